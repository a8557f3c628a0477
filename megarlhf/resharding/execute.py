"""Runs a reshard plan over a process group, on gloo and NCCL alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megarlhf.models.parameters import parameter_specs
from megarlhf.parallel.groups import ModelGroups
from megarlhf.resharding.plan import Copy, ReshardPlan

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ALIGNMENT = 16
"""Pieces start at multiples of this many bytes in a message, whatever their dtypes."""


@dataclass
class _Bucket:
    """This rank's pieces of one bucket: its own, and by peer what it sends and receives."""

    local: list[Copy] = field(default_factory=list)
    sends: dict[int, list[Copy]] = field(default_factory=lambda: defaultdict(list))
    receives: dict[int, list[Copy]] = field(default_factory=lambda: defaultdict(list))


class Resharder:
    """Copies weights from one layout to another: what a rank holds is copied locally, the rest is exchanged in buckets.

    All ranks go through the same buckets in the same order, with at most one message to and one from each peer in a bucket, all
    posted before any is waited for: no order of messages can block. Staging memory is that of one bucket: what this rank sends and
    what it receives in it, each about `bucket_bytes`, or one parameter's shard where that is larger.
    """

    def __init__(self, plan: ReshardPlan, groups: ModelGroups, *, bucket_bytes: int = 256 * 2**20) -> None:
        """`groups` are those of either layout: they give the rank, the device and the group of all ranks."""
        assert plan.source.num_ranks == dist.get_world_size(groups.world)
        self.plan = plan
        self._groups = groups
        self._bucket_bytes = bucket_bytes
        self._names = [spec.name for spec in parameter_specs(plan.architecture, plan.head)]
        self._mine = plan.for_rank(groups.rank)
        self._element_sizes: dict[str, int] = {}
        self._buckets: list[_Bucket] = []

    @torch.no_grad()
    def run(self, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        """Write the weights in `source` to `target`; every rank of the world calls it.

        ValueError, on all ranks, when a parameter does not have one dtype in both layouts: nothing is cast.

        Args:
            source: canonical name -> this rank's tensor in the source layout.
            target: canonical name -> this rank's tensor in the target layout.
        """
        element_sizes = self._agree_on_dtypes(source, target)
        if element_sizes != self._element_sizes:
            self._element_sizes, self._buckets = element_sizes, self._make_buckets(element_sizes)
        for bucket in self._buckets:
            self._exchange(bucket, source, target)

    def _agree_on_dtypes(self, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, int]:
        """Bytes per element of every parameter of the model, those included that this rank does not hold."""
        index = {name: i for i, name in enumerate(self._names)}
        seen = torch.zeros(len(index), len(DTYPES), dtype=torch.int32)
        for tensors in (source, target):
            for name, tensor in tensors.items():
                seen[index[name], DTYPES.index(tensor.dtype)] = 1
        seen = seen.to(self._groups.device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=self._groups.world)
        sizes = {}
        for name, row in zip(self._names, seen.tolist(), strict=True):
            dtypes = [dtype for dtype, present in zip(DTYPES, row, strict=True) if present]
            if len(dtypes) != 1:
                raise ValueError(
                    f"{name} is {' and '.join(str(dtype) for dtype in dtypes)} in layouts {self.plan.source} and {self.plan.target}: "
                    "resharding copies bits and casts nothing, so build both models with one precision"
                )
            sizes[name] = dtypes[0].itemsize
        return sizes

    def _make_buckets(self, element_sizes: dict[str, int]) -> list[_Bucket]:
        names = self.plan.buckets(element_sizes, max_bytes=self._bucket_bytes)
        bucket_of = {name: number for number, bucket in enumerate(names) for name in bucket}
        buckets = [_Bucket() for _ in names]
        for piece in self._mine.local:
            buckets[bucket_of[piece.name]].local.append(piece)
        for piece in self._mine.sends:
            buckets[bucket_of[piece.name]].sends[piece.target].append(piece)
        for piece in self._mine.receives:
            buckets[bucket_of[piece.name]].receives[piece.source].append(piece)
        return buckets

    def _exchange(self, bucket: _Bucket, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        world, operations, arriving = self._groups.world, [], []
        for peer, pieces in sorted(bucket.receives.items()):
            slices = [_slice(target, piece, piece.target_start) for piece in pieces]
            message = _new_message(slices)
            operations.append(dist.P2POp(dist.irecv, message, peer, world))
            arriving.append((message, slices))
        packed: dict[tuple, Tensor] = {}  # peers that are sent the same slices share one message
        for peer, pieces in sorted(bucket.sends.items()):
            contents = tuple((piece.name, piece.source_start, piece.size) for piece in pieces)
            if contents not in packed:
                packed[contents] = _pack([_slice(source, piece, piece.source_start) for piece in pieces])
            operations.append(dist.P2POp(dist.isend, packed[contents], peer, world))
        pending = dist.batch_isend_irecv(operations) if operations else []
        for piece in bucket.local:
            _slice(target, piece, piece.target_start).copy_(_slice(source, piece, piece.source_start))
        for work in pending:
            work.wait()
        for message, slices in arriving:
            for part, place in zip(_parts(message, slices), slices, strict=True):
                place.copy_(part)


def _slice(tensors: Mapping[str, Tensor], piece: Copy, start: int) -> Tensor:
    return tensors[piece.name].narrow(piece.dim, start, piece.size)


def _num_bytes(piece: Tensor) -> int:
    """Bytes that a piece takes in a message."""
    return -(-piece.numel() * piece.element_size() // ALIGNMENT) * ALIGNMENT


def _new_message(slices: list[Tensor]) -> Tensor:
    return torch.empty(sum(map(_num_bytes, slices)), dtype=torch.uint8, device=slices[0].device)


def _pack(slices: list[Tensor]) -> Tensor:
    message = _new_message(slices)
    for part, piece in zip(_parts(message, slices), slices, strict=True):
        part.copy_(piece)
    return message


def _parts(message: Tensor, like: list[Tensor]) -> Iterator[Tensor]:
    """The pieces of a message of bytes, with the shapes and dtypes of `like`."""
    start = 0
    for piece in like:
        part = message.narrow(0, start, piece.numel() * piece.element_size())
        yield part.view(piece.dtype).view(piece.shape)
        start += _num_bytes(piece)
