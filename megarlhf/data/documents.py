"""Documents as they lie in files: a record of JSON lines or parquet, or a whole text file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megarlhf.data.fields import text_field
from megarlhf.data.files import BadRecord, record_of, stored_records


def stored_documents(paths: Iterable[str]) -> Iterator[tuple[str, bytes | dict]]:
    """(source, what is stored) of each document: a record of a .jsonl, .jsonl.gz or .parquet file, or the whole of a .txt file.

    Raises BadRecord for a file that is missing or of no known kind.
    """
    for path in paths:
        if path.endswith((".jsonl", ".jsonl.gz", ".parquet")):
            yield from stored_records(path)
        elif path.endswith(".txt"):
            if not os.path.isfile(path):
                raise BadRecord(path, "missing file", "there is no such file", "Check the path.")
            yield path, Path(path).read_bytes()
        else:
            raise BadRecord(path, "unknown kind of file", "neither .jsonl, .jsonl.gz, .parquet nor .txt", "Rename it to what it is.")


def document_text(source: str, stored: bytes | dict, keys: Sequence[str]) -> str:
    """A document's text: of a record those of its fields that are among `keys`, joined in the order of `keys`. Raises BadRecord."""
    if isinstance(stored, bytes) and source.endswith(".txt"):
        return text_field(source, {"text": _plain_text(source, stored)}, "text")
    record = record_of(source, stored)
    return "".join(text_field(source, record, key) for key in [key for key in keys if key in record] or keys[:1])


def _plain_text(source: str, content: bytes) -> str:
    """The text of a .txt file. Raises BadRecord with the line of a byte that is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BadRecord(f"{source}:{line}", "invalid UTF-8", f"byte {error.start} of the file", "Save the file as UTF-8.") from error
