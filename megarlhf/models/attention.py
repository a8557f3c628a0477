"""Core attention over torch's kernels, with rotary positions, of rows of one length or packed."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarlhf.models.rotary import Rotary
from megarlhf.parallel.upload import upload

PADDED_SHARE = 0.5
"""Most padding, as a share of the real tokens, for which rows of several lengths share a call: a call costs as much as a row or two."""


LEAST_CAPABILITY = (8, 0)
MOST_HEAD_SIZE = 256
"""What FlashAttention 2 is for."""
VARLEN_ARGUMENTS = {"window_size", "enable_gqa", "seqused_k"}
"""What is asked of torch's varlen attention: 2.12 is the first to have them all, and 2.10 the first to have it."""


def has_varlen_kernel(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether torch's varlen attention (FlashAttention) is for these: it needs CUDA, 16 bits and heads of whole 16 bytes, up to 512."""
    fits = dtype in (torch.bfloat16, torch.float16) and head_size % 8 == 0 and head_size <= MOST_HEAD_SIZE
    return device.type == "cuda" and fits and _runs_varlen_kernel(device)


@functools.cache
def _runs_varlen_kernel(device: torch.device) -> bool:
    """Whether this torch has the kernel, with all that is asked of it, and the device is one for it."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # here: it brings torch's compiler, some two seconds that a CPU need not wait
    except ImportError:
        return False
    takes_all = VARLEN_ARGUMENTS <= set(inspect.signature(varlen_attn).parameters)
    return takes_all and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


class PackedRows:
    """Rows of several lengths one after the other, in place of an attention mask: each attends to itself alone."""

    def __init__(self, lengths: tuple[int, ...], device: torch.device) -> None:
        """lengths: tokens of each row."""
        self._lengths, self._device, self._longest = lengths, device, max(lengths)
        ends = list(itertools.accumulate(lengths, initial=0))
        positions = positions_in_rows(torch.tensor(lengths))
        self.positions, self._boundaries = upload([positions, torch.tensor(ends, dtype=torch.int32)], device)
        self._angles: tuple[Tensor, Tensor] | None = None

    @functools.cached_property
    def _groups(self) -> list[_RowsTogether]:
        """Rows that share a call; nothing is uploaded for them where the varlen kernel needs none."""
        return [_RowsTogether(rows, self._device) for rows in rows_together(self._lengths)]

    def angles(self, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """`Rotary.angles` of the tokens [tokens, size / 2], worked out once for all layers."""
        if self._angles is None:
            self._angles = rotary.angles(self.positions)
        return self._angles

    def attend(self, parts: Sequence[Tensor]) -> Tensor:
        """`causal_attention` within each row: parts [tokens, kv_heads, ..., head_size] -> [tokens, heads * head_size]."""
        if has_varlen_kernel(parts[0].device, parts[0].dtype, parts[0].shape[-1]):
            from torch.nn.attention.varlen import varlen_attn

            query, key, value = apart_by_heads(parts)
            grouped, ends, longest = query.shape[1] != key.shape[1], self._boundaries, self._longest
            return varlen_attn(query, key, value, ends, ends, longest, longest, window_size=(-1, 0), enable_gqa=grouped).flatten(1)
        pieces = [part.split([group.tokens for group in self._groups]) for part in parts]
        found = [
            group.packed(causal_attention([group.apart(piece) for piece in of_group]))
            for group, *of_group in zip(self._groups, *pieces, strict=True)
        ]
        return found[0] if len(found) == 1 else torch.cat(found)


def apart_by_heads(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Query [..., heads, head_size], key and value [..., kv_heads, head_size] out of `query_key_value`'s answer."""
    if len(parts) == 1:
        query, key, value = parts[0].split([parts[0].shape[-2] - 2, 1, 1], dim=-2)
    else:
        query, key = parts[0].split([parts[0].shape[-2] - 1, 1], dim=-2)
        value = parts[1]
    return query.flatten(-3, -2), key.squeeze(-2), value.squeeze(-2)


def causal_attention(parts: Sequence[Tensor]) -> Tensor:
    """Parts [rows, seq, kv_heads, ..., head_size], see `query_key_value` -> [rows, seq, heads * head_size]."""
    query, key, value = (x.transpose(1, 2) for x in apart_by_heads(parts))  # [rows, heads, seq, head_size]
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2).flatten(2)


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
            sizes, at = torch.tensor(lengths)[:, None], torch.arange(max(lengths))
            source = sizes.cumsum(0) - sizes + torch.minimum(at, sizes - 1)  # padding repeats the row's last token
            self._places = upload([source.flatten(), (at < sizes).flatten().nonzero().squeeze(1)], device)

    def apart(self, tokens: Tensor) -> Tensor:
        """[tokens, ...] -> [rows, longest, ...]."""
        return (_Apart.apply(tokens, *self._places) if self._places else tokens).unflatten(0, self._shape)

    def packed(self, rows: Tensor) -> Tensor:
        """[rows, longest, ...] -> [tokens, ...]."""
        flat = rows.flatten(0, 1)
        return _Packed.apply(flat, self._places[1]) if self._places else flat


class _Apart(torch.autograd.Function):
    """Tokens to their places among padding. What comes back to padding is zero: no token sees it, and `_Packed` leaves it out."""

    @staticmethod
    def forward(ctx, tokens, source, real):
        ctx.save_for_backward(real)
        return tokens.index_select(0, source)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Packed(torch.autograd.Function):
    """The same the other way round."""

    @staticmethod
    def forward(ctx, rows, real):
        ctx.save_for_backward(real)
        ctx.places = len(rows)
        return rows.index_select(0, real)

    @staticmethod
    def backward(ctx, grad):
        return grad.new_zeros(ctx.places, *grad.shape[1:]).index_copy_(0, ctx.saved_tensors[0], grad), None


def positions_in_rows(lengths: Tensor) -> Tensor:
    """Of rows of these `lengths` [rows], one after the other: each token's position in its row, [tokens] int64."""
    starts = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths)


def packed_rows_of_layers() -> Callable[[tuple[int, ...], torch.device], PackedRows]:
    """`PackedRows`, made once for all layers that share this function: of the micro-batches that a pipeline holds, most often."""
    return functools.lru_cache(maxsize=8)(PackedRows)


class SdpaAttention(nn.Module):
    """Causal softmax(q k / sqrt(d)) v, with rotary positions, for `Layer`.

    In place of a mask it is given the lengths of rows that stand one after the other (a host tensor, since megatron keeps it
    for recomputation); with None the batch's rows are all of one length. Generation has a forward pass of its own (models/decoding.py).
    """

    def __init__(
        self, *, config, layer_number: int, rotary: Rotary | None, packed_rows: Callable[..., PackedRows], **unused: object
    ) -> None:
        super().__init__()
        self.packed_rows = packed_rows
        self.layer_number = layer_number
        self.rotary = rotary
        self.head_size = config.kv_channels

    def forward(self, lengths: Tensor | None, *parts: Tensor) -> Tensor:
        """`query_key_value`'s parts [seq, batch, kv_heads, ..., head_size] -> [seq, batch, heads * head_size]; batch is 1 with lengths."""
        rows = None if lengths is None else self.packed_rows(tuple(lengths.tolist()), parts[0].device)
        if self.rotary is not None:
            seq = parts[0].shape[0]
            cos, sin = self.rotary.angles(torch.arange(seq, device=parts[0].device)) if rows is None else rows.angles(self.rotary)
            turned, value = parts if len(parts) == 2 else parts[0].split([parts[0].shape[-2] - 1, 1], dim=-2)
            parts = self.rotary.turned(turned, cos[:, None, None, None], sin[:, None, None, None]), value
        if rows is None:
            return causal_attention([part.transpose(0, 1) for part in parts]).transpose(0, 1)
        return rows.attend([part.squeeze(1) for part in parts]).unsqueeze(1)
