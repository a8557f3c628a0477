"""Broken Hugging Face folders by the thousand: a ValueError that names a file of the folder, and nothing left where it would have gone."""

import json
import random
import shutil

import pytest
import torch

from megarlhf.conversion.from_hf import from_hf
from megarlhf.conversion.hf_folder import CONFIG, INDEX, ONE_FILE, read_hf_folder
from megarlhf.conversion.tokenizer_files import load_travelling
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
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    write_tensors(folder / ONE_FILE, tensors, {"format": "pt"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": {"content": "<pad>"}}))
    sharded = tmp_path / "sharded"
    shutil.copytree(folder, sharded)
    (sharded / ONE_FILE).unlink()
    names, weight_map = list(tensors), {}
    for file, part in (("a.safetensors", names[:5]), ("b.safetensors", names[5:])):
        write_tensors(sharded / file, {name: tensors[name] for name in part}, {})
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
