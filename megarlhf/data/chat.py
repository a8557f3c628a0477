"""Chats as token ids, through the template that comes with a tokenizer.

The text is the one that transformers' ``apply_chat_template`` writes. In it the names of control tokens that the template wrote
become those tokens, and the names in a message's content stay text. To tell them apart the template is rewritten to write marks in
place of names (`data/templates.py`); contents hold no marks, and nothing that a template may do to a content makes one.

Templates that put a name together from parts, such as ``"<|" + role + "|>"``, write it as a name still. It is taken for the
token where it does not touch a content: rendered once more with the contents broken at every sign that such names are made
of, the text must be the same and the name still whole. Where a template treats such a broken content in another way the
two cannot be told apart, and the record is refused.
"""

from __future__ import annotations

import re
from functools import cached_property

import jinja2

from megarlhf.data.control_pieces import CUT, LAST_MARK, marks_of
from megarlhf.data.fields import Message, Messages
from megarlhf.data.files import BadRecord
from megarlhf.data.templates import Render, compiled, messages_of, named_tokens, template_beside, with_marks
from megarlhf.data.tokenizers import Tokenizer, UnwritableText

BREAK = chr(LAST_MARK)
PRIVATE = re.compile(f"[{CUT}-{BREAK}]")
Span = tuple[int, int]


class Chat:
    """Writes chats with the template of a tokenizer. ValueError where there is none, or none that can be read."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        source = template_beside(tokenizer.path)
        mark_of_id = marks_of(tokenizer.controls.values())
        self._marks = {name: mark_of_id[i] for name, i in tokenizer.controls.items()}
        self._name_of = {mark: name for name, mark in self._marks.items()}
        self._eos = mark_of_id[tokenizer.eos_id]
        self._eos_name = self._name_of[self._eos]
        self._tokens = {"eos_token": self._eos_name, **named_tokens(tokenizer.path)}
        try:
            self._plain = compiled(source, now=tokenizer.now)
            self._marked = compiled(source, now=tokenizer.now, marks=self._marks)
        except (jinja2.TemplateError, SyntaxError, ValueError, RecursionError) as error:  # Jinja compiles to Python
            raise ValueError(f"the chat template of {tokenizer.path} is none: {error}; correct it, or take the model's own") from error

    def text(self, source: str, messages: Messages, *, add_generation_prompt: bool) -> str:
        """The text that transformers' ``apply_chat_template`` writes. BadRecord where the template refuses the chat."""
        return self._render(source, self._plain, messages, self._tokens, add_generation_prompt)

    def prompt_ids(self, source: str, messages: Messages) -> list[int]:
        """The ids of a chat that the assistant is to answer. Raises BadRecord."""
        [ids] = self._encode(source, self._with_marks(source, messages, add_generation_prompt=True))
        return ids

    def conversation_ids(self, source: str, messages: Messages, *, first: int = 0) -> tuple[list[int], list[Span]]:
        """The ids of a chat that ends with the assistant's turn, and where the assistant's turns stand among them.

        A turn, [start, end), is all that follows the generation prompt, its EOS included; what the template writes after the
        last one is left out. Turns before message `first` are not looked for. BadRecord where the template writes the turns
        before an answer otherwise than it does when it asks for that answer, or ends an answer with something else than EOS.
        """
        whole = self._with_marks(source, messages, add_generation_prompt=False)
        answers = [i for i, message in enumerate(messages) if message.role == "assistant" and i >= first]
        starts = [self._start_of(source, whole, messages, i) for i in answers]
        ends = [whole.find(self._eos, start) + 1 for start in starts]
        for i, end, next_start in zip(answers, ends, [*starts[1:], len(whole)], strict=True):
            if not 0 < end <= next_start:
                raise self._endless(source, whole, i)
        whole = whole[: ends[-1]]
        [ids] = self._encode(source, whole)
        heads = [len(head) for start in starts for [head] in [self._encode(source, whole[:start])] if ids[: len(head)] == head]
        if len(heads) < len(starts):  # a token would reach from a prompt into its answer: they are encoded apart
            bounds = [0, *starts, len(whole)]
            parts = self._encode(source, CUT.join(whole[a:b] for a, b in zip(bounds, bounds[1:], strict=False)))
            ids = [i for part in parts for i in part]
            heads = [sum(map(len, parts[: i + 1])) for i in range(len(starts))]
        return ids, [(head, ids.index(self._tokenizer.eos_id, head) + 1) for head in heads]

    def names_for_marks(self, marked: str) -> str:
        """A marked text as the template means it."""
        return PRIVATE.sub(lambda mark: self._name_of.get(mark.group(), ""), marked)

    def _start_of(self, source: str, whole: str, messages: Messages, answer: int) -> int:
        asked = self._with_marks(source, messages[:answer], add_generation_prompt=True)
        if not whole.startswith(asked):
            at = next((i for i, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), len(whole))
            then, now = (self.names_for_marks(text[max(0, at - 20) : at + 20]) for text in (asked, whole))
            detail = f"the template asks for message {answer} with {then!a} and then writes {now!a}"
            raise BadRecord(source, "rewritten turns", detail, "Make a record of each answer, or take a template that leaves turns alone.")
        return len(asked)

    def _endless(self, source: str, whole: str, answer: int) -> BadRecord:
        marks = [self._name_of[mark] for mark in whole if mark in self._name_of]
        detail = f"message {answer} does not end with the tokenizer's EOS {self._eos_name!r}; the last control token is {marks[-1:]}"
        return BadRecord(source, "endless turn", detail, "Set tokenizer.eos_token to the token with which the template ends a turn.")

    def _with_marks(self, source: str, messages: Messages, *, add_generation_prompt: bool) -> str:
        for i, message in enumerate(messages):
            if PRIVATE.search(message.content):
                detail = f"message {i} holds a letter of Unicode's plane 15, which stand for control tokens here"
                raise BadRecord(source, "private letters", detail, "Remove it.")
        tokens = {key: with_marks(name, self._marks) for key, name in self._tokens.items()}
        marked = self._render(source, self._marked, messages, tokens, add_generation_prompt)
        if self.names_for_marks(marked) != self.text(source, messages, add_generation_prompt=add_generation_prompt):
            raise self._ambiguous(source, "a control token's name")
        if not self._assembled.search(marked):
            return marked
        broken = tuple(Message(message.role, self._signs.sub(rf"{BREAK}\g<0>{BREAK}", message.content)) for message in messages)
        again = self._render(source, self._marked, broken, tokens, add_generation_prompt)
        if again.replace(BREAK, "") != marked:
            raise self._ambiguous(source, "a sign that control tokens' names are made of")
        return self._assembled.sub(lambda name: self._marks[name.group()], again).replace(BREAK, "")

    def _ambiguous(self, source: str, what: str) -> BadRecord:
        detail = f"the chat template acts on {what} in a message, so that its tokens and the message's text cannot be told apart"
        return BadRecord(source, "ambiguous chat", detail, "Remove it from the message, or take a template that copies messages.")

    @cached_property
    def _signs(self) -> re.Pattern:
        """What control tokens' names are made of, but for letters and digits."""
        signs = {letter for name in self._marks for letter in name if not letter.isalnum()}
        return re.compile(f"[{re.escape(''.join(sorted(signs)))}]" if signs else r"(?!)")

    @cached_property
    def _assembled(self) -> re.Pattern:
        """Names that can be told from a message's text, wherever they come from."""
        names = sorted((name for name in self._marks if self._signs.search(name)), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def _render(self, source: str, render: Render, messages: Messages, tokens: dict[str, str], add_generation_prompt: bool) -> str:
        plain = messages_of([(message.role, message.content) for message in messages])
        try:
            return render(messages=plain, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **tokens)
        except Exception as error:  # a template is somebody else's program: it may fail in any way
            way_out = "Write the turns in the order and the roles that the template knows."
            raise BadRecord(source, "chat refused by the template", f"{type(error).__name__}: {error}", way_out) from error

    def _encode(self, source: str, marked: str) -> list[list[int]]:
        try:
            return self._tokenizer.encode_marked(marked)
        except UnwritableText as error:
            raise BadRecord(source, "unwritable text", f"chat: {error}", "Take another tokenizer or eos_token, or remove it.") from error
