"""The stages, end to end in miniature: layouts, resumes, the paper's facts, and what a user is told."""

import json
import shutil

import pytest

from tests.distributed.recipe import curves, lines_of, make_recipe, run_stage_of

STAGES = ("base", "sft", "reward", "ppo")


@pytest.fixture(scope="module")
def recipe(ranks1, tmp_path_factory):
    """The recipe's folder, with every stage run on one rank."""
    folder = make_recipe(tmp_path_factory.mktemp("recipe"))
    ranks1.run(check_stages, folder, folder / "runs", [])
    return folder


def check_stages(folder, runs, overrides):
    for name in STAGES:
        run_stage_of(folder / f"{name}.yaml", [f"run.dir={runs / name}", *overrides])


def largest_difference(one, other):
    """Of two curves' numbers; anything else must be equal."""
    assert len(one) == len(other)
    worst = (0.0, "")
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if isinstance(a[name], float):
                worst = max(worst, (abs(a[name] - b[name]) / (1 + abs(b[name])), f"{name} {a['step']}"))
            else:
                assert a[name] == b[name], name
    return worst


LAYOUTS = {
    "tp2": (2, ["parallel.tp=2"]),
    "pp2": (2, ["parallel.pp=2"]),
    "dp2": (2, []),
    "tp2 sequence parallel": (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "tp2 pp2": (4, ["parallel.tp=2", "parallel.pp=2"]),
    "tp2 dp2": (4, ["parallel.tp=2"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_stage_gives_the_same_curves_in_every_layout(recipe, ranks2, ranks4, name, tmp_path):
    num_ranks, overrides = LAYOUTS[name]
    (ranks2 if num_ranks == 2 else ranks4).run(check_stages, recipe, tmp_path, overrides)
    for stage in STAGES:
        print(stage, largest_difference(curves(tmp_path / stage), curves(recipe / "runs" / stage)))
    assert lines_of(tmp_path / "ppo" / "samples.jsonl")
