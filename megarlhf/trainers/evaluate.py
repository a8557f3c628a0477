"""`megarlhf evaluate`: how good a finished model is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megarlhf.config.inference import EvaluateConfig
from megarlhf.data.answers import AnswerRow, Label
from megarlhf.data.collation import prompt_batch, ranking_batch, text_batch
from megarlhf.data.task_rows import TaskRow
from megarlhf.data.tokenized import DemonstrationRow, PromptRow, RankingRow
from megarlhf.data.tokenizers import Tokenizer
from megarlhf.engine.engine import Engine
from megarlhf.evaluation.intervals import interval_metrics
from megarlhf.evaluation.rankings import accuracy_by_group, accuracy_by_prompt, ranking_metrics, ranking_records
from megarlhf.evaluation.responses import Judged, ResponseJudge, generator_of, response_lines
from megarlhf.evaluation.tasks import answer_results, choice_results, newline_ids, task_metrics
from megarlhf.evaluation.text import HeldOutText, language_model_loss_on
from megarlhf.evaluation.win_rate import answer_scores, by_prompt, comparison, sampled_answers
from megarlhf.models.parameters import Head
from megarlhf.runs.answers import ANSWERS_FILE, INPUTS_FILE, answers_to_other_input, inputs_of
from megarlhf.runs.folder import Run
from megarlhf.runs.models import ModelPlanner
from megarlhf.runs.records import Records, open_tokenizer
from megarlhf.runs.row_lengths import row_lengths
from megarlhf.telemetry.tables import format_table

RANKINGS_FILE, TASKS_FILE, COMPARISONS_FILE = "rankings.jsonl", "tasks.jsonl", "comparisons.jsonl"


def evaluate(config: EvaluateConfig, run: Run) -> dict[str, float]:
    """`megarlhf evaluate`: what the given data allow; a table, <run.dir>/evaluation.json, and a JSONL file of each kind of record."""
    return Evaluation(config, run).metrics()


@dataclass(frozen=True)
class _Data:
    """What there is to evaluate on."""

    prompts: list[PromptRow]
    rankings: list[RankingRow]
    demonstrations: list[DemonstrationRow]
    held_out: HeldOutText
    tasks: dict[str, list[TaskRow]]
    ours: list[AnswerRow]
    theirs: list[AnswerRow]
    pairs: list[tuple[int, int]]
    """Numbers of `ours` (without them: of `prompts`) and of `theirs`."""
    labels: list[Label]

    @staticmethod
    def read(config: EvaluateConfig, records: Records, tokenizer: Tokenizer) -> _Data:
        """All files of the configuration."""
        prompts = records.prompts("prompts", config.prompts)
        rankings = records.rankings("rankings", config.rankings)
        demonstrations = records.demonstrations("demonstrations", config.demonstrations)
        held_out = records.held_out("text", config.text)
        tasks = records.tasks("tasks", config.tasks, shots=config.shots, seed=config.run.seed)
        ours = records.answers("win_rate.responses", config.win_rate.responses)
        theirs = records.answers("win_rate.against", config.win_rate.against)
        expected = [row.answer for row in ours] or sampled_answers(prompts, tokenizer)
        pairs = records.pairs(expected, [row.answer for row in theirs])
        labels = records.labels(config.win_rate.labels, about=[expected[i] for i, _ in pairs])
        return _Data(prompts, rankings, demonstrations, held_out, tasks, ours, theirs, pairs, labels)


class Evaluation:
    """Reads and checks everything, builds the models, and measures what the data allow."""

    def __init__(self, config: EvaluateConfig, run: Run) -> None:
        self.config = config
        self.run = run
        self.tokenizer = open_tokenizer(config.tokenizer, run.world, now=run.began)
        records = Records(self.tokenizer, config.limits, run.world)
        self.data = _Data.read(config, records, self.tokenizer)
        self.inputs = inputs_of(config, records.fingerprints, self.data.prompts)
        problems = records.agree(run.world) + answers_to_other_input(run, self.inputs)

        planner = ModelPlanner(run, self.tokenizer, config.parallel, problems=problems)
        heads, lengths = planner.saved_heads(config.model), row_lengths(config)
        head: Head = "scalar" if heads == {"scalar"} or ("scalar" in heads and not _speaks(config) and config.reward is None) else "lm"
        planner.violations += _unfit(config, head)
        models = (("model", config.model, head), ("reward", config.reward, "scalar"), ("reference", config.reference, "lm"))
        plans = {role: planner.plan(role, model, kind, rows=lengths[role]) for role, model, kind in models if model is not None}
        planner.sample("sampling", config.sampling, plans["model"], self.data.prompts)
        planner.check()
        run.introduce([*records.notes, *planner.notes])
        engines = {role: planner.build_frozen(plan) for role, plan in plans.items()}
        self.model = engines["model"]
        self.reward, self.reference = engines.get("reward"), engines.get("reference")

    @property
    def judge(self) -> Engine:
        """What scores rankings and answers."""
        return self.reward or self.model

    def metrics(self) -> dict[str, float]:
        """Everything, written into the run's folder and shown."""
        data = self.data
        metrics = data.held_out.metrics(self.model)
        metrics |= self._rankings() if data.rankings else {}
        if data.demonstrations:
            batch = text_batch(data.demonstrations, pad_id=self.tokenizer.pad_id)
            metrics["valid/loss"] = language_model_loss_on(self.model, batch)
        judged = self._responses() if data.prompts else None
        metrics |= judged.metrics("valid") if judged is not None else {}
        metrics |= self._tasks() if data.tasks else {}
        metrics |= self._comparisons(judged) if data.pairs else {}
        metrics |= interval_metrics("win_rate/by_labels", list(by_prompt(data.labels).values()))
        of_this = {RANKINGS_FILE: data.rankings, TASKS_FILE: data.tasks, COMPARISONS_FILE: data.pairs}
        self.run.remove(name for name, given in of_this.items() if not given)
        self.run.write("evaluation.json", json.dumps(metrics, indent=1) + "\n")
        if self.run.is_writer:
            print(format_table(("metric", "value"), [(name, f"{value:.4f}") for name, value in metrics.items()]), flush=True)
        return metrics

    def _rankings(self) -> dict[str, float]:
        batch = ranking_batch(self.data.rankings, pad_id=self.tokenizer.pad_id)
        scores = self.judge.scores(batch)
        records = ranking_records(scores, self.data.rankings)
        self._write_lines(RANKINGS_FILE, records)
        return ranking_metrics(scores, batch) | accuracy_by_prompt(records) | accuracy_by_group(records)

    def _responses(self) -> Judged:
        batch, judges = prompt_batch(self.data.prompts, pad_id=self.tokenizer.pad_id), {"reward": self.reward, "reference": self.reference}
        how = {"seed": self.config.run.seed, "purpose": "evaluate", "policy": self.model}
        judged = ResponseJudge(generator_of(self.model, self.tokenizer), batch, self.config.sampling, **how, **judges).judge()
        self.run.write(INPUTS_FILE, json.dumps(self.inputs, indent=1) + "\n")
        self.run.write(ANSWERS_FILE, response_lines(judged, self.tokenizer, self.data.prompts) if self.run.is_writer else "")
        return judged

    def _tasks(self) -> dict[str, float]:
        rows_at_once = self.config.sampling.max_batch_size or self.config.model.micro_batch_size * self.model.groups.layout.dp
        generates = any(not row.choice_ids for rows in self.data.tasks.values() for row in rows[:1])
        stop_ids = newline_ids(self.tokenizer) if generates else []
        generator = generator_of(self.model, self.tokenizer, stop_ids=stop_ids)
        metrics: dict[str, float] = {}
        records: list[dict] = []
        for name, rows in self.data.tasks.items():
            if rows[0].choice_ids:
                results = choice_results(self.model, name, rows, pad_id=self.tokenizer.pad_id)
            else:
                results = answer_results(generator, name, rows, self.tokenizer, rows_at_once=rows_at_once)
            metrics |= task_metrics(name, results)
            records += results
        self._write_lines(TASKS_FILE, records)
        return metrics

    def _comparisons(self, judged: Judged | None) -> dict[str, float]:
        """A against B by the reward model: A's answers are those of the file, else those that were just sampled."""
        data, pad_id = self.data, self.tokenizer.pad_id
        if data.ours:
            ours, our_scores = [row.answer for row in data.ours], answer_scores(self.judge, data.ours, pad_id=pad_id)
        else:
            assert judged is not None and judged.scores is not None
            ours, our_scores = sampled_answers(data.prompts, self.tokenizer, judged.rollouts), judged.scores.tolist()
        their_scores = answer_scores(self.judge, data.theirs, pad_id=pad_id)
        records = [comparison(ours[i], data.theirs[j].answer, our_scores[i], their_scores[j]) for i, j in data.pairs]
        self._write_lines(COMPARISONS_FILE, records)
        return interval_metrics("win_rate/by_reward", [record["preference"] for record in records])

    def _write_lines(self, name: str, records: Sequence[Mapping[str, object]]) -> None:
        self.run.write(name, "".join(json.dumps(record) + "\n" for record in records) if self.run.is_writer else "")


def _speaks(config: EvaluateConfig) -> bool:
    """Whether the model is asked for text."""
    return bool(config.prompts or config.demonstrations or config.text or config.tasks)


def _unfit(config: EvaluateConfig, head: Head) -> list[str]:
    """How the model's kind does not fit what it is to be evaluated on."""
    found = []
    if head == "scalar" and _speaks(config):
        found.append("model: it is a reward model, which can be evaluated on rankings and on win_rate.responses only")
    if head == "scalar" and config.reward is not None:
        found.append("reward: `model` is a reward model itself; leave one of the two out")
    for key, given in (("rankings", config.rankings), ("win_rate.against", config.win_rate.against)):
        if head == "lm" and given and config.reward is None:
            found.append(f"{key}: they need a reward model: `model` is a language model, and `reward` is not given")
    return found
