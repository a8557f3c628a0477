"""Runs a reshard plan over a process group, on gloo and NCCL alike."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megarlhf.models.parameters import parameter_specs, shard_of
from megarlhf.parallel.groups import ModelGroups
from megarlhf.resharding.near_memory import MOST_BYTES, NearMemory
from megarlhf.resharding.plan import Copy, ReshardPlan

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BUCKET_BYTES = 256 * 2**20
DIRECT_BYTES = 2**18
"""Slices of at least this many bytes are messages of their own, sent and received where they lie; smaller ones are packed together."""

Part = tuple[Copy, tuple[int, int] | None]
"""A slice, and which of its rows: None for all."""


@dataclass
class _Bucket:
    """This rank's slices of one bucket: its own, and by peer what it sends and receives."""

    local: list[Part] = field(default_factory=list)
    sends: dict[int, list[Part]] = field(default_factory=lambda: defaultdict(list))
    receives: dict[int, list[Part]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True)
class _Ranges:
    """What this rank reads from the memory of another: ranges of bytes of tensors, [n] int64 each."""

    tensors: Tensor
    """Numbers of the parameters."""
    source_starts: Tensor
    target_starts: Tensor
    sizes: Tensor


class Resharder:
    """Brings weights from one layout to another: what a rank holds is copied locally, the rest is exchanged in buckets.

    On the CPUs of one host nothing is sent: a rank reads what it lacks where it lies, and writes it where it belongs.

    Elsewhere all ranks go through the same buckets in the same order, and post all messages of a bucket before any is waited for: no
    order of messages can block. A large slice is a message by itself, sent from where it lies and received where it belongs, if it is
    contiguous there. Others are packed; what that takes is at most one bucket of what is sent and one of what is received, each of
    `bucket_bytes` at most.
    """

    def __init__(
        self,
        plan: ReshardPlan,
        groups: ModelGroups,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        direct_bytes: int = DIRECT_BYTES,
        reads: bool = True,
    ) -> None:
        """`groups` are those of either layout: they give the rank, the device and the group of all ranks, in a layout or not.

        Without `reads` there are messages even where memory could be read. All ranks of the world make one together.
        """
        assert plan.num_ranks <= dist.get_world_size(groups.world)
        self.plan = plan
        self._groups = groups
        self._bucket_bytes = bucket_bytes
        self._direct_bytes = direct_bytes
        self._specs = {spec.name: spec for spec in parameter_specs(plan.architecture, plan.head)}
        self._mine = plan.for_rank(groups.rank)
        self._element_sizes: dict[str, int] = {}
        self._buckets: list[_Bucket] = []
        self._ranges: dict[int, _Ranges] = {}
        """By rank, what is read from it."""
        self._memory: NearMemory | None = None
        if reads and groups.device.type == "cpu":
            memory = NearMemory(groups.world, {piece.source for piece in self._mine.receives})
            self._memory = memory if memory.reachable else None

    @torch.no_grad()
    def run(self, source: Mapping[str, Tensor], target: Mapping[str, Tensor], *, views: Collection[str] = ()) -> None:
        """Write the weights in `source` to `target`; every rank of the world calls it, with nothing for a layout that it is not in.

        ValueError, on all ranks, when a parameter does not have one dtype in both layouts: nothing is cast.

        Args:
            source: canonical name -> this rank's tensor in the source layout.
            target: canonical name -> this rank's tensor in the target layout.
            views: the names of target tensors that are views of the source's, as `ReshardPlan.views` says: nothing is copied to them.
        """
        element_sizes = self._agree_on_dtypes(source, target)
        if element_sizes != self._element_sizes:
            self._element_sizes = element_sizes
            if self._memory is not None:
                self._ranges = self._make_ranges(element_sizes)
            else:
                self._buckets = self._make_buckets(element_sizes)
        if self._memory is not None:
            self._read(self._memory, source, target, views)
        for bucket in self._buckets:
            self._exchange(bucket, source, target, views)

    def _agree_on_dtypes(self, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, int]:
        """Bytes per element of every parameter of the model, those included that this rank does not hold."""
        index = {name: i for i, name in enumerate(self._specs)}
        seen = torch.zeros(len(index), len(DTYPES), dtype=torch.int32)
        for tensors in (source, target):
            for name, tensor in tensors.items():
                seen[index[name], DTYPES.index(tensor.dtype)] = 1
        seen = seen.to(self._groups.device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=self._groups.world)
        sizes = {}
        for name, row in zip(self._specs, seen.tolist(), strict=True):
            dtypes = [dtype for dtype, present in zip(DTYPES, row, strict=True) if present]
            if len(dtypes) != 1:
                raise ValueError(
                    f"{name} is {' and '.join(str(dtype) for dtype in dtypes)} in layouts {self.plan.source} and {self.plan.target}: "
                    "resharding copies bits and casts nothing, so build both models with one precision"
                )
            sizes[name] = dtypes[0].itemsize
        return sizes

    def _make_ranges(self, element_sizes: dict[str, int]) -> dict[int, _Ranges]:
        index = {name: i for i, name in enumerate(self._specs)}
        parts: dict[int, list[tuple[Tensor, ...]]] = defaultdict(list)
        for piece in self._mine.receives:
            starts = self._byte_ranges(piece, element_sizes[piece.name])
            parts[piece.source].append((torch.full_like(starts[0], index[piece.name]), *starts))
        return {peer: _Ranges(*map(torch.cat, zip(*of_peer, strict=True))) for peer, of_peer in parts.items()}

    def _byte_ranges(self, piece: Copy, element_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where a slice's bytes start in the source's tensor, where in the target's, and how many: a range for each row where it is
        some of a matrix's columns."""
        spec, source, target = self._specs[piece.name], self.plan.source, self.plan.target
        from_shape = shard_of(spec, source.coordinates(piece.source).tp, source.tp).shape
        to_shape = shard_of(spec, target.coordinates(piece.target).tp, target.tp).shape
        inner = element_size * math.prod(spec.shape[piece.dim + 1 :])
        rows, size = math.prod(spec.shape[: piece.dim]), piece.size * inner
        row, cut = torch.arange(rows)[:, None], torch.arange(0, size, MOST_BYTES)
        starts = (
            (row * shape[piece.dim] + start) * inner + cut
            for shape, start in ((from_shape, piece.source_start), (to_shape, piece.target_start))
        )
        sizes = (size - cut).clamp(max=MOST_BYTES).expand(rows, -1)
        source_starts, target_starts = (of_side.flatten() for of_side in starts)
        return source_starts, target_starts, sizes.flatten()

    def _read(self, memory: NearMemory, source: Mapping[str, Tensor], target: Mapping[str, Tensor], views: Collection[str]) -> None:
        """Everything, from where it lies."""
        addresses = memory.addresses([source.get(name) for name in self._specs])
        here = torch.tensor([target[name].data_ptr() if name in target else 0 for name in self._specs])
        for peer, ranges in self._ranges.items():
            remote = addresses[peer][ranges.tensors] + ranges.source_starts
            memory.read(peer, remote, here[ranges.tensors] + ranges.target_starts, ranges.sizes)
        self._copy([(piece, None) for piece in self._mine.local], source, target, views)
        memory.done()

    def _copy(self, parts: Iterable[Part], source: Mapping[str, Tensor], target: Mapping[str, Tensor], views: Collection[str]) -> None:
        """What this rank holds in both layouts."""
        for part in parts:
            if part[0].name not in views:
                _slice(target, part, part[0].target_start).copy_(_slice(source, part, part[0].source_start))

    def _make_buckets(self, element_sizes: dict[str, int]) -> list[_Bucket]:
        portions = self.plan.buckets(element_sizes, max_bytes=self._bucket_bytes)
        places: dict[str, list[tuple[int, tuple[int, int] | None]]] = defaultdict(list)  # name -> (bucket, rows)
        for number, bucket in enumerate(portions):
            for portion in bucket:
                places[portion.name].append((number, portion.rows))
        buckets = [_Bucket() for _ in portions]
        for piece in self._mine.local:
            for number, rows in places[piece.name]:
                buckets[number].local.append((piece, rows))
        for piece in self._mine.sends:
            for number, rows in places[piece.name]:
                buckets[number].sends[piece.target].append((piece, rows))
        for piece in self._mine.receives:
            for number, rows in places[piece.name]:
                buckets[number].receives[piece.source].append((piece, rows))
        return buckets

    def _exchange(self, bucket: _Bucket, source: Mapping[str, Tensor], target: Mapping[str, Tensor], views: Collection[str]) -> None:
        world, operations, arriving = self._groups.world, [], []
        for peer, parts in sorted(bucket.receives.items()):
            for _, slices in self._messages((part, _slice(target, part, part[0].target_start)) for part in parts):
                direct = _as_bytes(slices)
                message = _new_message(slices) if direct is None else direct
                operations.append(dist.P2POp(dist.irecv, message, peer, world))
                if direct is None:
                    arriving.append((message, slices))
        packed: dict[tuple, Tensor] = {}  # peers that are sent the same slices share one message
        for peer, parts in sorted(bucket.sends.items()):
            for contents, slices in self._messages((part, _slice(source, part, part[0].source_start)) for part in parts):
                message = _as_bytes(slices)
                if message is None:
                    message = packed[contents] = packed[contents] if contents in packed else _pack(slices)
                operations.append(dist.P2POp(dist.isend, message, peer, world))
        pending = dist.batch_isend_irecv(operations) if operations else []
        self._copy(bucket.local, source, target, views)
        for work in pending:
            work.wait()
        for message, slices in arriving:
            for part, place in zip(_parts(message, slices), slices, strict=True):
                place.copy_(part)

    def _messages(self, pieces: Iterable[tuple[Part, Tensor]]) -> Iterator[tuple[tuple, list[Tensor]]]:
        """What goes from one rank to another in a bucket as (contents, slices) of each message.

        The order and the sizes of the slices alone decide, so that both ends make the same messages in the same order.
        """
        small: list[tuple[Part, Tensor]] = []
        for part, piece in pieces:
            if piece.nbytes >= self._direct_bytes:
                yield (_contents(part),), [piece]
            else:
                small.append((part, piece))
        if small:
            small.sort(key=lambda entry: -entry[1].element_size())  # so that each starts at a multiple of its elements' size
            yield tuple(_contents(part) for part, _ in small), [piece for _, piece in small]


def _slice(tensors: Mapping[str, Tensor], part: Part, start: int) -> Tensor:
    piece, rows = part
    found = tensors[piece.name].detach().narrow(piece.dim, start, piece.size)
    return found if rows is None else found.narrow(0, rows[0], rows[1] - rows[0])


def _contents(part: Part) -> tuple:
    piece, rows = part
    return piece.name, piece.source_start, piece.size, rows


def _as_bytes(slices: list[Tensor]) -> Tensor | None:
    """The message that one contiguous slice is as it lies; None where it has to be packed."""
    return slices[0].view(-1).view(torch.uint8) if len(slices) == 1 and slices[0].is_contiguous() else None


def _new_message(slices: list[Tensor]) -> Tensor:
    return torch.empty(sum(piece.nbytes for piece in slices), dtype=torch.uint8, device=slices[0].device)


def _pack(slices: list[Tensor]) -> Tensor:
    message = _new_message(slices)
    for part, piece in zip(_parts(message, slices), slices, strict=True):
        part.copy_(piece)
    return message


def _parts(message: Tensor, like: list[Tensor]) -> Iterator[Tensor]:
    """The pieces of a message of bytes, with the shapes and dtypes of `like`."""
    start = 0
    for piece in like:
        yield message.narrow(0, start, piece.nbytes).view(piece.dtype).view(piece.shape)
        start += piece.nbytes
