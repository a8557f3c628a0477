"""Supervised fine-tuning on demonstrations (Ouyang et al. 2022, section 3.5 and Appendices C.1 and C.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megarlhf.batch import TextBatch, stack
from megarlhf.config.stages import SftConfig
from megarlhf.data.collation import prompt_batch, text_batch
from megarlhf.data.order import ShuffledOrder
from megarlhf.data.pretraining import PretrainingStream
from megarlhf.data.tokenized import PromptRow
from megarlhf.data.tokenizers import load_tokenizer
from megarlhf.engine.terms import LanguageModelLoss, Term
from megarlhf.evaluation.responses import ResponseJudge
from megarlhf.evaluation.text import HeldOutText, language_model_loss_on
from megarlhf.generation.generator import Generator
from megarlhf.parallel.groups import World
from megarlhf.telemetry.timers import Timers
from megarlhf.trainers.data import Records
from megarlhf.trainers.loop import run_stage, step_metrics
from megarlhf.trainers.models import ModelPlanner
from megarlhf.trainers.pretrain import scheduled_rate, timed
from megarlhf.trainers.run import Run


class SupervisedFineTuning:
    """A language model on demonstrations, the loss on their responses only, with a share of pretraining rows mixed in."""

    shown = ("model/loss", "model/learning_rate")

    def __init__(self, config: SftConfig, world: World) -> None:
        self.config = config
        data = config.data
        self.tokenizer = load_tokenizer(config.tokenizer.path, eos_token=config.tokenizer.eos_token)
        self.records = Records(self.tokenizer, config.limits)
        self.demonstrations = self.records.demonstrations(data.train)
        valid = self.records.demonstrations(data.valid) if data.valid else []
        ids = {"eos_id": self.tokenizer.eos_id, "vocab_size": self.tokenizer.vocab_size}

        planner = ModelPlanner(world, self.tokenizer, config.parallel, seed=config.run.seed)
        context = config.limits.max_prompt_len + config.limits.max_response_len
        mixed = max(context, data.pretraining.seq_len if data.pretraining else 0)
        plan = planner.plan("model", config.model, "lm", context=mixed)
        judge = planner.plan("reward", config.reward, "scalar", context=context) if config.reward else None
        planner.check()

        self.order = ShuffledOrder(len(self.demonstrations), seed=config.run.seed)
        self.num_mixed = round(config.pretraining_mix * config.batch_size)
        self.text = None
        if self.num_mixed:
            self.text = PretrainingStream(data.pretraining.prefix, seq_len=data.pretraining.seq_len, seed=config.run.seed, **ids)
        self.valid = text_batch(valid, pad_id=self.tokenizer.pad_id) if valid else None
        self.held_out = HeldOutText.of(data.pretraining, **ids)
        self.model = planner.build_trained(plan, dropout=config.dropout)
        self.models = {"model": self.model}
        self.judge = self._judge(planner.build_frozen(judge), valid, world) if judge else None
        per_step = config.batch_size - self.num_mixed
        self.total_steps = max(1, math.ceil(config.epochs * len(self.demonstrations) / per_step))
        self.best: float | None = None
        self.timers = Timers()

    def _judge(self, reward, valid, world: World) -> ResponseJudge:
        rows = [PromptRow(row.prompt_ids, row.source, number) for number, row in enumerate(valid)]
        prompts = prompt_batch(rows, pad_id=self.tokenizer.pad_id)
        generator = Generator(
            self.model.transformers,
            self.model.groups,
            architecture=self.model.spec.architecture,
            eos_id=self.tokenizer.eos_id,
            pad_id=self.tokenizer.pad_id,
        )
        return ResponseJudge(generator, prompts, self.config.sampling, seed=self.config.run.seed, reward=reward)

    def next_batch(self) -> TextBatch:
        """The next demonstrations, and the pretraining rows that go with them."""
        rows = [self.demonstrations[i] for i in self.order.take(self.config.batch_size - self.num_mixed)]
        batch = text_batch(rows, pad_id=self.tokenizer.pad_id)
        return stack(batch, self.text.take(self.num_mixed), pad_id=self.tokenizer.pad_id) if self.text else batch

    def step(self, number: int) -> dict[str, float]:
        """One optimizer step on the next batch."""
        peak = self.config.model.adam.learning_rate
        rate = scheduled_rate(self.config.schedule, number, peak=peak, total_steps=self.total_steps)
        with self.timers("step_seconds"):
            result = self.model.step([Term("model", LanguageModelLoss(), self.next_batch())], learning_rate=rate)
        return step_metrics("model", [result], rate) | timed(self.timers)

    def evaluate(self, number: int) -> dict[str, float]:
        """Loss on validation demonstrations and on held-out text, and the reward of sampled responses where there is a judge."""
        metrics = self.held_out.metrics(self.model)
        if self.valid is not None:
            metrics["valid/loss"] = language_model_loss_on(self.model, self.valid)
        if self.judge is not None:
            metrics |= self.judge.judge(iteration=number).metrics("valid")
        return metrics

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether this evaluation is the best by `select_by` (Appendix C.1: reward-model score on validation prompts)."""
        if self.config.select_by == "last":
            return False
        score = metrics["valid/reward_mean"] if self.config.select_by == "reward" else -metrics["valid/loss"]
        better = self.best is None or score > self.best
        self.best = score if better else self.best
        return better

    def finish(self) -> None:
        """Nothing more to do."""

    def state_dict(self) -> dict:
        """Data cursors and the best score."""
        return {"order": self.order.state_dict(), "text": self.text.state_dict() if self.text else None, "best": self.best}

    def load_state_dict(self, state: dict) -> None:
        """Go on from saved cursors."""
        self.order.load_state_dict(state["order"])
        if self.text:
            self.text.load_state_dict(state["text"])
        self.best = state["best"]


def sft(config: SftConfig, world: World, *, fresh: bool = False) -> dict[str, float]:
    """`megarlhf sft`."""
    stage = SupervisedFineTuning(config, world)
    run = Run(config, world, fresh=fresh)
    for line in stage.records.skipped():
        run.say(line)
    try:
        return run_stage(stage, run)
    finally:
        run.close()
