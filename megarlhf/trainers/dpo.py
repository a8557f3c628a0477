"""Direct preference optimisation: a policy from rankings, without a reward model or samples (Rafailov et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from megarlhf.algorithms.logprobs import response_logprobs
from megarlhf.config.dpo import DpoConfig
from megarlhf.data.collation import preference_batch
from megarlhf.data.order import ShuffledOrder
from megarlhf.data.tokenized import RankingRow
from megarlhf.engine.engine import Engine
from megarlhf.engine.terms import DpoLoss, LanguageModelLoss, Term
from megarlhf.evaluation.preferences import preference_metrics
from megarlhf.runs.folder import Run
from megarlhf.runs.loop import Stage, run_stage, step_metrics
from megarlhf.runs.models import ModelPlanner
from megarlhf.runs.phases import Phases
from megarlhf.runs.records import Records, open_tokenizer
from megarlhf.runs.row_lengths import row_lengths
from megarlhf.runs.schedules import refuse_long_warmup, scheduled_rate


class DirectPreferenceOptimization(Stage):
    """A language model on rankings against a frozen reference, with pretraining text beside them as in PPO-ptx.

    All completions of a prompt are one batch element. An epoch takes each ranking once, its last batch what is left.
    """

    shown = ("dpo/loss", "dpo/accuracy", "dpo/margin")

    def __init__(self, config: DpoConfig, run: Run) -> None:
        self.config = config
        s, data = config.dpo, config.data
        self.tokenizer = open_tokenizer(config.tokenizer, run.world, now=run.began)
        records = Records(self.tokenizer, config.limits, run.world)
        self.rankings = records.rankings("data.train", data.train, batch=("batch_size", config.batch_size))
        valid = records.rankings("data.valid", data.valid, apart_from="data.train")
        section = "data.pretraining"
        self.text = records.text(section, data.pretraining, seed=config.run.seed) if s.ptx_coef else None
        self.held_out = records.held_out(section, data.pretraining)

        problems = [*records.agree(run.world), *run.keep(records.fingerprints)]
        planner = ModelPlanner(run, self.tokenizer, config.parallel, problems=problems)
        rows = row_lengths(config)
        plan = planner.plan("model", config.model, "lm", rows=rows["model"])
        reference = planner.plan("reference", config.reference, "lm", rows=rows["reference"])
        planner.check()

        self.order = ShuffledOrder(len(self.rankings), seed=config.run.seed)
        self.ref_logprobs, of_valid = self.judged_by(planner.build_frozen(reference), valid)
        self.valid = preference_batch(valid, pad_id=self.tokenizer.pad_id, ref_logprobs=of_valid) if valid else None
        self.model = planner.build_trained(plan)
        self.models = {"model": self.model}
        self.loss = DpoLoss(kind=s.loss, beta=s.beta, label_smoothing=s.label_smoothing)
        self.total_steps = config.epochs * math.ceil(len(self.rankings) / config.batch_size)
        text_notes = self.text.notes(config.epochs * len(self.rankings) * s.ptx_ratio) if self.text else []
        self.notes = [*records.notes, *text_notes, *planner.notes]
        refuse_long_warmup(config.schedule, self.total_steps)
        self.phases = Phases()

    def judged_by(self, reference: Engine, valid: Sequence[RankingRow]) -> tuple[list[Tensor], list[Tensor]]:
        """The reference's log-probabilities of each ranking's completions [K], for training and for validation.

        They are computed once, after which the reference is not needed any more, in the batches of the first epoch: where the
        reference is what the model starts from, the first margins are exactly 0. A resumed run computes them again.
        """
        first_epoch = ShuffledOrder(len(self.rankings), seed=self.config.run.seed)
        found: dict[int, Tensor] = {}
        while first_epoch.epoch == 0:
            index = first_epoch.take_batch(self.config.batch_size)
            found |= zip(index, self._of_completions(reference, [self.rankings[i] for i in index]), strict=True)
        return [found[i] for i in range(len(found))], self._of_completions(reference, valid) if valid else []

    def _of_completions(self, model: Engine, rows: Sequence[RankingRow]) -> list[Tensor]:
        batch = preference_batch(rows, pad_id=self.tokenizer.pad_id)
        sums = response_logprobs(model.logprobs(batch, batch.response_mask), batch.response_mask)
        return list(sums.split([len(row.ranks) for row in rows]))

    def next_terms(self) -> list[Term]:
        """The loss on the next rankings, and the ptx term beside it: ptx_ratio rows of text per prompt."""
        index = self.order.take_batch(self.config.batch_size)
        rows, ref_logprobs = [self.rankings[i] for i in index], [self.ref_logprobs[i] for i in index]
        terms = [Term("dpo", self.loss, preference_batch(rows, pad_id=self.tokenizer.pad_id, ref_logprobs=ref_logprobs))]
        if self.text is not None:
            s = self.config.dpo
            terms.append(Term("ptx", LanguageModelLoss(), self.text.take(s.ptx_ratio * len(rows)), weight=s.ptx_coef))
        return terms

    def step(self, number: int) -> dict[str, float]:
        """One optimizer step on the comparisons of the next prompts."""
        peak = self.config.model.adam.learning_rate
        rate = scheduled_rate(self.config.schedule, number, peak=peak, total_steps=self.total_steps)
        with self.phases("step"):
            result = self.model.step(self.next_terms(), learning_rate=rate)
        shares = self.text.metrics() if self.text else {}
        return step_metrics("model", [result], rate) | shares | self.phases.metrics(step=result.tokens)

    def evaluate(self) -> dict[str, float]:
        """Loss, accuracy and margins on validation rankings, and the loss on held-out text."""
        metrics = self.held_out.metrics(self.model)
        if self.valid is not None:
            metrics |= preference_metrics(self.model, self.loss, self.valid)
        return metrics

    def state_dict(self) -> dict:
        """The data cursors."""
        return {"order": self.order.state_dict(), "text": self.text.state_dict() if self.text else None}

    def load_state_dict(self, state: dict) -> None:
        """Go on at the data cursors; text begins where it was not there before."""
        self.order.load_state_dict(state["order"])
        if self.text and state["text"] is not None:
            self.text.load_state_dict(state["text"])


def dpo(config: DpoConfig, run: Run) -> dict[str, float]:
    """`megarlhf dpo`."""
    return run_stage(DirectPreferenceOptimization(config, run), run)
