"""Keys and values of the rows that are being generated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megarlhf.generation.schedule import Pass


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
        shape = (2, slots, kv_heads, capacity, head_size)
        # zeros: what a mask leaves out is multiplied by 0, which must not be NaN
        self._stored = {number: torch.zeros(shape, dtype=dtype, device=device) for number in layer_numbers}
        self.device = device
        self._pass = Pass(0)
        self._columns: Tensor | int = 0
        self._longest = 0
        self._mask: Tensor | None = None

    def begin(self, plan: Pass, positions: Tensor, on_host: Sequence[int]) -> None:
        """The next forward pass holds `plan`; its decoded tokens stand at `positions` [decoded], which are `on_host` too."""
        self._pass = plan
        self._filled = [self._index(group.slots) for group in plan.prefilled]
        self._copied = [(self._index(group.slots), self._index(group.sources)) for group in plan.copied]
        if not plan.decoded:
            return
        self._longest = max(on_host) + 1
        if min(on_host) + 1 == self._longest:
            self._columns, self._mask = on_host[0], None
        else:
            self._columns = positions
            self._rows = torch.arange(plan.decoded, device=self.device)
            self._mask = (torch.arange(self._longest, device=self.device) <= positions[:, None])[:, None, None]  # [rows, 1, 1, longest]

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
            parts.append(self._prefill(stored, slots, group.length, query[start:stop], key[start:stop], value[start:stop]))
            start = stop
        for group, (targets, sources) in zip(self._pass.copied, self._copied, strict=True):
            stored[:, targets, :, : group.length] = stored[:, sources, :, : group.length].clone()
        if n:
            parts.insert(0, self._decode(stored, query[:n], key[:n], value[:n]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _prefill(self, stored: Tensor, slots: Tensor | slice, length: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        kv_heads, per_head, size = query.shape[1:]
        key, value = (x.view(-1, length, kv_heads, size).transpose(1, 2) for x in (key, value))
        stored[0, slots, :, :length] = key
        stored[1, slots, :, :length] = value
        query = query.reshape(-1, length, kv_heads * per_head, size).transpose(1, 2)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=per_head > 1)
        return out.transpose(1, 2).reshape(-1, kv_heads * per_head * size)

    def _decode(self, stored: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Heads that share keys stand as if they were positions: they see the same, and nothing is repeated."""
        n = len(query)
        if self._mask is None:
            stored[0, :n, :, self._columns] = key
            stored[1, :n, :, self._columns] = value
        else:
            stored[0, self._rows, :, self._columns] = key
            stored[1, self._rows, :, self._columns] = value
        seen = stored[:, :n, :, : self._longest]
        return F.scaled_dot_product_attention(query, seen[0], seen[1], attn_mask=self._mask).reshape(n, -1)

    def move(self, moves: Sequence[tuple[int, int]], length: int) -> None:
        """Copy the first `length` positions of each (from, to) of slots, of which none is in two pairs; layer by layer."""
        if not moves:
            return
        sources, targets = (torch.tensor(slots, device=self.device) for slots in zip(*moves, strict=True))
        for stored in self._stored.values():
            stored[:, targets, :, :length] = stored[:, sources, :, :length]
