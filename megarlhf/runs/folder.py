"""A run's folder: its configuration, metrics, samples and checkpoints, and how it goes on after an interruption."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import yaml
from tqdm import tqdm

from megarlhf.config import ConfigError, dump_yaml
from megarlhf.config.loader import to_dict
from megarlhf.config.stages import StageConfig
from megarlhf.engine import checkpoint
from megarlhf.engine.trainable import TrainEngine
from megarlhf.parallel.collectives import broadcast_object
from megarlhf.parallel.groups import World
from megarlhf.telemetry.samples import SampleLog
from megarlhf.telemetry.sinks import Sink, make_sinks

CONFIG_FILE = "config.yaml"
BEST_FILE = "best.json"
FIXED = {
    "run.seed": "order, noise and samples would be another run's",
    "batch_size": "the number of steps and the learning rate's schedule follow from it",
    "pretraining_mix": "the number of steps and the learning rate's schedule follow from it",
}
"""Keys that a run keeps from its first step to its last, and why. Any other may change; what did is said at the resume."""


class Run:
    """One stage's folder. Only rank 0 writes; saving is a collective of the whole world."""

    def __init__(self, config: StageConfig, world: World, *, fresh: bool = False) -> None:
        """Look at the folder, and write nothing yet.

        ConfigError when it belongs to another stage, and with `fresh` when it holds anything.
        """
        self.stage = config.stage
        self.config = config.run
        self.world = world
        self.dir = Path(config.run.dir)
        self._whole = config
        self._sinks: list[Sink] = []
        self._samples: SampleLog | None = None
        _refuse(_cannot_open(self.dir, config.stage, fresh) if self.is_writer else None)

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
            tqdm.write(f"[{self.stage}] {text}", file=sys.stderr)  # above a progress bar, where there is one
            sys.stderr.flush()

    def introduce(self, notes: Sequence[str]) -> None:
        """Write the configuration, and say what the run is about to use, a line for each note."""
        _refuse(self._problem_in(self._write_config))
        for note in notes:
            self.say(note)

    def write(self, name: str, text: str) -> None:
        """Write a result of the run into its folder."""
        if self.is_writer:
            (self.dir / name).write_text(text)

    def changes(self, saved: Mapping) -> tuple[list[str], list[str]]:
        """How the configuration differs from the one in a checkpoint: (what is refused, what is said).

        Where the run lives and how often it saves is not compared.
        """
        refused, said = [], []
        now = dict(_flat(to_dict(self._whole)))
        for key, value in _flat(saved):
            if key not in now or now[key] == value or (key.startswith("run.") and key not in FIXED):
                continue
            if key in FIXED:
                refused.append(f"{key} is {now[key]}, but {self.dir} began with {value}: {FIXED[key]}; keep it or choose another run.dir")
            else:
                said.append(f"{key} {value} -> {now[key]}")
        return refused, said

    def open_logs(self, step: int) -> None:
        """Open the logs, without what was written after `step`: those steps come again.

        ConfigError on every rank where a sink cannot be opened, or a log of before is broken.
        """
        _refuse(self._problem_in(self._open_logs, step))

    def _problem_in(self, function: Callable[..., None], *args: object) -> str | None:
        """Call a function on the rank that writes; returns what went wrong."""
        if not self.is_writer:
            return None
        try:
            function(*args)
        except (OSError, ValueError) as error:
            return f"run: {error}"
        return None

    def _write_config(self) -> None:
        self.dir.mkdir(parents=True, exist_ok=True)
        (self.dir / CONFIG_FILE).write_text(dump_yaml(self._whole))

    def _open_logs(self, step: int) -> None:
        self._sinks = make_sinks(self.config.sinks, self.dir, name=self.dir.name, wandb_mode=self.config.wandb_mode)
        self._samples = SampleLog(self.dir / "samples.jsonl")
        for log in (*self._sinks, self._samples):
            log.truncate_after(self.stage, step)

    def log(self, step: int, metrics: Mapping[str, float], samples: Sequence[Mapping[str, object]] = ()) -> None:
        """Write one step's metrics to every sink, and its sampled responses."""
        for sink in self._sinks:
            sink.write(self.stage, step, metrics)
        if self._samples is not None:
            for sample in samples:
                self._samples.write(self.stage, step, **sample)

    def save(self, step: int, models: Mapping[str, TrainEngine], cursors: dict, *, best: bool = False) -> None:
        """Write the checkpoint of `step`, remember it as the best if it is, and remove the oldest beyond keep_checkpoints."""
        path = self.checkpoints / f"step_{step:08d}"
        state = {"stage": self.stage, "step": step, "cursors": cursors, "config": to_dict(self._whole)}
        checkpoint.save(path, models, state, self.world)
        if not self.is_writer:
            return
        if best:
            (self.checkpoints / BEST_FILE).write_text(json.dumps({"checkpoint": path.name}))
        kept = best_checkpoint(self.checkpoints)
        whole = sorted(p for p in self.checkpoints.iterdir() if p.is_dir() and p.suffix != ".partial")
        for old in whole[: -self.config.keep_checkpoints]:
            if old != kept:
                shutil.rmtree(old)

    def close(self) -> None:
        """Flush and close what is open."""
        for log in (*self._sinks, *([self._samples] if self._samples else [])):
            log.close()


def _refuse(problem: str | None) -> None:
    """Raise ConfigError on every rank when rank 0 has a problem."""
    if (said := broadcast_object(problem)) is not None:
        raise ConfigError(said)


def _cannot_open(folder: Path, stage: str, fresh: bool) -> str | None:
    if fresh and folder.exists() and any(folder.iterdir()):
        return f"--fresh: {folder} is not empty; remove it, choose another run.dir, or leave --fresh out to go on with it"
    file = folder / CONFIG_FILE
    found = yaml.safe_load(file.read_text())["stage"] if file.is_file() else stage
    if found != stage:
        return f"run.dir: {folder} holds a run of {found}; choose another folder for {stage}"
    return None


def _flat(tree: Mapping, path: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def best_checkpoint(checkpoints: Path) -> Path | None:
    """The checkpoint that a run's validation chose, if it chose one."""
    file = checkpoints / BEST_FILE
    return checkpoints / json.loads(file.read_text())["checkpoint"] if file.is_file() else None


def find_checkpoint(path: str, world: World) -> Path:
    """The checkpoint that `path` means, as rank 0 sees it: itself, or a run folder's best or newest; a collective of the world.

    ValueError on every rank when there is none.
    """
    folder = Path(path) / "checkpoints"
    found = None
    if world.rank == 0:
        found = Path(path) if (Path(path) / checkpoint.STATE_FILE).is_file() else best_checkpoint(folder)
    found = broadcast_object(found) or checkpoint.newest(folder, world)
    if found is None:
        raise ValueError(f"{path} is neither a checkpoint (a folder with {checkpoint.STATE_FILE}) nor a run with one in {folder}")
    return found
