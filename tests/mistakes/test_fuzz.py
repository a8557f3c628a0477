"""Thousands of broken files: each is read, or refused with a ValueError that names a file; nothing else ever happens.

A file is broken as disks, copies and editors break it: bits are turned, parts are lost, doubled, moved or overwritten; and, where it
is JSON, values are replaced, keys removed and renamed. What is broken follows from the seed.
"""

import argparse
import gzip
import json
import random

import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import save_file

from megarlhf.config import load_stage_config
from megarlhf.config.loader import doubts
from megarlhf.config.paths import path_problems
from megarlhf.conversion.from_hf import from_hf
from megarlhf.conversion.from_megatron import read_megatron_folder
from megarlhf.conversion.hf_folder import read_hf_folder
from megarlhf.conversion.tokenizer_files import load_travelling
from megarlhf.data.answers import read_answers, read_labels
from megarlhf.data.chat import Chat
from megarlhf.data.corpus import Corpus
from megarlhf.data.fields import Message
from megarlhf.data.records import read_demonstrations, read_prompts, read_rankings
from megarlhf.data.tasks import read_task
from megarlhf.data.tokenizer_training import train_sentencepiece
from megarlhf.models.parameters import parameter_specs
from megarlhf.preparation.corpora import write_corpus
from megarlhf.runs.checkpoints import find_source
from megarlhf.storage.checkpoints import CheckpointReader
from megarlhf.storage.pieces import Piece
from megarlhf.storage.tensors import TensorFile
from tests.distributed.families import make, make_tokenizer
from tests.distributed.recipe import configurations

JUNK = [None, True, -1, 0, 1e308, 2**63, 2**200, "", "\0", "../../etc", "\ud800", [], {}, [[]], {"": None}, "x" * 300, -0.5]
"""What a value of JSON may be replaced with."""
CHAT = (Message("user", "what is <|im_end|> it?"), Message("assistant", "that"), Message("user", "so"))


# Breaking


def broken_bytes(content, rng):
    """The bytes with one to three things done to them."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        size = len(content)
        a, b = sorted((rng.randrange(size + 1), min(size, rng.randrange(size + 1))))
        b = min(b, a + rng.choice((1, 4, 64, size)))
        how = rng.choice(("turn", "turn", "turn", "cut", "lose", "double", "overwrite", "number", "move"))
        if how == "turn" and size:
            content[rng.randrange(size)] ^= 1 << rng.randrange(8)
        elif how == "cut":
            del content[a:]
        elif how == "lose":
            del content[a:b]
        elif how == "double":
            content[a:a] = content[a:b]
        elif how == "overwrite":
            content[a:b] = rng.randbytes(b - a)
        elif how == "number":
            content[a : a + 8] = rng.choice((0, 1, 2**31, 2**63 - 1, 2**64 - 1, 255)).to_bytes(8, "little")
        elif how == "move":
            part = bytes(content[a:b])
            del content[a:b]
            at = rng.randrange(len(content) + 1)
            content[at:at] = part
    return bytes(content)


def broken_json(tree, rng):
    """The value with one place of it changed."""
    tree = json.loads(json.dumps(tree))
    places = []

    def walk(value):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    walk(tree)
    for _ in range(rng.choice((1, 1, 2))):
        value, key = rng.choice(places)
        how = rng.choice(("junk", "junk", "junk", "gone", "renamed", "other"))
        try:
            if how == "junk":
                value[key] = rng.choice(JUNK)
            elif how == "gone":
                del value[key]
            elif how == "renamed" and isinstance(value, dict):
                value[f"{key}x"] = value.pop(key)
            else:
                value[key] = (lambda where: where[0][where[1]])(rng.choice(places))
        except (KeyError, IndexError):
            continue  # an earlier change has taken it away
    try:
        return json.dumps(tree).encode()
    except (ValueError, RecursionError):  # a value in itself
        return b"{}"


def broken(path, content, rng):
    """A broken version of a file's content."""
    if path.name.endswith((".json", ".jsonl", ".yaml")) and rng.random() < 0.6:
        if path.suffix == ".jsonl":
            lines = content.splitlines()
            lines[rng.randrange(len(lines))] = broken_json(json.loads(rng.choice(lines)), rng)
            return b"\n".join(lines)
        return broken_json(yaml.safe_load(content), rng)
    return broken_bytes(content, rng)


# What is read, and how


def jsonl(folder):
    demonstrations = [{"prompt": f"p{i}", "response": "r", "id": i} for i in range(3)]
    chats = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    rankings = [{"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 2, 2]}, {"prompt": "p", "chosen": "a", "rejected": "b"}]
    hh = [{"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}]
    task = [{"context": f"c{i}", "choices": ["a", "b"], "answer": 1} for i in range(3)]
    files = {"demonstrations": [*demonstrations, *chats], "prompts": demonstrations, "rankings": [*rankings, *hh], "task": task}
    files["labels"] = [{"id": "x", "preference": "a"}, {"prompt": "p", "preference": "tie"}]
    for name, records in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def read_jsonl(folder):
    read_demonstrations(folder / "demonstrations.jsonl")
    read_prompts(folder / "prompts.jsonl")
    read_rankings(folder / "rankings.jsonl")
    read_task(folder / "task.jsonl")
    read_answers(folder / "prompts.jsonl")
    read_labels(folder / "labels.jsonl")


def packed_records(folder):
    records = [{"prompt": f"p{i}", "response": "r", "more": {"score": 1.5}} for i in range(20)]
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), folder / "b.parquet")


def read_packed(folder):
    read_demonstrations(folder / "a.jsonl.gz")
    read_demonstrations(folder / "b.parquet")


def tensors(folder):
    save_file({"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}, folder / "t.safetensors")


def read_tensors(folder):
    file = TensorFile(folder / "t.safetensors")
    for name in file.entries:
        file.read(name)


def corpus(folder):
    write_corpus(folder / "c", [[5, 6, 8], [9] * 20, [4]] * 4, eos_id=7, vocab_size=500)


def read_corpus(folder):
    rows = Corpus(folder / "c", seq_len=8, eos_id=7, vocab_size=500)
    for number in range(rows.num_rows):
        rows.row(number)


def configuration(folder):
    for name, tree in configurations(folder).items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))


def read_configuration(folder):
    for path in sorted(folder.glob("*.yaml")):
        config = load_stage_config(path)
        doubts(config)
        path_problems(config)


def sentencepiece(folder):
    train_sentencepiece([f"{i} is {i * i}, and {i + 1} is not." for i in range(2000)], folder / "s", vocab_size=300)
    (folder / "s.vocab").unlink(missing_ok=True)


def huggingface(folder):
    make_tokenizer(folder, vocab_size=100)
    for path in folder.iterdir():
        if path.name not in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
            path.unlink()


def gpt2(folder):
    letters = [*map(chr, range(33, 127)), "\u0120", "ab", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")


def read_tokenizer(folder):
    tokenizer = load_travelling(folder, None)
    tokenizer.decode(tokenizer.encode("it is 12 <|im_end|>\n caf\u00e9"))
    if (folder / "chat_template.jinja").is_file():
        chat = Chat(tokenizer)
        chat.prompt_ids(f"{folder}/chats.jsonl:1", CHAT)
        chat.conversation_ids(f"{folder}/chats.jsonl:1", CHAT[:2])


def hf_model(folder):
    make("llama3", folder)


def read_hf_model(folder):
    model = read_hf_folder(folder)
    for spec in model.specs():
        model.read(spec)


def checkpoint(folder):
    make("smollm2", folder / "hf")
    from_hf(folder / "hf", folder / "ours")
    for path in (folder / "hf").iterdir():
        path.unlink()
    (folder / "hf").rmdir()
    (folder / "ours" / "config.json").unlink()


def read_checkpoint(folder):
    saved = find_source(str(folder / "ours"))
    assert saved.damages() or CheckpointReader(saved).parameters("model")
    if not saved.damages():
        name = "decoder.final_layernorm.weight"
        CheckpointReader(saved).fill(torch.empty(32), "model", "weights", name, Piece.whole((32,)))


def megatron(folder):
    attention = {"self_attention.linear_qkv": (24, 8), "self_attention.linear_proj": (8, 8)}
    shapes = {**attention, "mlp.linear_fc1": (32, 8), "mlp.linear_fc2": (8, 32)}
    norms = {f"{name}.layer_norm": (8,) for name in ("self_attention.linear_qkv", "mlp.linear_fc1")}
    state = {"embedding.word_embeddings.weight": torch.randn(40, 8), "embedding.position_embeddings.weight": torch.randn(16, 8)}
    for name, shape in shapes.items():
        state |= {f"decoder.layers.{name}.weight": torch.randn(2, *shape), f"decoder.layers.{name}.bias": torch.randn(2, shape[0])}
    for name, shape in norms.items():
        state |= {f"decoder.layers.{name}_{kind}": torch.randn(2, *shape) for kind in ("weight", "bias")}
    state |= {f"decoder.final_layernorm.{kind}": torch.randn(8) for kind in ("weight", "bias")}
    dcp.save(state, checkpoint_id=str(folder), no_dist=True)
    sizes = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "max_position_embeddings": 16}
    torch.save({"args": argparse.Namespace(**sizes), "iteration": 7}, folder / "common.pt")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')


def read_megatron(folder):
    model = read_megatron_folder(folder)
    for spec in parameter_specs(model.architecture, model.head):
        model.read(spec)


KINDS = {
    # name -> (how files are made, how they are read, how many are broken)
    "records": (jsonl, read_jsonl, 1500),
    "packed records": (packed_records, read_packed, 600),
    "tensors": (tensors, read_tensors, 1000),
    "corpus": (corpus, read_corpus, 1000),
    "configuration": (configuration, read_configuration, 150),
    "sentencepiece": (sentencepiece, read_tokenizer, 300),
    "tokenizer": (huggingface, read_tokenizer, 400),
    "gpt2 tokenizer": (gpt2, read_tokenizer, 300),
    "hugging face model": (hf_model, read_hf_model, 400),
    "checkpoint": (checkpoint, read_checkpoint, 300),
    "megatron checkpoint": (megatron, read_megatron, 500),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_file_is_read_or_refused_by_its_name(kind, tmp_path):
    make_files, read, count = KINDS[kind]
    make_files(tmp_path)
    read(tmp_path)
    files = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    rng = random.Random(kind)
    refused = 0
    for number in range(count):
        path = rng.choice(list(files))
        path.write_bytes(broken(path, files[path], rng))
        try:
            read(tmp_path)
        except ValueError as error:
            assert str(tmp_path) in str(error), f"{kind} {number}: {error!r} names no file"
            refused += 1
        except BaseException as error:
            pytest.fail(f"{kind} {number}: {error!r} from {path}, which is left as it is")
        path.write_bytes(files[path])
    assert refused > count / 5
    read(tmp_path)


def test_there_are_thousands():
    assert sum(count for *_, count in KINDS.values()) > 5000
