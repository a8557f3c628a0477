"""Read demonstrations, rankings and prompts from JSON lines, and refuse what is not one.

Nothing is dropped in silence: a bad record raises `BadRecord` with its file, line, reason and the way out, or, with
``on_bad_record="skip"``, is counted by reason in the `RecordReport` that comes back with the records.
"""

from __future__ import annotations

import codecs
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

OnBadRecord = Literal["raise", "skip"]
NUM_EXAMPLES = 5
LARGEST_RANK = 2**63 - 1  # ranks are compared as int64
T = TypeVar("T")
R = TypeVar("R")


class BadRecord(ValueError):
    """A record that cannot be used: where it is, why, and what to do about it."""

    def __init__(self, source: str, reason: str, detail: str, way_out: str):
        # All four go to Exception, so that the error crosses process borders (pickle calls the class with `args`).
        super().__init__(source, reason, detail, way_out)
        self.source, self.reason, self.detail, self.way_out = source, reason, detail, way_out

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}: {self.detail}. {self.way_out}"


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

    prompt: str
    response: str
    source: str
    """"file:line"."""


@dataclass(frozen=True)
class Ranking:
    """A prompt, its completions and their ranks: 1 is best, equal ranks are ties (Ouyang et al. 2022, section 3.5)."""

    prompt: str
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    source: str
    """"file:line"."""
    group: str | int | None = None
    """Whose ranking it is: its "group", or else its "labeler"."""


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer, with whatever else its record says."""

    prompt: str
    source: str
    """"file:line"."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The record's other fields, such as "id": they stand beside the response."""


def read_demonstrations(path: str | Path, *, on_bad_record: OnBadRecord = "raise") -> tuple[list[Demonstration], RecordReport]:
    """Read ``{"prompt", "response"}`` lines. Raises BadRecord."""

    def convert(source: str, record: dict) -> Demonstration:
        return Demonstration(text_field(source, record, "prompt"), text_field(source, record, "response"), source)

    return _read(path, convert, on_bad_record)


def read_rankings(path: str | Path, *, on_bad_record: OnBadRecord = "raise") -> tuple[list[Ranking], RecordReport]:
    """Read ``{"prompt", "responses", "ranks"}`` or ``{"prompt", "chosen", "rejected"}`` lines. Raises BadRecord.

    An optional "labeler" says whose ranking it is, or a "group" whose group's.
    """

    def convert(source: str, record: dict) -> Ranking:
        prompt = text_field(source, record, "prompt")
        labeler, group = (name_field(source, record, name) for name in ("labeler", "group"))
        group = labeler if group is None else group
        if record.keys() & {"responses", "ranks"} and record.keys() & {"chosen", "rejected"}:
            raise BadRecord(source, "two rankings in one", "responses with ranks, and a pair", "Make two records of it.")
        if "responses" in record or "ranks" in record:
            responses = _responses_field(source, record)
            ranks = _ranks_field(source, record, num_responses=len(responses))
            require_one_rank_each(source, responses, ranks)
            return Ranking(prompt, responses, ranks, source, group)
        if "chosen" in record or "rejected" in record:
            pair = (text_field(source, record, "chosen"), text_field(source, record, "rejected"))
            require_one_rank_each(source, pair, (1, 2))
            return Ranking(prompt, pair, (1, 2), source, group)
        raise BadRecord(source, "missing field", "no completions", 'Add "responses" and "ranks", or "chosen" and "rejected".')

    return _read(path, convert, on_bad_record)


def read_prompts(path: str | Path, *, on_bad_record: OnBadRecord = "raise") -> tuple[list[Prompt], RecordReport]:
    """Read ``{"prompt"}`` lines, with an optional string or integer ``"id"`` and any other fields. Raises BadRecord."""

    def convert(source: str, record: dict) -> Prompt:
        prompt = text_field(source, record, "prompt")
        name_field(source, record, "id")
        return Prompt(prompt, source, {name: value for name, value in record.items() if name != "prompt"})

    return _read(path, convert, on_bad_record)


def lines(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """The lines of a file as ("file:line", bytes), without byte order marks; blank ones hold no record and are passed over.

    Raises BadRecord where there is no file or it cannot be read.
    """
    if not Path(path).is_file():
        way_out = "Check the path; a relative one starts at the working directory."
        raise BadRecord(str(path) or "''", "missing file", "there is no such file", way_out)
    try:
        with open(path, "rb") as file:  # bytes, because a text file that is not UTF-8 would fail without its line number
            for number, line in enumerate(file, start=1):
                content = line.removeprefix(codecs.BOM_UTF8)  # of any line: files that were joined have some inside
                if content.strip():
                    yield f"{path}:{number}", content
    except OSError as error:
        raise BadRecord(str(path), "unreadable file", error.strerror or str(error), "Check its permissions and its disk.") from error


def json_record(source: str, line: bytes) -> dict:
    """One line as a JSON object, in which no key comes twice and every number is finite. Raises BadRecord."""
    try:
        record = json.loads(
            line.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_no_constant, parse_float=_finite
        )
    except UnicodeDecodeError as error:
        raise BadRecord(source, "invalid UTF-8", f"byte {error.start} of the line", "Save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
        raise BadRecord(source, "broken JSON", str(error), "Write one complete JSON object per line.") from error
    if not isinstance(record, dict):
        raise BadRecord(source, "not an object", f"the line is {_kind(record)}", 'Write an object per line: {"prompt": ...}.')
    return record


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict:
    record = dict(pairs)
    if len(record) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f'"{twice}" comes twice in one object')
    return record


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits} is beyond the largest number")
    return value


def require_one_rank_each(source: str, responses: Iterable[object], ranks: Iterable[int]) -> None:
    """Raise BadRecord where two responses are the same and their ranks are not."""
    seen: dict[object, tuple[int, int]] = {}
    for i, (response, rank) in enumerate(zip(responses, ranks, strict=True)):
        first, its_rank = seen.setdefault(response, (i, rank))
        if its_rank != rank:
            detail = f"responses {first} and {i} are one text, ranked {its_rank} and {rank}"
            raise BadRecord(source, "a response better than itself", detail, "Give them one rank, or leave one of them out.")


def text_field(source: str, record: dict, name: str) -> str:
    """The non-empty text of a field. Raises BadRecord."""
    return _text(source, f'"{name}"', _field(source, record, name))


def name_field(source: str, record: Mapping[str, Any], name: str) -> str | int | None:
    """What an optional field names something by, a string or an integer. Raises BadRecord."""
    value = record.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
        raise BadRecord(source, "wrong type", f'"{name}" is {_kind(value)}', "Make it a string or an integer, or leave it out.")
    return value


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
        """Count a bad record, or raise it."""
        if self._on_bad_record == "raise":
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
    def convert_line(item: tuple[str, bytes]) -> R:
        source, line = item
        return convert(source, json_record(source, line))

    return sift(str(path), lines(path), convert_line, on_bad_record=on_bad_record)


def _field(source: str, record: dict, name: str) -> Any:
    if name not in record:
        have = ", ".join(f'"{key}"' for key in record) or "no field"
        raise BadRecord(source, "missing field", f'no "{name}" among {have}', f'Add "{name}" to the record.')
    return record[name]


def _text(source: str, what: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadRecord(source, "wrong type", f"{what} is {_kind(value)}", "Make it a string.")
    if not value.strip():
        raise BadRecord(source, "empty text", f"{what} has no text", "Write some text or remove the record.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(source, "invalid Unicode", f"{what} has half of a surrogate pair", "Write both \\u escapes of it.") from error
    return value


def _responses_field(source: str, record: dict) -> tuple[str, ...]:
    responses = _field(source, record, "responses")
    if not isinstance(responses, list):
        raise BadRecord(source, "wrong type", f'"responses" is {_kind(responses)}', "Make it a list of strings.")
    if len(responses) < 2:
        raise BadRecord(source, "too few responses", f"{len(responses)} of them", "A ranking compares two or more.")
    return tuple(_text(source, f'"responses"[{i}]', response) for i, response in enumerate(responses))


def _ranks_field(source: str, record: dict, *, num_responses: int) -> tuple[int, ...]:
    ranks = _field(source, record, "ranks")
    if not isinstance(ranks, list):
        raise BadRecord(source, "wrong type", f'"ranks" is {_kind(ranks)}', "Make it a list of integers.")
    if len(ranks) != num_responses:
        raise BadRecord(source, "wrong number of ranks", f"{len(ranks)} for {num_responses} responses", "Give each response its rank.")
    for i, rank in enumerate(ranks):
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= LARGEST_RANK:
            said = json.dumps(rank)
            shown = said if len(said) < 40 else f"{said[:20]}... ({len(said)} characters)"
            raise BadRecord(source, "bad rank", f'"ranks"[{i}] is {shown}', "Ranks are integers from 1 (best) up; ties are equal.")
    return tuple(ranks)


def _kind(value: Any) -> str:
    """The JSON name of a value's type, with its article."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names[type(value)]
