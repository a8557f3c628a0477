"""What must or should hold between keys of several sections, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

from megarlhf.config.fields import default_of, show
from megarlhf.config.sections import ModelConfig, PretrainingDataConfig, RunConfig, ScheduleConfig

OF_STEPS = (
    "save_every", "save_minutes", "stop_after_minutes", "keep_checkpoints", "keep_every", "save_in_background", "resume",
    "max_skipped_steps", "alert_deviations", "alert_window", "eval_every", "profile_step", "sinks", "wandb_mode",
)  # fmt: skip
"""Keys of `run` that say how a run of steps goes."""
NO_RESPONSES = "the files here hold prompts only"
IDLE: dict[str, dict[str, str]] = {
    "ppo": {"limits.max_response_len": f"{NO_RESPONSES}; generation.sampling.max_new_tokens limits what is sampled"},
    "generate": {
        **{f"run.{name}": "generate takes no steps" for name in OF_STEPS},
        "limits.max_response_len": f"{NO_RESPONSES}; sampling.max_new_tokens limits what is sampled",
        "model.micro_batch_tokens": "sampling.max_batch_size says how many rows are sampled at a time",
        "model.micro_batch_size": "sampling.max_batch_size says how many rows are sampled at a time",
    },
    "evaluate": {f"run.{name}": "evaluate takes no steps" for name in OF_STEPS},
}
"""Command -> key of a section that other commands share and that this one never reads -> why."""


def warmup_violations(schedule: ScheduleConfig, total_steps: int) -> list[str]:
    """A cosine over the whole run has no place for a warm-up that is longer."""
    if schedule.shape != "cosine" or schedule.warmup_steps <= total_steps:
        return []
    return [f"schedule.warmup_steps {schedule.warmup_steps} is longer than the run's {total_steps} steps: the peak rate is never reached"]


def warmup_doubts(key: str, warmup: int, total: int) -> list[str]:
    """A constant rate does not know the run's length, so that a run may end within its warm-up."""
    return [f"{key} {warmup} is longer than the run's {total} steps: the peak rate is never reached"] if warmup > total else []


def same_file_doubts(**paths: str | None) -> list[str]:
    """Validation on what is trained on."""
    given: dict[str, str] = {}
    found = []
    for key, path in paths.items():
        if path is not None and path in given:
            found.append(f"data.{key} is data.{given[path]}, {path}: validation then says nothing of what was not trained on")
        elif path is not None:
            given[path] = key
    return found


def task_name(path: str | Path) -> str:
    """What the results of a task's file are called by: "sst" for "data/sst.jsonl"."""
    name = Path(path).name
    return name.partition(".")[0] or name


def task_violations(paths: Sequence[str], shots: int | None) -> list[str]:
    """Results of two files under one name could not be told apart, and examples stand before the queries of tasks only."""
    names = Counter(map(task_name, paths))
    shared = {name: count for name, count in names.items() if count > 1}
    found = [f"tasks has {count} files of the name {name}, which their results would share: rename one" for name, count in shared.items()]
    if shots is not None and not paths:
        found.append(f"shots {shots} says how many examples stand before the queries of tasks, and tasks is empty")
    return found


def fresh_doubts(**models: ModelConfig) -> list[str]:
    """Random weights where the paper starts from a trained model."""
    fresh = [role for role, model in models.items() if model.load is None]
    return [f"{role}.architecture starts from random weights; the paper loads a trained model here" for role in fresh]


def unused_text_doubts(coefficient: str, value: float, text: PretrainingDataConfig | None) -> list[str]:
    """Text that is neither trained on nor evaluated on."""
    if text is None or value or text.valid_prefix is not None:
        return []
    return [f"data.pretraining is not used: {coefficient} is 0, and it names no valid_prefix"]


def unjudged_doubts(run: RunConfig, data: Mapping[str, object]) -> list[str]:
    """Evaluations without anything to evaluate on; `data`: key -> what there is of it."""
    if not run.eval_every or any(data.values()):
        return []
    return [f"run.eval_every {run.eval_every} evaluates nothing: {', '.join(data)} would be evaluated on, and none is given"]


def reference_doubts(name: str, model: ModelConfig, reference: ModelConfig) -> list[str]:
    """A reference that is not what the policy, the model of that `name`, starts from."""
    if model.load is None:
        return []
    if model.load != reference.load:
        return [f"reference.load {reference.load} is not what the policy starts from, {name}.load {model.load}"]
    differing = [key for key in ("load_model", "load_average") if getattr(model, key) != getattr(reference, key)]
    return [
        f"reference.{key} {show(getattr(reference, key))} is not what the policy starts from, {name}.{key} {show(getattr(model, key))}"
        for key in differing
    ]


def idle_doubts(config: Any) -> list[str]:
    """Keys that a command never reads and that are not what they are by default."""
    found = []
    for key, why in IDLE[config.stage].items():
        path, _, name = key.rpartition(".")
        section = attrgetter(path)(config)
        default = next(default_of(field, MISSING) for field in fields(section) if field.name == name)
        found += [f"{key} has no effect: {why}"] if getattr(section, name) != default else []
    return found
