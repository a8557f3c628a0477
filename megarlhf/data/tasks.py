"""Benchmark tasks from JSON lines, and how their records are written out as prompts (Ouyang et al. 2022, Appendix D).

A file is one task, multiple choice or generative. Its first line may be {"task": {...}}, the task's `Form`. Every other line
is a record: {"context", "choices", "answer"} with the number of the right choice from 0, or {"context", "answers"} with every
text that is right. Records with "part": "train" are examples for the prompts of the others; a record may bring "examples" of
its own instead. Any further field can be named by the form.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from megarlhf.data.fields import text_field
from megarlhf.data.files import BadRecord, json_record, lines
from megarlhf.data.records import OnBadRecord, RecordReport, sift

Metric = Literal["accuracy", "exact_match", "contains", "f1"]
GENERATIVE_METRICS = tuple(name for name in get_args(Metric) if name != "accuracy")
MOST_TOKENS = 2**20
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Form:
    """How the records of a task become prompts. "{name}" stands for a field of the record."""

    instruction: str = ""
    """Stands once before everything else."""
    query: str = "{context}"
    """What is asked: of an example, and of the record itself."""
    target: str = " {answer}"
    """What follows the query: of an example its right answer, of a multiple-choice record each of its choices."""
    separator: str = "\n\n"
    """Between the instruction, the examples and the query."""
    shots: int | None = None
    """Examples before each query; None: all of a record's own."""
    metric: Metric = "exact_match"
    """How generated answers are judged where a record does not say it itself."""
    max_new_tokens: int | None = None
    """Most tokens of a generated answer; None: limits.max_response_len."""

    def query_of(self, record: TaskRecord) -> str:
        """What is asked of a record. Raises BadRecord."""
        return _filled(record, "query", self.query, record.fields)

    def target_of(self, record: TaskRecord, answer: str) -> str:
        """An answer as it follows the query. Raises BadRecord."""
        return _filled(record, "target", self.target, {**record.fields, "answer": answer})

    def prompt_of(self, record: TaskRecord, examples: Iterable[TaskRecord]) -> str:
        """The whole text before the answer. Raises BadRecord."""
        shown = [self.query_of(example) + self.target_of(example, example.answers[0]) for example in examples]
        return self.separator.join([*([self.instruction] if self.instruction else []), *shown, self.query_of(record)])


@dataclass(frozen=True)
class TaskRecord:
    """A question and its answers."""

    fields: Mapping[str, Any]
    """All that its line says."""
    choices: tuple[str, ...]
    """Empty where the answer is generated."""
    answers: tuple[str, ...]
    """Every right answer, the one that examples show first."""
    metric: Metric
    examples: tuple[TaskRecord, ...] | None
    """Its own; None where it has none and those of the file's train part stand before it."""
    source: str
    """"file:line"."""

    @property
    def num_right(self) -> int:
        """The number of the right choice."""
        return self.choices.index(self.answers[0])


@dataclass(frozen=True)
class Task:
    """A file of records of one kind."""

    path: str
    form: Form
    train: tuple[TaskRecord, ...]
    """What examples are taken from."""
    records: tuple[TaskRecord, ...]
    """What is asked."""


def read_task(path: str | Path, *, on_bad_record: OnBadRecord = "raise") -> tuple[Task, RecordReport]:
    """Read a task's file. Raises BadRecord, where its form is bad or its records are of two kinds whatever on_bad_record says."""
    rest = lines(path)
    first = next(rest, None)
    form = _form(first[0], json_record(*first)) if first is not None and b'"task"' in first[1] else None
    items = [*([first] if first is not None and form is None else []), *rest]
    form = form or Form()
    records, report = sift(str(path), items, lambda item: _record(item[0], json_record(*item), form), on_bad_record=on_bad_record)
    _require_one_kind(records)
    train = tuple(record for record in records if record.fields.get("part") == "train")
    asked = tuple(record for record in records if record.fields.get("part") != "train")
    if not asked:
        raise BadRecord(str(path), "nothing to ask", "all of its records are of the train part", 'Leave "part" out where it is asked.')
    return Task(str(path), form, train, asked), report


def _require_one_kind(records: list[TaskRecord]) -> None:
    other = next((record for record in records if bool(record.choices) != bool(records[0].choices)), None)
    if other is not None:
        kinds = ["generative", "multiple choice"]
        detail = f"it is {kinds[bool(other.choices)]}, and {records[0].source} is {kinds[bool(records[0].choices)]}"
        raise BadRecord(other.source, "two kinds of record", detail, "Make a file of each.")


def _form(source: str, line: dict) -> Form | None:
    """The form that a first line gives; None where it is a record."""
    if line.keys() != {"task"}:
        return None
    given, known = line["task"], {field.name: field for field in dataclasses.fields(Form)}
    if not isinstance(given, dict):
        raise BadRecord(source, "wrong type", '"task" is no object', f"Write an object with any of {', '.join(known)}.")
    for name, value in given.items():
        if name not in known:
            raise BadRecord(source, "unknown key", f'"task" has "{name}"', f"It may have {', '.join(known)}.")
        if name in ("shots", "max_new_tokens"):
            _require_number(source, name, value, least=0 if name == "shots" else 1)
        elif name == "metric":
            _require_metric(source, value)
        elif not isinstance(value, str):
            raise BadRecord(source, "wrong type", f'"{name}" of "task" is no string', "Make it one.")
    form = Form(**given)
    if "{answer}" not in form.target or "{answer}" in form.query:
        raise BadRecord(source, "no place for the answer", 'it stands in "target", and not in "query"', 'Write "{answer}" in "target".')
    return form


def _require_number(source: str, name: str, value: Any, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST_TOKENS:
        raise BadRecord(source, "bad number", f'"{name}" is {value!r:.40}', f"Make it an integer from {least} to {MOST_TOKENS}.")


def _require_metric(source: str, value: Any) -> None:
    if value not in GENERATIVE_METRICS:
        raise BadRecord(source, "unknown metric", f'"metric" is {value!r:.40}', f"Take one of {', '.join(GENERATIVE_METRICS)}.")


def _record(source: str, line: dict, form: Form, *, example: bool = False) -> TaskRecord:
    choices = _texts(source, line, "choices", least=2) if "choices" in line else ()
    if choices and "answers" in line:
        raise BadRecord(source, "two kinds of record", '"choices" and "answers"', 'Give "answer", the number of the right choice.')
    if len(set(choices)) < len(choices):
        raise BadRecord(source, "a choice twice", '"choices" has one text twice', "Leave one of them out.")
    answers = (choices[_right(source, line, len(choices))],) if choices else _texts(source, line, "answers", least=1)
    metric: Metric = "accuracy" if choices else line.get("metric", form.metric)
    if not choices:
        _require_metric(source, metric)
    if "part" in line and line["part"] not in ("train", "test"):
        raise BadRecord(source, "unknown part", f'"part" is {line["part"]!r:.40}', 'It is "train" or "test".')
    examples = None
    if "examples" in line and not example:
        if not isinstance(line["examples"], list) or not all(isinstance(item, dict) for item in line["examples"]):
            raise BadRecord(source, "wrong type", '"examples" is no list of objects', "Write records into it.")
        examples = tuple(_record(f"{source}, example {i}", item, form, example=True) for i, item in enumerate(line["examples"]))
        _require_one_kind_with(source, bool(choices), examples)
    record = TaskRecord(line, choices, answers, metric, examples, source)
    text_field(source, {"query": form.query_of(record)}, "query")
    for answer in choices or answers:
        text_field(source, {"target": form.target_of(record, answer)}, "target")
    return record


def _require_one_kind_with(source: str, choices: bool, examples: tuple[TaskRecord, ...]) -> None:
    if any(bool(example.choices) != choices for example in examples):
        raise BadRecord(source, "two kinds of record", "an example is of another kind", "Give examples of the record's own kind.")


def _right(source: str, line: dict, num_choices: int) -> int:
    answer = line.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < num_choices:
        detail = f'"answer" is {answer!r:.40}' if "answer" in line else 'no "answer"'
        raise BadRecord(source, "no right choice", detail, f"Give the number of the right choice, 0 to {num_choices - 1}.")
    return answer


def _texts(source: str, line: dict, name: str, *, least: int) -> tuple[str, ...]:
    texts = line.get(name)
    if not isinstance(texts, list) or len(texts) < least:
        needs = '"choices" and "answer", or "answers"'
        detail = f'no "{name}"' if name not in line else f'"{name}" is no list of {least} or more texts'
        raise BadRecord(source, "nothing to judge by", detail, f"A record of a task has {needs}.")
    return tuple(text_field(source, {f"{name}[{i}]": text}, f"{name}[{i}]") for i, text in enumerate(texts))


def _filled(record: TaskRecord, part: str, form: str, fields: Mapping[str, Any]) -> str:
    """The form with the record's own values in their places; what looks like a place in a value stays as it is."""

    def value(slot: re.Match[str]) -> str:
        name = slot.group(1)
        if name not in fields:
            have = ", ".join(f'"{key}"' for key in fields)
            raise BadRecord(record.source, "missing field", f'"{part}" names "{name}", and there is {have}', "Add it, or change the form.")
        if isinstance(fields[name], bool) or not isinstance(fields[name], str | int | float):
            raise BadRecord(record.source, "wrong type", f'"{name}" is neither text nor number', "Make it one: the form names it.")
        return str(fields[name])

    return _SLOT.sub(value, form)
