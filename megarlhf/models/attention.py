"""Core attention over torch's kernels, with rotary positions, of rows of one length or packed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from megarlhf.models.rotary import Rotary
from megarlhf.parallel.upload import upload


class PackedRows:
    """Rows of several lengths one after the other, in place of an attention mask: each attends to itself alone."""

    def __init__(self, lengths: tuple[int, ...], device: torch.device) -> None:
        """lengths: tokens of each row."""
        self._groups = [(length, len(list(rows))) for length, rows in itertools.groupby(lengths)]
        self._longest = max(lengths)
        ends = list(itertools.accumulate(lengths, initial=0))
        positions = positions_in_rows(torch.tensor(lengths))[None]
        self.positions, self._boundaries = upload([positions, torch.tensor(ends, dtype=torch.int32)], device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [1, heads, tokens, head_size]; key, value [1, kv_heads, tokens, head_size] -> [1, heads, tokens, head_size]."""
        grouped = query.shape[1] != key.shape[1]
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
            rows = [x[0].transpose(0, 1) for x in (query, key, value)]
            ends, longest = self._boundaries, self._longest
            out = varlen_attn(*rows, ends, ends, longest, longest, window_size=(-1, 0), enable_gqa=grouped)
            return out.transpose(0, 1)[None]
        parts = [x.split([length * rows for length, rows in self._groups], dim=2) for x in (query, key, value)]
        found = []
        for (length, rows), *qkv in zip(self._groups, *parts, strict=True):
            q, k, v = (x[0].unflatten(1, (rows, length)).transpose(0, 1) for x in qkv)  # [rows, heads, length, head_size]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            found.append(out.transpose(0, 1).flatten(1, 2))
        return (found[0] if len(found) == 1 else torch.cat(found, dim=1))[None]


def positions_in_rows(lengths: Tensor) -> Tensor:
    """Of rows of these `lengths` [rows], one after the other: each token's position in its row, [tokens] int64."""
    starts = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths)


def packed_rows_of_layers() -> Callable[[tuple[int, ...], torch.device], PackedRows]:
    """`PackedRows`, made once for all layers that share this function: of the micro-batches that a pipeline holds, most often."""
    return functools.lru_cache(maxsize=8)(PackedRows)


class SdpaAttention(nn.Module):
    """Causal softmax(q k / sqrt(d)) v for megatron's self-attention.

    In place of the mask the model is given the lengths of rows that stand one after the other (a host tensor, since megatron keeps it
    for recomputation); with None the batch's rows are all of one length. Generation has a forward pass of its own (models/decoding.py).
    """

    def __init__(
        self, *, config, layer_number: int, rotary: Rotary | None, packed_rows: Callable[..., PackedRows], **unused: object
    ) -> None:
        super().__init__()
        self.packed_rows = packed_rows
        self.layer_number = layer_number
        self.rotary = rotary

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **unused: object) -> Tensor:
        """query [seq, batch, heads, head_size]; key, value [seq, batch, kv_heads, head_size] -> [seq, batch, heads * head_size]."""
        rows = None if attention_mask is None else self.packed_rows(tuple(attention_mask.tolist()), query.device)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [batch, heads, seq, head_size]
        if self.rotary is not None:
            positions = torch.arange(q.shape[2], device=q.device)[None] if rows is None else rows.positions
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        if rows is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        else:
            out = rows.attend(q, k, v)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
