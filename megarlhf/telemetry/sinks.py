"""Where metrics are written: a JSON-lines file, Weights & Biases, TensorBoard. One process writes, the others have no sinks."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

from megarlhf.storage.files import write_atomically
from megarlhf.telemetry.jsonl import JsonLines

KINDS = ("jsonl", "wandb", "tensorboard")


class Sink(Protocol):
    """A place that metrics are written to."""

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Record the values of one step of a stage."""

    def truncate_after(self, stage: str, step: int) -> None:
        """Forget the steps of `stage` after `step`, which a resumed run is about to write again."""

    def close(self) -> None:
        """Write what is buffered and let go of files and connections."""


class JsonlSink:
    """One JSON object per step: "stage", "step", "time" (UTC, when it was logged), and the metrics by their flat names.

    See `JsonLines` for non-finite numbers.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        """Args: clock: seconds since 1970, UTC."""
        self._lines = JsonLines(path)
        self._clock = clock

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Append one line and flush it."""
        now = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self._lines.append(stage, step, {"time": now, **values})

    def truncate_after(self, stage: str, step: int) -> None:
        """Drop the lines of `stage` later than `step`, atomically."""
        self._lines.truncate_after(stage, step)

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


class WandbSink:
    """A Weights & Biases run, online or kept in `run_dir` for ``wandb sync``.

    Each stage has its own step axis, "<stage>/step", so that stages follow one another in one run. A run folder is
    always the same run: its id is kept in ``wandb_id``. Offline, each start leaves a folder of its own under ``wandb/``, and
    ``wandb sync`` sends them as one run, in order. wandb's own variables of the environment hold: WANDB_PROJECT and WANDB_NAME take
    the place of `project` and `name`.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        project: str,
        name: str | None = None,
        mode: Literal["offline", "online"] = "offline",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        wandb = _imported("wandb", kind="wandb", package="wandb")
        run_dir.mkdir(parents=True, exist_ok=True)
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            write_atomically(id_file, uuid.uuid4().hex[:8])
        run_id = id_file.read_text(encoding="utf-8").strip()
        project, name = os.environ.get("WANDB_PROJECT") or project, os.environ.get("WANDB_NAME") or name
        try:
            self._run = wandb.init(
                project=project, name=name, dir=str(run_dir), mode=mode, id=run_id, resume="allow",
                config=dict(config or {}), allow_val_change=True,  # a resume may change what the run began with
            )  # fmt: skip
        except wandb.Error as error:  # no account, no network
            raise ValueError(f"the sink 'wandb' cannot be opened: {error} (run.wandb_mode: offline needs no account)") from error
        self._stages: set[str] = set()

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Log the values as "<stage>/<name>" at "<stage>/step"."""
        if stage not in self._stages:
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._stages.add(stage)
        self._run.log({f"{stage}/step": step} | {f"{stage}/{name}": value for name, value in values.items()})

    def truncate_after(self, stage: str, step: int) -> None:
        """Nothing: Weights & Biases cannot take back what was sent, so steps that run again appear twice there."""

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class TensorboardSink:
    """TensorBoard event files, one folder per stage below `path`."""

    def __init__(self, path: Path) -> None:
        self._module = _imported("torch.utils.tensorboard", kind="tensorboard", package="tensorboard")
        self._path = path
        self._writers = {}

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """One scalar per name."""
        writer = self._writer(stage)
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def truncate_after(self, stage: str, step: int) -> None:
        """Have TensorBoard hide the events of `stage` later than `step`."""
        self._writer(stage, purge_step=step + 1)

    def close(self) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()

    def _writer(self, stage: str, purge_step: int | None = None):
        if purge_step is not None and stage in self._writers:
            self._writers.pop(stage).close()
        if stage not in self._writers:
            self._writers[stage] = self._module.SummaryWriter(str(self._path / stage), purge_step=purge_step)
        return self._writers[stage]


def check_sinks(kinds: Sequence[str]) -> list[str]:
    """A sentence for every kind whose package is not installed: known before anything is built. Imports nothing heavy."""
    packages = {"wandb": "wandb", "tensorboard": "tensorboard"}
    needed = [(kind, packages[kind]) for kind in kinds if kind in packages]
    return [
        f"run.sinks: {kind} needs the package {package}, which is not installed: pip install {package}, or leave {kind} out"
        for kind, package in needed
        if package in sys.modules and sys.modules[package] is None or importlib.util.find_spec(package) is None
    ]


def make_sinks(
    kinds: Sequence[str],
    run_dir: Path,
    *,
    project: str = "megarlhf",
    name: str | None = None,
    wandb_mode: Literal["offline", "online"] = "offline",
    config: Mapping[str, Any] | None = None,
) -> list[Sink]:
    """The sinks of the given kinds, writing into `run_dir`: ``metrics.jsonl``, ``wandb/``, ``tensorboard/``.

    Args: config: the run's configuration as plain values, for wandb's table of runs.

    Raises ValueError for an unknown kind and for one whose package is not installed.
    """
    sinks: list[Sink] = []
    for kind in kinds:
        if kind == "jsonl":
            sinks.append(JsonlSink(run_dir / "metrics.jsonl"))
        elif kind == "wandb":
            sinks.append(WandbSink(run_dir, project=project, name=name, mode=wandb_mode, config=config))
        elif kind == "tensorboard":
            sinks.append(TensorboardSink(run_dir / "tensorboard"))
        else:
            close = difflib.get_close_matches(kind, KINDS, n=1)
            raise ValueError(f"unknown sink {kind!r}; {f'did you mean {close[0]!r}?' if close else 'known: ' + ', '.join(KINDS)}")
    return sinks


def _imported(module: str, *, kind: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"the sink {kind!r} needs {package}, which cannot be imported ({error}); pip install {package}") from error
