"""Two models' answers to the same prompts, and labels that say whose answer is better.

Answers are `responses.jsonl` of a run, or lines of {"prompt", "response"} from elsewhere; where the prompt was a chat, "messages" say so,
and it is written by the tokenizer's template as it was when it was asked. Labels are lines of
{"id" or "prompt", "preference": "a", "b" or "tie"}.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megarlhf.data.fields import Messages, messages_field, name_field, text_field
from megarlhf.data.files import BadRecord, json_record, lines
from megarlhf.data.records import OnBadRecord, RecordReport, sift
from megarlhf.data.tokenized import TextEncoder, TokenIds
from megarlhf.data.tokenizers import Tokenizer

PREFERENCES = {"a": 1.0, "tie": 0.5, "b": 0.0}
"""What a label counts for A."""
Key = tuple[str, str | int]
"""("id", the record's id), or ("prompt", its text)."""


@dataclass(frozen=True)
class Answer:
    """One model's answer to a prompt."""

    prompt: str
    """Its text; of a chat, once it is encoded, what the template wrote."""
    response: str
    """May be empty: a model may end at once."""
    finished: bool
    """Whether it ended with EOS."""
    id: str | int | None
    source: str
    """"file:line"."""
    chat: Messages | None = None
    """The messages that were answered, where the prompt is a chat."""


@dataclass(frozen=True)
class AnswerRow:
    """The tokens of a prompt and of an answer to it."""

    prompt_ids: TokenIds
    response_ids: TokenIds
    """With EOS where the answer is finished."""
    answer: Answer
    """As the tokenizer gives its text back."""


@dataclass(frozen=True)
class Label:
    """What somebody preferred."""

    key: Key
    preference: float
    """1 where it is A's answer, 0 where it is B's, 1/2 for a tie."""
    source: str
    """"file:line"."""


def read_answers(path: str | Path, *, on_bad_record: OnBadRecord = "raise") -> tuple[list[Answer], RecordReport]:
    """Read {"prompt", "response"} lines, with optional "messages", "finished" (else true) and "id". Raises BadRecord."""

    def convert(item: tuple[str, bytes]) -> Answer:
        source, record = item[0], json_record(*item)
        response, finished = record.get("response"), record.get("finished", True)
        if not isinstance(response, str) or response.strip():
            response = text_field(source, record, "response")
        if not isinstance(finished, bool):
            raise BadRecord(source, "wrong type", '"finished" is not true or false', "Make it so, or leave it out.")
        chat = messages_field(source, record, "messages", last="user") if "messages" in record else None
        prompt = "" if chat is not None else text_field(source, record, "prompt")
        return Answer(prompt, response, finished, name_field(source, record, "id"), source, chat)

    return sift(str(path), lines(path), convert, on_bad_record=on_bad_record)


def read_labels(path: str | Path, *, on_bad_record: OnBadRecord = "raise") -> tuple[list[Label], RecordReport]:
    """Read {"id" or "prompt", "preference"} lines; several may be about one prompt. Raises BadRecord."""

    def convert(item: tuple[str, bytes]) -> Label:
        source, record = item[0], json_record(*item)
        number = name_field(source, record, "id")
        key: Key = ("id", number) if number is not None else ("prompt", text_field(source, record, "prompt"))
        preference = record.get("preference")
        if not isinstance(preference, str) or preference not in PREFERENCES:
            detail = f'"preference" is {preference!r:.40}'
            raise BadRecord(source, "unknown preference", detail, 'It is "a", "b" or "tie".')
        return Label(key, PREFERENCES[preference], source)

    return sift(str(path), lines(path), convert, on_bad_record=on_bad_record)


def answer_rows(
    answers: Sequence[Answer], tokenizer: Tokenizer, *, max_prompt_len: int, max_response_len: int, on_bad_record: OnBadRecord = "raise"
) -> tuple[list[AnswerRow], RecordReport]:
    """Encode answers, a prompt apart from its answer. Raises BadRecord, where one is too long as well."""
    encoder = TextEncoder(tokenizer)

    def convert(answer: Answer) -> AnswerRow:
        prompt = encoder.encode_prompt(answer.source, answer.prompt if answer.chat is None else answer.chat)
        response = encoder.encode(answer.source, "response", answer.response) if answer.response else []
        response = [*response, *([tokenizer.eos_id] if answer.finished else [])]
        for what, ids, limit, most in (
            ("prompt", prompt, "max_prompt_len", max_prompt_len),
            ("response", response, "max_response_len", max_response_len),
        ):
            if len(ids) > most:
                detail = f"the {what} has {len(ids)} tokens, more than {limit} {most}"
                raise BadRecord(answer.source, f"{what} over limit", detail, f"Raise {limit}, or skip such records.")
        as_read = replace(answer, prompt=tokenizer.decode(prompt), response=tokenizer.decode(response))
        return AnswerRow(array("i", prompt), array("i", response), as_read)

    files = dict.fromkeys(answer.source.rpartition(":")[0] for answer in answers)
    rows, report = sift(", ".join(files), answers, convert, on_bad_record=on_bad_record)
    return rows, replace(report, lost=encoder.lost())


def answers_fingerprint(rows: Iterable[AnswerRow]) -> str:
    """A hash of the token ids and ids of answers."""
    whole = hashlib.sha256()
    for row in rows:
        for ids in (row.prompt_ids, row.response_ids):
            whole.update(f"{len(ids)} ".encode() + array("i", ids).tobytes())
        whole.update(repr(row.answer.id).encode())
    return whole.hexdigest()


def paired(ours: Sequence[Answer], theirs: Sequence[Answer]) -> tuple[list[tuple[int, int]], list[str]]:
    """(numbers of two answers to one prompt, in the order of `ours`; what is left out and why, a line each).

    Answers belong together by their ids where all have one, else by the texts of their prompts.
    """
    by_id = all(answer.id is not None for answer in (*ours, *theirs))
    problems: list[str] = []
    a, b = (_by_key(answers, by_id, problems) for answers in (ours, theirs))
    for side, answers, other in ((a, ours, b), (b, theirs, a)):
        alone = [number for key, number in side.items() if key not in other]
        if alone:
            what = f"no answer on the other side with the same {'id' if by_id else 'prompt'}"
            problems.append(f"{len(alone)} of {len(answers)} answers have {what}, {answers[alone[0]].source} the first")
    pairs = [(number, b[key]) for key, number in a.items() if key in b]
    for i, j in pairs:
        if ours[i].prompt != theirs[j].prompt:
            problems.append(f"{ours[i].source} and {theirs[j].source} have one id and other prompts")
    return [(i, j) for i, j in pairs if ours[i].prompt == theirs[j].prompt], problems


def _by_key(answers: Sequence[Answer], by_id: bool, problems: list[str]) -> dict[str | int, int]:
    """Each answer's number by its id or its prompt's text."""
    numbers: dict[str | int, int] = {}
    for number, answer in enumerate(answers):
        first = numbers.setdefault(answer.id if by_id else answer.prompt, number)
        if first != number:
            what = "id" if by_id else "prompt"
            problems.append(f"{answer.source} has the {what} of {answers[first].source}: nothing says which of the two is meant")
    return numbers
