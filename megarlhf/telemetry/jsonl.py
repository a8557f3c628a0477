"""One JSON object per line, each with its stage and step, that a resumed run continues without duplicates."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

NONFINITE = "nonfinite"


class JsonLines:
    """Appends records to a file, each line flushed as it is written.

    The lines are standard JSON, which has no word for NaN or infinity: such a value is written as null, and the record's
    "nonfinite" says which names held what, for example ``{"loss": null, "nonfinite": {"loss": "nan"}}``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)
        self._file = path.open("a", encoding="ascii")

    def append(self, stage: str, step: int, record: Mapping[str, object]) -> None:
        """Write one line: the stage, the step, then `record`, a flat mapping of JSON values."""
        reserved = {"stage", "step", NONFINITE} & record.keys()
        assert not reserved, f"{self.path}: the record may not hold {sorted(reserved)}"
        values = {name: value for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)}
        line = {"stage": stage, "step": step, **record, **dict.fromkeys(values)}
        if values:
            line[NONFINITE] = {name: str(value) for name, value in values.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def truncate_after(self, stage: str, step: int) -> None:
        """Drop the lines of `stage` with a step later than `step`; the file is replaced at once or not at all.

        Raises ValueError, with the line's number, where the file holds a line that this class did not write.
        """
        lines = self.path.read_text(encoding="ascii", errors="replace").splitlines(keepends=True)
        kept = [line for number, line in enumerate(lines, 1) if not self._is_after(line, number, stage, step)]
        if len(kept) == len(lines):
            return
        self._file.close()
        replacement = self.path.with_name(self.path.name + ".tmp")
        with replacement.open("w", encoding="ascii") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(replacement, self.path)
        self._file = self.path.open("a", encoding="ascii")

    def close(self) -> None:
        """Close the file; nothing can be appended after."""
        self._file.close()

    def _is_after(self, line: str, number: int, stage: str, step: int) -> bool:
        try:
            record = json.loads(line)
            return record["stage"] == stage and record["step"] > step
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path}, line {number}: expected a JSON object with a stage and a step, got {line[:80]!r}; "
                "mend or remove the line to resume"
            ) from error


def _drop_torn_line(path: Path) -> None:
    """Cut off a last line without its end, which a process that was killed while writing leaves; its step will run again."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)
