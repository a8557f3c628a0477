"""The loop that every stage shares: step, evaluate, log, save, and go on where the last checkpoint left off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from megarlhf.engine.trainable import StepResult, TrainEngine
from megarlhf.telemetry.metrics import Metrics
from megarlhf.telemetry.progress import Progress
from megarlhf.trainers.run import Run


class Stage(Protocol):
    """What the loop asks of a stage."""

    total_steps: int
    """Steps (PPO: iterations) of the whole run."""
    shown: tuple[str, ...]
    """Metrics beside the progress bar."""
    models: Mapping[str, TrainEngine]
    """Trained models by their names in checkpoints."""

    def step(self, number: int) -> dict[str, float]:
        """Step `number`, from 0; returns its metrics."""
        ...

    def evaluate(self, number: int) -> dict[str, float]:
        """Validation metrics after `number` steps."""
        ...

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether an evaluation is the best so far."""
        ...

    def finish(self) -> None:
        """What is done once, after the last step and before the last checkpoint."""
        ...

    def state_dict(self) -> dict:
        """Counters and cursors, as JSON."""
        ...

    def load_state_dict(self, state: dict) -> None:
        """Go on from saved counters and cursors."""
        ...


def run_stage(stage: Stage, run: Run) -> dict[str, float]:
    """Run a stage to its end, from its newest checkpoint if it has one; returns the last evaluation's metrics.

    The state after step n is saved as checkpoint n; metrics are logged under n.
    """
    saved = run.resume(stage.models)
    start = 0
    if saved is not None:
        stage.load_state_dict(saved["cursors"])
        start = saved["step"]
        if saved["finished"]:
            run.say(f"already complete at step {start}; use another run.dir for a new run")
            return {}
    evaluation: dict[str, float] = {}
    progress = Progress(run.stage, stage.total_steps, initial=start, enabled=run.is_writer)
    for number in range(start, stage.total_steps):
        metrics = stage.step(number)
        done, last = number + 1, number + 1 == stage.total_steps
        if last:
            stage.finish()
        best = False
        if last or _due(done, run.config.eval_every):
            evaluation = stage.evaluate(done)
            best = stage.is_best(evaluation)
        run.log(done, metrics | evaluation if last or _due(done, run.config.eval_every) else metrics)
        progress.update({name.split("/", 1)[-1]: metrics[name] for name in stage.shown if name in metrics})
        if last or best or _due(done, run.config.save_every):
            run.save(done, stage.models, {"cursors": stage.state_dict(), "finished": last}, best=best)
    progress.close()
    return evaluation


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def step_metrics(role: str, results: list[StepResult], learning_rate: float) -> dict[str, float]:
    """Metrics of a model's optimizer steps: `role`/loss of its own term, other terms under their names, and statistics.

    Means over the steps; statistics as (sum, count) over all of them.
    """
    metrics = Metrics()
    for result in results:
        for term, loss in result.losses.items():
            metrics.add(f"{term}/loss", loss)
        metrics.update(result.stats)
        metrics.add(f"{role}/grad_norm", result.grad_norm)
        metrics.add(f"{role}/skipped_steps", float(result.skipped))
    metrics.set(f"{role}/learning_rate", learning_rate)
    metrics.set(f"{role}/loss_scale", results[-1].loss_scale)
    return metrics.means()
