"""Fields of a record, checked: texts, chat messages, completions and their ranks. Each raises BadRecord with the field's name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megarlhf.data.files import BadRecord, kind_of

LARGEST_RANK = 2**63 - 1  # ranks are compared as int64
ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,31}")


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    """"system", "user", "assistant", or another word that the tokenizer's template knows."""
    content: str


Messages = tuple[Message, ...]
"""A chat, its turns in order."""


def text_field(source: str, record: dict, name: str) -> str:
    """The non-empty text of a field."""
    return _text(source, f'"{name}"', field_of(source, record, name))


def name_field(source: str, record: Mapping[str, Any], name: str) -> str | int | None:
    """What an optional field names something by, a string or an integer."""
    value = record.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
        raise BadRecord(source, "wrong type", f'"{name}" is {kind_of(value)}', "Make it a string or an integer, or leave it out.")
    return value


def field_of(source: str, record: dict, name: str) -> Any:
    """The value of a field that must be there."""
    if name not in record:
        have = ", ".join(f'"{key}"' for key in record) or "no field"
        raise BadRecord(source, "missing field", f'no "{name}" among {have}', f'Add "{name}" to the record; docs/data.md has the forms.')
    return record[name]


def messages_field(source: str, record: dict, name: str, *, last: str) -> Messages:
    """A list of ``{"role", "content"}``, the last of which is of the role `last`."""
    value = field_of(source, record, name)
    if not isinstance(value, list):
        raise BadRecord(source, "wrong type", f'"{name}" is {kind_of(value)}', 'Make it a list of {"role": ..., "content": ...}.')
    if not value:
        raise BadRecord(source, "no messages", f'"{name}" is an empty list', "Write a message or remove the record.")
    messages = tuple(_message(source, f'"{name}"[{i}]', message) for i, message in enumerate(value))
    if messages[-1].role != last:
        detail = f'"{name}" ends with the role {messages[-1].role!r}, not {last!r}'
        raise BadRecord(source, "wrong last turn", detail, f"End it with the {last}'s turn.")
    return messages


def answer_field(source: str, record: dict, name: str) -> str:
    """The text of an answer, written as a text or as a list of the assistant's one message."""
    if not isinstance(record.get(name), list):
        return text_field(source, record, name)
    messages = messages_field(source, record, name, last="assistant")
    if len(messages) > 1:
        raise BadRecord(source, "several turns", f'"{name}" has {len(messages)} messages', "An answer is one message of the assistant's.")
    return messages[0].content


def as_named_here(record: dict) -> dict:
    """A record whose "prompt" is a list of messages, as TRL's data sets have it, with the list as "messages"."""
    if not isinstance(record.get("prompt"), list) or "messages" in record:
        return record
    return {"messages" if name == "prompt" else name: value for name, value in record.items()}


def responses_field(source: str, record: dict) -> tuple[str, ...]:
    """The texts of "responses", two or more."""
    responses = field_of(source, record, "responses")
    if not isinstance(responses, list):
        raise BadRecord(source, "wrong type", f'"responses" is {kind_of(responses)}', "Make it a list of strings.")
    if len(responses) < 2:
        raise BadRecord(source, "too few responses", f"{len(responses)} of them", "A ranking compares two or more.")
    return tuple(_text(source, f'"responses"[{i}]', response) for i, response in enumerate(responses))


def ranks_field(source: str, record: dict, *, num_responses: int) -> tuple[int, ...]:
    """The integers of "ranks", one per response."""
    ranks = field_of(source, record, "ranks")
    if not isinstance(ranks, list):
        raise BadRecord(source, "wrong type", f'"ranks" is {kind_of(ranks)}', "Make it a list of integers.")
    if len(ranks) != num_responses:
        raise BadRecord(source, "wrong number of ranks", f"{len(ranks)} for {num_responses} responses", "Give each response its rank.")
    for i, rank in enumerate(ranks):
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= LARGEST_RANK:
            said = json.dumps(rank)
            shown = said if len(said) < 40 else f"{said[:20]}... ({len(said)} characters)"
            raise BadRecord(source, "bad rank", f'"ranks"[{i}] is {shown}', "Ranks are integers from 1 (best) up; ties are equal.")
    return tuple(ranks)


def require_one_rank_each(source: str, responses: Iterable[object], ranks: Iterable[int]) -> None:
    """Raise BadRecord where two responses are the same and their ranks are not."""
    seen: dict[object, tuple[int, int]] = {}
    for i, (response, rank) in enumerate(zip(responses, ranks, strict=True)):
        first, its_rank = seen.setdefault(response, (i, rank))
        if its_rank != rank:
            detail = f"responses {first} and {i} are one text, ranked {its_rank} and {rank}"
            raise BadRecord(source, "a response better than itself", detail, "Give them one rank, or leave one of them out.")


def _message(source: str, what: str, value: Any) -> Message:
    if not isinstance(value, dict):
        raise BadRecord(source, "wrong type", f"{what} is {kind_of(value)}", 'Make it {"role": ..., "content": ...}.')
    # Whatever else a message may hold (tool calls, a name, reasoning) a template could write; leaving it out would change the text.
    other = [key for key, inner in value.items() if key not in ("role", "content") and inner is not None]
    if other:
        detail = f'{what} has "{other[0]}", and a message is its "role" and its "content"'
        raise BadRecord(source, "unknown field", detail, "Write it into the content, or remove it.")
    role = _text(source, f"{what}.role", field_of(source, value, "role"))
    if not ROLE.fullmatch(role):  # a role stands in the template's own text, so that it must not be able to say much
        raise BadRecord(source, "bad role", f"{what}.role is {role[:40]!a}", 'A role is a word, such as "user" or "assistant".')
    return Message(role, _text(source, f"{what}.content", field_of(source, value, "content")))


def _text(source: str, what: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadRecord(source, "wrong type", f"{what} is {kind_of(value)}", "Make it a string.")
    if not value.strip():
        raise BadRecord(source, "empty text", f"{what} has no text", "Write some text or remove the record.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(source, "invalid Unicode", f"{what} has half of a surrogate pair", "Write both \\u escapes of it.") from error
    return value
