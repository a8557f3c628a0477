"""Collectives by what they mean."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megarlhf.parallel.groups import ModelGroups, World


def sum_over_copies(values: Tensor, groups: ModelGroups) -> Tensor:
    """Sum over micro-batches' owners: `values`, meaningful on the last stage, summed over dp and known to every rank.

    Args: values [n], zeros on ranks that are not on the last stage.
    """
    total = values.clone()
    _add_up(total, groups.outputs)
    return total


def gather_rows(rows: Tensor, index: Tensor, num_rows: int, groups: ModelGroups) -> Tensor:
    """Every row's output on every rank, from the last stage of whichever copy computed it.

    Args:
        rows: [n, ...] outputs computed here (n = 0 off the last stage).
        index: [n] their row numbers in the global batch; each row is computed by one copy.
        num_rows: rows of the global batch.

    Returns: [num_rows, ...] on the same device, identical on all ranks.
    """
    whole = torch.zeros(num_rows, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    whole[index] = rows
    _add_up(whole, groups.outputs)
    return whole


def of_every_copy(values: Sequence[int], groups: ModelGroups) -> list[list[int]]:
    """The `values` of each data-parallel copy, which all its ranks have, known to every rank."""
    whole = torch.zeros(groups.layout.dp, len(values), dtype=torch.int64)
    whole[groups.coordinates.dp] = torch.tensor(values)
    whole = whole.to(groups.device)
    dist.all_reduce(whole, group=groups.dp)
    return whole.tolist()


def largest(value: int, group: dist.ProcessGroup, device: torch.device) -> int:
    """The largest `value` of the group."""
    whole = torch.tensor([value], dtype=torch.int64, device=device)
    dist.all_reduce(whole, op=dist.ReduceOp.MAX, group=group)
    return int(whole)


def any_rank(flag: bool, group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether the flag is set on any rank of the group."""
    return bool(largest(int(flag), group, device))


def largest_of_world(values: Sequence[int], world: World) -> list[int]:
    """The largest of each of `values` over all ranks."""
    whole = torch.tensor(values, dtype=torch.int64, device=world.device)
    dist.all_reduce(whole, op=dist.ReduceOp.MAX)
    return whole.tolist()


def sum_of_world(values: Sequence[int], world: World) -> list[int]:
    """The sum of each of `values` over all ranks."""
    whole = torch.tensor(values, dtype=torch.int64, device=world.device)
    dist.all_reduce(whole)
    return whole.tolist()


def broadcast_object(value: object, *, source: int = 0) -> object:
    """Rank `source`'s picklable value on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value: object) -> list:
    """Each rank's picklable value, in rank order, on every rank.

    Where all ranks have the same, as they nearly always do, digests are all that is sent, some 80 bytes a rank whatever the value, and
    the list is of this rank's own value.
    """
    digests: list = [None] * dist.get_world_size()
    dist.all_gather_object(digests, hashlib.sha256(pickle.dumps(value)).digest())
    if len(set(digests)) == 1:
        return [value] * len(digests)
    gathered = [None] * len(digests)
    dist.all_gather_object(gathered, value)
    return gathered


def gather_on_rank_0(value: object, world: World) -> list:
    """Each rank's picklable value, in rank order, on rank 0; an empty list elsewhere."""
    gathered: list = [None] * world.size if world.rank == 0 else []
    dist.gather_object(value, gathered if world.rank == 0 else None)
    return gathered


def sum_over_world(values: Tensor, groups: ModelGroups) -> Tensor:
    """Sum of `values` [n] over every rank."""
    total = values.clone()
    _add_up(total, groups.world)
    return total


def sum_over_holders(tensor: Tensor, copies: int, tp: dist.ProcessGroup) -> None:
    """Sum `tensor`, in place, over the `copies` consecutive ranks of `tp` that hold the same part of a parameter.

    All ranks of `tp` call it, each run of holders with the tensor of its own part. They use one message with a place for each
    part, so that no group of its own is needed for each way of sharing.
    """
    places = torch.zeros(tp.size() // copies, *tensor.shape, dtype=tensor.dtype, device=tensor.device)
    mine = places[tp.rank() // copies]
    mine.copy_(tensor)
    dist.all_reduce(places, group=tp)
    tensor.copy_(mine)


def _add_up(tensor: Tensor, group: dist.ProcessGroup) -> None:
    """In place; a rank by itself wakes no thread for it."""
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
