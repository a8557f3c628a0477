"""What passes between the stages, and between the tensor-parallel ranks, of one copy of a model that generates."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megarlhf.parallel.groups import ModelGroups


def pass_between_stages(
    hidden: Tensor | None, source: int, target: int, shape: tuple[int, ...], dtype: torch.dtype, groups: ModelGroups
) -> Tensor | None:
    """Hand hidden states from one stage of this copy to another; returns them on the target, None elsewhere."""
    place = groups.coordinates
    if source == target:
        return hidden
    peer = groups.layout.rank(tp=place.tp, dp=place.dp, pp=target if place.pp == source else source)
    if place.pp == source:
        dist.send(hidden.contiguous(), dst=peer)
    elif place.pp == target:
        received = torch.empty(shape, dtype=dtype, device=groups.device)
        dist.recv(received, src=peer)
        return received
    return None


def broadcast_from_last_stage(values: Tensor, groups: ModelGroups) -> Tensor:
    """The last stage's `values` on every stage of this copy, in place."""
    if groups.layout.pp > 1:
        place = groups.coordinates
        dist.broadcast(values, src=groups.layout.rank(tp=place.tp, dp=place.dp, pp=groups.layout.pp - 1), group=groups.pp)
    return values


def gather_over_tensor_parallel(values: Tensor, tp: dist.ProcessGroup | None) -> Tensor:
    """[...] of each tensor-parallel rank -> [tp, ...] on all of them."""
    if tp is None or tp.size() == 1:
        return values.unsqueeze(0)
    gathered = torch.empty(tp.size(), *values.shape, dtype=values.dtype, device=values.device)
    dist.all_gather(list(gathered.unbind()), values.contiguous(), group=tp)
    return gathered
