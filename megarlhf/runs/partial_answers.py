"""Answers as they are given: appended by the rank that knows them, kept through any end of the process, put in order at last.

answers/00003.jsonl    of rank 3: a line per answered row, flushed to the disk before the next: {"row", "tokens", "record"}

A last line without its end was being written when the process ended; its row is answered again.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megarlhf.generation.in_flight import Listener
from megarlhf.storage.files import sync_folder
from megarlhf.telemetry.progress import Progress


@dataclass(frozen=True)
class Answered:
    """A row that is done."""

    tokens: int
    """Of its response."""
    record: dict[str, object]
    """What responses.jsonl will say of it."""


def read_parts(folder: Path) -> dict[int, Answered]:
    """Row -> its answer; lines that were being written when a process ended are cut off. ValueError where a line is damaged."""
    found: dict[int, Answered] = {}
    for path in sorted(folder.glob("*.jsonl")):
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with path.open("rb+") as file:
                file.truncate(len(whole))
                os.fsync(file.fileno())
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                found.setdefault(int(entry["row"]), Answered(int(entry["tokens"]), dict(entry["record"])))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number} is damaged ({error}); remove the line, and its row is answered again") from error
    return found


class PartWriter(Listener):
    """Appends the answers that this rank is told of, and shows how far its copy of the model is."""

    def __init__(self, path: Path, rows: Sequence[int], record: Callable[[int, Sequence[int]], dict[str, object]], progress: bool) -> None:
        """Args: rows: the run's number of each row of the batch. record: what is said of (a run's row, its response)."""
        path.parent.mkdir(exist_ok=True)
        self._file = path.open("ab")
        sync_folder(path.parent)
        self._rows, self._record, self._shows = rows, record, progress
        self._progress: Progress | None = None
        self._started, self._tokens = time.monotonic(), 0

    def expect(self, rows: int) -> None:
        """So many are to be answered here."""
        if self._progress is None:
            self._progress = Progress("responses", rows, enabled=self._shows)
        else:
            self._progress.expect(rows)

    def token(self, row: int, token: int) -> None:
        """Counted."""
        self._tokens += 1

    def end(self, row: int, tokens: Sequence[int]) -> None:
        """On the disk when this returns."""
        number = self._rows[row]
        line = json.dumps({"row": number, "tokens": len(tokens), "record": self._record(number, tokens)})
        try:
            self._file.write(f"{line}\n".encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:  # which does not say of which file it speaks
            with contextlib.suppress(OSError):  # it has the rest of the line, and would try again: the error is known
                self._file.close()
            raise OSError(error.errno, error.strerror, self._file.name) from error
        self._progress.update({"tokens/s": self._tokens / max(1e-9, time.monotonic() - self._started)})

    def close(self) -> None:
        """Nothing is written after."""
        self._file.close()
        if self._progress is not None:
            self._progress.close()
