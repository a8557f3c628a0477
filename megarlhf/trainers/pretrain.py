"""Pretraining: next-token prediction on packed text (Brown et al. 2020), the base of everything after it."""

from __future__ import annotations

from megarlhf.config.sections import LimitsConfig
from megarlhf.config.training import PretrainConfig
from megarlhf.engine.terms import LanguageModelLoss, Term
from megarlhf.runs.folder import Run
from megarlhf.runs.loop import Stage, run_stage, step_metrics
from megarlhf.runs.models import ModelPlanner
from megarlhf.runs.phases import Phases
from megarlhf.runs.records import Records, open_tokenizer
from megarlhf.runs.row_lengths import row_lengths
from megarlhf.runs.schedules import scheduled_rate


class Pretraining(Stage):
    """A language model on packed rows of text."""

    shown = ("model/loss", "model/learning_rate")

    def __init__(self, config: PretrainConfig, run: Run) -> None:
        self.config = config
        tokenizer = open_tokenizer(config.tokenizer, run.world, now=run.began)
        records = Records(tokenizer, LimitsConfig())
        self.text = records.text("data", config.data, seed=config.run.seed)
        self.held_out = records.held_out("data", config.data)
        problems = [*records.agree(run.world), *run.keep(records.fingerprints)]
        planner = ModelPlanner(run, tokenizer, config.parallel, problems=problems)
        plan = planner.plan("model", config.model, "lm", rows=row_lengths(config)["model"])
        planner.check()
        self.model = planner.build_trained(plan)
        self.models = {"model": self.model}
        self.notes = [*self.text.notes(config.steps * config.batch_size), *planner.notes]
        self.total_steps = config.steps
        self.phases = Phases()

    def step(self, number: int) -> dict[str, float]:
        """One optimizer step on the next rows."""
        rate = scheduled_rate(
            self.config.schedule, number, peak=self.config.model.adam.learning_rate, total_steps=self.config.steps
        )
        with self.phases("step"):
            rows = self.text.take(self.config.batch_size)
            result = self.model.step([Term("model", LanguageModelLoss(), rows)], learning_rate=rate)
        return step_metrics("model", [result], rate) | self.text.metrics() | self.phases.metrics(step=result.tokens)

    def evaluate(self) -> dict[str, float]:
        """Language-model loss on held-out text."""
        return self.held_out.metrics(self.model)

    def state_dict(self) -> dict:
        """The data cursor."""
        return {"text": self.text.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Go on at the data cursor."""
        self.text.load_state_dict(state["text"])


def pretrain(config: PretrainConfig, run: Run) -> dict[str, float]:
    """`megarlhf pretrain`."""
    return run_stage(Pretraining(config, run), run)
