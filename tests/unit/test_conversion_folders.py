"""Hugging Face folders that cannot be converted, broken ones by the thousand: a ValueError that names a file, and nothing left behind."""

import errno
import json
import random
import re
import shutil
from unittest import mock

import pytest
import torch

from megarlhf.conversion.command import main as convert
from megarlhf.conversion.from_hf import from_hf
from megarlhf.conversion.hf_folder import CONFIG, INDEX, ONE_FILE, read_hf_folder
from megarlhf.conversion.tokenizer_files import load_travelling
from megarlhf.storage import checkpoints, tensors
from megarlhf.storage.tensors import write_tensors
from tests.unit.test_conversion import OF_FAMILY

SMALL = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
CONFIGURED = {**OF_FAMILY["llama"], **SMALL, "intermediate_size": 8, "architectures": ["LlamaForCausalLM"]}
VALUES = [None, True, 0, -1, 3, 1.5, 10**30, float("nan"), "", "x", "../x", [], [1], [None], {}, {"x": 1}, "F32", "I64", [8], [0, 10**18]]


@pytest.fixture
def whole(tmp_path):
    """A sound folder: a small Llama in one file, its tokenizer, and the same in two files with an index."""
    folder = tmp_path / "whole"
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(CONFIGURED))
    layer = "model.layers.0"
    shapes = {
        **{name: (40, 8) for name in ("model.embed_tokens.weight", "lm_head.weight")},
        **{name: (8,) for name in (f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight", "model.norm.weight")},
        **{f"{layer}.self_attn.{x}_proj.weight": ({"q": 8, "o": 8}.get(x, 4), 8) for x in "qkvo"},
        **{f"{layer}.mlp.{x}_proj.weight": (8, 8) for x in ("gate", "up", "down")},
    }
    values = {name: torch.randn(shape) for name, shape in shapes.items()}
    write_tensors(folder / ONE_FILE, values, {"format": "pt"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": {"content": "<pad>"}}))
    sharded = tmp_path / "sharded"
    shutil.copytree(folder, sharded)
    (sharded / ONE_FILE).unlink()
    names, weight_map = list(values), {}
    for file, part in (("a.safetensors", names[:5]), ("b.safetensors", names[5:])):
        write_tensors(sharded / file, {name: values[name] for name in part}, {})
        weight_map |= dict.fromkeys(part, file)
    (sharded / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


def tokenizer():
    vocab = {"</s>": 0, "<pad>": 1, **{chr(97 + i): 2 + i for i in range(26)}, "ab": 28}
    special = [{"id": i, "content": c, "special": True, "normalized": False, "single_word": False} for i, c in enumerate(("</s>", "<pad>"))]
    added = [{**token, "lstrip": False, "rstrip": False} for token in special]
    return {"version": "1.0", "added_tokens": added, "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]]}}


def look(folder):
    """Read all of a folder; returns what is wrong in words, or None."""
    try:
        model = read_hf_folder(folder)
        for spec in model.specs():
            assert model.read(spec).shape == spec.shape
        load_travelling(folder, None)
    except ValueError as error:
        assert str(folder) in str(error), error
        return str(error)
    return None


def broken_bytes(content, dice):
    """`content` with something wrong: a flipped bit, a cut, a byte too many, or other bytes; near its beginning more often."""
    place = min(dice.randrange(len(content)), dice.randrange(len(content)))
    kind = dice.randrange(5)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + bytes([dice.randrange(256)]) + content[place:]
    if kind == 2:
        return content[:place] + content[place + 1 + dice.randrange(4) :]
    if kind == 3:
        return content[:place] + bytes(dice.randrange(256) for _ in range(4)) + content[place + 4 :]
    return content[:place] + bytes([content[place] ^ (1 << dice.randrange(8))]) + content[place + 1 :]


def broken_tree(tree, dice):
    """A JSON tree with one value replaced, one key gone, renamed or doubled under another name, somewhere in it."""
    places = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    tree = json.loads(json.dumps(tree))
    walk(tree)
    node, key = dice.choice(places)
    kind = dice.randrange(4)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[dice.choice(["x", "", key + "x", *map(str, node)])] = node.pop(key)
    else:
        node[key] = dice.choice(VALUES)
    return tree


def attempts(folder, name, whole_content, broken, count):
    """How many of `count` broken contents of a file are refused; each message names the folder."""
    refused = 0
    for _ in range(count):
        (folder / name).write_bytes(broken())
        refused += look(folder) is not None
    (folder / name).write_bytes(whole_content)
    assert look(folder) is None
    return refused


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("whole", CONFIG),
        ("whole", ONE_FILE),
        ("whole", "tokenizer.json"),
        ("whole", "tokenizer_config.json"),
        ("sharded", INDEX),
        ("sharded", "b.safetensors"),
    ],
)
def test_broken_files_give_clear_errors_only(kind, name, whole, tmp_path):
    folder, dice = tmp_path / kind, random.Random(7)
    content = (folder / name).read_bytes()
    assert attempts(folder, name, content, lambda: broken_bytes(content, dice), 400) > 40
    if name.endswith(".json"):
        tree = json.loads(content)
        assert attempts(folder, name, content, lambda: json.dumps(broken_tree(tree, dice)).encode(), 400) > 40
        return
    length = int.from_bytes(content[:8], "little")
    header, values = json.loads(content[8 : 8 + length]), content[8 + length :]

    def with_header():
        text = json.dumps(broken_tree(header, dice)).encode()
        return len(text).to_bytes(8, "little") + text + values

    assert attempts(folder, name, content, with_header, 400) > 300
    for cut in range(0, len(content), 97):
        (folder / name).write_bytes(content[:cut])
        assert look(folder) is not None


def test_nothing_is_left_of_a_refused_conversion(whole, tmp_path):
    dice = random.Random(8)
    sound = {path.name: path.read_bytes() for path in whole.iterdir()}
    for _ in range(60):
        name = dice.choice(sorted(sound))
        (whole / name).write_bytes(broken_bytes(sound[name], dice))
        try:
            from_hf(whole, tmp_path / "ours")
        except ValueError as error:
            assert str(whole) in str(error)
            assert sorted(path.name for path in tmp_path.iterdir()) == ["sharded", "whole"]
        else:
            shutil.rmtree(tmp_path / "ours")
        (whole / name).write_bytes(sound[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda at: (at / ONE_FILE).rename(at / "pytorch_model.bin"), "pytorch_model.bin is a pickle, which can run code .* not opened"),
        (lambda at: (at / ONE_FILE).rename(at / "m.gguf"), "whole holds neither model.safetensors nor .*; it holds: config.json, m.gguf"),
        (lambda at: (at / INDEX).write_text("{}"), "whole holds both model.safetensors and model.safetensors.index.json: remove the one"),
        (lambda at: (at / CONFIG).unlink(), "config.json cannot be read: No such file"),
        (lambda at: configured(at, model_type="mamba"), "config.json: model_type 'mamba' is not supported; there are: gpt2, gpt_neox,"),
        (
            lambda at: configured(at, architectures=["LlamaModel"]),
            r"architectures \['LlamaModel'\] is not supported, only",
        ),
        (
            lambda at: configured(at, architectures=["LlamaForSequenceClassification"]),
            "no file holds score.weight, which config",
        ),
        (lambda at: configured(at, rope_scaling={"type": "yarn"}), "config.json: llama: rotary scaling 'yarn' is not supported"),
        (lambda at: configured(at, num_hidden_layers=10**12), "config.json: it has 1000000000000 layers, and the files hold 12 tensors"),
        (lambda at: configured(at, score_bias="x"), "config.json: score_bias must be a number, got 'x'"),
    ],
)
def test_what_is_refused_is_named(change, message, whole, tmp_path):
    change(whole)
    with pytest.raises(ValueError, match=message):
        from_hf(whole, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def configured(folder, **changes):
    (folder / CONFIG).write_text(json.dumps({**CONFIGURED, **changes}))


@pytest.mark.parametrize("stopped", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full disk", "Ctrl-C"])
@pytest.mark.parametrize("outward", [False, True], ids=["in", "out"])
def test_a_conversion_that_stops_leaves_nothing(stopped, outward, whole, tmp_path, capsys):
    source, target = (tmp_path / "ours" if outward else whole), tmp_path / "made"
    if outward:
        from_hf(whole, source)
    made = tensors._made

    def fails_at_last(name, tensor):
        if "down_proj" in name or "linear_fc2" in name:
            assert (tmp_path / "made.partial").is_dir() and not target.exists()
            raise stopped
        return made(name, tensor)

    with mock.patch.object(tensors, "_made", fails_at_last):
        status = convert(["--from", str(source), "--to", str(target)])
    assert status == (1 if isinstance(stopped, OSError) else 130)
    assert not target.exists() and not (tmp_path / "made.partial").exists()
    assert ("No space left" in capsys.readouterr().err) == isinstance(stopped, OSError)
    assert convert(["--from", str(source), "--to", str(target)]) == 0


def test_what_is_there_stays(whole, tmp_path, capsys):
    for name in ("file", "full", "link"):
        target = tmp_path / name
        if name == "file":
            target.write_text("kept")
        elif name == "full":
            target.mkdir()
            (target / "kept").write_text("kept")
        else:
            target.symlink_to(tmp_path / "full")
        assert convert(["--from", str(whole), "--to", str(target)]) == 2
        assert f"{name} is there already" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "kept").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.partial").mkdir()
    assert convert(["--from", str(whole), "--to", str(tmp_path / "cut")]) == 2
    assert "cut.partial is there: a conversion to" in capsys.readouterr().err
    with mock.patch.object(shutil, "disk_usage", lambda path: mock.Mock(free=1000)):
        assert convert(["--from", str(whole), "--to", str(tmp_path / "new" / "deep")]) == 2
    assert re.search(r"deep needs \d+\.\d\d KiB, and its disk has 1000 bytes free", capsys.readouterr().err)
    assert convert(["--from", str(whole), "--to", str(tmp_path / "empty")]) == 0
    assert checkpoints.read_saved(tmp_path / "empty").state["stage"] == "convert"


def test_a_damaged_checkpoint_does_not_go_out(whole, tmp_path, capsys):
    from_hf(whole, tmp_path / "ours")
    part = tmp_path / "ours" / "part_00000.safetensors"
    content = part.read_bytes()
    part.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    assert convert(["--from", str(tmp_path / "ours"), "--to", str(tmp_path / "back")]) == 2
    assert "part_00000.safetensors is damaged: its content is not what was written" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_options_that_mean_nothing_are_refused(whole, tmp_path, capsys):
    from_hf(whole, tmp_path / "ours")
    ours, to = ["--from", str(tmp_path / "ours"), "--to", str(tmp_path / "x")], ["--from", str(whole), "--to", str(tmp_path / "x")]
    cases = [
        ([*to, "--dtype", "bf16", "--model", "policy"], "--model, --dtype: of use only from one of our checkpoints"),
        ([*ours, "--eos-token", "b", "--layers", "1"], "--eos-token, --layers: of use only from a Hugging Face folder"),
        ([*to, "--layers", "1"], "--layers must be from 1 to 0, as .*whole has 1 layers, got 1; without it all stay"),
        ([*ours, "--model", "policy"], "ours holds no model named 'policy'; it holds: model"),
        ([*ours, "--weights", "average"], "--weights average: .*ours holds no moving average of model"),
        ([*ours, "--family", "qwen2"], "no Hugging Face family .* .qwen2 cannot: qkv_bias would be True, and is False"),
        ([*ours, "--family", "t5"], "--family t5 is not supported; there are: gpt2"),
        ([*ours, "--shard-gb", "0"], "--shard-gb must be above 0"),
        (["--from", str(tmp_path / "none"), "--to", str(tmp_path / "x")], "there is no folder .*none"),
    ]
    for arguments, message in cases:
        assert convert(arguments) == 2
        err = capsys.readouterr().err
        assert re.search(message, err), (message, err)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("config", "generation", "doubtful"),
    [
        ({}, None, ""),
        ({"eos_token_id": 0}, None, ""),
        ({"eos_token_id": [0, 7]}, None, ""),
        ({"eos_token_id": 2}, None, "token 2"),
        ({"eos_token_id": [2, 7]}, None, "token 2, 7"),
        ({"eos_token_id": 2}, {"eos_token_id": [2, 0]}, ""),  # what transformers generates by
        ({"eos_token_id": 0}, {"eos_token_id": 5}, "token 5"),
        ({"eos_token_id": None}, {"temperature": 0.7}, ""),
    ],
)
def test_an_end_that_the_models_files_do_not_know_is_said(config, generation, doubtful, whole, tmp_path, capsys):
    configured(whole, **config)
    if generation is not None:
        (whole / "generation_config.json").write_text(json.dumps(generation))
    assert convert(["--from", str(whole), "--to", str(tmp_path / "ours")]) == 0
    said = capsys.readouterr().out
    assert (f"texts end with {doubtful}, and its tokenizer that they do with 0" in said) if doubtful else "is this meant" not in said


def test_a_token_before_each_text_is_said(whole, tmp_path, capsys):
    named = {"eos_token": "</s>", "bos_token": "</s>", "add_bos_token": True}
    (whole / "tokenizer_config.json").write_text(json.dumps(named))
    assert convert(["--from", str(whole), "--to", str(tmp_path / "ours")]) == 0
    assert "has transformers begin every text with </s>" in capsys.readouterr().out


def test_the_first_layers_make_a_smaller_model(whole, tmp_path, capsys):
    file = tensors.TensorFile(whole / ONE_FILE)
    values = {name: file.read(name).reshape(entry.shape) for name, entry in file.entries.items()}
    layer = {name: value for name, value in values.items() if ".layers.0." in name}
    values |= {name.replace(".0.", f".{i}."): torch.randn_like(value) for i in (1, 2) for name, value in layer.items()}
    write_tensors(whole / ONE_FILE, values, {"format": "pt"})
    configured(whole, num_hidden_layers=3)
    to = ["--to", str(tmp_path / "two")]
    assert convert(["--from", str(whole), *to, "--layers", "2"]) == 0
    assert "its first 2 of 3 layers" in capsys.readouterr().out
    assert convert(["--from", str(tmp_path / "two"), "--to", str(tmp_path / "back")]) == 0
    for folder in ("two", "back"):
        assert json.loads((tmp_path / folder / CONFIG).read_text())["num_hidden_layers"] == 2
    back = tensors.TensorFile(tmp_path / "back" / ONE_FILE)
    left = {name for name in values if ".layers.2." not in name and name != "lm_head.weight"} | (back.entries.keys() & {"lm_head.weight"})
    assert back.entries.keys() == left
    assert all(back.read(name).equal(file_value.reshape(back.read(name).shape)) for name, file_value in values.items() if name in left)
    for layers in ("0", "-1", "3", "4"):
        assert convert(["--from", str(whole), "--to", str(tmp_path / "x"), "--layers", layers]) == 2
        assert f"--layers must be from 1 to 2, as {whole} has 3 layers, got {layers}" in capsys.readouterr().err
    assert convert(["--from", str(whole), "--to", str(tmp_path / "x"), "--layers", "1", "--verify"]) == 2
    assert "--verify compares with the whole model" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
