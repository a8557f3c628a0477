"""Keys and values of the rows that are being generated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megarlhf.generation.ragged_attention import RaggedAttention, has_sparse_products
from megarlhf.generation.schedule import Pass
from megarlhf.models.architecture import Architecture
from megarlhf.models.attention import has_varlen_kernel
from megarlhf.models.parameters import kv_heads_per_rank
from megarlhf.parallel.layout import ParallelLayout


def bytes_per_slot(architecture: Architecture, layout: ParallelLayout, dtype: torch.dtype, capacity: int) -> int:
    """Bytes of the keys and values of one row of `capacity` tokens, on the rank that holds most layers."""
    a = architecture
    layers = max(sum(map(len, layout.chunks(a.num_layers, stage))) for stage in range(layout.pp))
    return 2 * layers * kv_heads_per_rank(a, layout.tp) * a.head_size * capacity * dtype.itemsize


class SlotCache:
    """The key-value store of rows in slots: for each layer held here, keys and values [2, slots, kv_heads / tp, capacity, head_size]."""

    def __init__(
        self,
        layer_numbers: Sequence[int],
        *,
        slots: int,
        kv_heads: int,
        group: int,
        capacity: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`capacity`: positions of a slot; `group`: heads that share keys."""
        self.slots, self.capacity, self.device, self.dtype = slots, capacity, device, dtype
        self.reads_by_mask = not has_varlen_kernel(device, dtype, head_size)
        """Whether `begin_decoding` sets up a mask; else torch's varlen kernel reads of each slot what its row has."""
        self.reads_lines = self.reads_by_mask and has_sparse_products(device, dtype)
        """Whether `begin` sets up a `RaggedAttention`; else rows are read as far as the longest of them, with a mask."""
        # zeros: what a mask leaves out is multiplied by 0, which must not be NaN
        shape = (2, slots, kv_heads, capacity, head_size) if self.reads_by_mask else (2, slots, capacity, kv_heads, head_size)
        stored = {number: torch.zeros(shape, dtype=dtype, device=device) for number in layer_numbers}
        self._stored = stored if self.reads_by_mask else {number: whole.transpose(2, 3) for number, whole in stored.items()}
        self._lines = {number: whole.view(-1, head_size) for number, whole in stored.items()}
        """The same memory, a line for each key and value of a head."""
        self._half = slots * kv_heads * capacity
        self._first_lines, self._line_step = self._numbered(kv_heads)
        self._group = group
        self._pass = Pass(0)
        self._column: int | None = None
        """Where the new keys and values of all rows stand, if that is one position; else `_targets` are their lines [rows, kv_heads, 2]."""
        self._seen = 0
        """How many positions of a slot are read by a mask."""
        self._mask: Tensor | None = None
        """[rows, 1, 1, seen] of bool: which of them a row has; None: all."""
        self._used: Tensor | None = None
        self._ragged: RaggedAttention | None = None

    def _numbered(self, kv_heads: int) -> tuple[Tensor, int]:
        """The numbers of the lines of position 0 [slots, kv_heads, 2], and what a position adds to them."""
        head, position = (self.capacity, 1) if self.reads_by_mask else (1, kv_heads)
        slot = kv_heads * self.capacity
        slots, heads, parts = (torch.arange(n, device=self.device) for n in (self.slots, kv_heads, 2))
        return (slots * slot)[:, None, None] + (heads * head)[:, None] + parts * (self.slots * slot), position

    def begin(self, plan: Pass, positions: Tensor, on_host: Sequence[int]) -> None:
        """The next forward pass holds `plan`; its decoded tokens stand at `positions` [decoded], which are `on_host` too."""
        self._pass, self._used, self._ragged = plan, None, None
        self._filled = [self._index(group.slots) for group in plan.prefilled]
        self._copied = [(self._index(group.slots), self._index(group.sources)) for group in plan.copied]
        if not plan.decoded:
            return
        lengths = [position + 1 for position in on_host]
        self._seen = max(lengths)
        self._column = on_host[0] if min(lengths) == self._seen else None
        if self._column is None:
            self._targets = self._lines_at(positions)
        if self.reads_lines:
            first = self._first_lines[: plan.decoded, :, 0]
            self._ragged = RaggedAttention(first, lengths, group=self._group, num_lines=self._half)
        else:
            self._mask = self._mask_of(positions) if self._column is None else None

    def begin_decoding(self, positions: Tensor, reach: int) -> None:
        """The next forward pass decodes the first slots, at `positions` [decoded], which are below `reach`: no other number matters."""
        self._pass, self._filled, self._copied, self._ragged = Pass(len(positions)), [], [], None
        self._column, self._targets = None, self._lines_at(positions)
        if self.reads_by_mask:
            self._seen = reach
            self._mask, self._used = self._mask_of(positions), None
        else:
            self._used = (positions + 1).int()

    def _lines_at(self, positions: Tensor) -> Tensor:
        return self._first_lines[: len(positions)] + (positions * self._line_step)[:, None, None]

    def _mask_of(self, positions: Tensor) -> Tensor:
        return (torch.arange(self._seen, device=self.device) <= positions[:, None])[:, None, None]

    def _index(self, slots: Sequence[int]) -> Tensor | slice:
        """Slots as an index; one piece of the cache where they follow each other."""
        first, last = slots[0], slots[-1]
        in_order = all(a + 1 == b for a, b in zip(slots, slots[1:], strict=False))
        return slice(first, last + 1) if in_order else torch.tensor(slots, device=self.device)

    def attend(self, layer_number: int, query: Tensor, key_value: Tensor) -> Tensor:
        """See `PackedAttention.attend`."""
        stored, n = self._stored[layer_number], self._pass.decoded
        parts, start = [], n
        for group, slots in zip(self._pass.prefilled, self._filled, strict=True):
            stop = start + group.length * len(group.slots)
            new = key_value[start:stop].unflatten(0, (-1, group.length)).permute(3, 0, 2, 1, 4)  # [2, prompts, kv_heads, length, head_size]
            stored[:, slots, :, : group.length] = new
            if len(query) > n:
                parts.append(self._attend_prefilled(query[start:stop], *new))
            start = stop
        for group, (targets, sources) in zip(self._pass.copied, self._copied, strict=True):
            stored[:, targets, :, : group.length] = stored[:, sources, :, : group.length].clone()
        if n:
            self._store_decoded(layer_number, key_value[:n])
            parts.insert(0, self._decode(layer_number, query[:n]))
        if not parts:
            return query.flatten(1)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_prefilled(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        kv_heads, per_head, size = query.shape[1:]
        query = query.reshape(len(key), -1, kv_heads * per_head, size).transpose(1, 2)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=per_head > 1)
        return out.transpose(1, 2).reshape(-1, kv_heads * per_head * size)

    def _store_decoded(self, layer_number: int, key_value: Tensor) -> None:
        if self._column is None:
            self._lines[layer_number].index_put_((self._targets,), key_value)
        else:
            self._stored[layer_number][:, : len(key_value), :, self._column] = key_value.permute(2, 0, 1, 3)

    def _decode(self, layer_number: int, query: Tensor) -> Tensor:
        """Heads that share keys stand as if they were positions: they see the same, and nothing is repeated."""
        n = len(query)
        if self._ragged is not None:
            lines = self._lines[layer_number]
            return self._ragged(query, lines[: self._half], lines[self._half :])
        stored = self._stored[layer_number]
        if self._used is not None:
            return self._read_used(stored, query, self._used)
        seen = stored[:, :n, :, : self._seen]
        return F.scaled_dot_product_attention(query, seen[0], seen[1], attn_mask=self._mask).reshape(n, -1)

    def _read_used(self, stored: Tensor, query: Tensor, used: Tensor) -> Tensor:
        """Of each slot its first `used` [n] int32 positions, by torch's varlen kernel, to which slots are rows of `capacity` tokens."""
        from torch.nn.attention.varlen import varlen_attn  # here: see `has_varlen_kernel`

        n, _, per_head, _ = query.shape
        keys, values = (part[:n].transpose(1, 2).flatten(0, 1) for part in stored)  # [n * capacity, kv_heads, head_size], no copies
        rows = torch.arange(n + 1, dtype=torch.int32, device=self.device)
        how = {"seqused_k": used, "enable_gqa": per_head > 1}
        return varlen_attn(query.flatten(1, 2), keys, values, rows, rows * self.capacity, 1, self.capacity, **how).reshape(n, -1)

    def move(self, moves: Sequence[tuple[int, int]], length: int) -> None:
        """Copy the first `length` positions of each (from, to) of slots as they were, none copied to twice; layer by layer."""
        if not moves:
            return
        sources, targets = zip(*moves, strict=True)
        if len(moves) == 1:
            for stored in self._stored.values():
                stored[:, targets[0], :, :length] = stored[:, sources[0], :, :length]
            return
        source, target = (torch.tensor(slots, device=self.device) for slots in (sources, targets))
        for stored in self._stored.values():
            stored[:, target, :, :length] = stored[:, source, :, :length]
