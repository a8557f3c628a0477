"""Keys and values of the rows that are being generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megarlhf.generation.schedule import Pass, read_together
from megarlhf.models.attention import has_varlen_kernel

CALL_BYTES = 2**18
"""Of keys and values that a CPU reads in the time that one more call of attention takes."""


@dataclass(frozen=True)
class _Together:
    """Slots that follow each other, read in one call."""

    rows: slice
    longest: int
    """Positions of the longest row."""
    mask: Tensor | None
    """[rows, 1, 1, longest]: what each row sees of them; None: all."""


class SlotCache:
    """The key-value store of rows in slots: for each layer held here, keys and values [2, slots, kv_heads / tp, capacity, head_size]."""

    def __init__(
        self,
        layer_numbers: Sequence[int],
        *,
        slots: int,
        kv_heads: int,
        capacity: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`capacity`: positions of a slot."""
        self.slots, self.capacity, self.device, self.dtype = slots, capacity, device, dtype
        self.reads_by_mask = not has_varlen_kernel(device, dtype, head_size)
        """Whether `begin_decoding` sets up a mask; else torch's varlen kernel reads of each slot what its row has."""
        # zeros: what a mask leaves out is multiplied by 0, which must not be NaN
        shape = (2, slots, kv_heads, capacity, head_size) if self.reads_by_mask else (2, slots, capacity, kv_heads, head_size)
        stored = {number: torch.zeros(shape, dtype=dtype, device=device) for number in layer_numbers}
        self._stored = stored if self.reads_by_mask else {number: whole.transpose(2, 3) for number, whole in stored.items()}
        self.call_cost = CALL_BYTES // (2 * kv_heads * head_size * dtype.itemsize) if device.type == "cpu" else None
        """What a call of attention costs, in positions of a slot that are read; None where all slots are read in one call."""
        self._pass = Pass(0)
        self._columns: Tensor | int = 0
        self._pieces: list[_Together] = []
        self._used: Tensor | None = None

    def begin(self, plan: Pass, positions: Tensor, on_host: Sequence[int]) -> None:
        """The next forward pass holds `plan`; its decoded tokens stand at `positions` [decoded], which are `on_host` too."""
        self._pass, self._used = plan, None
        self._filled = [self._index(group.slots) for group in plan.prefilled]
        self._copied = [(self._index(group.slots), self._index(group.sources)) for group in plan.copied]
        if not plan.decoded:
            return
        lengths = [position + 1 for position in on_host]
        if min(lengths) == max(lengths):
            self._columns = on_host[0]
        else:
            self._columns = positions
            self._rows = torch.arange(plan.decoded, device=self.device)
        pieces = [slice(0, plan.decoded)] if self.call_cost is None else read_together(lengths, self.call_cost)
        self._pieces = [self._together(rows, lengths[rows], positions[rows]) for rows in pieces]

    def begin_decoding(self, positions: Tensor, reach: int) -> None:
        """The next forward pass decodes the first slots, at `positions` [decoded], which are below `reach`: no other number matters."""
        n = len(positions)
        self._pass, self._filled, self._copied = Pass(n), [], []
        self._columns, self._rows = positions, torch.arange(n, device=self.device)
        if self.reads_by_mask:
            seen = torch.arange(reach, device=self.device) <= positions[:, None]
            self._pieces, self._used = [_Together(slice(0, n), reach, seen[:, None, None])], None
        else:
            self._used = (positions + 1).int()

    def _together(self, rows: slice, lengths: Sequence[int], positions: Tensor) -> _Together:
        longest = max(lengths)
        if min(lengths) == longest:
            return _Together(rows, longest, None)
        seen = (torch.arange(longest, device=self.device) <= positions[:, None])[:, None, None]  # [rows, 1, 1, longest]
        if self.device.type == "cpu":  # what its kernel makes of a mask, once instead of in every layer
            seen = torch.zeros(seen.shape, dtype=self.dtype).masked_fill_(~seen, -torch.inf)
        return _Together(rows, longest, seen)

    def _index(self, slots: Sequence[int]) -> Tensor | slice:
        """Slots as an index; one piece of the cache where they follow each other."""
        first, last = slots[0], slots[-1]
        in_order = all(a + 1 == b for a, b in zip(slots, slots[1:], strict=False))
        return slice(first, last + 1) if in_order else torch.tensor(slots, device=self.device)

    def attend(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `PackedAttention.attend`."""
        stored, n = self._stored[layer_number], self._pass.decoded
        parts, start = [], n
        for group, slots in zip(self._pass.prefilled, self._filled, strict=True):
            stop = start + group.length * len(group.slots)
            new = self._prefill(stored, slots, group.length, key[start:stop], value[start:stop])
            if len(query) > n:
                parts.append(self._attend_prefilled(query[start:stop], *new))
            start = stop
        for group, (targets, sources) in zip(self._pass.copied, self._copied, strict=True):
            stored[:, targets, :, : group.length] = stored[:, sources, :, : group.length].clone()
        if n:
            parts.insert(0, self._decode(stored, query[:n], key[:n], value[:n]))
        if not parts:
            return query.flatten(1)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _prefill(self, stored: Tensor, slots: Tensor | slice, length: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store packed prompts' keys and values, and return them by prompt: [prompts, kv_heads, length, head_size] each."""
        key, value = (x.view(-1, length, *x.shape[1:]).transpose(1, 2) for x in (key, value))
        stored[0, slots, :, :length] = key
        stored[1, slots, :, :length] = value
        return key, value

    def _attend_prefilled(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        kv_heads, per_head, size = query.shape[1:]
        query = query.reshape(len(key), -1, kv_heads * per_head, size).transpose(1, 2)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=per_head > 1)
        return out.transpose(1, 2).reshape(-1, kv_heads * per_head * size)

    def _decode(self, stored: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Heads that share keys stand as if they were positions: they see the same, and nothing is repeated."""
        n = len(query)
        if isinstance(self._columns, int):
            stored[0, :n, :, self._columns] = key
            stored[1, :n, :, self._columns] = value
        else:
            stored[0, self._rows, :, self._columns] = key
            stored[1, self._rows, :, self._columns] = value
        if self._used is not None:
            return self._read_used(stored, query, self._used)
        found = []
        for piece in self._pieces:
            seen = stored[:, piece.rows, :, : piece.longest]
            found.append(F.scaled_dot_product_attention(query[piece.rows], seen[0], seen[1], attn_mask=piece.mask))
        return (found[0] if len(found) == 1 else torch.cat(found)).reshape(n, -1)

    def _read_used(self, stored: Tensor, query: Tensor, used: Tensor) -> Tensor:
        """Of each slot its first `used` [n] int32 positions, by torch's varlen kernel, to which slots are rows of `capacity` tokens."""
        from torch.nn.attention.varlen import varlen_attn  # here: it brings torch's compiler, some two seconds that a CPU need not wait

        n, _, per_head, _ = query.shape
        keys, values = (part[:n].transpose(1, 2).flatten(0, 1) for part in stored)  # [n * capacity, kv_heads, head_size], no copies
        rows = torch.arange(n + 1, dtype=torch.int32, device=self.device)
        how = {"seqused_k": used, "enable_gqa": per_head > 1}
        return varlen_attn(query.flatten(1, 2), keys, values, rows, rows * self.capacity, 1, self.capacity, **how).reshape(n, -1)

    def move(self, moves: Sequence[tuple[int, int]], length: int) -> None:
        """Copy the first `length` positions of each (from, to) of slots as they were, none copied to twice; layer by layer."""
        if not moves:
            return
        sources, targets = (torch.tensor(slots, device=self.device) for slots in zip(*moves, strict=True))
        for stored in self._stored.values():
            stored[:, targets, :, :length] = stored[:, sources, :, :length]
