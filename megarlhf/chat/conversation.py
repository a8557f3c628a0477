"""What has been said so far, as the tokens that a model continues."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megarlhf.data.fields import Message
from megarlhf.data.templates import has_template
from megarlhf.data.tokenized import TextEncoder
from megarlhf.data.tokenizers import Tokenizer
from megarlhf.generation.in_flight import Listener

REPLACEMENT = chr(0xFFFD)
"""What decoders write for bytes that are no whole letter yet."""


@dataclass
class Conversation:
    """Turns of a user and a model.

    With a chat template they are its messages. Without one they are plain text that the model continues: each line of the user, a
    newline, the answer, a newline.
    """

    tokenizer: Tokenizer
    context: int
    """Tokens that the model can hold."""
    system: str | None = None
    """A message before all others."""
    turns: list[tuple[str, str]] = field(default_factory=list)
    """(what the user said, what was answered)."""

    def __post_init__(self) -> None:
        self.has_template = has_template(self.tokenizer.path)
        self._encoder = TextEncoder(self.tokenizer)
        if self.system is not None and not self.has_template:
            raise ValueError(f"--system: {self.tokenizer.path} comes without a chat template, and without one there is no system message")

    def prompt(self, line: str, room: int) -> tuple[list[int], int]:
        """(ids that ask for the answer to `line`, how many of the oldest turns are left out so that `room` tokens can follow them).

        ValueError where the line alone leaves no room for a token, or the template or the tokenizer refuses it.
        """
        left_out = 0
        ids = self._ids(self.turns, line)
        while left_out < len(self.turns) and len(ids) + room > self.context:
            left_out += 1
            ids = self._ids(self.turns[left_out:], line)
        if len(ids) >= self.context:
            raise ValueError(f"this takes {len(ids)} tokens, and the model's context has {self.context}: write less")
        return ids, left_out

    def _ids(self, turns: Sequence[tuple[str, str]], line: str) -> list[int]:
        if not self.has_template:
            return self._encoder.encode_prompt("your line", "".join(f"{asked}\n{said}\n" for asked, said in turns) + f"{line}\n")
        messages = [] if self.system is None else [Message("system", self.system)]
        for asked, said in turns:
            messages += [Message("user", asked), Message("assistant", said)]
        return self._encoder.encode_prompt("your line", (*messages, Message("user", line)))


class SpokenText(Listener):
    """Writes a response as its tokens come, letters only when they are whole."""

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], None]) -> None:
        self.text = ""
        """What has been written."""
        self._tokenizer, self._write = tokenizer, write
        self._ids: list[int] = []

    def token(self, row: int, token: int) -> None:
        """Write what it adds."""
        self._ids.append(token)
        self._show(self._tokenizer.decode(self._ids).rstrip(REPLACEMENT))

    def end(self, row: int, tokens: Sequence[int]) -> None:
        """Write what is left, whole or not."""
        self._show(self._tokenizer.decode(list(tokens)))

    def _show(self, text: str) -> None:
        if text.startswith(self.text) and len(text) > len(self.text):
            self._write(text[len(self.text) :])
            self.text = text
