"""Supervised fine-tuning on demonstrations (Ouyang et al. 2022, section 3.5 and Appendices C.1 and C.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from megarlhf.config.training import SftConfig
from megarlhf.data.collation import prompt_batch, text_batch
from megarlhf.data.order import ShuffledOrder
from megarlhf.data.tokenized import DemonstrationRow, PromptRow
from megarlhf.engine.frozen import FrozenEngine
from megarlhf.engine.terms import LanguageModelLoss, Term
from megarlhf.evaluation.responses import NUM_SAMPLES, ResponseJudge, generator_of, response_records
from megarlhf.evaluation.text import language_model_loss_on
from megarlhf.runs.folder import Run
from megarlhf.runs.loop import Stage, run_stage, step_metrics
from megarlhf.runs.models import ModelPlanner
from megarlhf.runs.phases import Phases
from megarlhf.runs.records import Records, open_tokenizer
from megarlhf.runs.row_lengths import row_lengths
from megarlhf.runs.schedules import refuse_long_warmup, scheduled_rate


class SupervisedFineTuning(Stage):
    """A language model on demonstrations, the loss on their responses only, with a share of pretraining text in the loss.

    An epoch takes each demonstration once, its last batch what is left. Text is a term of its own: the loss is
    (1 - mix) * mean over the responses' tokens + mix * mean over the text's, as if that share of all its tokens were text.
    How many rows of text go with a batch decides only how well its mean is known.
    """

    shown = ("model/loss", "model/learning_rate")

    def __init__(self, config: SftConfig, run: Run) -> None:
        self.config = config
        data = config.data
        self.tokenizer = open_tokenizer(config.tokenizer, run.world, now=run.began)
        records = Records(self.tokenizer, config.limits, run.world)
        self.demonstrations = records.demonstrations("data.train", data.train, batch=("batch_size", config.batch_size))
        valid = records.demonstrations("data.valid", data.valid, apart_from="data.train")
        mix, section = config.pretraining_mix, "data.pretraining"
        self.text = records.text(section, data.pretraining, seed=config.run.seed) if mix else None
        self.held_out = records.held_out(section, data.pretraining)

        problems = [*records.agree(run.world), *run.keep(records.fingerprints)]
        planner = ModelPlanner(run, self.tokenizer, config.parallel, problems=problems)
        rows = row_lengths(config)
        plan = planner.plan("model", config.model, "lm", rows=rows["model"])
        reward = planner.plan("reward", config.reward, "scalar", rows=rows["reward"]) if config.reward else None
        planner.sample("sampling", config.sampling, plan, self._answered(valid))
        planner.check()

        self.order = ShuffledOrder(len(self.demonstrations), seed=config.run.seed)
        self.valid = text_batch(valid, pad_id=self.tokenizer.pad_id) if valid else None
        self.model = planner.build_trained(plan, dropout=config.dropout)
        self.models = {"model": self.model}
        self.judge = self._judge(valid, planner.build_frozen(reward) if reward else None) if valid else None
        self.total_steps = config.epochs * math.ceil(len(self.demonstrations) / config.batch_size)
        self.text_rows = max(1, round(mix * config.batch_size))
        text_notes = self.text.notes(self.total_steps * self.text_rows) if self.text else []
        self.notes = [*records.notes, *text_notes, *planner.notes]
        refuse_long_warmup(config.schedule, self.total_steps)
        self.phases = Phases()

    def _judge(self, valid: Sequence[DemonstrationRow], reward: FrozenEngine | None) -> ResponseJudge:
        """Responses to all validation prompts for the reward model, or to a few of them, to be read."""
        rows = [PromptRow(row.prompt_ids, row.source) for row in self._answered(valid)]
        prompts = prompt_batch(rows, pad_id=self.tokenizer.pad_id)
        generator = generator_of(self.model, self.tokenizer)
        return ResponseJudge(generator, prompts, self.config.sampling, seed=self.config.run.seed, purpose="sft validation", reward=reward)

    def _answered(self, valid: Sequence[DemonstrationRow]) -> Sequence[DemonstrationRow]:
        return valid if self.config.reward is not None else valid[:NUM_SAMPLES]

    def next_terms(self) -> list[Term]:
        """The loss on the next demonstrations, and on the text that goes with them."""
        rows = [self.demonstrations[i] for i in self.order.take_batch(self.config.batch_size)]
        mix, loss = self.config.pretraining_mix, LanguageModelLoss()
        demonstrations = Term("model", loss, text_batch(rows, pad_id=self.tokenizer.pad_id), weight=1 - mix)
        if self.text is None:
            return [demonstrations]
        return [demonstrations, Term("pretraining", loss, self.text.take(self.text_rows), weight=mix)]

    def step(self, number: int) -> dict[str, float]:
        """One optimizer step on the next batch."""
        peak = self.config.model.adam.learning_rate
        rate = scheduled_rate(self.config.schedule, number, peak=peak, total_steps=self.total_steps)
        with self.phases("step"):
            terms = self.next_terms()
            result = self.model.step(terms, learning_rate=rate)
        shares = pretraining_shares(terms) | (self.text.metrics() if self.text else {})
        return step_metrics("model", [result], rate) | shares | self.phases.metrics(step=result.tokens)

    def evaluate(self) -> dict[str, float]:
        """Loss on validation demonstrations and on held-out text, and the reward of sampled responses where there is a judge."""
        metrics = self.held_out.metrics(self.model)
        if self.valid is not None:
            metrics["valid/loss"] = language_model_loss_on(self.model, self.valid)
            judged = self.judge.judge()
            self.samples = response_records(judged.rollouts, self.tokenizer, first=NUM_SAMPLES, reward=judged.scores)
            if judged.scores is not None:
                metrics |= judged.metrics("valid")
        return metrics

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether this evaluation is the best by `select_by` (Appendix C.1: reward-model score on validation prompts)."""
        if self.config.select_by == "last":
            return False
        score = metrics["valid/reward_mean"] if self.config.select_by == "reward" else -metrics["valid/loss"]
        better = math.isfinite(score) and (self.best is None or score > self.best)
        self.best = score if better else self.best
        return better

    def state_dict(self) -> dict:
        """Data cursors and the best score."""
        return {"order": self.order.state_dict(), "text": self.text.state_dict() if self.text else None, "best": self.best}

    def load_state_dict(self, state: dict) -> None:
        """Go on from saved cursors."""
        self.order.load_state_dict(state["order"])
        if self.text and state["text"] is not None:
            self.text.load_state_dict(state["text"])
        self.best = state["best"]


def pretraining_shares(terms: Sequence[Term]) -> dict[str, float]:
    """How much of a batch is pretraining text: of the loss, as its weight says, of the tokens in the loss, and of the rows."""
    shares = {
        "loss_share": [term.weight for term in terms],
        "token_share": [term.loss.count(term.batch) for term in terms],
        "row_share": [term.batch.num_rows for term in terms],
    }
    return {f"pretraining/{name}": parts[-1] / sum(parts) for name, parts in shares.items() if len(terms) > 1}


def sft(config: SftConfig, run: Run) -> dict[str, float]:
    """`megarlhf sft`."""
    return run_stage(SupervisedFineTuning(config, run), run)
