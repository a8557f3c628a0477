"""Tokenizers of all three kinds give text back as it was; what is no tokenizer is refused."""

import json
import shutil
from pydoc_data.topics import topics

import pytest
import sentencepiece
import tokenizers

from megarlhf.data.tokenizer_training import train_sentencepiece
from megarlhf.data.tokenizers import UnwritableText, load_tokenizer

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
        assert tokenizer.decode([tokenizer.vocab_size, *ids, tokenizer.vocab_size + 70]) == text  # a padded model may sample them
    # Joined where a prompt ends and its response begins, the text is the two texts joined.
    assert tokenizer.decode([*tokenizer.encode("Ask"), *tokenizer.encode("answer")]) == "Askanswer"
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_padding_is_no_text(folders):
    for kind in ("sentencepiece", "huggingface", "gpt2"):
        tokenizer = load_tokenizer(folders / kind)
        assert tokenizer.decode([tokenizer.pad_id, *tokenizer.encode("a"), tokenizer.pad_id]) == "a"
    tokenizer = load_tokenizer(folders / "gpt2")  # it has no pad piece: the byte FF, which UTF-8 does not have, stands in
    assert json.loads((folders / "gpt2" / "vocab.json").read_text())["\u00ff"] == tokenizer.pad_id


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
    with pytest.raises(ValueError, match="no token '<end>', which eos_token names.*eos_token="):
        load_tokenizer(path, eos_token="<end>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    with pytest.raises(ValueError, match="no token '<end>', which eos_token in .*tokenizer_config.json names"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path, eos_token="</s>").eos_id == 1
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
    assert (tokenizer.decode([tokenizer.eos_id]), tokenizer.pad_id) == ("", 1)  # the control piece <s>


SYMBOLS = ["<|im_end|>", "<|user|>", "stop", " and", "the"]
"""What a file may call its end of text: made-up symbols, and words that a text is full of."""


def sentencepiece_model(folder, symbol, **kwargs):
    prefix = str(folder / "m")
    kwargs = {"user_defined_symbols": [symbol], "byte_fallback": True, "normalization_rule_name": "identity", **kwargs}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=prefix, vocab_size=500, minloglevel=2, **kwargs
    )
    return prefix + ".model"


def added_token(model, folder, symbol, **kwargs):
    model.add_tokens([tokenizers.AddedToken(symbol, **{"special": False, **kwargs})])
    model.save(str(folder / "tokenizer.json"))
    return folder


def byte_level_with(folder, symbol, **kwargs):
    return added_token(byte_level(400, []), folder, symbol, **kwargs)


def unigram_with(folder, symbol):
    """A model that finds the symbol in its own vocabulary, as those of T5 do."""
    letters = sorted(set("".join(TEXTS)) - {" "} | set("".join(SYMBOLS)) - {" "})
    vocab = [("<unk>", 0.0), (symbol.replace(" ", "\u2581"), 0.0), ("\u2581", -2.0), *((letter, -3.0) for letter in letters)]
    model = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, unk_id=0))
    model.pre_tokenizer, model.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    model.save(str(folder / "tokenizer.json"))
    return folder


def gpt2_with(folder, symbol):
    """A word of the vocabulary, with the merges that make it."""
    byte_level(600, ["<|endoftext|>", "<|im_end|>", "<|user|>"]).save_model(str(folder))
    return folder


KINDS = {
    "sentencepiece bpe": lambda folder, symbol: sentencepiece_model(folder, symbol, model_type="bpe"),
    "sentencepiece unigram": lambda folder, symbol: sentencepiece_model(folder, symbol, model_type="unigram"),
    "sentencepiece control": lambda folder, symbol: sentencepiece_model(folder, symbol, user_defined_symbols=[], control_symbols=[symbol]),
    "added": byte_level_with,
    "added normalized": lambda folder, symbol: byte_level_with(folder, symbol, normalized=True),
    "added single word": lambda folder, symbol: byte_level_with(folder, symbol, single_word=True),
    "added lstrip rstrip": lambda folder, symbol: byte_level_with(folder, symbol, lstrip=True, rstrip=True),
    "added special": lambda folder, symbol: byte_level_with(folder, symbol, special=True),
    "unigram vocabulary": unigram_with,
    "gpt2 vocabulary": gpt2_with,
}


def name_in(kind, symbol):
    """How a kind's vocabulary writes a word with a space before it."""
    if kind == "unigram vocabulary":
        return symbol.replace(" ", "\u2581")
    return symbol.replace(" ", "\u0120") if kind == "gpt2 vocabulary" else symbol


@pytest.mark.parametrize("symbol", SYMBOLS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_text_yields_the_end_of_a_text_or_padding(tmp_path, kind, symbol):
    path = KINDS[kind](tmp_path, symbol)
    name = name_in(kind, symbol)
    if kind == "gpt2 vocabulary" and name not in json.loads((tmp_path / "vocab.json").read_text()):
        pytest.skip(f"a small vocabulary without {name}")
    tokenizer = load_tokenizer(path, eos_token=name)
    around = [symbol, f"a{symbol}b", f"a {symbol} b", f"{symbol}{symbol}\n{symbol}", symbol[:-1] + symbol]
    for text in [*around, "</s><pad><s> stop the and", *TEXTS]:
        ids = tokenizer.encode(text)
        assert {tokenizer.eos_id, tokenizer.pad_id}.isdisjoint(ids)
        assert tokenizer.decode(ids).split() == text.split()  # some kinds make runs of whitespace one space
    assert tokenizer.decode([*tokenizer.encode("a b"), tokenizer.eos_id]).strip() == "a b"


def test_a_text_that_a_model_can_only_write_with_its_end_is_refused(tmp_path):
    letters = {"<unk>": 0, "a": 1, "b": 2}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="<unk>"))
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path, eos_token="<unk>")
    with pytest.raises(UnwritableText, match="control token 0"):
        tokenizer.encode("c")
    assert load_tokenizer(tmp_path, eos_token="b").encode("b") == [0]


@pytest.mark.parametrize("how", ["file", "with an end", "only an end", "configuration", "sentencepiece"])
def test_what_transformers_begins_a_text_with_is_known_and_never_written(folders, tmp_path, how):
    """As Llama's and OPT's tokenizers do: models that were trained with it answer otherwise without."""
    if how == "sentencepiece":
        file = next((folders / "sentencepiece").glob("*.model"))
        shutil.copy(file, tmp_path)
        bos = "<s>"
    else:
        model, bos = byte_level(300, ["<start>", "</s>"]), "<start>"
        if written := {"file": "<start> $A", "with an end": "<start> $A </s>", "only an end": "$A </s>"}.get(how):
            specials = [(name, model.token_to_id(name)) for name in ("<start>", "</s>") if name in written]
            model.post_processor = tokenizers.processors.TemplateProcessing(single=written, special_tokens=specials)
        model.save(str(tmp_path / "tokenizer.json"))
    said = {}
    for add in (None, False, True):
        config = {"bos_token": bos, "eos_token": "</s>"} | ({"add_bos_token": add} if add is not None else {})
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        said[add] = load_tokenizer(tmp_path).opening
        assert load_tokenizer(tmp_path).encode("a")[0] != load_tokenizer(tmp_path).controls[bos]
    in_file = bos if how in ("file", "with an end") else None
    assert said == {True: bos, False: in_file, None: in_file}


def test_one_text_has_one_encoding(folders, tmp_path):
    path = shutil.copytree(folders / "huggingface", tmp_path / "dropout") / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["model"]["dropout"] = 0.5
    path.write_text(json.dumps(tree))
    assert all(load_tokenizer(path).encode(text) == load_tokenizer(folders / "huggingface").encode(text) for text in TEXTS[:5])


def test_a_damaged_or_odd_configuration_beside_the_tokenizer_is_named(tmp_path):
    byte_level(300, ["<stop>", "</s>"]).save(str(tmp_path / "tokenizer.json"))
    config = tmp_path / "tokenizer_config.json"
    config.write_bytes(b'\xef\xbb\xbf{"eos_token": "<stop>"}')
    assert load_tokenizer(tmp_path).eos_id == 0
    for content, message in ((b"[]", "holds list, not dict"), (b'{"eos', "not whole JSON"), (b"", "not whole JSON"), (b"\xff", "whole")):
        config.write_bytes(content)
        with pytest.raises(ValueError, match=f"tokenizer_config.json.*{message}"):
            load_tokenizer(tmp_path)
    config.write_bytes(b'{"eos_token": 5, "pad_token": null}')
    with pytest.raises(ValueError, match="no token 5"):
        load_tokenizer(tmp_path)


def test_a_configuration_speaks_for_sentencepiece_too(folders, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((folders / "sentencepiece" / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    assert load_tokenizer(tmp_path).eos_id == 1
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    with pytest.raises(ValueError, match="no token '<|im_end|>'"):
        load_tokenizer(tmp_path)


def test_a_fingerprint_is_of_the_content(folders, tmp_path):
    def copy(kind):
        return shutil.copytree(folders / kind, tmp_path / f"{kind}{len(list(tmp_path.iterdir()))}")

    prints = {kind: load_tokenizer(folders / kind).fingerprint for kind in ("sentencepiece", "huggingface", "gpt2")}
    assert len(set(prints.values())) == 3
    assert all(load_tokenizer(copy(kind)).fingerprint == fingerprint for kind, fingerprint in prints.items())
    merges = copy("gpt2") / "merges.txt"
    merges.write_text("\n".join(merges.read_text().splitlines()[:-1]))  # the vocabulary is as large as before
    assert load_tokenizer(merges.parent).fingerprint != prints["gpt2"]
    assert load_tokenizer(folders / "huggingface", eos_token="<pad>").fingerprint != prints["huggingface"]
    other = train_sentencepiece(TEXTS[:20], tmp_path / "other", vocab_size=500)
    assert load_tokenizer(other).fingerprint != prints["sentencepiece"]


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
