"""Kills a run with SIGKILL at random moments until it has had enough, lets it end, and compares it with one that was left alone.

    python -m tests.faults.storm [--kills 60] [--ranks 2] [--seed 1] [--stages base sft reward ppo grpo dpo]

Every process of the run is killed at once. A moment is a random time of the whole run, or a random instant after a step was logged, or
after a save has begun: so that starts, rollouts, updates and saves are hit alike. Equal means bit for bit: the metrics of every step but
what the machine's pace decides, the sampled responses, and every tensor of the last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from megarlhf.runs.checkpoints import PARTIAL, own_checkpoints
from tests.distributed.recipe import curves, make_recipe

LONGER = {
    "base": ["steps=14", "batch_size=12"],
    "sft": ["epochs=3", "batch_size=4", "pretraining_mix=0.25", "dropout=0.1", "select_by=valid_loss", "run.eval_every=2"],
    "reward": ["epochs=4", "batch_size=8", "run.eval_every=3"],
    "ppo": ["ppo.iterations=10", "run.eval_every=4"],
    "grpo": ["ppo.iterations=10", "run.eval_every=4"],
    "dpo": ["epochs=4", "batch_size=8", "run.eval_every=3"],
}
"""What makes each stage of the recipe some ten steps long."""
STARTED_FROM = ("base", "sft", "reward")
"""The stages that others of the recipe start from."""
DONE_WITHIN = 300.0
"""Seconds after which a run that neither ends nor dies has failed."""


@dataclass
class Storm:
    """What a stage has been through."""

    moments: Counter = field(default_factory=Counter)
    """Where the kills fell -> how many."""
    starts: int = 0

    @property
    def kills(self) -> int:
        """How many there were."""
        return sum(self.moments.values())


class Started:
    """A run of some ranks, each a process, in a process group of their own."""

    def __init__(self, words: list[str], ranks: int, log: Path, *, program: tuple[str, ...] = ("-m", "megarlhf")) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, *program, *words]
        self.processes: list[subprocess.Popen] = []
        with log.open("ab") as out:
            for rank in range(ranks):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), **(place if ranks > 1 else {})}
                self.processes.append(subprocess.Popen(command, stdout=out, stderr=out, env=env, start_new_session=True))

    def statuses(self) -> list[int | None]:
        """Each process's exit status, None for one that runs."""
        return [process.poll() for process in self.processes]

    @property
    def runs(self) -> bool:
        """Whether any process does."""
        return None in self.statuses()

    def kill(self) -> None:
        """SIGKILL to all of them at once."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()


def storm(recipe: Path, folder: Path, stage: str, *, kills: int, ranks: int, seed: int) -> Storm:
    """Run `stage` of the recipe into folder/calm without and into folder/storm with `kills`; AssertionError where they differ."""
    draw, through = random.Random(f"{seed} {stage}"), Storm()
    calm, torn, log = folder / stage / "calm", folder / stage / "storm", folder / stage / "log.txt"
    words = [stage_command(stage), "--config", str(recipe / f"{stage}.yaml"), "run.save_every=1", "run.threads=1", *LONGER[stage]]
    log.parent.mkdir(parents=True)
    since = time.monotonic()
    assert _ends(Started([*words, f"run.dir={calm}"], ranks, log)), f"the run without kills failed:\n{log.read_text()}"
    length = time.monotonic() - since
    while through.kills < kills:
        through.starts += 1
        run = Started([*words, f"run.dir={torn}"], ranks, log)
        _wait_for_a_moment(run, torn, draw, length)
        where = _where(torn)
        if run.runs:
            run.kill()
            through.moments[where] += 1
        elif any(run.statuses()):
            raise AssertionError(f"a start ended with {run.statuses()}:\n{log.read_text()[-3000:]}")
        else:  # it came to its end first: begin anew
            _same(calm, torn)
            torn = torn.with_name(f"storm{through.starts}")
    through.starts += 1
    assert _ends(Started([*words, f"run.dir={torn}"], ranks, log)), f"the last start failed:\n{log.read_text()[-3000:]}"
    _same(calm, torn)
    return through


def stage_command(stage: str) -> str:
    """The recipe's name of a stage as the program's."""
    return {"base": "pretrain", "grpo": "ppo"}.get(stage, stage)


def _ends(run: Started) -> bool:
    until = time.monotonic() + DONE_WITHIN
    try:
        while run.runs and time.monotonic() < until:
            time.sleep(0.05)
        return run.statuses() == [0] * len(run.statuses())
    finally:
        run.kill()


def _wait_for_a_moment(run: Started, folder: Path, draw: random.Random, length: float) -> None:
    """Return at a moment to kill at, or when the run has ended."""
    kind, until = draw.choice(("any time", "after a step", "in a save")), time.monotonic() + length
    if kind == "any time":
        until = time.monotonic() + draw.uniform(0, length)
        while run.runs and time.monotonic() < until:
            time.sleep(0.01)
        return
    logged, lines = _logged(folder), draw.randint(1, 4)
    while run.runs and time.monotonic() < until:
        if kind == "in a save" and _logged(folder) > logged and _partial(folder):
            break
        if kind == "after a step" and _logged(folder) >= logged + lines:
            break
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.02 if kind == "in a save" else 0.3))


def _where(folder: Path) -> str:
    if _partial(folder):
        return "in a save"
    return "in a step" if _logged(folder) else "in the first start"


def _logged(folder: Path) -> int:
    """Steps in the metrics' file."""
    try:
        return len((folder / "metrics.jsonl").read_bytes().splitlines())
    except FileNotFoundError:
        return 0


def _partial(folder: Path) -> list[Path]:
    checkpoints = folder / "checkpoints"
    return [path for path in checkpoints.iterdir() if PARTIAL.fullmatch(path.name)] if checkpoints.is_dir() else []


def _same(calm: Path, torn: Path) -> None:
    assert curves(torn) == curves(calm), f"{torn}: metrics differ from those of {calm}"
    for name in ("samples.jsonl", "checkpoints/best.json"):
        assert (torn / name).exists() == (calm / name).exists()
        assert not (calm / name).exists() or (torn / name).read_bytes() == (calm / name).read_bytes(), f"{torn / name} differs"
    assert not _partial(torn), f"{torn} has left {_partial(torn)}"
    one, other = (own_checkpoints(folder / "checkpoints", run=None)[0][0] for folder in (calm, torn))
    assert one.state["step"] == other.state["step"] and one.files.keys() == other.files.keys()
    for name in one.files:
        before, after = load_file(one.path / name), load_file(other.path / name)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before), f"{other.path / name} differs"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60, help="in all, shared out among the stages")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stages", nargs="+", choices=list(LONGER), default=list(LONGER))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe"
        recipe.mkdir()
        make_recipe(recipe)
        for stage in STARTED_FROM:
            if not _ends(Started([stage_command(stage), "--config", str(recipe / f"{stage}.yaml")], 1, Path(folder) / "log.txt")):
                print((Path(folder) / "log.txt").read_text())
                return 1
        per_stage = -(-options.kills // len(options.stages))
        for stage in options.stages:
            since = time.monotonic()
            through = storm(recipe, Path(folder) / "runs", stage, kills=per_stage, ranks=options.ranks, seed=options.seed)
            fell = ", ".join(f"{count} {where}" for where, count in sorted(through.moments.items()))
            seconds = time.monotonic() - since
            ended = f"ended bit for bit as without; {seconds:.0f} s"
            print(f"{stage}: {through.kills} kills in {through.starts} starts ({fell}); {ended}", flush=True)
    print(f"storm: all {per_stage * len(options.stages)} kills survived")
    return 0


if __name__ == "__main__":
    sys.exit(main())
