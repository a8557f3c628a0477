"""Supervised fine-tuning on demonstrations (Ouyang et al. 2022, section 3.5 and Appendices C.1 and C.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from megarlhf.batch import TextBatch, stack
from megarlhf.config.stages import SftConfig
from megarlhf.data.collation import prompt_batch, text_batch
from megarlhf.data.order import ShuffledOrder
from megarlhf.data.tokenized import DemonstrationRow, PromptRow
from megarlhf.engine.frozen import FrozenEngine
from megarlhf.engine.terms import LanguageModelLoss, Term
from megarlhf.evaluation.responses import NUM_SAMPLES, ResponseJudge, generator_of, response_records
from megarlhf.evaluation.text import language_model_loss_on
from megarlhf.parallel import platform
from megarlhf.parallel.groups import World
from megarlhf.runs.folder import Run
from megarlhf.runs.loop import Stage, run_stage, step_metrics
from megarlhf.runs.models import ModelPlanner
from megarlhf.runs.records import Records, open_tokenizer
from megarlhf.runs.schedules import refuse_long_warmup, scheduled_rate
from megarlhf.telemetry.timers import Timers


class SupervisedFineTuning(Stage):
    """A language model on demonstrations, the loss on their responses only, with a share of pretraining rows mixed in."""

    shown = ("model/loss", "model/learning_rate")

    def __init__(self, config: SftConfig, world: World) -> None:
        self.config = config
        data = config.data
        self.tokenizer = open_tokenizer(config.tokenizer, world)
        records = Records(self.tokenizer, config.limits)
        self.demonstrations = records.demonstrations(data.train)
        valid = records.demonstrations(data.valid)
        self.num_mixed = round(config.pretraining_mix * config.batch_size)
        self.text = records.text(data.pretraining, seed=config.run.seed) if self.num_mixed else None
        self.held_out = records.held_out(data.pretraining)

        planner = ModelPlanner(world, self.tokenizer, config.parallel, seed=config.run.seed, problems=records.problems)
        context = config.limits.max_prompt_len + config.limits.max_response_len
        mixed = max(context, data.pretraining.seq_len if data.pretraining else 0)
        plan = planner.plan("model", config.model, "lm", context=mixed)
        reward = planner.plan("reward", config.reward, "scalar", context=context) if config.reward else None
        planner.check()

        self.order = ShuffledOrder(len(self.demonstrations), seed=config.run.seed)
        self.valid = text_batch(valid, pad_id=self.tokenizer.pad_id) if valid else None
        self.model = planner.build_trained(plan, dropout=config.dropout)
        self.models = {"model": self.model}
        self.judge = self._judge(valid, planner.build_frozen(reward) if reward else None) if valid else None
        self.notes = [*records.notes, *planner.notes]
        per_step = config.batch_size - self.num_mixed
        self.total_steps = max(1, math.ceil(config.epochs * len(self.demonstrations) / per_step))
        refuse_long_warmup(config.schedule, self.total_steps)
        self.best: float | None = None
        self.timers = Timers(platform.synchronize)

    def _judge(self, valid: Sequence[DemonstrationRow], reward: FrozenEngine | None) -> ResponseJudge:
        """Responses to all validation prompts for the reward model, or to a few of them, to be read."""
        rows = [PromptRow(row.prompt_ids, row.source) for row in (valid if reward else valid[:NUM_SAMPLES])]
        prompts = prompt_batch(rows, pad_id=self.tokenizer.pad_id)
        generator = generator_of(self.model, self.tokenizer)
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
        return step_metrics("model", [result], rate) | self.timers.metrics()

    def evaluate(self) -> dict[str, float]:
        """Loss on validation demonstrations and on held-out text, and the reward of sampled responses where there is a judge."""
        metrics = self.held_out.metrics(self.model)
        if self.valid is not None:
            metrics["valid/loss"] = language_model_loss_on(self.model, self.valid)
            judged = self.judge.judge()
            self.samples = response_records(judged.rollouts, self.tokenizer, reward=judged.scores)[:NUM_SAMPLES]
            if judged.scores is not None:
                metrics |= judged.metrics("valid")
        return metrics

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether this evaluation is the best by `select_by` (Appendix C.1: reward-model score on validation prompts)."""
        if self.config.select_by == "last":
            return False
        score = metrics["valid/reward_mean"] if self.config.select_by == "reward" else -metrics["valid/loss"]
        better = self.best is None or score > self.best
        self.best = score if better else self.best
        return better

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
    run = Run(config, world, fresh=fresh)
    return run_stage(SupervisedFineTuning(config, world), run)
