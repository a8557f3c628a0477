"""How tensors of theirs become one of ours, and back; each form of families.py, tensor by tensor, bit by bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megarlhf.conversion.families import Form
from megarlhf.models.architecture import Architecture

UNUSED_POSITIONS = 2
"""Rows of OPT's position table before that of position 0: one never read, one for padding."""


def their_shapes(form: Form, shape: Sequence[int], architecture: Architecture) -> list[tuple[int, ...]]:
    """Shapes of their tensors for one of ours of full shape `shape`, vocabulary padded."""
    a, (rows, *rest) = architecture, shape
    q, kv = a.num_heads * a.head_size, a.num_kv_heads * a.head_size
    return {
        "same": [(rows, *rest)],
        "vocabulary": [(a.vocab_size, *rest)],
        "after_two_rows": [(rows + UNUSED_POSITIONS, *rest)],
        "transposed": [(*rest, rows)],
        "stacked": [(rows // 2, *rest)] * 2,
        "grouped": [(q, *rest), (kv, *rest), (kv, *rest)],
        "thirds": [(rows, *rest)],
        "thirds_transposed": [(*rest, rows)],
    }[form]


def to_ours(form: Form, tensors: Sequence[Tensor], architecture: Architecture) -> Tensor:
    """Our full parameter from theirs.

    same: as it is. vocabulary: rows of zeros appended to the padded vocabulary. after_two_rows: without the first two rows.
    transposed: a Conv1D's [in, out]. stacked: gate above up. grouped: queries, keys and values, each of all heads, by key-value
    head: its queries, then its key, then its value. thirds: the same from one tensor of three thirds.
    """
    a, first = architecture, tensors[0]
    if form == "vocabulary":
        return F.pad(first, (0, 0, 0, a.padded_vocab_size - a.vocab_size))
    if form == "after_two_rows":
        return first[UNUSED_POSITIONS:]
    if form == "transposed":
        return first.T.contiguous()
    if form == "stacked":
        return torch.cat(list(tensors))
    if form.startswith("thirds"):
        tensors = (first.T if form == "thirds_transposed" else first).chunk(3)
    if form == "grouped" or form.startswith("thirds"):
        by_group = [x.reshape(a.num_kv_heads, -1, *x.shape[1:]) for x in tensors]
        return torch.cat(by_group, dim=1).flatten(0, 1)
    return first


def to_theirs(form: Form, tensor: Tensor, architecture: Architecture) -> list[Tensor]:
    """Their tensors from our full parameter: what `to_ours` undoes, bit by bit; OPT's two rows that mean nothing are zeros."""
    a = architecture
    if form == "vocabulary":
        return [tensor[: a.vocab_size]]
    if form == "after_two_rows":
        return [F.pad(tensor, (0, 0, UNUSED_POSITIONS, 0))]
    if form == "transposed":
        return [tensor.T.contiguous()]
    if form == "stacked":
        return list(tensor.chunk(2))
    if form == "grouped" or form.startswith("thirds"):
        by_group = tensor.view(a.num_kv_heads, -1, *tensor.shape[1:])
        queries = a.num_heads // a.num_kv_heads * a.head_size
        parts = [x.flatten(0, 1) for x in by_group.split([queries, a.head_size, a.head_size], dim=1)]
        if form == "grouped":
            return parts
        return [torch.cat(parts).T.contiguous() if form == "thirds_transposed" else torch.cat(parts)]
    return [tensor]
