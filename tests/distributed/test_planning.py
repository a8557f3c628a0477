"""A plan's bytes against what torch holds: the same stages run by real ranks, their storages counted by the same meter."""

from unittest import mock

import pytest
import yaml

from megarlhf.config import load_stage_config
from megarlhf.planning.models import run_models
from megarlhf.planning.stages import Job, dry_run_each
from tests.scale.proof import SHAPES, prove, run_for_real

WIDE = {"num_layers": 6, "hidden_size": 64, "num_heads": 4, "max_seq_len": 64}
TRAINED = {"adam": {"learning_rate": 1e-3}, "micro_batch_size": 2}
FRESH = {**TRAINED, "architecture": WIDE}
ROLES = ("policy", "value", "reward", "reference")
MIXED = {
    "policy": {"parallel": {"tp": 2, "pp": 2}},
    "value": {"parallel": {"tp": 1, "pp": 2}},
    "reward": {"parallel": {"tp": 4}},
    "reference": {"parallel": {"tp": 2, "pp": 2}, "offload": ["weights"]},
    "generation": {"parallel": {"tp": 2, "pp": 1}},
}
INTERLEAVED = {
    "policy": {"parallel": {"tp": 2, "pp": 2, "virtual_pp": 3, "sequence_parallel": True}, "recompute": "selective",
               "offload": ["gradients", "optimizer", "average"]},
    "value": {"parallel": {"tp": 2, "sequence_parallel": True}, "recompute": "full", "micro_batch_tokens": 150,
              "offload": ["weights", "gradients", "optimizer"]},
    "reward": {"parallel": {"tp": 1, "pp": 4}, "offload": ["weights"]},
    "reference": {"parallel": {"tp": 1}},
}


def write_ppo(folder, layouts, precision):
    """A PPO run whose models nobody has trained: their runs' files say what they are."""
    tree = {
        "stage": "ppo", "run": {"dir": f"{folder}/runs/ppo"}, "tokenizer": {"path": f"{folder}/no/tokenizer"},
        "policy": {**TRAINED, "load": f"{folder}/runs/base"}, "value": {**TRAINED, "load": f"{folder}/runs/base"},
        "reward": {"load": f"{folder}/runs/base", "micro_batch_size": 4},
        "reference": {"load": f"{folder}/runs/base", "micro_batch_size": 4},
        "data": {"prompts": "prompts.jsonl", "pretraining": {"prefix": "text", "seq_len": 48}}, "limits": {"max_prompt_len": 36},
        "ppo": {"iterations": 3, "batch_size": 16, "minibatch_size": 8, "ptx_ratio": 2}, "generation": {"sampling": {"max_new_tokens": 12}},
    }  # fmt: skip
    for role in ROLES:
        tree[role] = {**tree[role], **layouts[role], "precision": precision}
    tree["generation"] |= layouts.get("generation", {})
    base = {
        "stage": "pretrain", "run": {"dir": f"{folder}/runs/base"}, "tokenizer": tree["tokenizer"], "model": FRESH,
        "data": {"prefix": "text"}, "steps": 1,
    }  # fmt: skip
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    (folder / "ppo.yaml").write_text(yaml.safe_dump(tree))
    load_stage_config(folder / "base.yaml")
    with mock.patch("megarlhf.planning.models.GPT2_VOCAB", 500):
        return run_models(folder / "ppo.yaml", [], {}, 4)


@pytest.mark.parametrize(("layouts", "precision"), [(MIXED, "fp32"), (INTERLEAVED, "bf16")], ids=["mixed", "interleaved"])
def test_what_a_plan_says_of_each_rank_is_what_torch_holds(layouts, precision, tmp_path, ranks4):
    models = write_ppo(tmp_path, layouts, precision)
    real = ranks4.run(run_for_real, models)
    for rank, planned in enumerate(dry_run_each([Job(models, rank, 2) for rank in range(4)])):
        assert planned.held == real[rank].held
        assert planned.host_bytes == real[rank].host_bytes > 0
        assert planned.peaks.keys() == real[rank].peaks.keys()
        for phase in planned.peaks:
            if phase != "build":
                assert planned.peak(phase) == pytest.approx(real[rank].peak(phase), rel=0.05), (rank, phase)


def test_the_parallelism_of_a_175b_run_trains_as_one_rank_and_holds_what_its_plan_says(recipe, ranks4, tmp_path):
    proof = prove(recipe, tmp_path, ranks4, SHAPES["tp2 pp2"])
    assert proof.holds, proof
