"""A run's folder: its configuration, metrics, samples and checkpoints, and how it goes on after an interruption."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from megarlhf.config import dump_yaml
from megarlhf.config.stages import StageConfig
from megarlhf.engine import checkpoint
from megarlhf.engine.trainable import TrainEngine
from megarlhf.parallel.collectives import broadcast_object
from megarlhf.parallel.groups import World
from megarlhf.telemetry.samples import SampleLog
from megarlhf.telemetry.sinks import Sink, make_sinks

CONFIG_FILE = "config.yaml"
BEST_FILE = "best.json"


class Run:
    """One stage's folder. Only rank 0 writes; saving is a collective of the whole world."""

    def __init__(self, config: StageConfig, world: World, *, fresh: bool = False) -> None:
        """Open the folder, and leave what it holds from an earlier start of the same stage.

        ValueError when it belongs to another stage, and with `fresh` when it holds anything.
        """
        self.stage = config.stage
        self.config = config.run
        self.world = world
        self.dir = Path(config.run.dir)
        problem = broadcast_object(_cannot_open(self.dir, config.stage, fresh) if world.rank == 0 else None)
        if problem is not None:
            raise ValueError(problem)
        self.sinks: list[Sink] = []
        self.sample_log: SampleLog | None = None
        if self.is_writer:
            self.dir.mkdir(parents=True, exist_ok=True)
            (self.dir / CONFIG_FILE).write_text(dump_yaml(config))
            self.sinks = list(make_sinks(config.run.sinks, self.dir, name=self.dir.name, wandb_mode=config.run.wandb_mode))
            self.sample_log = SampleLog(self.dir / "samples.jsonl")

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes and prints."""
        return self.world.rank == 0

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.dir / "checkpoints"

    def say(self, text: str) -> None:
        """Print a line, once."""
        if self.is_writer:
            print(f"[{self.stage}] {text}", file=sys.stderr, flush=True)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one step's metrics to every sink."""
        for sink in self.sinks:
            sink.write(self.stage, step, metrics)

    def sample(self, step: int, *, prompt: str, response: str, **values: float | str) -> None:
        """Write one sampled response."""
        if self.sample_log is not None:
            self.sample_log.write(self.stage, step, prompt=prompt, response=response, **values)

    def save(self, step: int, models: Mapping[str, TrainEngine], state: dict, *, best: bool = False) -> None:
        """Write the checkpoint of `step`, remember it as the best if it is, and remove the oldest beyond keep_checkpoints."""
        path = self.checkpoints / f"step_{step:08d}"
        checkpoint.save(path, models, {"stage": self.stage, "step": step, **state}, self.world)
        if not self.is_writer:
            return
        if best:
            (self.checkpoints / BEST_FILE).write_text(json.dumps({"checkpoint": path.name}))
        kept = best_checkpoint(self.checkpoints)
        whole = sorted(p for p in self.checkpoints.iterdir() if p.is_dir() and p.suffix != ".partial")
        for old in whole[: -self.config.keep_checkpoints]:
            if old != kept:
                shutil.rmtree(old)

    def resume(self, models: Mapping[str, TrainEngine]) -> dict | None:
        """Restore `models` from the newest checkpoint and return its state; None where there is none yet.

        Metrics and samples written after that checkpoint are removed: those steps come again.
        """
        path = checkpoint.newest(self.checkpoints, self.world)
        step = 0
        state = None
        if path is not None:
            state = checkpoint.load(path, models).state
            step = state["step"]
            self.say(f"resuming from {path}")
        for log in [*self.sinks, *([self.sample_log] if self.sample_log else [])]:
            log.truncate_after(self.stage, step)
        return state

    def close(self) -> None:
        """Flush and close what is open."""
        for sink in self.sinks:
            sink.close()
        if self.sample_log is not None:
            self.sample_log.close()


def _cannot_open(folder: Path, stage: str, fresh: bool) -> str | None:
    if fresh and folder.exists() and any(folder.iterdir()):
        return f"--fresh: {folder} is not empty; remove it, choose another run.dir, or leave --fresh out to go on with it"
    metrics = folder / "metrics.jsonl"
    if metrics.is_file():
        with open(metrics) as file:
            line = file.readline()
        found = json.loads(line).get("stage") if line.strip() else stage
        if found != stage:
            return f"{folder} holds a {found} run; choose another run.dir for {stage}"
    return None


def best_checkpoint(checkpoints: Path) -> Path | None:
    """The checkpoint that a run's validation chose, if it chose one."""
    file = checkpoints / BEST_FILE
    return checkpoints / json.loads(file.read_text())["checkpoint"] if file.is_file() else None


def find_checkpoint(path: str, world: World) -> Path:
    """The checkpoint that `path` means: itself, or a run folder's best or newest.

    ValueError when there is none.
    """
    given = Path(path)
    if (given / checkpoint.STATE_FILE).is_file():
        return given
    folder = given / "checkpoints"
    found = best_checkpoint(folder) or checkpoint.newest(folder, world)
    if found is None:
        raise ValueError(f"{path} is neither a checkpoint (a folder with {checkpoint.STATE_FILE}) nor a run with one in {folder}")
    return found
