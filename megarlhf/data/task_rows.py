"""Tasks as token rows: their few-shot prompts, within the limits of a run."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace

from megarlhf.config.relations import task_name
from megarlhf.data.files import BadRecord
from megarlhf.data.records import OnBadRecord, RecordReport, sift
from megarlhf.data.tasks import Form, Task, TaskRecord
from megarlhf.data.tokenized import TextEncoder, TokenIds
from megarlhf.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class TaskRow:
    """The tokens of a query with its examples before it, and of its choices."""

    prompt_ids: TokenIds
    choice_ids: tuple[TokenIds, ...]
    """One per choice, without EOS; none where the answer is generated."""
    shots: int
    """Examples in the prompt."""
    shots_lost: int
    """Examples that it had no room for."""
    record: TaskRecord
    max_new_tokens: int
    """Most tokens of a generated answer."""


def task_fingerprint(rows: Iterable[TaskRow]) -> str:
    """A hash of all that decides the results of rows: their token ids, right answers and metrics."""
    whole = hashlib.sha256()
    for row in rows:
        for ids in (row.prompt_ids, *row.choice_ids):
            whole.update(f"{len(ids)} ".encode() + array("i", ids).tobytes())
        whole.update(repr((row.record.answers, row.record.metric, row.max_new_tokens)).encode())
    return whole.hexdigest()


def task_rows(
    task: Task,
    tokenizer: Tokenizer,
    *,
    shots: int | None,
    seed: int,
    max_prompt_len: int,
    max_response_len: int,
    on_bad_record: OnBadRecord = "raise",
) -> tuple[list[TaskRow], RecordReport]:
    """Encode a task's records, each with its examples; choices are encoded apart from what stands before them.

    A prompt of more than `max_prompt_len` tokens loses examples, the first ones first; a query that is too long alone, or a
    choice of more than `max_response_len` tokens, makes a bad record.

    Args:
        shots: examples before each query; None leaves it to the file.
        seed: of the examples' draw from the train part, which is another one for each record.
    Raises BadRecord, also where a file has not the examples that are asked of it, whatever on_bad_record says.
    """
    form = replace(task.form, shots=task.form.shots if shots is None else shots)
    longest = max_response_len if form.max_new_tokens is None else form.max_new_tokens
    if longest > max_response_len:
        detail = f'"max_new_tokens" of "task" is {longest}, more than max_response_len {max_response_len}'
        raise BadRecord(task.path, "response over limit", detail, "Lower it, or raise max_response_len.")
    drawn = [(record, _examples(task, form, record, f"{seed} {task_name(task.path)} {i}")) for i, record in enumerate(task.records)]
    encoder = TextEncoder(tokenizer)

    def convert(item: tuple[TaskRecord, tuple[TaskRecord, ...]]) -> TaskRow:
        record, examples = item
        prompt_ids, kept = _prompt_ids(form, record, examples, encoder, max_prompt_len)
        choice_ids = tuple(_choice_ids(form, record, i, encoder, max_response_len) for i in range(len(record.choices)))
        return TaskRow(prompt_ids, choice_ids, kept, len(examples) - kept, record, longest)

    rows, report = sift(task.path, drawn, convert, on_bad_record=on_bad_record)
    return rows, replace(report, lost=encoder.lost())


def _examples(task: Task, form: Form, record: TaskRecord, noise: str) -> tuple[TaskRecord, ...]:
    """What stands before a record: the first of its own examples, or a draw from the train part."""
    if record.examples is not None:
        if len(record.examples) < (form.shots or 0):
            detail = f"it has {len(record.examples)} examples, and {form.shots} shots are asked for"
            raise BadRecord(record.source, "too few examples", detail, "Add examples, or lower shots.")
        return record.examples[: form.shots]
    if form.shots is None and task.train:
        detail = f"{len(task.train)} records of the train part, and nothing says how many of them stand before a query"
        raise BadRecord(task.path, "no shots", detail, 'Give "shots" in its "task" line, or the key shots.')
    if len(task.train) < (form.shots or 0):
        detail = f"{form.shots} shots are asked for, and its train part has {len(task.train)} records"
        raise BadRecord(task.path, "too few examples", detail, 'Mark more with "part": "train", or lower shots.')
    if len(task.train) == form.shots:
        return task.train  # all of them, in the order in which they were written
    return tuple(random.Random(noise).sample(task.train, form.shots or 0))


def _prompt_ids(
    form: Form, record: TaskRecord, examples: tuple[TaskRecord, ...], encoder: TextEncoder, max_prompt_len: int
) -> tuple[TokenIds, int]:
    """(the prompt with as many of the last examples as fit, their number)."""
    for first in range(len(examples) + 1):
        ids = encoder.encode(record.source, "prompt", form.prompt_of(record, examples[first:]))
        if len(ids) <= max_prompt_len:
            return array("i", ids), len(examples) - first
    detail = f"the query alone has {len(ids)} tokens, more than max_prompt_len {max_prompt_len}"
    raise BadRecord(record.source, "prompt over limit", detail, "Shorten it, raise max_prompt_len, or skip such records.")


def _choice_ids(form: Form, record: TaskRecord, number: int, encoder: TextEncoder, max_response_len: int) -> TokenIds:
    ids = encoder.encode(record.source, f"choice {number}", form.target_of(record, record.choices[number]))
    if len(ids) > max_response_len:
        detail = f"choice {number} has {len(ids)} tokens, more than max_response_len {max_response_len}"
        raise BadRecord(record.source, "response over limit", detail, "Shorten it, raise max_response_len, or skip such records.")
    return array("i", ids)
