r"""The forms in which rankings come, each told by its fields and read as (prompt, responses, ranks).

- ours: ``prompt`` or ``messages``, with ``responses`` and ``ranks``, or with ``chosen`` and ``rejected``;
- two chats: ``chosen`` and ``rejected`` are whole lists of messages that differ in the last, the assistant's, or that message alone
  beside ``messages``;
- two transcripts, as Anthropic's HH has them (Bai et al. 2022): ``chosen`` and ``rejected`` alone, in which
  "\n\nHuman: " and "\n\nAssistant: " begin the turns; the prompt is all up to the last "\n\nAssistant:";
- OpenAI's summarize-from-feedback (Stiennon et al. 2020): ``info``, ``summaries``, ``choice``. The prompt is written as theirs
  is (their table of query formats): subreddit, title and post, or article, then "TL;DR:". Its evaluations by axis rate one
  summary and compare nothing: they are left out and counted.
"""

from __future__ import annotations

from typing import Any

from megarlhf.data.fields import (
    Message,
    Messages,
    field_of,
    messages_field,
    ranks_field,
    require_one_rank_each,
    responses_field,
    text_field,
)
from megarlhf.data.files import BadRecord, OtherRecord, kind_of

ANSWER_BEGINS = "\n\nAssistant:"
Comparison = tuple[str | Messages, tuple[str, ...], tuple[int, ...]]
PAIR_RANKS = (1, 2)


def comparison_of(source: str, record: dict) -> Comparison:
    """(prompt, responses, ranks) of a record in any of the forms. Raises BadRecord, OtherRecord."""
    prompt, responses, ranks = _of_its_form(source, record)
    require_one_rank_each(source, responses, ranks)
    return prompt, responses, ranks


def prompt_of(source: str, record: dict) -> str | Messages:
    """The text of "prompt", or the chat of "messages", which ends with the user's turn. Raises BadRecord."""
    if "messages" not in record:
        return text_field(source, record, "prompt")
    messages = messages_field(source, record, "messages", last="user")
    require_one_question(source, record, messages)
    return messages


def require_one_question(source: str, record: dict, messages: Messages) -> None:
    """Raise BadRecord where a record has a "prompt" beside a chat, but for one that repeats a message, as some data sets do."""
    prompt = record.get("prompt")
    if prompt is not None and not any(message.content == prompt for message in messages):
        raise BadRecord(source, "two prompts in one", '"prompt" is none of the messages beside it', "Leave one of the two out.")


def _of_its_form(source: str, record: dict) -> Comparison:
    ranked, paired = record.keys() & {"responses", "ranks"}, record.keys() & {"chosen", "rejected"}
    if ranked and paired:
        raise BadRecord(source, "two rankings in one", "responses with ranks, and a pair", "Make two records of it.")
    if ranked:
        prompt, responses = prompt_of(source, record), responses_field(source, record)
        return prompt, responses, ranks_field(source, record, num_responses=len(responses))
    if paired:
        return _pair(source, record)
    if record.keys() & {"summaries", "summary", "choice"} and "info" in record:
        return _summaries(source, record)
    prompt_of(source, record)  # which may be what is wrong
    raise BadRecord(source, "missing field", "no completions", 'Add "responses" and "ranks", or "chosen" and "rejected".')


def _pair(source: str, record: dict) -> Comparison:
    if any(isinstance(record.get(name), list) for name in ("chosen", "rejected")):
        return _two_chats(source, record)
    if record.keys() & {"prompt", "messages"}:
        prompt = prompt_of(source, record)
        return prompt, (text_field(source, record, "chosen"), text_field(source, record, "rejected")), PAIR_RANKS
    texts = [text_field(source, record, name) for name in ("chosen", "rejected")]
    if not all(ANSWER_BEGINS in text for text in texts):
        text_field(source, record, "prompt")  # no transcripts: what lacks is the prompt
    prompts, responses = zip(*(_last_answer(text) for text in texts), strict=True)
    for name, response in zip(("chosen", "rejected"), responses, strict=True):
        if not response.strip():
            detail = f'"{name}" ends with {ANSWER_BEGINS.strip()!a} and nothing after it'
            raise BadRecord(source, "empty text", detail, "Write the answer or remove the record.")
    if prompts[0] != prompts[1]:
        raise _other_question(source, len(_shared(*prompts)))
    return prompts[0], responses, PAIR_RANKS


def _last_answer(transcript: str) -> tuple[str, str]:
    begins = transcript.rindex(ANSWER_BEGINS) + len(ANSWER_BEGINS)
    return transcript[:begins], transcript[begins:]


def _two_chats(source: str, record: dict) -> Comparison:
    chosen, rejected = (messages_field(source, record, name, last="assistant") for name in ("chosen", "rejected"))
    if "messages" in record and record["messages"] != record["chosen"]:  # some data sets repeat the better chat for SFT
        prompt = prompt_of(source, record)
        chosen, rejected = ((*prompt, *chat) if len(chat) == 1 else chat for chat in (chosen, rejected))
        if chosen[:-1] != prompt:
            raise BadRecord(source, "two prompts in one", 'the "messages" are not those before the answers', "Leave one of the two out.")
    if chosen[:-1] != rejected[:-1]:
        raise _other_question(source, next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0), "message")
    if len(chosen) < 2:
        raise BadRecord(source, "missing field", "the chats have no turn before the answer", "Add the user's turn.")
    require_one_question(source, record, chosen[:-1])
    return chosen[:-1], (chosen[-1].content, rejected[-1].content), PAIR_RANKS


def _other_question(source: str, at: int, unit: str = "character") -> BadRecord:
    detail = f'"chosen" and "rejected" part at {unit} {at}, before their last answers'
    return BadRecord(source, "answers to two questions", detail, "Compare two answers to one question.")


def _shared(one: str, other: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:at]


def _summaries(source: str, record: dict) -> Comparison:
    if "summary" in record and "summaries" not in record:
        raise OtherRecord(source, "evaluation by axis", "one summary, rated", "Only comparisons are read.")
    info, summaries, choice = (field_of(source, record, name) for name in ("info", "summaries", "choice"))
    if not isinstance(info, dict):
        raise BadRecord(source, "wrong type", f'"info" is {kind_of(info)}', "Make it an object with the post.")
    if not isinstance(summaries, list) or len(summaries) < 2 or not all(isinstance(summary, dict) for summary in summaries):
        raise BadRecord(source, "wrong type", '"summaries" is no list of two objects or more', 'Make it [{"text": ...}, ...].')
    if isinstance(choice, bool) or not isinstance(choice, int) or not 0 <= choice < len(summaries):
        detail = f'"choice" is {choice if isinstance(choice, int) else kind_of(choice)}, and there are {len(summaries)} summaries'
        raise BadRecord(source, "bad choice", detail, "It is the number of the better summary, from 0.")
    texts = tuple(text_field(f"{source}, summary {i}", summary, "text") for i, summary in enumerate(summaries))
    return _query(source, info), texts, tuple(1 if i == choice else 2 for i in range(len(texts)))


def _query(source: str, info: dict[str, Any]) -> str:
    if info.get("post") is None and info.get("article") is not None:
        return f"Article:\n\n{text_field(source, info, 'article')}\n\nTL;DR:"
    heads = [("SUBREDDIT: r/", "subreddit"), ("TITLE: ", "title")]
    parts = [f"{head}{text_field(source, info, name)}" for head, name in heads if info.get(name) is not None]
    return "\n\n".join([*parts, f"POST: {text_field(source, info, 'post')}", "TL;DR:"])


def chat_of(prompt: Messages, response: str) -> Messages:
    """A chat and the assistant's answer to it."""
    return (*prompt, Message("assistant", response))
