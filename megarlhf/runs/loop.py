"""The loop that every stage shares: step, evaluate, log, save, and go on where the last checkpoint left off."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Mapping, Sequence
from typing import ClassVar

from megarlhf.engine import checkpoint
from megarlhf.engine.trainable import StepResult, TrainEngine
from megarlhf.parallel.collectives import largest_of_world
from megarlhf.runs.agreement import RunError, refuse_together
from megarlhf.runs.bad_batches import keep_bad_batches
from megarlhf.runs.folder import Run
from megarlhf.runs.interruption import CLOCK, Interrupted, Interruption
from megarlhf.runs.profiling import profiled, refuse_late_profile
from megarlhf.telemetry.alerts import Alerts
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
    best: float | None = None
    """What the best evaluation so far gave, where evaluations choose a checkpoint."""
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
    """Run a stage to its end, from the checkpoint that the run goes on from; returns the last evaluation's metrics.

    The state after step n is saved as checkpoint n; metrics are logged under n. Interrupted, when a signal asked any rank to stop, or
    the run's time is over: after the step that was under way, and with its state saved. RunError when the training has diverged.
    """
    start = _resume(stage, run)
    with Interruption(within=run.asked) as interruption:
        return _run_steps(stage, run, start, interruption)


def _resume(stage: Stage, run: Run) -> int:
    """Restore the stage from the run's checkpoint; returns its step, 0 where there is none yet."""
    saved = run.resumed
    if saved is None:
        return 0
    start, problems = saved.state["step"], []
    if start > stage.total_steps:
        problems.append(f"{saved.path} is at step {start}, beyond the run's end at {stage.total_steps}")
    try:
        stage.load_state_dict(saved.state["cursors"])
    except ValueError as error:
        problems.append(str(error))
    refuse_together(problems, run.world)
    checkpoint.load(saved, stage.models)
    run.say_changes()
    return start


def _run_steps(stage: Stage, run: Run, start: int, interruption: Interruption) -> dict[str, float]:
    if start == stage.total_steps:
        run.say(f"already complete at step {start}; choose another run.dir for a new run")
        return {}
    refuse_late_profile(run, stage.total_steps)
    run.introduce(stage.notes)
    run.open_logs(start)
    if not run.find_best():
        stage.best = None
    evaluation: dict[str, float] = {}
    pace, alerts = _Pace(run, interruption), Alerts(deviations=run.config.alert_deviations, window=run.config.alert_window)
    if run.resumed is not None:
        alerts.load_state_dict(run.resumed.state.get("alerts", {}))
    with Progress(run.stage, stage.total_steps, initial=start, enabled=run.is_writer) as progress:
        for number in range(start, stage.total_steps):
            done, last, best, best_before = number + 1, number + 1 == stage.total_steps, False, stage.best
            run.world.alarm.doing = f"step {done}"
            with profiled(run, done):
                metrics = stage.step(number)
            keep_bad_batches(run, done, stage.models)
            metrics |= _alerts_of(metrics, alerts, run, done)
            if diverged := divergence(stage.models, max_skipped_steps=run.config.max_skipped_steps, last=last):
                run.log(done, metrics)
                raise RunError(f"step {done}: {diverged}; nothing is saved of it, {run.newest()}")
            if last:
                stage.finish()
            asked, save_now = pace.after_step()
            if last or _due(done, run.config.eval_every):
                evaluation = stage.evaluate()
                best = stage.is_best(evaluation)
                metrics = metrics | evaluation
                _say_evaluation(run, done, evaluation, best)
            if lost := run.saving.take_seconds():
                metrics["time/save_seconds"] = lost
            run.log(done, metrics, stage.samples)
            stage.samples = ()
            progress.update({_short(name): metrics[name] for name in stage.shown if name in metrics})
            if last or best or asked or save_now or _due(done, run.config.save_every):
                if not _save(stage, run, done, alerts, best=best, last=last or bool(asked)):
                    stage.best = best_before
                pace.saved()
            if asked and not last:
                by = f"run.stop_after_minutes {run.config.stop_after_minutes:g}" if asked == CLOCK else signal.Signals(asked).name
                raise Interrupted(f"stopped by {by} after step {done} of {stage.total_steps}; start it again to go on", asked)
    if wrong := [name for name, value in evaluation.items() if not math.isfinite(value)]:
        raise RunError(f"the last evaluation gave no finite number for {', '.join(wrong)}; see {run.dir}/metrics.jsonl")
    run.say(f"done: {run.dir}")
    return evaluation


def _alerts_of(metrics: Mapping[str, float], alerts: Alerts, run: Run, done: int) -> dict[str, float]:
    found, lines = alerts.look(metrics)
    for line in lines:
        run.say(f"step {done}: alert: {line}")
    return found


def _say_evaluation(run: Run, done: int, evaluation: Mapping[str, float], best: bool) -> None:
    if evaluation:
        run.say(f"step {done}: {', '.join(f'{name} {value:.4g}' for name, value in evaluation.items())}{' (best)' if best else ''}")


def _save(stage: Stage, run: Run, done: int, alerts: Alerts, *, best: bool, last: bool) -> bool:
    """Save what is finite, as it is now; False where the disk has no room for it."""
    if broken := [name for name, engine in stage.models.items() if not engine.weights_are_finite()]:
        raise RunError(f"step {done}: the weights of {', '.join(broken)} are not finite; they are not saved, {run.newest()}")
    return run.save(done, stage.models, stage.state_dict(), alerts=alerts.state_dict(), of=stage.total_steps, best=best, last=last)


class _Pace:
    """When to save besides every `save_every` steps, and whether to stop: agreed between all ranks after each step."""

    def __init__(self, run: Run, interruption: Interruption) -> None:
        self._run = run
        self._interruption = interruption
        self.saved()

    def saved(self) -> None:
        """Everything up to now is on disk."""
        self._since = time.monotonic()

    def after_step(self) -> tuple[int, bool]:
        """(number of the signal that any rank received, CLOCK where rank 0's says that the run's time is over, 0 for neither; whether
        rank 0's clock says that a save is due).

        A checkpoint that every rank has written by now is finished here.
        """
        config = self._run.config
        due = self._is_over(config.save_minutes, since=self._since)
        over = self._is_over(config.stop_after_minutes, since=self._run.started)
        mine = [self._interruption.received, int(due), int(over), int(self._run.saving.is_writing)]
        received, due, over, writing = largest_of_world(mine, self._run.world)
        if not writing:
            self._run.saving.finish()
        return received or (CLOCK if over else 0), bool(due)

    def _is_over(self, minutes: float | None, *, since: float) -> bool:
        return self._run.is_writer and minutes is not None and time.monotonic() - since >= 60 * minutes


def divergence(models: Mapping[str, TrainEngine], *, max_skipped_steps: int, last: bool) -> str | None:
    """Why training cannot go on, if it cannot: steps that were skipped because their gradients were not finite.

    While fp16's loss scale is still falling skipped steps are its search; they are not counted before it is at its smallest.
    With `last` one such step is enough: a run must not end on it as if all were well.
    """
    for name, engine in models.items():
        skips = engine.optimizer.consecutive_skips
        searching = engine.spec.precision == "fp16" and not engine.optimizer.at_smallest_loss_scale
        if skips and not searching and (last or skips >= max_skipped_steps):
            rate = "a smaller learning rate, or clip_grad, may help"
            return f"{name}'s gradients were not finite in the last {skips} steps, which were skipped: it has diverged ({rate})"
    return None


def _short(name: str) -> str:
    """A metric's name beside the progress of its stage: without its prefix, but for text beside the policy."""
    return name if name.startswith("ptx/") else name.split("/", 1)[-1]


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def step_metrics(role: str, results: list[StepResult], learning_rate: float) -> dict[str, float]:
    """Metrics of a model's optimizer steps: the loss of every term under the term's name, and statistics.

    Losses and statistics are means over what they count in all of the steps, the gradient's norm one over the steps.
    """
    metrics = Metrics()
    for result in results:
        metrics.update({f"{term}/loss": loss for term, loss in result.sums.items()})
        metrics.update(result.stats)
        metrics.add(f"{role}/grad_norm", result.grad_norm)
        metrics.add(f"{role}/skipped_steps", float(result.skipped))
        metrics.add(f"throughput/{role}_padding_fraction", result.positions - result.tokens, result.positions)
    metrics.set(f"{role}/learning_rate", learning_rate)
    metrics.set(f"{role}/loss_scale", results[-1].loss_scale)
    return metrics.means()
