"""Benchmarks: multiple choice by log-probability, generated answers by their text (Ouyang et al. 2022, Appendix D)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch

from megarlhf.batch import Prompts, Rollouts, Rows, pad_rows
from megarlhf.data.task_rows import TaskRow
from megarlhf.data.tasks import Metric
from megarlhf.data.tokenizers import Tokenizer
from megarlhf.engine.engine import Engine, require_finite
from megarlhf.evaluation.intervals import interval_metrics
from megarlhf.evaluation.responses import SAID
from megarlhf.generation.generator import Generator

ROWS_AT_ONCE = 4096
"""Rows of one batch, which every rank holds."""
ARTICLES = re.compile(r"\b(a|an|the)\b")
_MARK = re.escape(string.punctuation)
PUNCTUATION = re.compile(rf"(?<!\d)(?!(?<!\w)-\.?\d)(?!(?<!\w)\.\d)[{_MARK}]|(?<=\d)(?:,|[{_MARK}](?!\d))")
"""ASCII punctuation, but for what a number is written with: "-" and "." before its first digit, anything but a comma between two."""


def choice_results(engine: Engine, task: str, rows: Sequence[TaskRow], *, pad_id: int) -> list[dict[str, object]]:
    """A record per query: the model's choice is the one with the highest average log-probability of its tokens given the prompt.

    "choice_by_sum" is the one with the highest sum. The first of equals is taken.
    """
    sums = iter(_log_probabilities(engine, [(row.prompt_ids, choice) for row in rows for choice in row.choice_ids], pad_id=pad_id))
    results = []
    for row in rows:
        of_row = [next(sums) for _ in row.choice_ids]
        means = [total / len(ids) for total, ids in zip(of_row, row.choice_ids, strict=True)]
        choice, by_sum = (values.index(max(values)) for values in (means, of_row))
        right = row.record.num_right
        found = {"answer": right, "choice": choice, "choice_by_sum": by_sum, "logprobs_per_token": means, "logprobs": of_row}
        results.append(_about(task, row) | found | {"accuracy": float(choice == right), "accuracy_by_sum": float(by_sum == right)})
    return results


def answer_results(
    generator: Generator, task: str, rows: Sequence[TaskRow], tokenizer: Tokenizer, *, rows_at_once: int
) -> list[dict[str, object]]:
    """A record per query: the answer at temperature 0, cut at its first newline, and what its metric says of it."""
    results = []
    for some in _cut(rows, rows_at_once):
        tokens, lengths = pad_rows([list(row.prompt_ids) for row in some], pad_id=tokenizer.pad_id)
        prompts = Prompts(tokens=tokens, lengths=lengths, ids=torch.arange(len(some)))
        limit = max(row.max_new_tokens for row in some)
        rollouts = generator.generate(prompts, max_new_tokens=limit, temperature=0.0, seed=0, iteration=0)
        require_finite(rollouts.logprobs, SAID, precision=generator.precision)
        for row, response in zip(some, _first_lines(rollouts, tokenizer), strict=True):
            metric = row.record.metric
            found = {"answers": list(row.record.answers), "response": response, metric: METRICS[metric](response, row.record.answers)}
            results.append(_about(task, row) | found)
    return results


def task_metrics(task: str, results: Sequence[dict]) -> dict[str, float]:
    """The mean of each metric over the records that it judges, and its 95 % interval."""
    found: dict[str, float] = {}
    for name in ("accuracy", "accuracy_by_sum", *METRICS):
        found |= interval_metrics(f"tasks/{task}/{name}", [result[name] for result in results if name in result])
    return found


def newline_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens whose text has a newline: an answer that is cut there needs nothing after them."""
    return [i for i in range(tokenizer.vocab_size) if "\n" in tokenizer.decode([i])]


def normalized(text: str) -> list[str]:
    """The words of an answer in lower case, without ASCII punctuation and articles (SQuAD's evaluation, Rajpurkar et al. 2016).

    But a number keeps its minus sign and what stands between its digits, commas apart: 3.5 is not 35, and -5 not 5.
    """
    return ARTICLES.sub(" ", _bare(text)).split()


def _bare(text: str) -> str:
    return PUNCTUATION.sub("", text.lower())


def _with_articles(text: str) -> list[str]:
    return _bare(text).split()


def _as_they_are(text: str) -> list[str]:
    return text.lower().split()


def _words(response: str, answer: str) -> tuple[list[str], list[str]]:
    """The words of the two, read in the first way in which the answer has any: one that is but "A" or "+" would match nothing said."""
    for words in (normalized, _with_articles):
        if wanted := words(answer):
            return words(response), wanted
    return _as_they_are(response), _as_they_are(answer)


def exact_match(response: str, answers: Sequence[str]) -> float:
    """1 where the words are those of an answer."""
    return float(any(said == wanted for said, wanted in (_words(response, answer) for answer in answers)))


def contains(response: str, answers: Sequence[str]) -> float:
    """1 where the words of an answer stand in the response, one after the other."""
    pairs = (_words(response, answer) for answer in answers)
    return float(any(f" {' '.join(wanted)} " in f" {' '.join(said)} " for said, wanted in pairs))


def f1(response: str, answers: Sequence[str]) -> float:
    """The harmonic mean of precision and recall over words, for the answer where it is highest."""

    def against(answer: str) -> float:
        said, wanted = map(Counter, _words(response, answer))
        return 2 * (said & wanted).total() / (said.total() + wanted.total())

    return max(map(against, answers))


METRICS: dict[Metric, Callable[[str, Sequence[str]], float]] = {"exact_match": exact_match, "contains": contains, "f1": f1}


def _log_probabilities(engine: Engine, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, pad_id: int) -> Iterator[float]:
    """The sum of log-probabilities of the second of each pair of token ids after the first."""
    for some in _cut(pairs, ROWS_AT_ONCE):
        tokens, lengths = pad_rows([[*before, *after] for before, after in some], pad_id=pad_id)
        starts = torch.tensor([len(before) for before, _ in some])
        predicted = torch.arange(1, tokens.shape[1])  # position t is about token t + 1
        mask = (predicted >= starts[:, None]) & (predicted < lengths[:, None])
        logprobs = engine.logprobs(Rows(tokens=tokens, lengths=lengths), mask)
        yield from logprobs.double().sum(dim=1).tolist()


def _first_lines(rollouts: Rollouts, tokenizer: Tokenizer) -> Iterator[str]:
    """Each response's text up to its first newline, without blanks around it."""
    for ids, start, stop in zip(rollouts.tokens, rollouts.prompt_lengths, rollouts.lengths, strict=True):
        yield tokenizer.decode(ids[start:stop].tolist()).partition("\n")[0].strip()


def _about(task: str, row: TaskRow) -> dict[str, object]:
    number = {"id": row.record.fields["id"]} if "id" in row.record.fields else {}
    return {"task": task, **number, "source": row.record.source, "shots": row.shots}


def _cut(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
