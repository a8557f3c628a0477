"""Keys and values of the rows that are being generated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class KeyValueCache:
    """The key-value store of one batch of right-padded rows: filled with the prompts, then one token per row at a time.

    For each layer held here, keys and values [batch, kv_heads / tp, max_len, head_size].
    """

    def __init__(
        self,
        layer_numbers: Sequence[int],
        *,
        batch: int,
        kv_heads: int,
        max_len: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (batch, kv_heads, max_len, head_size)
        self._stored = {
            number: [torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)]
            for number in layer_numbers
        }
        self._device = device
        self._mask: Tensor | None = None
        self._rows = torch.arange(batch, device=device)
        self.positions = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        """[batch, new]: where the tokens of the current forward pass stand."""

    def prefill(self, width: int) -> None:
        """The next forward pass holds whole prompts [batch, width]."""
        self.positions = torch.arange(width, device=self._device)[None].expand(self.positions.shape[0], -1)
        self._mask = None

    def decode(self, positions: Tensor, longest: int) -> None:
        """The next forward pass holds one token per row, at `positions` [batch], none beyond `longest` - 1."""
        self.positions = positions[:, None]
        self._rows = torch.arange(len(positions), device=self._device)
        self._mask = (torch.arange(longest, device=self._device) <= self.positions)[:, None, None]  # [batch, 1, 1, longest]

    def attend(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `KeyValueStore.attend`."""
        keys, values = self._stored[layer_number]
        grouped = query.shape[1] != key.shape[1]
        if self._mask is None:
            keys[:, :, : key.shape[2]] = key
            values[:, :, : value.shape[2]] = value
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        rows, columns = self._rows, self.positions[:, 0]
        keys[rows, :, columns] = key[:, :, 0]
        values[rows, :, columns] = value[:, :, 0]
        longest = self._mask.shape[-1]
        return F.scaled_dot_product_attention(
            query, keys[:, :, :longest], values[:, :, :longest], attn_mask=self._mask, enable_gqa=grouped
        )

    def keep(self, index: Tensor) -> None:
        """Keep the rows at `index` [n] only, in that order. One tensor at a time: no second cache beside the first."""
        for stored in self._stored.values():
            for number in range(len(stored)):
                stored[number] = stored[number][index]
        self.positions = self.positions[index]
