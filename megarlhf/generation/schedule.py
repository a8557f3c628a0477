"""Which row is in which slot of the cache, and when: rows leave as they end and waiting ones enter. Pure host logic."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

PREFILL_TOKENS = 4096
"""Most prompt tokens of one forward pass, but for a longer prompt: enough to fill a device, and no more activations than that."""


@dataclass(frozen=True)
class WaitingRow:
    """A prompt to answer."""

    number: int
    """Which row of the batch it is."""
    prompt: int
    """Which of the distinct prompts it has: rows of the same prompt share its prefill."""
    length: int
    """Tokens of the prompt."""
    limit: int
    """Tokens that its response may have, at least 1."""


@dataclass(frozen=True)
class SameLength:
    """Slots whose first `length` positions are filled together."""

    length: int
    slots: tuple[int, ...]
    sources: tuple[int, ...] = ()
    """Where the positions are copied from other slots: which."""


@dataclass(frozen=True)
class Pass:
    """What one forward pass holds: the newest token of each of the first `decoded` slots, then whole prompts without their last token.

    The last token of a prompt is decoded like a sampled one; so all rows of a prompt can start from copies of one prefill.
    """

    decoded: int
    prefilled: tuple[SameLength, ...] = ()
    """Prompts, in the order in which their tokens follow."""
    copied: tuple[SameLength, ...] = ()
    """Slots that take a prompt's positions from another, before anything is decoded."""

    @property
    def only_decodes(self) -> bool:
        """Whether no row enters."""
        return not (self.prefilled or self.copied)

    @property
    def tokens(self) -> int:
        """Tokens of the pass."""
        return self.decoded + sum(group.length * len(group.slots) for group in self.prefilled)


@dataclass
class Slot:
    """A row that is being answered."""

    row: WaitingRow
    position: int
    """Where the token stands that is decoded next; after the last look at most."""


@dataclass
class Slots:
    """The slots of one cache, the occupied ones always the first: what is read of the cache is one piece."""

    waiting: deque[WaitingRow]
    """Shared with other caches of the same copy of the model."""
    size: int
    held: list[Slot] = field(default_factory=list)
    entered: list[int] = field(default_factory=list)
    """Slots whose rows have nothing in the cache yet, in ascending order; `admit` says what fills them."""

    def admit(self) -> list[Pass]:
        """Fill free slots with waiting rows; returns the passes that this takes, the last of which decodes all rows.

        Empty when nothing is held.
        """
        while self.waiting and len(self.held) < self.size:
            self.entered.append(len(self.held))
            self.held.append(_begun(self.waiting.popleft()))
        holders, new = {}, set(self.entered)
        for at, slot in enumerate(self.held):
            if at not in new:
                holders.setdefault(slot.row.prompt, at)
        prefilled: dict[int, list[int]] = {}
        copied: dict[int, list[tuple[int, int]]] = {}
        for at in self.entered:
            row = self.held[at].row
            holder = holders.setdefault(row.prompt, at)
            if row.length == 1:
                continue
            if holder == at:
                prefilled.setdefault(row.length - 1, []).append(at)
            else:
                copied.setdefault(row.length - 1, []).append((at, holder))
        self.entered = []
        if not self.held:
            return []
        *early, last = _in_chunks(prefilled)
        copies = tuple(
            SameLength(length, tuple(at for at, _ in pairs), tuple(source for _, source in pairs)) for length, pairs in copied.items()
        )
        return [*(Pass(0, groups) for groups in early), Pass(len(self.held), last, copies)]

    def advance(self) -> None:
        """Every row has been given one more token."""
        for slot in self.held:
            slot.position += 1

    @property
    def is_full_of_tokens(self) -> bool:
        """Whether a row has all that it may have."""
        return any(slot.position - slot.row.length + 1 >= slot.row.limit for slot in self.held)

    def leave(self, ended: Iterable[int]) -> list[tuple[int, int]]:
        """Empty the slots `ended`; rows that wait take their places, and the last rows move into the gaps that are left.

        Returns (from, to) of each move, no slot in two of them. To be followed by `admit`.
        """
        gaps = sorted(ended)
        while gaps and self.waiting:  # the first gaps, so that nothing that has just entered would have to move
            self.entered.append(gaps.pop(0))
            self.held[self.entered[-1]] = _begun(self.waiting.popleft())
        stay, gone = len(self.held) - len(gaps), set(gaps)
        movers = [at for at in range(stay, len(self.held)) if at not in gone]
        moves = list(zip(movers, (at for at in gaps if at < stay), strict=True))
        for source, target in moves:
            self.held[target] = self.held[source]
        del self.held[stay:]
        return moves


def _begun(row: WaitingRow) -> Slot:
    return Slot(row, row.length - 1)


def _in_chunks(prefilled: dict[int, list[int]]) -> list[tuple[SameLength, ...]]:
    """Slots by length of what is to be filled, cut into passes; at least one, which may be empty."""
    chunks: list[list[SameLength]] = [[]]
    room = PREFILL_TOKENS
    for length in sorted(prefilled, reverse=True):
        slots = prefilled[length]
        while slots:
            fitting = max(0, room // length)
            if not fitting and room < PREFILL_TOKENS:
                chunks.append([])
                room = PREFILL_TOKENS
                continue
            taken, slots = slots[: max(1, fitting)], slots[max(1, fitting) :]
            chunks[-1].append(SameLength(length, tuple(taken)))
            room -= length * len(taken)
    return [tuple(chunk) for chunk in chunks]


def slots_within(budget: int | None, bytes_per_slot: int, *, wanted: int, capacity: int) -> int:
    """How many of the `wanted` slots fit into `budget` bytes (None: all).

    ValueError, with what would do, where not one does.
    """
    if budget is None:
        return wanted
    if budget < bytes_per_slot:
        raise ValueError(f"kv_cache_bytes {budget} holds no row: the keys and values of one of {capacity} tokens take {bytes_per_slot}")
    return min(wanted, budget // bytes_per_slot)


def dealt(rows: Sequence[WaitingRow], copies: int) -> list[list[WaitingRow]]:
    """The rows of each of `copies` of a model: equal numbers up to one, the work even, rows of one prompt together where that allows it.

    Work of a row: what it may be given, and once per prompt what is prefilled. Largest first, each to who has least. A copy answers
    its rows in the order of their numbers, those of one prompt one after the other.
    """
    most = -(-len(rows) // copies)
    prompts: dict[int, list[WaitingRow]] = {}
    for row in rows:
        prompts.setdefault(row.prompt, []).append(row)
    parts = [of_one[at : at + most] for of_one in prompts.values() for at in range(0, len(of_one), most)]
    parts.sort(key=lambda part: -_work(part))
    hands: list[list[WaitingRow]] = [[] for _ in range(copies)]
    loads = [0] * copies
    for part in parts:
        while part:
            room = [copy for copy in range(copies) if len(hands[copy]) < most]
            whole = [copy for copy in room if len(hands[copy]) + len(part) <= most]
            copy = min(whole or room, key=lambda copy: (loads[copy], copy))
            taken, part = part[: most - len(hands[copy])], part[most - len(hands[copy]) :]
            hands[copy] += taken
            loads[copy] += _work(taken)
    first = {prompt: of_one[0].number for prompt, of_one in prompts.items()}
    return [sorted(hand, key=lambda row: (first[row.prompt], row.number)) for hand in hands]


def level(held: Sequence[int], waiting: Sequence[deque[WaitingRow]]) -> None:
    """Let rows that wait last at one copy of a model wait at another, until the copies differ by one row at most or none can be given.

    held: rows of each copy that are being answered; how much is left of them is as unknown as of those that wait.
    """
    totals = [rows + len(queue) for rows, queue in zip(held, waiting, strict=True)]
    copies = range(len(totals))
    while givers := [copy for copy in copies if waiting[copy]]:
        most, least = max(givers, key=lambda copy: totals[copy]), min(copies, key=lambda copy: totals[copy])
        if totals[most] - totals[least] < 2:
            return
        waiting[least].append(waiting[most].pop())
        totals[most] -= 1
        totals[least] += 1


def _work(part: Sequence[WaitingRow]) -> int:
    return part[0].length + sum(row.limit for row in part)
