"""A rank that stops answering, or that keeps the others waiting: the run ends in time, and says which rank it was."""

import os
import signal
import time

import pytest

from tests.faults.storm import Started

DAWDLES = """
import os, sys, time
from megarlhf import cli
from megarlhf.trainers.pretrain import Pretraining

step = Pretraining.step

def dawdling(self, number):
    if number == 2 and os.environ["RANK"] == "1":
        time.sleep(600)
    return step(self, number)

Pretraining.step = dawdling
sys.argv[0] = "megarlhf"
cli.start()
"""


def said(run, log, *, within=90.0):
    """What rank 0 said at its end."""
    until = time.monotonic() + within
    try:
        while run.processes[0].poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        assert run.processes[0].poll() == 1, log.read_text()
    finally:
        run.kill()
    return log.read_text()


def words(recipe, tmp_path):
    return ["pretrain", "--config", str(recipe / "base.yaml"), f"run.dir={tmp_path / 'run'}", "steps=100000", "run.timeout_minutes=0.25"]


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_does_not_answer_is_named(recipe, tmp_path, number):
    run, log = Started(words(recipe, tmp_path), 2, tmp_path / "log.txt"), tmp_path / "log.txt"
    metrics = tmp_path / "run" / "metrics.jsonl"
    while run.runs and not (metrics.exists() and metrics.stat().st_size):  # until its first step is done
        time.sleep(0.05)
    os.kill(run.processes[1].pid, number)
    text = said(run, log)
    assert "megarlhf pretrain (rank 0 of 2): the connection to another rank broke" in text
    assert "rank 1 of 2 did not answer when the roll was called in step " in text and "Traceback" not in text


def test_a_rank_that_keeps_the_others_waiting_is_named_with_its_place(recipe, tmp_path):
    (tmp_path / "dawdles.py").write_text(DAWDLES)
    log = tmp_path / "log.txt"
    text = said(Started(words(recipe, tmp_path), 2, log, program=(str(tmp_path / "dawdles.py"),)), log)
    assert "rank 1 of 2 was not waiting for others, in step 3, at" in text and "in dawdling\n    time.sleep(600)" in text
    assert "rank 0 of 2 was not" not in text
