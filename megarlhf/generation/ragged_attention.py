"""Attention of one new token per row over what rows of any lengths have, on a CPU: two sparse products that read nothing else.

A CPU's dense kernels take small matrix products for each row and head, whose calls cost as much as some 50 positions, and read every row as
far as the longest. Here scores are products of queries and keys at chosen places alone (sampled dense-dense product), and what comes
out is a sum of values weighted by their probabilities (an embedding bag). Both go through memory about as fast as it is read, and what
a row is given does not depend on the rows beside it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor


def has_sparse_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `RaggedAttention` is for these: its kernels are a CPU's, and in 16 bits they would add up in 16."""
    return device.type == "cpu" and dtype == torch.float32


class RaggedAttention:
    """Which keys and values the rows of one step see; the same for all layers."""

    def __init__(self, first_lines: Tensor, lengths: Sequence[int], *, group: int, num_lines: int) -> None:
        """Keys and values are lines [num_lines, head_size]; a row's begin at `first_lines` [rows, kv_heads], one after the other.

        lengths: how many each row sees. group: heads that share keys.
        """
        (rows, kv_heads), self._longest = first_lines.shape, max(lengths)
        positions, seen = torch.arange(self._longest), torch.tensor(lengths)
        self._shape = kv_heads, rows, group
        # heads stand outside, so that only what one of them sees has to be worked out
        if min(lengths) == self._longest:
            self._places = None
            lines = (first_lines.t()[..., None, None] + positions).expand(-1, -1, group, -1)
        else:
            mask = (positions < seen[:, None])[:, None].expand(-1, group, -1)
            row, member, position = mask.nonzero(as_tuple=True)
            lines = first_lines.t().index_select(1, row).add_(position)
            places = (row * group + member) * self._longest + position
            self._places = (torch.arange(kv_heads)[:, None] * mask.numel() + places).flatten()
            self._padded = torch.full((kv_heads * mask.numel(),), -math.inf)
        self._lines = lines.reshape(-1)
        self._offsets = torch.zeros(kv_heads * rows * group + 1, dtype=torch.int64)
        torch.cumsum(seen[:, None].expand(kv_heads, -1, group).flatten(), 0, out=self._offsets[1:])
        scores = torch.zeros(len(self._lines))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse", UserWarning)  # that torch's sparse rows are a beta of it
            size = len(self._offsets) - 1, num_lines
            self._scores = torch.sparse_csr_tensor(self._offsets, self._lines, scores, size, check_invariants=False)

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Query [rows, kv_heads, group, head_size]; keys, values [lines, head_size] -> [rows, heads * head_size]. All float32."""
        (kv_heads, rows, _), size = self._shape, query.shape[-1]
        queries = query.transpose(0, 1).reshape(-1, size)
        torch.sparse.sampled_addmm(self._scores, queries, keys.t(), beta=0.0, alpha=size**-0.5, out=self._scores)
        weights = self._softmax(self._scores.values())
        found = torch.embedding_bag(values, self._lines, self._offsets, False, 0, False, weights, True)[0]
        return found.view(kv_heads, rows, -1).transpose(0, 1).reshape(rows, -1)

    def _softmax(self, scores: Tensor) -> Tensor:
        """Of each row and head: [all that is seen] -> the same shape."""
        if self._places is None:
            return scores.view(-1, self._longest).softmax(dim=-1).view(-1)
        self._padded.index_copy_(0, self._places, scores)
        return self._padded.view(-1, self._longest).softmax(dim=-1).view(-1).index_select(0, self._places)
