"""Records as token rows within the limits of a run.

A prompt and its response are encoded apart, as generation sees them: the response starts at a token of its own. A
response ends with EOS, and one that does not fit with its EOS is a bad record: training on a cut response would teach
the model to stop, or to go on, where its author did not.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from megarlhf.data.records import BadRecord, Demonstration, OnBadRecord, Prompt, Ranking, RecordReport, sift
from megarlhf.data.tokenizers import Tokenizer

TokenIds = array  # array("i"): 4 bytes per token, where a list of Python integers takes 36
T = TypeVar("T", Demonstration, Ranking, Prompt)
R = TypeVar("R")


@dataclass(frozen=True)
class DemonstrationRow:
    """The tokens of a demonstration."""

    prompt_ids: TokenIds
    response_ids: TokenIds
    """EOS included."""
    source: str


@dataclass(frozen=True)
class RankingRow:
    """The tokens of a prompt and of its ranked completions."""

    prompt_ids: TokenIds
    response_ids: tuple[TokenIds, ...]
    """One per completion, EOS included."""
    ranks: tuple[int, ...]
    source: str


@dataclass(frozen=True)
class PromptRow:
    """The tokens of a prompt."""

    prompt_ids: TokenIds
    source: str
    id: str | int | None = None


def demonstration_rows(
    records: Sequence[Demonstration],
    tokenizer: Tokenizer,
    *,
    max_prompt_len: int,
    max_response_len: int,
    on_bad_record: OnBadRecord = "raise",
) -> tuple[list[DemonstrationRow], RecordReport]:
    """Encode demonstrations; `max_response_len` counts the EOS. Raises BadRecord."""

    def convert(record: Demonstration) -> DemonstrationRow:
        return DemonstrationRow(
            _prompt_ids(record, tokenizer, max_prompt_len),
            _response_ids(record.source, "response", record.response, tokenizer, max_response_len),
            record.source,
        )

    return _rows(records, convert, on_bad_record)


def ranking_rows(
    records: Sequence[Ranking],
    tokenizer: Tokenizer,
    *,
    max_prompt_len: int,
    max_response_len: int,
    on_bad_record: OnBadRecord = "raise",
) -> tuple[list[RankingRow], RecordReport]:
    """Encode rankings; one completion out of limits makes its whole ranking bad. Raises BadRecord."""

    def convert(record: Ranking) -> RankingRow:
        prompt_ids = _prompt_ids(record, tokenizer, max_prompt_len)
        response_ids = tuple(
            _response_ids(record.source, f"response {i}", response, tokenizer, max_response_len)
            for i, response in enumerate(record.responses)
        )
        return RankingRow(prompt_ids, response_ids, record.ranks, record.source)

    return _rows(records, convert, on_bad_record)


def prompt_rows(
    records: Sequence[Prompt], tokenizer: Tokenizer, *, max_prompt_len: int, on_bad_record: OnBadRecord = "raise"
) -> tuple[list[PromptRow], RecordReport]:
    """Encode prompts. Raises BadRecord."""

    def convert(record: Prompt) -> PromptRow:
        return PromptRow(_prompt_ids(record, tokenizer, max_prompt_len), record.source, record.id)

    return _rows(records, convert, on_bad_record)


def _rows(records: Sequence[T], convert: Callable[[T], R], on_bad_record: OnBadRecord) -> tuple[list[R], RecordReport]:
    # The rows come from the files of the records: "a.jsonl:12" is line 12 of a.jsonl.
    files = dict.fromkeys(record.source.rpartition(":")[0] for record in records)
    return sift(", ".join(files) or "the records", records, convert, on_bad_record=on_bad_record)


def _prompt_ids(record: Demonstration | Ranking | Prompt, tokenizer: Tokenizer, max_prompt_len: int) -> TokenIds:
    ids = tokenizer.encode(record.prompt)
    _require_tokens(record.source, "prompt", ids)
    if len(ids) > max_prompt_len:
        raise BadRecord(
            record.source,
            "prompt over limit",
            f"the prompt has {len(ids)} tokens, more than max_prompt_len {max_prompt_len}",
            "Shorten it, raise max_prompt_len, or skip such records.",
        )
    return array("i", ids)


def _response_ids(source: str, what: str, text: str, tokenizer: Tokenizer, max_response_len: int) -> TokenIds:
    ids = tokenizer.encode(text)
    _require_tokens(source, what, ids)
    if len(ids) + 1 > max_response_len:
        raise BadRecord(
            source,
            "response over limit",
            f"{what} has {len(ids)} tokens + EOS, more than max_response_len {max_response_len}",
            "Shorten it, raise max_response_len, or skip such records.",
        )
    return array("i", [*ids, tokenizer.eos_id])


def _require_tokens(source: str, what: str, ids: list[int]) -> None:
    if not ids:
        raise BadRecord(source, "empty after tokenization", f"the tokenizer gives no token for {what}", "Write some text or remove it.")
