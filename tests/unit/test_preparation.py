"""The commands that make what a run begins with: tokenizers here, and configurations."""

import json
import re
from pydoc_data.topics import topics

import pytest

from megarlhf import cli
from megarlhf.config import COMMANDS, load_stage_config
from megarlhf.config.documentation import keys_of
from megarlhf.config.template import COMMON, FILLED, template
from megarlhf.data.tokenizers import load_tokenizer

TEXTS = [topics[name] for name in sorted(topics)][:12]


# Tokenizers


@pytest.fixture
def files(tmp_path):
    """Two files of text: records with two fields or one, and a text."""
    records = [{"prompt": text[:80], "response": text[80:]} for text in TEXTS[:-1]] + [{"text": "one more"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "b.txt").write_text(TEXTS[-1])
    return ["--input", str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt"), "--json-key", "text", "prompt", "response"]


@pytest.mark.parametrize(("kind", "size"), [("sentencepiece", 500), ("bpe", 700)])
def test_a_tokenizer_is_what_tokenizer_path_takes_and_its_report_counts(files, tmp_path, capsys, kind, size):
    folder = tmp_path / "made" / kind
    assert cli.main(["tokenizer", *files, "--to", str(folder), "--vocab-size", str(size), "--kind", kind]) == 0
    said = capsys.readouterr().out
    tokenizer, texts = load_tokenizer(folder), [*TEXTS[:-1], "one more", TEXTS[-1]]
    ids = [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(row) for row in ids] == texts and tokenizer.vocab_size == size
    assert {tokenizer.eos_id, tokenizer.pad_id}.isdisjoint(i for row in ids for i in row) and tokenizer.eos_id != tokenizer.pad_id
    num_tokens, num_words = sum(map(len, ids)), sum(len(re.findall(r"\S+", text)) for text in texts)
    bytes_in_each = sum(len(text.encode()) for text in texts) / num_tokens
    assert f"{size} tokens; tokenizer.path takes {folder}" in said and "kept 13 of 13 records" in said
    assert f"13 texts, {num_tokens} tokens: {num_tokens / num_words:.2f} for each word, {bytes_in_each:.2f} bytes in each" in said
    assert f"median {sorted(map(len, ids))[6]}" in said and f"longest {max(map(len, ids))}" in said
    assert said.endswith("every text comes back as it was\n")
    assert tokenizer.encode("<|endoftext|></s>") != [tokenizer.eos_id]


def test_what_a_tokenizer_loses_is_said_of_text_that_it_was_not_trained_on(files, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("a\u2581b")  # sentencepiece's own sign for a space
    words = ["tokenizer", *files, "--held-out", str(tmp_path / "other.txt"), "--to", str(tmp_path / "t"), "--vocab-size", "400"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "1 texts," in said and "the tokenizer loses text: 1 of 1 texts do not come back" in said
    for more, sentence in {
        (): f"{tmp_path}/t/tokenizer.model exists; choose another --to",
        ("--to", str(tmp_path / "u"), "--vocab-size", "20"): "cannot train a tokenizer with vocab_size 20",
        ("--to", str(tmp_path / "u"), "--vocab-size", "20", "--kind", "bpe"): "the 256 bytes, EOS and padding need 258",
        ("--to", str(tmp_path / "u"), "--json-key", "body"): 'a.jsonl:1: missing field: no "body"',
        ("--to", str(tmp_path / "u"), "--held-out", "none.txt"): "none.txt: missing file",
    }.items():
        assert cli.main([*words, *more]) == 2
        assert f"megarlhf tokenizer: {sentence}".removesuffix(sentence) in (err := capsys.readouterr().err) and sentence in err


# Configurations


def filled(text):
    """A template with a value at every key that asks for one."""

    def value(match):
        kind = match[2]
        return f"{match[1]} {kind if kind.startswith(chr(34)) else 1 if kind in ('int', 'float') else 'x'}"

    return re.sub(r'^( *\w+:) +# fill in: ("?[\w.-]+"?).*', value, text, flags=re.M)


def uncommented(text):
    """A template with every key that it shows a default of, but for those of sections that are absent by default."""
    lines, absent = [], None
    for line in text.splitlines():
        depth = len(line) - len(line.lstrip())
        absent = None if absent is not None and line and depth <= absent else absent
        absent = depth if absent is None and line.endswith("# absent by default") else absent
        lines.append(line if absent is not None else re.sub(r"^( *)#(?=\w)", r"\1", line))
    return "\n".join(lines)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("every", [False, True], ids=["common", "all"])
def test_what_init_writes_loads_once_it_is_filled_in(tmp_path, capsys, command, every):
    file = tmp_path / "made here" / "run.yaml"
    assert cli.main(["init", command, "--to", str(file), *(["--all"] if every else [])]) == 0
    text = file.read_text()
    assert f"--config '{file}'" in capsys.readouterr().out and text == template(command, every=every)
    (tmp_path / "filled.yaml").write_text(filled(text))
    config = load_stage_config(tmp_path / "filled.yaml", command=command)
    with pytest.raises(ValueError, match="run.dir: expected str, got null"):
        load_stage_config(file)
    assert cli.main(["init", command, "--to", str(file)]) == 2
    assert "exists; choose another --to" in capsys.readouterr().err and file.read_text() == text
    (tmp_path / "filled.yaml").write_text(filled(uncommented(text)))
    assert load_stage_config(tmp_path / "filled.yaml") == config  # what stands behind "#" is each key's default
    shown = [line.strip().lstrip("#").split(":")[0] for line in text.splitlines() if re.match(r" *#?\w+:", line)]
    keys = [key.rpartition(".")[2] for key, *_ in keys_of(COMMANDS[command]) if "[]" not in key]
    assert shown == keys if every else len(shown) < len(keys) / 1.4


def test_init_writes_to_stdout_and_knows_its_commands(capsys):
    assert cli.main(["init", "sft"]) == 0
    assert capsys.readouterr().out == template("sft", every=False)
    with pytest.raises(SystemExit) as end:
        cli.main(["init", "train"])
    assert end.value.code == 2 and "train" in capsys.readouterr().err


def test_the_template_names_keys_that_there_are():
    keys = {key for cls in COMMANDS.values() for key, *_ in keys_of(cls)}
    assert set(COMMON) <= {key.rpartition(".")[2] for key in keys} | keys
    for command, filled_in in FILLED.items():
        assert set(filled_in) <= {key for key, *_ in keys_of(COMMANDS[command])}
