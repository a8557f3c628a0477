"""The rows in flight: what the host knows of them, and what the device is given for the next forward pass."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megarlhf.batch import Prompts
from megarlhf.generation.cache import SlotCache
from megarlhf.generation.repeated_steps import RepeatedSteps
from megarlhf.generation.schedule import Pass, Slots, WaitingRow


class Listener:
    """Is told of the responses as the host learns of them, on each rank of the copy of the model that answers a row."""

    def expect(self, rows: int) -> None:
        """So many rows will be this copy's, as it looks: said at first, and again where rows that wait have gone to other copies."""

    def token(self, row: int, token: int) -> None:
        """The next token of a row."""

    def end(self, row: int, tokens: Sequence[int]) -> None:
        """A row's response is whole."""


@dataclass
class Answers:
    """What the rows of a batch have been answered so far, by row number."""

    ends: Collection[int]
    """Tokens after which a response ends."""
    listener: Listener | None = None
    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    """On the last stage."""
    ended: set[int] = field(default_factory=set)
    """Rows whose response is whole."""

    def take(self, row: int, limit: int, tokens: list[int], logprobs: list[float] | None) -> bool:
        """Add a row's next tokens up to its end; returns whether it has ended."""
        given = self.tokens.setdefault(row, [])
        for at, token in enumerate(tokens):
            given.append(token)
            if logprobs is not None:
                self.logprobs.setdefault(row, []).append(logprobs[at])
            if self.listener is not None:
                self.listener.token(row, token)
            if token in self.ends or len(given) >= limit:
                self.ended.add(row)
                if self.listener is not None:
                    self.listener.end(row, given)
                return True
        return False


@dataclass(frozen=True)
class PassInFlight:
    """A forward pass and its inputs."""

    rows: RowsInFlight
    plan: Pass
    tokens: Tensor
    """[tokens of the plan] int64, decoded ones first."""
    positions: Tensor
    """The same shape."""
    on_host: list[int]
    """The positions of the decoded ones."""
    samples: Tensor
    """[decoded]: the keys of their noise."""

    def begin(self) -> None:
        """Tell the cache that this pass comes next."""
        self.rows.cache.begin(self.plan, self.positions[: self.plan.decoded], self.on_host)


class RowsInFlight:
    """One group of rows that step together: their slots, their cache, and the tokens that the host has not looked at yet."""

    def __init__(self, slots: Slots, cache: SlotCache, prompts: Prompts, answers: Answers, *, steps_between_looks: int) -> None:
        """`prompts` are the whole batch's, on the host."""
        self.slots, self.cache = slots, cache
        self.repeated: Sequence[RepeatedSteps] = ()
        """By chunk, what takes the passes that only decode; none: they are taken like all others."""
        self.awaited = 0
        """Rows whose newest token this stage has not been told."""
        self._prompts, self._answers = prompts, answers
        self._steps_between_looks = steps_between_looks
        self._device = cache.device
        self._tokens: list[Tensor] = []
        self._logprobs: list[Tensor] = []
        self._inputs: tuple[Tensor, Tensor, Tensor] | None = None
        """(newest tokens, positions, samples) of the rows held [rows], where they are on the device already."""

    @property
    def is_active(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self.slots.held or self.slots.waiting)

    def take(self, tokens: Tensor, logprobs: Tensor | None) -> None:
        """The newest token of each row [rows], and on the last stage its log-probability."""
        self.awaited = 0
        self._tokens.append(tokens)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        if self._inputs is not None:
            self._inputs = (tokens, *self._inputs[1:])

    def next_passes(self) -> list[PassInFlight]:
        """What brings every row forward by one token, rows that end having left and others entered; empty when none is left."""
        if self._tokens and (len(self._tokens) >= self._steps_between_looks or self.slots.is_full_of_tokens):
            self._look()
        before = len(self.slots.held)
        plans = [Pass(before)] if self._tokens else self.slots.admit()
        if not plans:
            return []
        if self._inputs is None or len(self.slots.held) != before:
            self._inputs = self._from_host()
        on_host = [slot.position for slot in self.slots.held]
        passes = [self._with_inputs(plan, on_host) for plan in plans]
        self.slots.advance()
        self.awaited = len(on_host)
        newest, positions, samples = self._inputs
        self._inputs = newest, positions + 1, samples
        return passes

    def _look(self) -> None:
        """Bring the tokens to the host; rows that have ended leave."""
        tokens = torch.stack(self._tokens, dim=1).tolist()  # [rows][steps]
        logprobs = torch.stack(self._logprobs, dim=1).tolist() if self._logprobs else [None] * len(tokens)
        ended = [
            at for at, slot in enumerate(self.slots.held) if self._answers.take(slot.row.number, slot.row.limit, tokens[at], logprobs[at])
        ]
        self._tokens.clear()
        self._logprobs.clear()
        if ended:
            moves = self.slots.leave(ended)
            self.cache.move(moves, max((self.slots.held[at].position for _, at in moves), default=0))
            self._inputs = None

    def _from_host(self) -> tuple[Tensor, Tensor, Tensor]:
        held = self.slots.held
        newest = [self._newest(slot.row) for slot in held]
        samples = self._prompts.ids[[slot.row.number for slot in held]]
        on_device = [torch.tensor(x, device=self._device) for x in (newest, [slot.position for slot in held])]
        return on_device[0], on_device[1], samples.to(self._device)

    def _newest(self, row: WaitingRow) -> int:
        """The token that is decoded next: the last one given, at first the prompt's."""
        given = self._answers.tokens.get(row.number)
        return given[-1] if given else int(self._prompts.tokens[row.number, row.length - 1])

    def _with_inputs(self, plan: Pass, on_host: list[int]) -> PassInFlight:
        newest, positions, samples = self._inputs if plan.decoded else (None, None, torch.zeros(0, dtype=torch.int64))
        tokens = [] if newest is None else [newest]
        places = [] if positions is None else [positions]
        for group in plan.prefilled:
            rows = [self.slots.held[at].row.number for at in group.slots]
            tokens.append(self._prompts.tokens[rows, : group.length].flatten().to(self._device))
            places.append(torch.arange(group.length, device=self._device).repeat(len(rows)))
        tokens, places = (x[0] if len(x) == 1 else torch.cat(x) for x in (tokens, places))
        return PassInFlight(self, plan, tokens, places, on_host if plan.decoded else [], samples)
