"""What passes between the stages, and between the tensor-parallel ranks, of one copy of a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megarlhf.parallel.groups import ModelGroups

Shape = tuple[int, ...]


class StageCommunicator(P2PCommunicator):
    """The messages of megatron's pipeline schedules, where every stage knows what will arrive.

    Backends pair the messages from one rank to another in the order in which they were posted, whatever they mean.
    Activations and gradients so travel in two groups, which differ where the two would share their ends
    (`ParallelLayout.messages_meet`). And since each stage knows every micro-batch, no shapes are exchanged.
    """

    def __init__(self, groups: ModelGroups, config, *, activations: Sequence[Shape], gradients: Sequence[Shape]) -> None:
        """`activations` and `gradients`: the shapes of all that arrives at this stage, each in the order of its arrival."""
        super().__init__(groups.pp, config)
        self._groups = groups
        self._activations = list(activations)[::-1]
        self._gradients = list(gradients)[::-1]

    @property
    def is_done(self) -> bool:
        """Whether all that was to arrive has arrived."""
        return not self._activations and not self._gradients

    def _communicate(
        self,
        *,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        **unused: object,
    ) -> tuple[Tensor | None, Tensor | None, None]:
        """Send and receive together, and wait; returns (activations from the previous stage, gradients from the next, None)."""
        activation = self._buffer(self._activations) if recv_prev else None
        gradient = self._buffer(self._gradients) if recv_next else None
        forward = self._operations(tensor_send_next, self.next_rank, activation, self.prev_rank, self._groups.pp)
        back = self._operations(tensor_send_prev, self.prev_rank, gradient, self.next_rank, self._groups.pp_back)
        requests = [request for part in (forward, back) if part for request in dist.batch_isend_irecv(part)]
        for request in requests:
            request.wait()
        return activation, gradient, None

    def _buffer(self, shapes: list[Shape]) -> Tensor:
        return torch.empty(shapes.pop(), dtype=self.config.pipeline_dtype, device=self._groups.device, requires_grad=True)

    @staticmethod
    def _operations(
        sent: Tensor | None, target: int, received: Tensor | None, source: int, group: dist.ProcessGroup
    ) -> list[dist.P2POp]:
        operations = [] if sent is None else [dist.P2POp(dist.isend, sent.contiguous(), target, group)]
        return operations if received is None else [*operations, dist.P2POp(dist.irecv, received, source, group)]


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
