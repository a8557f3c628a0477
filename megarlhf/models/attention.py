"""Core attention over torch's kernels, with rotary positions, of rows of one length or packed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarlhf.models.rotary import Rotary
from megarlhf.parallel.upload import upload

PADDED_SHARE = 0.5
"""Most padding, as a share of the real tokens, for which rows of several lengths share a call: a call costs as much as a row or two."""


class PackedRows:
    """Rows of several lengths one after the other, in place of an attention mask: each attends to itself alone."""

    def __init__(self, lengths: tuple[int, ...], device: torch.device) -> None:
        """lengths: tokens of each row."""
        self._groups = [_RowsTogether(rows, device) for rows in rows_together(lengths)]
        self._longest = max(lengths)
        ends = list(itertools.accumulate(lengths, initial=0))
        positions = positions_in_rows(torch.tensor(lengths))[None]
        self.positions, self._boundaries = upload([positions, torch.tensor(ends, dtype=torch.int32)], device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [1, heads, tokens, head_size]; key, value [1, kv_heads, tokens, head_size] -> [1, heads, tokens, head_size]."""
        grouped = query.shape[1] != key.shape[1]
        packed = [x[0].transpose(0, 1) for x in (query, key, value)]  # [tokens, heads, head_size]
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
            from torch.nn.attention.varlen import varlen_attn  # here: it brings torch's compiler, some two seconds that a CPU need not wait

            ends, longest = self._boundaries, self._longest
            out = varlen_attn(*packed, ends, ends, longest, longest, window_size=(-1, 0), enable_gqa=grouped)
            return out.transpose(0, 1)[None]
        parts = [x.split([group.tokens for group in self._groups]) for x in packed]
        found = []
        for group, *qkv in zip(self._groups, *parts, strict=True):
            q, k, v = (group.apart(x).transpose(1, 2) for x in qkv)  # [rows, heads, longest, head_size]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            found.append(group.packed(out.transpose(1, 2)))
        return (found[0] if len(found) == 1 else torch.cat(found)).transpose(0, 1)[None]


def rows_together(lengths: Sequence[int]) -> list[list[int]]:
    """Consecutive rows of these `lengths` that attend in one call, padded to the longest of them by at most PADDED_SHARE."""
    groups: list[list[int]] = []
    for length in lengths:
        if groups and max(*groups[-1], length) * (len(groups[-1]) + 1) <= (1 + PADDED_SHARE) * (sum(groups[-1]) + length):
            groups[-1].append(length)
        else:
            groups.append([length])
    return groups


class _RowsTogether:
    """Rows that attend in one call. Padding stands behind each, so that with a causal mask no token sees any."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.tokens = sum(lengths)
        self._shape = len(lengths), max(lengths)
        self._places: list[Tensor] = []
        if self.tokens < len(lengths) * max(lengths):
            real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
            source = torch.full(self._shape, self.tokens)  # padding: the row of zeros behind the tokens
            source[real] = torch.arange(self.tokens)
            self._places = upload([source.flatten(), real.flatten().nonzero().squeeze(1)], device)

    def apart(self, tokens: Tensor) -> Tensor:
        """[tokens, ...] -> [rows, longest, ...]."""
        return (_Apart.apply(tokens, *self._places) if self._places else tokens).unflatten(0, self._shape)

    def packed(self, rows: Tensor) -> Tensor:
        """[rows, longest, ...] -> [tokens, ...]."""
        flat = rows.flatten(0, 1)
        return _Packed.apply(flat, *self._places) if self._places else flat


def _with_zeros(tokens: Tensor, source: Tensor) -> Tensor:
    return torch.cat([tokens, tokens.new_zeros(1, *tokens.shape[1:])])[source]


class _Apart(torch.autograd.Function):
    """Tokens to their places among padding, and their gradients back: each is picked out once, where autograd would add them up."""

    @staticmethod
    def forward(ctx, tokens, source, real):
        ctx.save_for_backward(real)
        return _with_zeros(tokens, source)

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.saved_tensors[0]], None, None


class _Packed(torch.autograd.Function):
    """The same the other way round."""

    @staticmethod
    def forward(ctx, rows, source, real):
        ctx.save_for_backward(source)
        return rows[real]

    @staticmethod
    def backward(ctx, grad):
        return _with_zeros(grad, ctx.saved_tensors[0]), None, None


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
