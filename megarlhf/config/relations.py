"""What must or should hold between keys of several sections, in words."""

from __future__ import annotations

from megarlhf.config.sections import ModelConfig, ScheduleConfig


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


def fresh_doubts(**models: ModelConfig) -> list[str]:
    """Random weights where the paper starts from a trained model."""
    fresh = [role for role, model in models.items() if model.load is None]
    return [f"{role}.architecture starts from random weights; the paper loads a trained model here" for role in fresh]
