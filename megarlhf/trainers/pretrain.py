"""Pretraining: next-token prediction on packed text (Brown et al. 2020), the base of everything after it."""

from __future__ import annotations

from collections.abc import Mapping

from megarlhf.algorithms.learning_rate import constant_with_warmup, cosine
from megarlhf.config.stages import PretrainConfig, ScheduleConfig
from megarlhf.data.pretraining import PretrainingStream
from megarlhf.data.tokenizers import load_tokenizer
from megarlhf.engine.terms import LanguageModelLoss, Term
from megarlhf.evaluation.text import HeldOutText
from megarlhf.parallel.groups import World
from megarlhf.telemetry.timers import Timers
from megarlhf.trainers.loop import run_stage, step_metrics
from megarlhf.trainers.models import ModelPlanner
from megarlhf.trainers.run import Run


def scheduled_rate(schedule: ScheduleConfig, step: int, *, peak: float, total_steps: int) -> float:
    """The learning rate of optimizer step `step`, from 0."""
    if schedule.shape == "constant":
        return constant_with_warmup(step, peak=peak, warmup_steps=schedule.warmup_steps)
    return cosine(
        step, peak=peak, total_steps=total_steps, final_fraction=schedule.final_fraction, warmup_steps=schedule.warmup_steps
    )


class Pretraining:
    """A language model on packed rows of text."""

    shown = ("model/loss", "model/learning_rate")

    def __init__(self, config: PretrainConfig, world: World) -> None:
        self.config = config
        tokenizer = load_tokenizer(config.tokenizer.path, eos_token=config.tokenizer.eos_token)
        planner = ModelPlanner(world, tokenizer, config.parallel, seed=config.run.seed)
        plan = planner.plan("model", config.model, "lm", context=config.data.seq_len)
        planner.check()
        data = config.data
        ids = {"eos_id": tokenizer.eos_id, "vocab_size": tokenizer.vocab_size}
        self.text = PretrainingStream(data.prefix, seq_len=data.seq_len, seed=config.run.seed, **ids)
        self.held_out = HeldOutText.of(data, **ids)
        self.model = planner.build_trained(plan)
        self.models = {"model": self.model}
        self.total_steps = config.steps
        self.timers = Timers()

    def step(self, number: int) -> dict[str, float]:
        """One optimizer step on the next rows."""
        rate = scheduled_rate(
            self.config.schedule, number, peak=self.config.model.adam.learning_rate, total_steps=self.config.steps
        )
        with self.timers("step_seconds"):
            rows = self.text.take(self.config.batch_size)
            result = self.model.step([Term("model", LanguageModelLoss(), rows)], learning_rate=rate)
        return step_metrics("model", [result], rate) | timed(self.timers)

    def evaluate(self, number: int) -> dict[str, float]:
        """Language-model loss on held-out text."""
        return self.held_out.metrics(self.model)

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        """The newest checkpoint is the one to use."""
        return False

    def finish(self) -> None:
        """Nothing more to do."""

    def state_dict(self) -> dict:
        """The data cursor."""
        return {"text": self.text.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Go on at the data cursor."""
        self.text.load_state_dict(state["text"])


def timed(timers: Timers) -> dict[str, float]:
    """The seconds collected since the last call, as time/<name>."""
    return {f"time/{name}": seconds for name, seconds in timers.collect().items()}


def pretrain(config: PretrainConfig, world: World, *, fresh: bool = False) -> dict[str, float]:
    """`megarlhf pretrain`."""
    stage = Pretraining(config, world)
    run = Run(config, world, fresh=fresh)
    try:
        return run_stage(stage, run)
    finally:
        run.close()
