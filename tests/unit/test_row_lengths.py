"""How long rows can get in every stage, and by which keys."""

import pytest
import yaml

from megarlhf.config import COMMANDS, load_stage_config
from megarlhf.runs.row_lengths import RowLength, row_lengths
from tests.unit.test_config_stages import MINIMAL

LIMITS = {"max_prompt_len": 100, "max_response_len": 50}
TEXT = {"prefix": "t", "valid_prefix": "v", "seq_len": 300}
GIVEN = "limits.max_prompt_len 100 + limits.max_response_len 50"
SAMPLED = "limits.max_prompt_len 100 + sampling.max_new_tokens 7"
IN_PPO = "limits.max_prompt_len 100 + generation.sampling.max_new_tokens 7"
PACKED = "data.pretraining.seq_len 300"
MODEL = {"load": "m"}
PAIR = {"responses": "a", "against": "b"}
SAMPLING = {"sampling": {"max_new_tokens": 7}}
JUDGED = {"select_by": "reward", "reward": MODEL, "data": {"train": "d", "valid": "v"}, "run": {"dir": "x", "eval_every": 1}}

CASES = [
    ("pretrain", {"data": {"prefix": "t", "seq_len": 300}}, {"model": ["data.seq_len 300"]}),
    ("sft", SAMPLING, {"model": [GIVEN], "reward": []}),
    ("sft", {"data": {"train": "d", "pretraining": TEXT}, **SAMPLING}, {"model": [GIVEN, PACKED], "reward": []}),
    ("sft", {**JUDGED, **SAMPLING}, {"model": [GIVEN, SAMPLED], "reward": [SAMPLED]}),
    ("reward", {}, {"model": [GIVEN]}),
    (
        "ppo",
        {"data": {"prompts": "p", "pretraining": TEXT}, "generation": SAMPLING},
        {"policy": [IN_PPO, PACKED], "value": [IN_PPO], "reward": [IN_PPO], "reference": [IN_PPO]},
    ),
    ("dpo", {"data": {"train": "r", "pretraining": TEXT}}, {"model": [GIVEN, PACKED], "reference": [GIVEN]}),
    ("generate", SAMPLING, {"model": [SAMPLED]}),
    ("evaluate", {"prompts": None, "rankings": "r", **SAMPLING}, {"model": [GIVEN], "reward": [GIVEN], "reference": []}),
    ("evaluate", {"prompts": None, "rankings": "r", "reward": MODEL, **SAMPLING}, {"model": [], "reward": [GIVEN], "reference": []}),
    ("evaluate", {"prompts": None, "tasks": ["t"], **SAMPLING}, {"model": [GIVEN], "reward": [], "reference": []}),
    ("evaluate", {"prompts": None, "win_rate": PAIR, **SAMPLING}, {"model": [GIVEN], "reward": [GIVEN], "reference": []}),
    (
        "evaluate",
        {"reward": MODEL, "win_rate": {"against": "b"}, **SAMPLING},
        {"model": [SAMPLED], "reward": [SAMPLED, GIVEN], "reference": [SAMPLED]},
    ),
    (
        "evaluate",
        {"prompts": "p", "demonstrations": "d", "reference": MODEL, "text": {"valid_prefix": "v", "seq_len": 300}, **SAMPLING},
        {"model": [SAMPLED, GIVEN, "text.seq_len 300"], "reward": [SAMPLED], "reference": [SAMPLED]},
    ),
]


@pytest.mark.parametrize("stage, changes, expected", CASES)
def test_rows_of_every_stage(tmp_path, stage, changes, expected):
    tree = {"stage": stage, "run": {"dir": "x"}, "tokenizer": {"path": "t"}, **MINIMAL[stage]}
    tree |= {} if stage == "pretrain" else {"limits": LIMITS}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree | changes))
    found = row_lengths(load_stage_config(tmp_path / "run.yaml"))
    assert {role: [row.keys for row in rows] for role, rows in found.items()} == expected
    for row in (row for rows in found.values() for row in rows):
        assert row.tokens == sum(int(word) for word in row.keys.split() if word.isdigit())


def test_every_command_has_a_rule():
    assert {stage for stage, _, _ in CASES} == set(COMMANDS)


@pytest.mark.parametrize("tokens, tp, padded", [(40, 1, 40), (40, 4, 40), (41, 2, 42), (1040, 3, 1041), (7, 8, 8)])
def test_rows_are_padded_to_what_sequence_parallelism_splits(tokens, tp, padded):
    row = RowLength.of(data__seq_len=tokens).on(multiple=tp)
    assert row.tokens == padded
    rounded = f"data.seq_len {tokens} = {tokens}, rounded up to {padded} for sequence_parallel over tp {tp}"
    assert row.keys == (rounded if padded > tokens else f"data.seq_len {tokens}")
