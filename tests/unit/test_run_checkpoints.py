"""Which checkpoint is a run's best, and what is said of one whose run has not come to its end."""

import json
import types

import pytest

from megarlhf.runs.checkpoints import best_as_of, best_step, unfinished


def folder_of(path, steps, best):
    for step in steps:
        (path / f"step_{step:08d}").mkdir(parents=True)
    if best is not None:
        (path / "best.json").write_text(json.dumps({"step": best}))
    return path


@pytest.mark.parametrize(
    ("steps", "named", "going_on_from", "best_then", "expected", "said"),
    [
        ([10, 20], 20, 20, 20, 20, ""),
        ([10, 20], 10, 20, 10, 10, ""),
        ([10, 20], None, 20, None, None, ""),
        ([10, 20], None, 20, 10, None, ""),  # somebody removed best.json, which means the newest
        ([10, 20], 10, 20, None, 10, ""),  # of a version that did not write down which it was
        ([10, 20], 20, 10, 10, 10, "was step 20, which comes again: it is step 10, as it was then"),  # 20 is damaged
        ([10], 20, 10, 10, 10, "it is step 10"),  # or was removed
        ([10], 20, 10, 5, None, "none is, until the next evaluation"),  # and 5 had to go when 20 was better
        ([10], 20, 10, None, None, "none is"),
        ([], 20, 0, None, None, "none is"),  # all were removed: the run begins
    ],
)
def test_a_best_checkpoint_of_steps_that_come_again_is_none(tmp_path, steps, named, going_on_from, best_then, expected, said):
    folder = folder_of(tmp_path, steps, named)
    best, line = best_as_of(folder, going_on_from, best_then)
    assert best == best_step(folder) == expected
    assert said in line and bool(line) == bool(said)


@pytest.mark.parametrize(
    ("state", "best", "given", "said"),
    [
        ({"step": 10, "total_steps": 40}, None, "run", "; is this meant? that run is at step 10 of 40"),
        ({"step": 40, "total_steps": 40}, None, "run", ""),
        ({"step": 10, "total_steps": 40}, 10, "run", ""),  # validation chose it
        ({"step": 10, "total_steps": 40}, None, "checkpoint", ""),  # and here somebody did
        ({"step": 10}, None, "run", ""),  # of an older version
        ({}, None, "run", ""),
    ],
)
def test_a_run_that_has_not_come_to_its_end_is_asked_about(tmp_path, state, best, given, said):
    folder = folder_of(tmp_path / "checkpoints", [10], best)
    saved = types.SimpleNamespace(path=folder / "step_00000010", state=state)
    assert unfinished(str(tmp_path if given == "run" else saved.path), saved) == said
