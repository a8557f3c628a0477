"""The loop that every stage shares: step, evaluate, log, save, and go on where the last checkpoint left off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from megarlhf.engine import checkpoint
from megarlhf.engine.trainable import StepResult, TrainEngine
from megarlhf.runs.agreement import refuse_together
from megarlhf.runs.folder import Run
from megarlhf.telemetry.metrics import Metrics
from megarlhf.telemetry.progress import Progress


class Stage:
    """What the loop asks of a stage."""

    shown: ClassVar[tuple[str, ...]] = ()
    """Metrics beside the progress bar."""
    models: Mapping[str, TrainEngine]
    """Trained models by their names in checkpoints."""
    total_steps: int
    """Steps (PPO: iterations) of the whole run."""
    notes: Sequence[str] = ()
    """What the user is told before the first step, a line for each."""
    samples: Sequence[Mapping[str, object]] = ()
    """Responses of the newest step or evaluation: "prompt", "response", and what is known of them."""

    def step(self, number: int) -> dict[str, float]:
        """Step `number`, from 0; returns its metrics."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        """Validation metrics of the present weights."""
        raise NotImplementedError

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether an evaluation is the best so far; never where the newest checkpoint is the one to use."""
        return False

    def finish(self) -> None:
        """What is done once, after the last step and before the last checkpoint: nothing, as a rule."""

    def state_dict(self) -> dict:
        """Counters and cursors, as JSON."""
        raise NotImplementedError

    def load_state_dict(self, state: dict) -> None:
        """Go on from saved counters and cursors, before the models have their saved weights. ValueError where they do not fit."""
        raise NotImplementedError


def run_stage(stage: Stage, run: Run) -> dict[str, float]:
    """Run a stage to its end, from its newest checkpoint if it has one; returns the last evaluation's metrics.

    The state after step n is saved as checkpoint n; metrics are logged under n.
    """
    try:
        start = _resume(stage, run)
        return _run_steps(stage, run, start)
    finally:
        run.close()


def _resume(stage: Stage, run: Run) -> int:
    """Restore the stage from the run's newest checkpoint; returns its step, 0 where there is none yet."""
    path = checkpoint.newest(run.checkpoints, run.world)
    start = 0
    if path is not None:
        saved = checkpoint.read_state(path).state
        start = saved["step"]
        problems, changes = run.changes(saved["config"])
        if start > stage.total_steps:
            problems.append(f"{path} is at step {start}, beyond the run's end at {stage.total_steps}")
        try:
            stage.load_state_dict(saved["cursors"])
        except ValueError as error:
            problems.append(str(error))
        refuse_together(problems, run.world)
        checkpoint.load(path, stage.models)
        run.say(f"going on from {path}")
        for change in changes:
            run.say(f"changed since then: {change}")
    return start


def _run_steps(stage: Stage, run: Run, start: int) -> dict[str, float]:
    if start == stage.total_steps:
        run.say(f"already complete at step {start}; choose another run.dir for a new run")
        return {}
    run.introduce(stage.notes)
    run.open_logs(start)
    evaluation: dict[str, float] = {}
    progress = Progress(run.stage, stage.total_steps, initial=start, enabled=run.is_writer)
    for number in range(start, stage.total_steps):
        metrics = stage.step(number)
        done, last, best = number + 1, number + 1 == stage.total_steps, False
        if last:
            stage.finish()
        evaluated = last or _due(done, run.config.eval_every)
        if evaluated:
            evaluation = stage.evaluate()
            best = stage.is_best(evaluation)
            metrics = metrics | evaluation
        run.log(done, metrics, stage.samples)
        stage.samples = ()
        progress.update({name.split("/", 1)[-1]: metrics[name] for name in stage.shown if name in metrics})
        if evaluated and evaluation:
            run.say(f"step {done}: {', '.join(f'{name} {value:.4g}' for name, value in evaluation.items())}{' (best)' if best else ''}")
        if last or best or _due(done, run.config.save_every):
            run.save(done, stage.models, stage.state_dict(), best=best)
    progress.close()
    run.say(f"done: {run.dir}")
    return evaluation


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def step_metrics(role: str, results: list[StepResult], learning_rate: float) -> dict[str, float]:
    """Metrics of a model's optimizer steps: the loss of every term under the term's name, and statistics.

    Means over the steps; statistics as (sum, count) over all of them.
    """
    metrics = Metrics()
    for result in results:
        for term, loss in result.losses.items():
            metrics.add(f"{term}/loss", loss)
        metrics.update(result.stats)
        metrics.add(f"{role}/grad_norm", result.grad_norm)
        metrics.add(f"{role}/skipped_steps", float(result.skipped))
        metrics.add(f"throughput/{role}_padding_share", result.positions - result.tokens, result.positions)
    metrics.set(f"{role}/learning_rate", learning_rate)
    metrics.set(f"{role}/loss_scale", results[-1].loss_scale)
    return metrics.means()
