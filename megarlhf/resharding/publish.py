"""From the policy's weights to the generator's, with a version, and the proof that they are the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megarlhf.models.architecture import Architecture
from megarlhf.models.parameters import Head, Shard, parameter_specs, shards_held
from megarlhf.parallel.groups import ModelGroups
from megarlhf.resharding.execute import Resharder
from megarlhf.resharding.plan import Copy, plan_reshard

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
STRIDE = -7046029254386353131  # 2**64 / golden ratio, odd, as a signed number: the positions' weights wrap around and stay apart
CHUNK_ELEMENTS = 2**24
"""Elements that a checksum widens to 64 bits at a time."""
MISSING = torch.iinfo(torch.int64).min


class Publisher:
    """Gives the generator the policy's weights, layout to layout; with the same shards in both there is nothing to do.

    The generator's tensors last from `publish` to `release`: those that are contiguous parts of the policy's are views of these, the
    others are allocated. So between two generations they take no memory, and an update of the policy makes the views new and the rest
    old: what was published must be published again before it is used.
    """

    def __init__(self, architecture: Architecture, head: Head, source_groups: ModelGroups, target_groups: ModelGroups) -> None:
        """Plan from the layout of `source_groups` to that of `target_groups`; a rank that is not in one passes nothing for it."""
        self.architecture, self.head = architecture, head
        self.source_groups, self.target_groups = source_groups, target_groups
        self.version: int | None = None
        """Version of the weights that were published last; None before the first and after a release."""
        self._resharder: Resharder | None = None
        self._views: dict[str, Copy] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        if not self.in_place:
            plan = plan_reshard(architecture, head, source_groups.layout, target_groups.layout)
            self._resharder = Resharder(plan, source_groups)
            self._views = plan.views(source_groups.rank)
            self._shapes = {name: shard.shape for name, shard in self._shards(target_groups).items()}

    @property
    def in_place(self) -> bool:
        """Whether every rank holds the same shards in both layouts: the generator then shares the policy's modules."""
        source, target = self.source_groups.layout, self.target_groups.layout
        axes = ("tp", "pp", "dp", "virtual_pp", "tp_stride", "first_rank")
        return all(getattr(source, axis) == getattr(target, axis) for axis in axes)

    @torch.no_grad()
    def publish(self, source_parameters: Mapping[str, Tensor], target_parameters: Mapping[str, Tensor], *, version: int) -> None:
        """Make `target_parameters` equal to `source_parameters` and record their version; every rank calls it.

        ValueError, on all ranks, when a parameter does not have one dtype in both layouts.

        Args: canonical name -> this rank's tensor in each layout; the same tensors when `in_place`. Else the storage of the target's
            is replaced where it can be the source's.
        """
        self.version = None
        if self._resharder is None:
            assert all(target_parameters[name].data_ptr() == tensor.data_ptr() for name, tensor in source_parameters.items())
        else:
            self.allocate(source_parameters, target_parameters)
            self._resharder.run(source_parameters, target_parameters, views=self._views)
        self.version = version

    def allocate(self, source_parameters: Mapping[str, Tensor], target_parameters: Mapping[str, Tensor]) -> None:
        """Give the target's tensors their storage, without values where it is not the source's; `publish` does so where it was not done."""
        for name in self._shapes:
            tensor, view, source = target_parameters[name], self._views.get(name), source_parameters.get(name)
            if view is not None and source.dtype == tensor.dtype:
                tensor.data = source.detach().narrow(view.dim, view.source_start, view.size)
            elif tensor.shape != self._shapes[name]:  # it was released
                tensor.data = tensor.detach().new_empty(self._shapes[name])

    def release(self, target_parameters: Mapping[str, Tensor]) -> None:
        """Free what the generator's weights take beside the policy's, until they are published again; nothing when `in_place`."""
        if self._resharder is None:
            return
        self.version = None
        for tensor in target_parameters.values():
            tensor.data = tensor.detach().new_empty(0)

    @torch.no_grad()
    def verify(self, source_parameters: Mapping[str, Tensor], target_parameters: Mapping[str, Tensor]) -> None:
        """Check that every copy of every parameter in both layouts has the same bits in the same places; every rank calls it.

        RuntimeError, on all ranks, names the first parameter that differs, and whether between the layouts or within one.

        Args: canonical name -> this rank's tensor in each layout.
        """
        low, high = zip(
            self._range_of_checksums(source_parameters, self.source_groups),
            self._range_of_checksums(target_parameters, self.target_groups),
            strict=True,
        )
        for i, spec in enumerate(parameter_specs(self.architecture, self.head)):
            for side, groups in enumerate((self.source_groups, self.target_groups)):
                if low[side][i] != high[side][i]:
                    raise RuntimeError(f"{spec.name} is not the same in all copies of the model in layout {groups.layout}")
            if low[0][i] != low[1][i]:
                layouts = f"{self.source_groups.layout} and {self.target_groups.layout}"
                raise RuntimeError(f"{spec.name} differs between the layouts {layouts}: the generator's weights are not the policy's")

    def _shards(self, groups: ModelGroups) -> dict[str, Shard]:
        """Name -> what this rank holds in a layout: nothing where it is not in it."""
        return shards_held(self.architecture, self.head, groups.layout, groups.coordinates) if groups.is_member else {}

    def _range_of_checksums(self, parameters: Mapping[str, Tensor], groups: ModelGroups) -> tuple[list[int], list[int]]:
        """The smallest and the largest checksum of each parameter over all copies in one layout."""
        index = {spec.name: i for i, spec in enumerate(parameter_specs(self.architecture, self.head))}
        whole: dict[str, Tensor] = {}
        if held := self._shards(groups):
            sums = [checksums(parameters[name], shard) for name, shard in held.items()]
            together = torch.cat(sums)
            dist.all_reduce(together, group=groups.tp)
            whole = dict(zip(held, together.split([len(part) for part in sums]), strict=True))
        largest = torch.full((2, len(index)), MISSING, dtype=torch.int64, device=groups.device)
        for name, values in whole.items():
            largest[0, index[name]] = values.max()
            largest[1, index[name]] = (~values).max()  # ~ reverses the order of integers, so that the largest is the smallest's
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=groups.world)
        return (~largest[1]).tolist(), largest[0].tolist()


def checksums(tensor: Tensor, shard: Shard) -> Tensor:
    """What a rank adds to the checksums of the copies of a whole parameter among its tensor-parallel peers: [copies] int64.

    A checksum is the sum over the elements of bits * weight of the place in the whole parameter, modulo 2**64. Copy c is made of
    copy c of every slice that several ranks hold, and of the slices that one rank holds; summed over the ranks, shards give the
    checksum of the whole, in whatever layout. A slice in the wrong place changes it.
    """
    totals = torch.zeros(shard.copies, dtype=torch.int64, device=tensor.device)
    for start, part in shard.placed():
        found = _checksum(tensor.narrow(shard.dim, start, part.size), shard.dim, part.start)
        totals[part.copy if part.copies > 1 else slice(None)] += found
    return totals


def _checksum(tensor: Tensor, dim: int, first: int) -> Tensor:
    """[] int64: bits * weight summed over part of a parameter, which starts at `first` along `dim`."""
    bits = tensor.contiguous().view(INTEGERS[tensor.element_size()]).reshape(tensor.shape[0], -1)
    rows, columns = (_weights(first if dim == d else 0, bits.shape[d], tensor.device) for d in (0, 1))
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    step = max(1, CHUNK_ELEMENTS // bits.shape[1])
    for part, row_weights in zip(bits.split(step), rows.split(step), strict=True):
        total += ((part.to(torch.int64) * columns).sum(dim=1) * row_weights).sum()
    return total


def _weights(first: int, size: int, device: torch.device) -> Tensor:
    """[size] int64: the weights of positions from `first` on in the whole parameter."""
    return torch.arange(first, first + size, device=device) * STRIDE + 1
