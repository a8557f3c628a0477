"""Records as they lie in files: JSON lines, JSON lines under gzip, and parquet, told apart by the file's name.

Each record comes with its place, "file:line" or, in parquet, "file:row", counted from 1. A file that is missing, torn or of
another kind raises `BadRecord`; so does, one record at a time and later, a record that is no JSON object.
"""

from __future__ import annotations

import codecs
import gzip
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

AS_LINES = {b"[": " `jq -c '.[]' FILE` makes such lines of an array.", b"{": " `jq -c . FILE` makes such lines of spread-out objects."}
"""What a file begins with that holds JSON in another way -> how to make lines of it."""
ROWS_AT_ONCE = 256  # of a parquet file in memory


class BadRecord(ValueError):
    """A record that cannot be used: where it is, why, and what to do about it."""

    def __init__(self, source: str, reason: str, detail: str, way_out: str):
        # All four go to Exception, so that the error crosses process borders (pickle calls the class with `args`).
        super().__init__(source, reason, detail, way_out)
        self.source, self.reason, self.detail, self.way_out = source, reason, detail, way_out

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}: {self.detail}. {self.way_out}"


class OtherRecord(BadRecord):
    """A record of another kind, which belongs where it is and is no mistake: it is left out and counted, never raised."""


def stored_records(path: str | Path) -> Iterator[tuple[str, bytes | dict]]:
    """The records of a file with their places: a line of JSON, or a row of a ``.parquet`` file. BadRecord for the file."""
    return _rows(Path(path)) if str(path).endswith(".parquet") else lines(path)


def record_of(source: str, stored: bytes | dict) -> dict:
    """A stored record as a JSON object in which every number is finite. Raises BadRecord."""
    return json_record(source, stored) if isinstance(stored, bytes) else _json_row(source, stored)


def lines(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """The lines of a file as ("file:line", bytes), without byte order marks; blank ones hold no record and are passed over.

    A file whose name ends in ``.gz`` is read through gzip. BadRecord where there is no file or it cannot be read to its end.
    """
    _require_file(path)
    number = 0
    try:
        # As bytes, because a text file that is not UTF-8 would fail without its line number.
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                content = line.removeprefix(codecs.BOM_UTF8)  # of any line: files that were joined have some inside
                if content.strip():
                    yield f"{path}:{number}", content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        way_out = "Fetch or write it again; a file that is not gzip has no .gz in its name."
        raise BadRecord(str(path), "damaged file", f"gzip ends or breaks after line {number}: {error}", way_out) from error
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
        way_out = f"Write one complete JSON object per line.{AS_LINES.get(line.strip(), '')}"
        raise BadRecord(source, "broken JSON", str(error), way_out) from error
    if not isinstance(record, dict):
        way_out = f'Write an object per line: {{"prompt": ...}}.{AS_LINES[b"["] if isinstance(record, list) else ""}'
        raise BadRecord(source, "not an object", f"the line is {kind_of(record)}", way_out)
    return record


def kind_of(value: Any) -> str:
    """The JSON name of a value's type, with its article; the type's own name where JSON has none."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _require_file(path: str | Path) -> None:
    if not Path(path).is_file():
        way_out = "Check the path; a relative one starts at the working directory."
        raise BadRecord(str(path) or "''", "missing file", "there is no such file", way_out)


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


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    _require_file(path)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise BadRecord(str(path), "no reader", "parquet is read by pyarrow, which is not here", "pip install pyarrow.") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            twice = [name for name, count in Counter(file.schema_arrow.names).items() if count > 1]
            if twice:
                raise BadRecord(str(path), "one column twice", f'"{twice[0]}"', "Leave one of them out.")
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except BadRecord:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # names that are no text, times that Python has not
        way_out = "Fetch or write it again; a file of JSON lines has another name."
        raise BadRecord(str(path), "damaged file", f"parquet breaks after row {number}: {error}", way_out) from error


def _json_row(source: str, row: dict) -> dict:
    """A parquet row as JSON has it: a column that is null is a field that the record lacks."""
    return {name: _json_value(source, f'"{name}"', value) for name, value in row.items() if value is not None}


def _json_value(source: str, name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_value(source, f"{name}.{key}", inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_json_value(source, f"{name}[{i}]", inner) for i, inner in enumerate(value)]
    if not isinstance(value, None | bool | int | float | str):
        detail = f"{name} is of type {type(value).__name__}, which JSON does not have"
        raise BadRecord(source, "wrong type", detail, "Make the column strings or numbers, or leave it out.")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRecord(source, "wrong type", f"{name} is {value}", "Make it a finite number, or null where there is none.")
    return value
