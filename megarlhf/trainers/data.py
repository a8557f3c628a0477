"""From files to token rows, with one report of what was left out."""

from __future__ import annotations

from pathlib import Path

from megarlhf.config.sections import LimitsConfig
from megarlhf.data.records import RecordReport, read_demonstrations, read_prompts, read_rankings
from megarlhf.data.tokenized import (
    DemonstrationRow,
    PromptRow,
    RankingRow,
    demonstration_rows,
    prompt_rows,
    ranking_rows,
)
from megarlhf.data.tokenizers import Tokenizer


class Records:
    """Reads a run's files under its limits; `reports` says of each file what was skipped."""

    def __init__(self, tokenizer: Tokenizer, limits: LimitsConfig) -> None:
        self.tokenizer = tokenizer
        self.limits = limits
        self.reports: list[RecordReport] = []

    def demonstrations(self, path: str | Path) -> list[DemonstrationRow]:
        """{"prompt", "response"} as rows."""
        records, report = read_demonstrations(path, on_bad_record=self.limits.on_bad_record)
        rows, fit = demonstration_rows(records, self.tokenizer, **self._lengths(), on_bad_record=self.limits.on_bad_record)
        self.reports += [report, fit]
        return rows

    def rankings(self, path: str | Path) -> list[RankingRow]:
        """Rankings and pairs as rows."""
        records, report = read_rankings(path, on_bad_record=self.limits.on_bad_record)
        rows, fit = ranking_rows(records, self.tokenizer, **self._lengths(), on_bad_record=self.limits.on_bad_record)
        self.reports += [report, fit]
        return rows

    def prompts(self, path: str | Path) -> list[PromptRow]:
        """{"prompt"} as rows."""
        records, report = read_prompts(path, on_bad_record=self.limits.on_bad_record)
        rows, fit = prompt_rows(
            records, self.tokenizer, max_prompt_len=self.limits.max_prompt_len, on_bad_record=self.limits.on_bad_record
        )
        self.reports += [report, fit]
        return rows

    def skipped(self) -> list[str]:
        """A line for every report that counts something left out."""
        return [str(report) for report in self.reports if report.num_skipped]

    def _lengths(self) -> dict[str, int]:
        return {"max_prompt_len": self.limits.max_prompt_len, "max_response_len": self.limits.max_response_len}
