"""The storm of kills in its short form; `python -m tests.faults.storm` is the long one."""

from tests.faults.storm import storm


def test_a_killed_run_ends_bit_for_bit_as_one_that_was_left_alone(recipe, tmp_path):
    through = storm(recipe, tmp_path, "ppo", kills=2, ranks=2, seed=1)
    assert through.kills == 2 and through.starts >= 3
