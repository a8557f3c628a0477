"""The reward model: K ranked completions per prompt, one forward each (Ouyang et al. 2022, section 3.5 and Appendix C.2)."""

from __future__ import annotations

import math

from megarlhf.config.training import RewardConfig
from megarlhf.data.collation import ranking_batch, text_batch
from megarlhf.data.order import ShuffledOrder
from megarlhf.engine.terms import RankingLoss, Term
from megarlhf.evaluation.rankings import ranking_metrics
from megarlhf.runs.folder import Run
from megarlhf.runs.loop import Stage, run_stage, step_metrics
from megarlhf.runs.models import ModelPlanner
from megarlhf.runs.phases import Phases
from megarlhf.runs.records import Records, open_tokenizer
from megarlhf.runs.row_lengths import row_lengths
from megarlhf.runs.schedules import refuse_long_warmup, scheduled_rate


class RewardModelTraining(Stage):
    """A scalar-headed model on rankings; all completions of a prompt are one batch element.

    An epoch takes each ranking once, its last batch what is left.
    """

    shown = ("reward/loss", "reward/accuracy", "reward/learning_rate")

    def __init__(self, config: RewardConfig, run: Run) -> None:
        self.config = config
        self.tokenizer = open_tokenizer(config.tokenizer, run.world, now=run.began)
        records = Records(self.tokenizer, config.limits, run.world)
        self.rankings = records.rankings("data.train", config.data.train, batch=("batch_size", config.batch_size))
        valid = records.rankings("data.valid", config.data.valid, apart_from="data.train")
        demonstrations = records.demonstrations("data.demonstrations", config.data.demonstrations)

        problems = [*records.agree(run.world), *run.keep(records.fingerprints)]
        planner = ModelPlanner(run, self.tokenizer, config.parallel, problems=problems)
        plan = planner.plan("model", config.model, "scalar", rows=row_lengths(config)["model"])
        planner.check()

        pad_id = self.tokenizer.pad_id
        self.order = ShuffledOrder(len(self.rankings), seed=config.run.seed)
        self.valid = ranking_batch(valid, pad_id=pad_id) if valid else None
        self.demonstrations = text_batch(demonstrations, pad_id=pad_id) if demonstrations else None
        self.model = planner.build_trained(plan)
        self.models = {"reward": self.model}
        self.notes = [*records.notes, *planner.notes]
        self.total_steps = config.epochs * math.ceil(len(self.rankings) / config.batch_size)
        refuse_long_warmup(config.schedule, self.total_steps)
        self.phases = Phases()

    def step(self, number: int) -> dict[str, float]:
        """One optimizer step on the comparisons of the next prompts."""
        peak = self.config.model.adam.learning_rate
        rate = scheduled_rate(self.config.schedule, number, peak=peak, total_steps=self.total_steps)
        with self.phases("step"):
            rows = [self.rankings[i] for i in self.order.take_batch(self.config.batch_size)]
            batch = ranking_batch(rows, pad_id=self.tokenizer.pad_id)
            result = self.model.step([Term("reward", RankingLoss(), batch)], learning_rate=rate)
        return step_metrics("reward", [result], rate) | self.phases.metrics(step=result.tokens)

    def finish(self) -> None:
        """Shift the bias so that demonstrations score 0 on average (section 3.5): the loss does not see such a shift."""
        if self.demonstrations is not None:
            self.model.shift_scores(-float(self.model.scores(self.demonstrations).double().mean()))

    def evaluate(self) -> dict[str, float]:
        """Loss and accuracy on validation rankings, and the demonstrations' mean score."""
        metrics = ranking_metrics(self.model.scores(self.valid), self.valid) if self.valid is not None else {}
        if self.demonstrations is not None:
            metrics["valid/demonstration_score"] = float(self.model.scores(self.demonstrations).double().mean())
        return metrics

    def state_dict(self) -> dict:
        """The data cursor."""
        return {"order": self.order.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Go on at the data cursor."""
        self.order.load_state_dict(state["order"])


def reward_model(config: RewardConfig, run: Run) -> dict[str, float]:
    """`megarlhf reward`."""
    return run_stage(RewardModelTraining(config, run), run)
