"""Tokenizers of all three kinds give text back as it was; what is no tokenizer is refused."""

import json
from pydoc_data.topics import topics

import pytest
import sentencepiece
import tokenizers

from megarlhf.data.tokenizers import load_tokenizer, train_sentencepiece

TEXTS = [text for _, text in sorted(topics.items())][:40]
HARD = [
    "a",
    " lead",
    "trail  ",
    "\n",
    "a\n\n  b\tc\r\n",
    "\u00e9\u6f22\u5b57\U0001f600",
    "def f():\n    return  1",
    "<|endoftext|></s><pad><s> <0x0A>",
    "x\x00y",
]


def byte_level(vocab_size, special_tokens):
    model = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator(TEXTS, vocab_size=vocab_size, special_tokens=special_tokens, show_progress=False)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder per kind."""
    root = tmp_path_factory.mktemp("tokenizers")
    for kind in ("sentencepiece", "huggingface", "gpt2"):
        (root / kind).mkdir()
    train_sentencepiece(TEXTS, root / "sentencepiece" / "tokenizer", vocab_size=500)
    limited = byte_level(400, ["<|endoftext|>", "<pad>"])
    limited.enable_truncation(4)  # as some files have; a text must not be cut
    limited.enable_padding(length=50)
    limited.save(str(root / "huggingface" / "tokenizer.json"))
    byte_level(400, ["<|endoftext|>"]).save_model(str(root / "gpt2"))
    return root


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface", "gpt2"])
def test_text_comes_back_as_it_was(folders, kind):
    tokenizer = load_tokenizer(folders / kind)
    assert tokenizer.eos_id != tokenizer.pad_id and {tokenizer.eos_id, tokenizer.pad_id} <= set(range(tokenizer.vocab_size))
    for text in [*HARD, *TEXTS, "".join(HARD)]:
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.eos_id for i in ids)
        assert tokenizer.decode(ids) == tokenizer.decode([*ids, tokenizer.eos_id]) == text
    # Joined where a prompt ends and its response begins, the text is the two texts joined.
    assert tokenizer.decode([*tokenizer.encode("Ask"), *tokenizer.encode("answer")]) == "Askanswer"
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_a_pad_piece_is_dropped_and_an_ordinary_token_in_its_place_is_not(folders):
    for kind in ("sentencepiece", "huggingface"):
        tokenizer = load_tokenizer(folders / kind)
        assert tokenizer.decode([tokenizer.pad_id, *tokenizer.encode("a"), tokenizer.pad_id]) == "a"
    tokenizer = load_tokenizer(folders / "gpt2")
    assert tokenizer.decode([tokenizer.pad_id]) == "!"  # GPT-2 has no pad piece


def test_the_paths_of_files_work_as_their_folders_do(folders, tmp_path):
    for kind, name in (("sentencepiece", "tokenizer.model"), ("huggingface", "tokenizer.json"), ("gpt2", "vocab.json")):
        assert load_tokenizer(folders / kind / name).encode("Some text") == load_tokenizer(folders / kind).encode("Some text")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / f"gpt2-{name}").write_bytes((folders / "gpt2" / name).read_bytes())
    assert load_tokenizer(tmp_path / "gpt2-vocab.json").encode("Some text") == load_tokenizer(folders / "gpt2").encode("Some text")


def test_gpt2_ids_are_those_of_the_library_that_made_the_files(folders):
    ours = load_tokenizer(folders / "gpt2")
    theirs = tokenizers.ByteLevelBPETokenizer(str(folders / "gpt2" / "vocab.json"), str(folders / "gpt2" / "merges.txt"))
    assert all(ours.encode(text) == theirs.encode(text).ids for text in [*HARD, *TEXTS])


def test_training_is_deterministic_and_keeps_each_newline_a_token(folders, tmp_path):
    path = train_sentencepiece(iter(TEXTS), tmp_path / "deep" / "again", vocab_size=500)
    assert path.read_bytes() == (folders / "sentencepiece" / "tokenizer.model").read_bytes()
    tokenizer = load_tokenizer(path)
    [newline] = tokenizer.encode("\n")
    assert all(tokenizer.encode(text).count(newline) == text.count("\n") for text in TEXTS)
    with pytest.raises(ValueError, match="vocab_size 20"):
        train_sentencepiece(TEXTS, tmp_path / "small", vocab_size=20)


def test_eos_is_found_configured_or_named(tmp_path):
    model = byte_level(300, ["<stop>", "</s>"])
    path = tmp_path / "tokenizer.json"
    model.save(str(path))
    assert load_tokenizer(path).eos_id == 1
    assert load_tokenizer(path, eos_token="<stop>").eos_id == 0 and load_tokenizer(path, eos_token="<stop>").pad_id == 1
    for eos in ("<stop>", {"content": "<stop>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        assert load_tokenizer(tmp_path).eos_id == 0
    with pytest.raises(ValueError, match="no token '<end>'.*eos_token="):
        load_tokenizer(path, eos_token="<end>")
    byte_level(300, ["<stop>"]).save(str(tmp_path / "none.json"))
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="none.json does not say.*eos_token="):
        load_tokenizer(tmp_path / "none.json")


def test_sentencepiece_models_without_eos_or_pad(tmp_path):
    prefix = str(tmp_path / "m")
    kwargs = {"model_prefix": prefix, "vocab_size": 200, "user_defined_symbols": ["<stop>"], "minloglevel": 2, "model_type": "bpe"}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), eos_id=-1, **kwargs)
    with pytest.raises(ValueError, match="eos_token="):
        load_tokenizer(prefix + ".model")
    tokenizer = load_tokenizer(prefix + ".model", eos_token="<stop>")
    assert (tokenizer.decode([tokenizer.eos_id]), tokenizer.pad_id) == ("", 0)


def test_what_is_no_tokenizer_is_refused(folders, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "broken.model").write_bytes(b"no model")
    (tmp_path / "vocab.json").write_bytes((folders / "gpt2" / "vocab.json").read_bytes())
    for name, message in (
        ("a.txt", "is not a tokenizer"),
        ("none", "there is no tokenizer at"),
        ("broken.json", "broken.json cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path / name)
    with pytest.raises(ValueError, match="broken.model cannot be read"):
        load_tokenizer(tmp_path / "broken.model")
    with pytest.raises(ValueError, match="needs merges.txt beside it"):
        load_tokenizer(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="0 .model files"):
        load_tokenizer(tmp_path / "empty")
