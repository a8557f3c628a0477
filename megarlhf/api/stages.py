"""Each stage as a function of its configuration; the command line runs the same."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from megarlhf.config import COMMANDS, ConfigError, check_config, doubts, load_stage_config
from megarlhf.config.dpo import DpoConfig
from megarlhf.config.inference import EvaluateConfig, GenerateConfig
from megarlhf.config.packages import missing_packages
from megarlhf.config.paths import path_problems
from megarlhf.config.ppo import PpoConfig
from megarlhf.config.stage import StageConfig
from megarlhf.config.training import PretrainConfig, RewardConfig, SftConfig
from megarlhf.parallel.launch import Place, place_in_run
from megarlhf.telemetry.sinks import check_sinks

if TYPE_CHECKING:
    from megarlhf.api.model import Model
    from megarlhf.parallel.groups import World
    from megarlhf.runs.interruption import Interruption

Callback = Callable[[int, dict[str, float]], None]
"""Called on every rank after each step (PPO: iteration) with its number, from 1, and a copy of its metrics (docs/metrics.md).

It may read, write files and print; what it returns is not looked at. An exception ends the run as one of its own would, with what was
saved before, and goes on to the caller: in a run of several ranks it must come on all of them, since the others would wait.
"""
C = TypeVar("C", bound=StageConfig)
STAGES = {
    "pretrain": "megarlhf.trainers.pretrain:pretrain",
    "sft": "megarlhf.trainers.sft:sft",
    "reward": "megarlhf.trainers.reward_model:reward_model",
    "ppo": "megarlhf.trainers.ppo:ppo",
    "dpo": "megarlhf.trainers.dpo:dpo",
    "generate": "megarlhf.trainers.generate:generate_responses",
    "evaluate": "megarlhf.trainers.evaluate:evaluate",
}
"""Command -> what runs it, called with the configuration and the run; imported when it is needed, as it imports torch."""


@dataclass(frozen=True)
class FinishedRun:
    """What a stage leaves."""

    config: StageConfig
    """As it was run: with ~ and ${NAME} put into its paths."""
    metrics: dict[str, float]
    """Of the last evaluation; empty where the run was complete before."""
    _open: dict[str, Model] = field(default_factory=dict, repr=False, compare=False)

    @property
    def dir(self) -> Path:
        """Its folder: metrics.jsonl, checkpoints/, responses.jsonl (docs/runs.md)."""
        return Path(self.config.run.dir)

    @property
    def policy(self) -> Model:
        """The language model that the run ended with, read from its checkpoint where it is not open: see `Model.of_run`."""
        return self._model("lm")

    @property
    def reward_model(self) -> Model:
        """The same of a reward model."""
        return self._model("scalar")

    def _model(self, head: Literal["lm", "scalar"]) -> Model:
        from megarlhf.api.model import Model

        if head not in self._open or self._open[head].is_closed:
            self._open[head] = Model.of_run(self.config, head)
        return self._open[head]


def load(command: str, path: Path | str, overrides: Sequence[str] = ()) -> StageConfig:
    """The configuration that a YAML file gives `command`, after overrides such as "run.seed=2". ConfigError lists all that is wrong."""
    if command not in COMMANDS:
        raise ConfigError(f"there is no command {command!r}; there are {', '.join(COMMANDS)}")
    return load_stage_config(path, overrides, command=command)


def pretrain(config: PretrainConfig, *, callbacks: Sequence[Callback] = (), fresh: bool = False) -> FinishedRun:
    """Train a language model on packed text: `megarlhf pretrain`. What all stages take and raise is said at `run`."""
    return run(config, PretrainConfig, callbacks=callbacks, fresh=fresh)


def sft(config: SftConfig, *, callbacks: Sequence[Callback] = (), fresh: bool = False) -> FinishedRun:
    """Fine-tune a language model on demonstrations: `megarlhf sft`. See `run`."""
    return run(config, SftConfig, callbacks=callbacks, fresh=fresh)


def reward(config: RewardConfig, *, callbacks: Sequence[Callback] = (), fresh: bool = False) -> FinishedRun:
    """Train a reward model on rankings: `megarlhf reward`. See `run`."""
    return run(config, RewardConfig, callbacks=callbacks, fresh=fresh)


def ppo(config: PpoConfig, *, callbacks: Sequence[Callback] = (), fresh: bool = False) -> FinishedRun:
    """Train a policy by PPO, PPO-ptx, GRPO, RLOO or REINFORCE++: `megarlhf ppo`. See `run`."""
    return run(config, PpoConfig, callbacks=callbacks, fresh=fresh)


def dpo(config: DpoConfig, *, callbacks: Sequence[Callback] = (), fresh: bool = False) -> FinishedRun:
    """Train a policy on rankings directly: `megarlhf dpo`. See `run`."""
    return run(config, DpoConfig, callbacks=callbacks, fresh=fresh)


def generate(config: GenerateConfig, *, fresh: bool = False) -> FinishedRun:
    """Answer a file of prompts into <run.dir>/responses.jsonl: `megarlhf generate`. See `run`."""
    return run(config, GenerateConfig, fresh=fresh)


def evaluate(config: EvaluateConfig, *, fresh: bool = False) -> FinishedRun:
    """Measure a finished model: `megarlhf evaluate`; the numbers are the returned run's metrics. See `run`."""
    return run(config, EvaluateConfig, fresh=fresh)


def run(config: C, expected: type[C], *, callbacks: Sequence[Callback] = (), fresh: bool = False) -> FinishedRun:
    """Run a stage to its end, in this process alone or, under torchrun or srun, together with the others; a collective then.

    It goes on from what run.dir holds; with `fresh` it refuses to. Nothing ends the process: ConfigError (a ValueError) for what is
    wrong with the configuration or its data, RunError for what goes wrong, its kind Interrupted where SIGTERM or Ctrl-C asked it to
    stop, with everything saved. Memory and process groups are let go of, so that calls may follow one another.
    """
    if not isinstance(config, expected):
        raise TypeError(f"expected a {expected.__name__}, got {type(config).__name__}: megarlhf.load(command, path) reads one from YAML")
    config, place, callbacks = check_config(config), place_in_run(), tuple(callbacks)
    problems = problems_of(config, place)
    if problems and place.size == 1:
        raise ConfigError("\n".join(problems))
    from megarlhf.api.process import world_of_process

    with world_of_process(config) as world:
        try:
            return FinishedRun(config, run_in(world, config, problems=problems, callbacks=callbacks, fresh=fresh))
        finally:
            gc.collect()  # models are cycles


def problems_of(config: StageConfig, place: Place, *, to_come: Collection[str] = ()) -> list[str]:
    """What a valid configuration names and this process cannot find; imports nothing heavy.

    Args: to_come: folders of runs that will have ended by then.
    """
    problems = path_problems(config, to_come=to_come) + missing_packages(config)
    if place.rank == 0:  # the only one that writes
        problems += check_sinks(config.run.sinks)
    return problems


def run_in(
    world: World,
    config: StageConfig | None,
    *,
    problems: Sequence[str] = (),
    callbacks: Sequence[Callback] = (),
    fresh: bool = False,
    asked: Interruption | None = None,
) -> dict[str, float]:
    """Run a stage in a world that this process has joined; a collective. Returns the last evaluation's metrics.

    Args: asked: where the process listens for signals around its runs, see `Run`.
    ConfigError on every rank where any rank has `problems`, as one without a configuration has, or another configuration.
    """
    from megarlhf.runs.agreement import refuse_together, require_same_config
    from megarlhf.runs.folder import Run

    refuse_together(problems, world)
    require_same_config(config, world)
    for doubt in doubts(config) if world.rank == 0 else ():
        print(f"megarlhf {config.stage}: is this meant? {doubt}", file=sys.stderr, flush=True)
    with Run(config, world, fresh=fresh, callbacks=callbacks, asked=asked) as run:
        metrics = stage_of(config.stage)(config, run)
    world.barrier()  # torchrun ends the others when one has failed, not when one is done: all are done here
    return metrics


def stage_of(command: str) -> Callable[..., dict[str, float]]:
    """What runs a command."""
    module, _, name = STAGES[command].partition(":")
    return getattr(importlib.import_module(module), name)
