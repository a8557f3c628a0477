"""Which rows each data-parallel copy computes, and in which micro-batches: pure, and the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megarlhf.batch import Rows


def micro_batch_rows(
    batch: Rows,
    *,
    dp: int,
    micro_batch_size: int,
    micro_batch_tokens: int | None = None,
    minibatches: Sequence[Tensor] | None = None,
) -> list[list[Tensor]]:
    """Share the rows of a batch over `dp` copies by tokens, each share cut into micro-batches of rows of like length.

    A micro-batch holds at most micro_batch_size rows, or where micro_batch_tokens is given, at most so many tokens whatever the
    number of rows. Rows of one group (a prompt's completions) stay in one micro-batch, which may then exceed both, as a longer row
    does. With `minibatches`, row numbers of which each stands in one, every minibatch is shared and cut by itself.

    Returns: for each copy its micro-batches as row numbers [rows] int64; every row stands in exactly one.
    """
    if minibatches is not None:
        how = {"dp": dp, "micro_batch_size": micro_batch_size, "micro_batch_tokens": micro_batch_tokens}
        parts = [micro_batch_rows(batch.rows(index), **how) for index in minibatches]
        whole = [[index[rows] for rows in share] for index, shares in zip(minibatches, parts, strict=True) for share in shares]
        return [[rows for share in whole[copy::dp] for rows in share] for copy in range(dp)]
    lengths = batch.lengths.tolist()
    if batch.groups is None:
        units = [[row] for row in range(batch.num_rows)]
    else:
        members: dict[int, list[int]] = {}
        for row, group in enumerate(batch.groups.tolist()):
            members.setdefault(group, []).append(row)
        units = list(members.values())
    longest_first = sorted(units, key=lambda unit: -max(lengths[row] for row in unit))
    shares: list[list[list[int]]] = [[] for _ in range(dp)]
    tokens = [0] * dp
    for unit in longest_first:
        copy = tokens.index(min(tokens))
        shares[copy].append(unit)
        tokens[copy] += sum(lengths[row] for row in unit)
    if micro_batch_tokens is None:
        return [_pack(share, [1] * len(lengths), micro_batch_size) for share in shares]
    return [_pack(share, lengths, micro_batch_tokens) for share in shares]


def _pack(units: list[list[int]], sizes: list[int], most: int) -> list[Tensor]:
    """Units one after the other, as many as fit: rows of these `sizes` [rows] have `most` together."""
    packed: list[list[int]] = []
    filled = 0
    for unit in units:
        size = sum(sizes[row] for row in unit)
        if packed and filled + size <= most:
            packed[-1].extend(unit)
            filled += size
        else:
            packed.append(list(unit))
            filled = size
    return [torch.tensor(rows, dtype=torch.int64) for rows in packed]
