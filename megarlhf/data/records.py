"""Read demonstrations, rankings and prompts, and refuse what is not one.

Nothing is dropped in silence: a bad record raises `BadRecord` with its file, line, reason and the way out, or, with
``on_bad_record="skip"``, is counted by reason in the `RecordReport` that comes back with the records. `docs/data.md` shows
each form with one record; `data/files.py` reads the kinds of files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from megarlhf.data.comparisons import comparison_of, prompt_of, require_one_question
from megarlhf.data.fields import Messages, answer_field, as_named_here, messages_field, name_field, text_field
from megarlhf.data.files import BadRecord, OtherRecord, record_of, stored_records

OnBadRecord = Literal["raise", "skip"]
NUM_EXAMPLES = 5
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class RecordReport:
    """How many records were seen, and how many of them skipped for which reason."""

    source: str
    num_records: int
    skipped_by_reason: Mapping[str, int]
    examples: tuple[str, ...]
    """The messages of the first skipped records."""
    lost: str = ""
    """What the tokenizer loses of the records' text, with numbers and an example; empty where it loses nothing."""

    @property
    def num_skipped(self) -> int:
        """Records that were left out."""
        return sum(self.skipped_by_reason.values())

    @property
    def num_kept(self) -> int:
        """Records that can be used."""
        return self.num_records - self.num_skipped

    def __str__(self) -> str:
        text = f"{self.source}: kept {self.num_kept} of {self.num_records} records"
        if not self.num_skipped:
            return text
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped_by_reason.items()))
        return f"{text}, skipped {self.num_skipped} ({reasons})"


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the response a labeler wrote (Ouyang et al. 2022, section 3.2)."""

    prompt: str | Messages
    """A text, or the turns before the assistant's last; the assistant's among them are demonstrations too."""
    response: str
    source: str
    """"file:line", or "file:row" in parquet."""


@dataclass(frozen=True)
class Ranking:
    """A prompt, its completions and their ranks: 1 is best, equal ranks are ties (Ouyang et al. 2022, section 3.5)."""

    prompt: str | Messages
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    source: str
    """"file:line"."""
    group: str | int | None = None
    """Whose ranking it is: its "group", or else its "labeler"."""


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer, with whatever else its record says."""

    prompt: str | Messages
    source: str
    """"file:line"."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The record's other fields, such as "id", and its chat if it is one: they stand beside the response."""


def read_demonstrations(path: str | Path, *, on_bad_record: OnBadRecord = "raise") -> tuple[list[Demonstration], RecordReport]:
    """Read ``{"prompt", "response"}``, or ``{"messages"}`` that end with the assistant's turn. Raises BadRecord.

    A response may be called "completion", and both may be lists of messages.
    """

    def convert(source: str, record: dict) -> Demonstration:
        answer = "completion" if "completion" in record and "response" not in record else "response"
        if "messages" not in record:
            return Demonstration(text_field(source, record, "prompt"), text_field(source, record, answer), source)
        if isinstance(record.get(answer), list):
            return Demonstration(prompt_of(source, record), answer_field(source, record, answer), source)
        messages = messages_field(source, record, "messages", last="assistant")
        require_one_question(source, record, messages)
        if len(messages) < 2:
            raise BadRecord(source, "missing field", "the chat has no turn before the answer", "Add the user's turn.")
        return Demonstration(messages[:-1], messages[-1].content, source)

    return _read(path, convert, on_bad_record)


def read_rankings(path: str | Path, *, on_bad_record: OnBadRecord = "raise") -> tuple[list[Ranking], RecordReport]:
    """Read rankings and pairs in any of the forms of `data/comparisons.py`. Raises BadRecord.

    An optional "labeler" says whose ranking it is, or a "group" whose group's.
    """

    def convert(source: str, record: dict) -> Ranking:
        labeler, group = (name_field(source, record, name) for name in ("labeler", "group"))
        return Ranking(*comparison_of(source, record), source, labeler if group is None else group)

    return _read(path, convert, on_bad_record)


def read_prompts(path: str | Path, *, on_bad_record: OnBadRecord = "raise") -> tuple[list[Prompt], RecordReport]:
    """Read ``{"prompt"}``, or ``{"messages"}`` that end with the user's turn, with any other fields. Raises BadRecord.

    "id", where there is one, is a string or an integer.
    """

    def convert(source: str, record: dict) -> Prompt:
        prompt = prompt_of(source, record)
        name_field(source, record, "id")
        return Prompt(prompt, source, {name: value for name, value in record.items() if name != "prompt"})

    return _read(path, convert, on_bad_record)


def stops(bad: BadRecord, on_bad_record: OnBadRecord) -> bool:
    """Whether a bad record ends the run; one of another kind is counted in any case."""
    return on_bad_record == "raise" and not isinstance(bad, OtherRecord)


class RecordTally:
    """Counts records as they are kept or skipped, or raises at the first bad one."""

    def __init__(self, source: str, *, on_bad_record: OnBadRecord):
        if on_bad_record not in ("raise", "skip"):
            raise ValueError(f'on_bad_record is {on_bad_record!r}; it must be "raise" or "skip"')
        self._source, self._on_bad_record = source, on_bad_record
        self._num_kept = 0
        self._skipped: Counter[str] = Counter()
        self._examples: list[str] = []

    def keep(self) -> None:
        """Count a good record."""
        self._num_kept += 1

    def skip(self, bad: BadRecord) -> None:
        """Count a bad record, or raise it: see `stops`."""
        if stops(bad, self._on_bad_record):
            raise bad
        self._skipped[bad.reason] += 1
        if len(self._examples) < NUM_EXAMPLES:
            self._examples.append(str(bad))

    def report(self) -> RecordReport:
        """The counts. Raises BadRecord if no record is left."""
        num_records = self._num_kept + self._skipped.total()
        report = RecordReport(self._source, num_records, dict(self._skipped), tuple(self._examples))
        if num_records == 0:
            raise BadRecord(self._source, "no record", "there is nothing in it", "Write one record per line.")
        if self._num_kept == 0:
            detail = f"{report}; the first: {self._examples[0]}"
            raise BadRecord(self._source, "no usable record", detail, "Correct the records or the limits they break.")
        return report


def sift(source: str, items: Iterable[T], convert: Callable[[T], R], *, on_bad_record: OnBadRecord) -> tuple[list[R], RecordReport]:
    """Convert each item; raise at the first bad one, or skip and count it. Raises BadRecord also when nothing is left."""
    tally = RecordTally(source, on_bad_record=on_bad_record)
    kept: list[R] = []
    for item in items:
        try:
            kept.append(convert(item))
            tally.keep()
        except BadRecord as bad:
            tally.skip(bad)
    return kept, tally.report()


def _read(path: str | Path, convert: Callable[[str, dict], R], on_bad_record: OnBadRecord) -> tuple[list[R], RecordReport]:
    def convert_stored(item: tuple[str, bytes | dict]) -> R:
        source, stored = item
        return convert(source, as_named_here(record_of(source, stored)))

    return sift(str(path), stored_records(path), convert_stored, on_bad_record=on_bad_record)
