"""Sampled responses, kept as text to be read."""

from __future__ import annotations

from pathlib import Path

from megarlhf.telemetry.jsonl import JsonLines


class SampleLog:
    """``samples.jsonl``: one object per sample with "stage", "step", "prompt", "response" and what is known about it."""

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path)

    def write(self, stage: str, step: int, *, prompt: str, response: str, **values: float | str) -> None:
        """Append one sample; `values` are further columns, such as ``score``."""
        self._lines.append(stage, step, {"prompt": prompt, "response": response, **values})

    def truncate_after(self, stage: str, step: int) -> None:
        """Drop the samples of `stage` later than `step`, which a resumed run will draw again."""
        self._lines.truncate_after(stage, step)

    def close(self) -> None:
        """Close the file."""
        self._lines.close()
