"""Which rows each data-parallel copy computes, and in which micro-batches: pure, and the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megarlhf.batch import Rows


def micro_batch_rows(
    batch: Rows, *, dp: int, micro_batch_size: int, minibatches: Sequence[Tensor] | None = None
) -> list[list[Tensor]]:
    """Share the rows of a batch over `dp` copies by tokens, each share cut into micro-batches of rows of like length.

    Rows of one group (a prompt's completions) stay in one micro-batch, which may then exceed micro_batch_size. With
    `minibatches`, row numbers of which each stands in one, every minibatch is shared and cut by itself.

    Returns: for each copy its micro-batches as row numbers [rows] int64; every row stands in exactly one.
    """
    if minibatches is not None:
        parts = [micro_batch_rows(batch.rows(index), dp=dp, micro_batch_size=micro_batch_size) for index in minibatches]
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
    return [_pack(share, micro_batch_size) for share in shares]


def _pack(units: list[list[int]], micro_batch_size: int) -> list[Tensor]:
    packed: list[list[int]] = []
    for unit in units:
        if packed and len(packed[-1]) + len(unit) <= micro_batch_size:
            packed[-1].extend(unit)
        else:
            packed.append(list(unit))
    return [torch.tensor(rows, dtype=torch.int64) for rows in packed]


def padded_positions(batch: Rows, shares: list[list[Tensor]]) -> int:
    """Positions that the micro-batches of all copies hold: each row as wide as the longest of its micro-batch."""
    return sum(len(rows) * int(batch.lengths[rows].max()) for share in shares for rows in share)
