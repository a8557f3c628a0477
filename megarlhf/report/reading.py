"""A run's folder as a frozen record: what is there is read, what is not is named, and nothing of it has to be whole."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarlhf.config.errors import ConfigError
from megarlhf.config.yaml_tree import read_yaml
from megarlhf.storage.files import read_json

CHECKPOINT = re.compile(r"step_([0-9]{8,})")
SIGNS = ("run.json", "config.yaml", "metrics.jsonl")
"""A folder with one of these is a run's."""
ANSWERING = ("generate", "evaluate")
"""Stages that answer prompts once: no steps, no checkpoints."""


@dataclass(frozen=True)
class Curve:
    """One metric over the steps that logged it."""

    steps: tuple[int, ...]
    values: tuple[float | None, ...]
    """None where it was not finite."""

    @property
    def finite(self) -> list[float]:
        """Its values without those that were not finite."""
        return [value for value in self.values if value is not None]


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder says."""

    label: str
    """Its path from the nearest folder that all runs of the page lie in."""
    path: Path
    stage: str
    """As in run.json; "unknown" where nothing says it."""
    config: Mapping[str, Any]
    """Dotted key -> value."""
    curves: Mapping[str, Curve]
    """Metric -> its values over the steps."""
    results: Mapping[str, float]
    """Of evaluation.json."""
    samples: Sequence[Mapping[str, Any]]
    """"prompt" and "response" (texts) as a rule, "step", "reward", "finished", "kl" where they are known."""
    environment: Mapping[str, Any]
    """What it ran on, as it wrote it down when it was last started."""
    checkpoints: tuple[int, ...]
    """Steps, rising."""
    best: int | None
    """The step that validation chose."""
    written: float | None
    """Seconds since 1970 when something was last logged."""
    lacks: Sequence[str]
    """A sentence for each thing that is not there, or not whole."""

    @property
    def last_step(self) -> int | None:
        """The newest step with metrics; None before the first."""
        return max((curve.steps[-1] for curve in self.curves.values()), default=None)

    @property
    def total_steps(self) -> int | None:
        """How many the configuration asks for, where it says so in steps."""
        total = self.config.get("ppo.iterations", self.config.get("steps"))
        return total if isinstance(total, int) else None


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """The runs in the given order, each once. ValueError names a path that holds none, and the runs below it."""
    folders = list(dict.fromkeys(path.resolve() for path in paths))
    for path in paths:
        if not _is_run(path):
            raise ValueError(_no_run(path))
    return [_read_run(path, label) for path, label in zip(folders, labels(folders), strict=True)]


def labels(folders: Sequence[Path]) -> list[str]:
    """Each folder as seen from the nearest folder that all of them lie in."""
    shared = os.path.commonpath([folder.parent for folder in folders])
    return [folder.relative_to(shared).as_posix() for folder in folders]


def _is_run(path: Path) -> bool:
    return any((path / sign).is_file() for sign in SIGNS)


def _no_run(path: Path) -> str:
    if not path.is_dir():
        return f"there is no folder {path}: give the run.dir of one run or more"
    below = sorted(str(sign.parent) for sign in path.glob("*/run.json"))
    there = f"; below it are {', '.join(below)}" if below else ""
    return f"{path} is no run's folder: it has neither {', '.join(SIGNS[:-1])} nor {SIGNS[-1]}{there}"


def _read_run(path: Path, label: str) -> RunRecord:
    lacks: list[str] = []
    run = _json(path, "run.json", "the run's id and stage", lacks)
    config = _config(path, lacks)
    stage = str(run.get("stage") or config.get("stage") or "unknown")
    answering = stage in ANSWERING
    lines = [] if answering else _lines(path, "metrics.jsonl", "no step was logged yet", lacks)
    answers = "responses.jsonl" if answering else "samples.jsonl"
    silent = stage in ("pretrain", "reward", "dpo")  # these write no responses down
    samples = [] if silent else _lines(path, answers, "no response was written down", lacks)
    found = sorted(_checkpoints(path / "checkpoints"))
    if not (found or answering):
        lacks.append("checkpoints/ has no checkpoint: nothing was saved yet")
    results = _json(path, "evaluation.json", "the evaluation's numbers", lacks) if stage == "evaluate" else {}
    return RunRecord(
        label=label,
        path=path,
        stage=stage,
        config=config,
        curves=curves(lines),
        results={name: value for name, value in results.items() if _is_number(value)},
        samples=[line for line in samples if isinstance(line.get("prompt"), str) and isinstance(line.get("response"), str)],
        environment=_json(path, "environment.json", "what the run was started on", lacks),
        checkpoints=tuple(found),
        best=_best(path),
        written=max((file.stat().st_mtime for file in (path / "metrics.jsonl", path / answers) if file.is_file()), default=None),
        lacks=lacks,
    )


def curves(lines: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Metric -> curve, from the lines of metrics.jsonl; of a step that is there twice the later line counts."""
    by_step = {line["step"]: line for line in lines if isinstance(line.get("step"), int)}
    points: dict[str, list[tuple[int, float | None]]] = {}
    for step, line in sorted(by_step.items()):
        for name, value in line.items():
            if "/" in name and (value is None or _is_number(value)):
                points.setdefault(name, []).append((step, value))
    return {name: Curve(*zip(*of, strict=True)) for name, of in points.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _json(path: Path, name: str, what: str, lacks: list[str]) -> dict[str, Any]:
    if not (path / name).is_file():
        lacks.append(f"{name} is not there: {what}")
        return {}
    try:
        return read_json(path / name)
    except ValueError as error:
        lacks.append(str(error))
        return {}


def _lines(path: Path, name: str, without: str, lacks: list[str]) -> list[dict[str, Any]]:
    """The JSON objects of a file, a line each; what a run that is going on has not written to its end is left out, and said."""
    file = path / name
    if not file.is_file():
        lacks.append(f"{name} is not there: {without}")
        return []
    text, _, torn = file.read_bytes().decode(errors="replace").rpartition("\n")
    if torn:
        lacks.append(f"{name}: the last line was not whole when this was read, and is left out")
    found, broken = [], []
    for number, line in enumerate(text.split("\n") if text else [], 1):
        try:
            record = json.loads(line, parse_constant=lambda _: None)  # NaN, which is no JSON
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            found.append(record)
        else:
            broken.append(number)
    if broken:
        of = len(found) + len(broken)
        lacks.append(f"{name}: {len(broken)} of {of} lines are no JSON objects and left out, the first is {broken[0]}")
    elif not found and not torn:
        lacks.append(f"{name} is empty: {without}")
    return found


def _config(path: Path, lacks: list[str]) -> dict[str, Any]:
    if not (path / "config.yaml").is_file():
        lacks.append("config.yaml is not there: the resolved configuration")
        return {}
    try:
        return _flat(read_yaml(path / "config.yaml"))
    except ConfigError as error:
        lacks.append(str(error))
        return {}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; a list is one value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _checkpoints(folder: Path) -> list[int]:
    names = (CHECKPOINT.fullmatch(path.name) for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ()
    return [int(name[1]) for name in names if name]


def _best(path: Path) -> int | None:
    try:
        step = read_json(path / "checkpoints" / "best.json").get("step")
    except ValueError:
        return None
    return step if isinstance(step, int) else None
