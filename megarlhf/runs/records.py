"""From files to token rows: everything that cannot be read is noted, and said together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from megarlhf.config.sections import HeldOutTextConfig, LimitsConfig, PretrainingDataConfig, TokenizerConfig
from megarlhf.data.pretraining import PretrainingStream
from megarlhf.data.records import RecordReport, read_demonstrations, read_prompts, read_rankings
from megarlhf.data.tokenized import (
    DemonstrationRow,
    PromptRow,
    RankingRow,
    demonstration_rows,
    prompt_rows,
    ranking_rows,
)
from megarlhf.data.tokenizers import Tokenizer, load_tokenizer
from megarlhf.evaluation.text import HeldOutText
from megarlhf.parallel.groups import World
from megarlhf.parallel.seed import derive_seed
from megarlhf.runs.agreement import refuse_together

T = TypeVar("T")
R = TypeVar("R")


def open_tokenizer(config: TokenizerConfig, world: World) -> Tokenizer:
    """The run's tokenizer. ConfigError on every rank where any rank cannot read it."""
    problems: list[str] = []
    tokenizer = _noting(problems, load_tokenizer, config.path, eos_token=config.eos_token)
    refuse_together([f"tokenizer: {problem}" for problem in problems], world)
    return tokenizer


class Records:
    """Reads a run's files under its limits. What fails is noted in `problems` and read as nothing."""

    def __init__(self, tokenizer: Tokenizer, limits: LimitsConfig) -> None:
        self.tokenizer = tokenizer
        self.limits = limits
        self.problems: list[str] = []
        self.notes: list[str] = []
        """What was read, and what of it was left out and why: a line for each."""

    def demonstrations(self, path: str | None) -> list[DemonstrationRow]:
        """{"prompt", "response"} as rows; none without a path."""
        return self._rows(path, read_demonstrations, demonstration_rows, **self._lengths())

    def rankings(self, path: str | None) -> list[RankingRow]:
        """Rankings and pairs as rows; none without a path."""
        return self._rows(path, read_rankings, ranking_rows, **self._lengths())

    def prompts(self, path: str | None) -> list[PromptRow]:
        """{"prompt"} as rows; none without a path."""
        return self._rows(path, read_prompts, prompt_rows, max_prompt_len=self.limits.max_prompt_len)

    def text(self, data: PretrainingDataConfig, *, seed: int) -> PretrainingStream | None:
        """Packed text without end; None where it cannot be read."""
        return _noting(self.problems, PretrainingStream, data.prefix, seq_len=data.seq_len, seed=derive_seed(seed, "text"), **self._ids())

    def held_out(self, data: HeldOutTextConfig | None) -> HeldOutText:
        """Held-out text, where there is any."""
        return _noting(self.problems, HeldOutText.of, data, **self._ids()) or HeldOutText(None)

    def _rows(self, path: str | None, read: Callable, convert: Callable[..., tuple[list[R], RecordReport]], **lengths: int) -> list[R]:
        return (_noting(self.problems, self._read, path, read, convert, **lengths) if path else None) or []

    def _read(self, path: str | Path, read: Callable, convert: Callable[..., tuple[list[R], RecordReport]], **lengths: int) -> list[R]:
        records, report = read(path, on_bad_record=self.limits.on_bad_record)
        rows, fit = convert(records, self.tokenizer, **lengths, on_bad_record=self.limits.on_bad_record)
        self.notes += [str(report), *([str(fit)] if fit.num_skipped else [])]
        return rows

    def _lengths(self) -> dict[str, int]:
        return {"max_prompt_len": self.limits.max_prompt_len, "max_response_len": self.limits.max_response_len}

    def _ids(self) -> dict[str, int]:
        return {"eos_id": self.tokenizer.eos_id, "vocab_size": self.tokenizer.vocab_size}


def _noting(problems: list[str], function: Callable[..., T], *args: object, **kwargs: object) -> T | None:
    """function(*args, **kwargs), or None with its ValueError noted."""
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        problems.append(str(error))
        return None
