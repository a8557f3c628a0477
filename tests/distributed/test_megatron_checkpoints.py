"""Checkpoints of Megatron-LM come in: the original's log-probabilities, and nothing in them is run."""

import argparse
import io
import json
import os
import pickle
import shutil
import zipfile

import pytest
import torch

from megarlhf.conversion.command import main as convert
from megarlhf.conversion.from_megatron import from_megatron, read_megatron_folder
from megarlhf.conversion.incoming import MODEL
from megarlhf.conversion.to_hf import Exported
from megarlhf.conversion.torch_dist import COMMON, METADATA, checkpoint_folder
from megarlhf.conversion.verification import _ours
from megarlhf.storage.checkpoints import read_saved
from tests.distributed.families import make_tokenizer
from tests.distributed.megatron_checkpoints import ARGUMENTS, MODELS, save_models, tokens

TOLERANCE = 2e-5
"""Of a log-probability; the largest that was seen is 1.4e-6."""


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def saved(request, tmp_path_factory, ranks2):
    """(folder of all models as Megatron saves them at this tp, name -> log-probabilities)."""
    folder = tmp_path_factory.mktemp("megatron")
    return folder, ranks2.run(save_models, folder, request.param)[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_megatron_checkpoint_comes_in(saved, name, tmp_path, capsys):
    folder, expected = saved
    assert convert(["--from", str(folder / name), "--to", str(tmp_path / "ours")]) == 0
    assert "language model of" in capsys.readouterr().out
    found = _ours(tokens(), Exported(read_saved(tmp_path / "ours"), MODEL))
    assert float((found - expected[name]).abs().max()) < TOLERANCE


@pytest.fixture
def llama(saved, tmp_path):
    """A copy of one checkpoint, to be damaged; with common.pt also where megatron-core has put what is in it among the tensors."""
    folder = shutil.copytree(saved[0] / "llama2" / "iter_0000007", tmp_path / "llama")
    if not (folder / COMMON).exists():
        torch.save({"args": argparse.Namespace(**{**ARGUMENTS, **MODELS["llama2"][0]})}, folder / COMMON)
    return folder


def test_the_tokenizer_is_given(llama, tmp_path, capsys):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    make_tokenizer(tokenizer, vocab_size=100)
    words = ["--from", str(llama), "--to", str(tmp_path / "ours"), "--tokenizer", str(tokenizer), "--shard-gb", "0.00001"]
    assert convert(words) == 0
    assert "ids that the tokenizer has no text for; they stay" in capsys.readouterr().out
    made = read_saved(tmp_path / "ours")
    assert (tmp_path / "ours" / "tokenizer.json").is_file() and made.state["fingerprints"]["tokenizer"] and len(made.files) > 3
    assert convert([*words[:4], "--model", "policy"]) == 2
    assert "--model: of no use from a Megatron-LM checkpoint" in capsys.readouterr().err


class Attack:
    """What runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def attack(mark):
    made = Attack()
    made.mark = mark
    return made


def test_nothing_in_a_pickle_is_run(llama, tmp_path):
    mark = tmp_path / "ran"
    whole = (llama / METADATA).read_bytes()
    pickle.loads(pickle.dumps(attack(mark)))
    assert mark.exists()  # it does run where pickles are trusted
    mark.unlink()
    (llama / METADATA).write_bytes(pickle.dumps({"state_dict_metadata": attack(mark)}))
    with pytest.raises(ValueError, match=r"\.metadata cannot be read: it names posix\.system, which has no place in such a file"):
        read_megatron_folder(llama)
    (llama / METADATA).write_bytes(b"cbuiltins\neval\n(S'1'\ntR.")
    with pytest.raises(ValueError, match=r"it names builtins\.eval"):
        read_megatron_folder(llama)
    (llama / METADATA).write_bytes(whole)
    with zipfile.ZipFile(llama / COMMON, "w") as archive:
        archive.writestr("common/data.pkl", pickle.dumps({"args": attack(mark)}))
    with pytest.raises(ValueError, match=r"common\.pt cannot be read: it names posix\.system"):
        read_megatron_folder(llama)
    assert not mark.exists()


def test_values_in_a_tensor_s_place_are_not_run(llama, tmp_path):
    mark = tmp_path / "ran"
    content = io.BytesIO()
    torch.save(attack(mark), content)
    for path in llama.glob("*.distcp"):
        path.write_bytes(content.getvalue() * 1000)
    with pytest.raises(ValueError, match=r"distcp cannot be read where .* should be"):
        from_megatron(llama, tmp_path / "ours", tokenizer=None)
    assert not mark.exists() and not (tmp_path / "ours").exists()


def with_arguments(folder, **changes):
    """Write common.pt anew, as torch does."""
    common = torch.load(folder / COMMON, weights_only=False)
    for name, value in changes.items():
        setattr(common["args"], name, value)
    torch.save(common, folder / COMMON)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 8}, "common.pt: num_experts 8 is not supported"),
        ({"window_size": (128, 0)}, r"window_size \(128, 0\) is not supported"),
        ({"multi_latent_attention": True, "squared_relu": True}, "multi_latent_attention True is not supported; squared_relu True is not"),
        ({"position_embedding_type": "yarn"}, "position_embedding_type 'yarn' is not supported, only 'learned_absolute' and 'rope'"),
        ({"normalization": "Other"}, "normalization 'Other' is not supported, only LayerNorm and RMSNorm"),
        ({"hidden_size": None}, "hidden_size must be a positive integer, got None"),
        ({"num_layers": 2}, r"has the shape \[3, .*, and the arguments need \[2, "),
        ({"num_layers": 10**9}, "num_layers 1000000000 are more than the files hold"),
        ({"add_qkv_bias": True}, "it holds no decoder.layers.0.self_attention.linear_qkv.bias, which the arguments in common.pt need"),
        ({"untie_embeddings_and_output_weights": False}, "output_layer.weight is left over: the arguments in common.pt describe no such"),
    ],
)
def test_what_is_not_supported_is_named(llama, changes, message, tmp_path):
    with_arguments(llama, **changes)
    with pytest.raises(ValueError, match=message):
        from_megatron(llama, tmp_path / "ours", tokenizer=None)
    assert not (tmp_path / "ours").exists()


def test_what_is_missing_is_named(llama, tmp_path):
    parent = llama.parent
    (parent / "latest_checkpointed_iteration.txt").write_text("12")
    with pytest.raises(ValueError, match="says '12', and .*iter_0000012 is no torch_dist checkpoint"):
        checkpoint_folder(parent)
    assert checkpoint_folder(tmp_path / "nothing") is None
    (llama / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(ValueError, match="metadata.json: sharded_backend 'zarr' is not supported"):
        read_megatron_folder(llama)
    (llama / "metadata.json").unlink()
    torch.save({"iteration": 1}, llama / COMMON)
    with pytest.raises(ValueError, match="common.pt holds no arguments of a Megatron-LM training"):
        read_megatron_folder(llama)
    (llama / COMMON).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="common.pt cannot be read"):
        read_megatron_folder(llama)
