"""Records as token rows within the limits of a run.

A prompt and its response are encoded apart, as generation sees them: the response starts at a token of its own. A
response ends with EOS, and one that does not fit with its EOS is a bad record: training on a cut response would teach
the model to stop, or to go on, where its author did not. A chat is written by the tokenizer's template (`data/chat.py`), which
ends the assistant's turns with EOS. What a tokenizer loses of the texts is counted.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

from megarlhf.data.chat import Chat, Span
from megarlhf.data.comparisons import chat_of
from megarlhf.data.fields import Messages, require_one_rank_each
from megarlhf.data.files import BadRecord
from megarlhf.data.records import Demonstration, OnBadRecord, Prompt, Ranking, RecordReport, sift, stops
from megarlhf.data.shares import Shares
from megarlhf.data.tokenizers import Tokenizer, UnwritableText

TokenIds = array  # array("i"): 4 bytes per token, where a list of Python integers takes 36
T = TypeVar("T", Demonstration, Ranking, Prompt)
R = TypeVar("R")
ALONE = Shares()


@dataclass(frozen=True)
class DemonstrationRow:
    """The tokens of a demonstration."""

    prompt_ids: TokenIds
    response_ids: TokenIds
    """EOS included."""
    source: str
    earlier_answers: tuple[Span, ...] = ()
    """Where the prompt holds answers of the assistant, [start, end) with their EOS, which are in the loss too."""


@dataclass(frozen=True)
class RankingRow:
    """The tokens of a prompt and of its ranked completions."""

    prompt_ids: TokenIds
    response_ids: tuple[TokenIds, ...]
    """One per completion, EOS included."""
    ranks: tuple[int, ...]
    source: str
    group: str | int | None = None
    """Whose ranking it is, where its record says so."""


@dataclass(frozen=True)
class PromptRow:
    """The tokens of a prompt."""

    prompt_ids: TokenIds
    source: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The record's other fields, such as "id"."""


Row = DemonstrationRow | RankingRow | PromptRow


def rows_fingerprint(rows: Iterable[Row]) -> str:
    """A hash of the token ids (and ranks) of rows in their order: the same for what trains the same."""
    whole = hashlib.sha256()
    for row in rows:
        responses = () if isinstance(row, PromptRow) else row.response_ids if isinstance(row, RankingRow) else (row.response_ids,)
        for ids in (row.prompt_ids, *responses):
            whole.update(f"{len(ids)} ".encode() + array("i", ids).tobytes())
        more = row.ranks if isinstance(row, RankingRow) else row.earlier_answers if isinstance(row, DemonstrationRow) else ()
        whole.update(f"{more}".encode())
    return whole.hexdigest()


def fields_fingerprint(rows: Iterable[PromptRow]) -> str:
    """A hash of what prompts' records say besides, which rewards of one's own may go by."""
    return hashlib.sha256(json.dumps([dict(row.fields) for row in rows], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class TextLoss:
    """What a tokenizer loses of one text."""

    num_unknown: int
    """Tokens that stand for text it does not know."""
    change: str
    """The first place where the text does not come back as it was, before and after; empty where it does."""


class TextEncoder:
    """Encodes the texts of records, and counts what the tokenizer loses of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._counts: Counter[str] = Counter()
        self._example = ""

    def encode(self, source: str, what: str, text: str) -> list[int]:
        """The ids of a text, one at least. Raises BadRecord."""
        ids, loss = encode_text(self.tokenizer, source, what, text)
        self.count(source, what, loss)
        return ids

    def encode_prompt(self, source: str, prompt: str | Messages) -> list[int]:
        """The ids of a prompt, up to where its answer begins. Raises BadRecord."""
        if isinstance(prompt, str):
            return self.encode(source, "prompt", prompt)
        ids = self.chat.prompt_ids(source, prompt)
        self._count_chat(source, prompt, ids)
        return ids

    def encode_chat(self, source: str, messages: Messages, *, first: int = 0) -> tuple[list[int], list[Span]]:
        """The ids of a chat and the assistant's turns from message `first` on (see `Chat.conversation_ids`). Raises BadRecord."""
        ids, spans = self.chat.conversation_ids(source, messages, first=first)
        self._count_chat(source, messages[first:], ids)
        return ids, spans

    @cached_property
    def chat(self) -> Chat:
        """The tokenizer's template. ValueError where it has none."""
        return Chat(self.tokenizer)

    def _count_chat(self, source: str, messages: Messages, ids: Sequence[int]) -> None:
        """Count what is lost of the contents, but for whitespace: templates strip it, and tokens swallow it."""
        back = "".join(self.tokenizer.decode(ids).split())
        lacking = next((text for message in messages if (text := "".join(message.content.split())) not in back), None)
        change = "" if lacking is None else f"{lacking[:40]!a} does not come back"
        self.count(source, "chat", TextLoss(sum(i == self.tokenizer.unk_id for i in ids), change))

    def count(self, source: str, what: str, loss: TextLoss) -> None:
        """Count what was lost of a text that was encoded elsewhere."""
        example = f"{source}, {what}: {loss.change}" if loss.change else ""
        counts = {"texts": 1, "unknown": loss.num_unknown, "with unknown": int(loss.num_unknown > 0), "changed": int(loss.change != "")}
        self.add_counts((Counter(counts), example))

    @property
    def counts(self) -> tuple[Counter[str], str]:
        """What was lost so far, and the first example of it."""
        return self._counts, self._example

    def add_counts(self, counts: tuple[Counter[str], str]) -> None:
        """Count what another encoder has lost of texts that come after these."""
        self._counts.update(counts[0])
        self._example = self._example or counts[1]

    def lost(self) -> str:
        """All that was lost so far in a sentence, with its first example; empty where nothing was."""
        found, of = [], self._counts
        if of["unknown"]:
            found.append(f"{of['unknown']} tokens for unknown text in {of['with unknown']} of {of['texts']} texts")
        if of["changed"]:
            found.append(f"{of['changed']} of {of['texts']} texts do not come back as they were")
        return f"the tokenizer loses text: {'; '.join(found)}{self._example and f' (the first: {self._example})'}" if found else ""


def encode_text(tokenizer: Tokenizer, source: str, what: str, text: str) -> tuple[list[int], TextLoss]:
    """The ids of a text, one at least, and what was lost of it. Raises BadRecord."""
    try:
        ids = tokenizer.encode(text)
    except UnwritableText as error:
        raise BadRecord(source, "unwritable text", f"{what}: {error}", "Take another tokenizer or eos_token, or remove it.") from error
    if not ids:
        raise BadRecord(source, "empty after tokenization", f"the tokenizer gives no token for {what}", "Write some text or remove it.")
    back = tokenizer.decode(ids)
    return ids, TextLoss(sum(i == tokenizer.unk_id for i in ids), "" if back == text else _first_change(text, back))


def _first_change(before: str, after: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after)))
    window = slice(max(0, at - 8), at + 16)
    return f"{before[window]!a} becomes {after[window]!a}"


def demonstration_rows(
    records: Sequence[Demonstration],
    tokenizer: Tokenizer,
    *,
    max_prompt_len: int,
    max_response_len: int,
    on_bad_record: OnBadRecord = "raise",
    shares: Shares = ALONE,
) -> tuple[list[DemonstrationRow], RecordReport]:
    """Encode demonstrations; `max_response_len` counts the EOS. Raises BadRecord, with `shares` on every rank."""

    def convert(record: Demonstration, encoder: TextEncoder) -> DemonstrationRow:
        if not isinstance(record.prompt, str):
            ids, [*earlier, (start, end)] = encoder.encode_chat(record.source, chat_of(record.prompt, record.response))
            prompt_ids = _within(record.source, ids[:start], max_prompt_len)
            response_ids = _response_within(record.source, "response", ids[start:end], max_response_len)
            return DemonstrationRow(prompt_ids, response_ids, record.source, tuple(earlier))
        return DemonstrationRow(
            _prompt_ids(record, encoder, max_prompt_len),
            _response_ids(record, "response", record.response, encoder, max_response_len),
            record.source,
        )

    return _rows(records, convert, tokenizer, on_bad_record, shares)


def ranking_rows(
    records: Sequence[Ranking],
    tokenizer: Tokenizer,
    *,
    max_prompt_len: int,
    max_response_len: int,
    on_bad_record: OnBadRecord = "raise",
    shares: Shares = ALONE,
) -> tuple[list[RankingRow], RecordReport]:
    """Encode rankings; one completion out of limits makes its whole ranking bad. Raises BadRecord, with `shares` on every rank."""

    def convert(record: Ranking, encoder: TextEncoder) -> RankingRow:
        prompt_ids = _prompt_ids(record, encoder, max_prompt_len)
        response_ids = tuple(
            _response_ids(record, f"response {i}", response, encoder, max_response_len)
            for i, response in enumerate(record.responses)
        )
        require_one_rank_each(record.source, map(tuple, response_ids), record.ranks)  # texts may differ where their tokens do not
        return RankingRow(prompt_ids, response_ids, record.ranks, record.source, record.group)

    return _rows(records, convert, tokenizer, on_bad_record, shares)


def prompt_rows(
    records: Sequence[Prompt], tokenizer: Tokenizer, *, max_prompt_len: int, on_bad_record: OnBadRecord = "raise", shares: Shares = ALONE
) -> tuple[list[PromptRow], RecordReport]:
    """Encode prompts. Raises BadRecord, with `shares` on every rank."""

    def convert(record: Prompt, encoder: TextEncoder) -> PromptRow:
        return PromptRow(_prompt_ids(record, encoder, max_prompt_len), record.source, record.fields)

    return _rows(records, convert, tokenizer, on_bad_record, shares)


def _rows(
    records: Sequence[T], convert: Callable[[T, TextEncoder], R], tokenizer: Tokenizer, on_bad_record: OnBadRecord, shares: Shares
) -> tuple[list[R], RecordReport]:
    # The rows come from the files of the records: "a.jsonl:12" is line 12 of a.jsonl.
    files = dict.fromkeys(record.source.rpartition(":")[0] for record in records)
    source = ", ".join(files) or "the records"
    mine, whole = TextEncoder(tokenizer), TextEncoder(tokenizer)
    outcomes: list[R | ValueError] = []
    for part, counts in shares.exchange((_outcomes(shares.of(records), convert, mine, on_bad_record), mine.counts)):
        outcomes += part
        whole.add_counts(counts)
    rows, report = sift(source, outcomes, _row_of, on_bad_record=on_bad_record)
    return rows, replace(report, lost=whole.lost())


def _outcomes(
    records: Sequence[T], convert: Callable[[T, TextEncoder], R], encoder: TextEncoder, on_bad_record: OnBadRecord
) -> list[R | ValueError]:
    """Each record's row, or what is wrong with it, up to what ends the run in any case."""
    found: list[R | ValueError] = []
    for record in records:
        try:
            found.append(convert(record, encoder))
        except ValueError as error:
            found.append(error)
            if not isinstance(error, BadRecord) or stops(error, on_bad_record):
                break
    return found


def _row_of(outcome: R | ValueError) -> R:
    if isinstance(outcome, ValueError):
        raise outcome
    return outcome


def _prompt_ids(record: Demonstration | Ranking | Prompt, encoder: TextEncoder, max_prompt_len: int) -> TokenIds:
    return _within(record.source, encoder.encode_prompt(record.source, record.prompt), max_prompt_len)


def _within(source: str, ids: list[int], max_prompt_len: int) -> TokenIds:
    if len(ids) > max_prompt_len:
        raise BadRecord(
            source,
            "prompt over limit",
            f"the prompt has {len(ids)} tokens, more than max_prompt_len {max_prompt_len}",
            "Shorten it, raise max_prompt_len, or skip such records.",
        )
    return array("i", ids)


def _response_ids(record: Demonstration | Ranking, what: str, text: str, encoder: TextEncoder, max_response_len: int) -> TokenIds:
    if isinstance(record.prompt, str):
        ids = [*encoder.encode(record.source, what, text), encoder.tokenizer.eos_id]
    else:
        whole, [(start, end)] = encoder.encode_chat(record.source, chat_of(record.prompt, text), first=len(record.prompt))
        ids = whole[start:end]
    return _response_within(record.source, what, ids, max_response_len)


def _response_within(source: str, what: str, ids: list[int], max_response_len: int) -> TokenIds:
    if len(ids) > max_response_len:
        raise BadRecord(
            source,
            "response over limit",
            f"{what} has {len(ids) - 1} tokens + EOS, more than max_response_len {max_response_len}",
            "Shorten it, raise max_response_len, or skip such records.",
        )
    return array("i", ids)
