"""How a stage's learning rate moves from step to step."""

from __future__ import annotations

from megarlhf.algorithms.learning_rate import constant_with_warmup, cosine
from megarlhf.config import ConfigError
from megarlhf.config.relations import warmup_violations
from megarlhf.config.sections import ScheduleConfig


def refuse_long_warmup(schedule: ScheduleConfig, total_steps: int) -> None:
    """ConfigError where the warm-up does not fit into a run whose length followed from its data; the same on every rank."""
    if found := warmup_violations(schedule, total_steps):
        raise ConfigError("; ".join(found))


def scheduled_rate(schedule: ScheduleConfig, step: int, *, peak: float, total_steps: int) -> float:
    """The learning rate of optimizer step `step`, from 0."""
    if schedule.shape == "constant":
        return constant_with_warmup(step, peak=peak, warmup_steps=schedule.warmup_steps)
    return cosine(
        step, peak=peak, total_steps=total_steps, final_fraction=schedule.final_fraction, warmup_steps=schedule.warmup_steps
    )
