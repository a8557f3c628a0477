"""What passes between the stages, and between the tensor-parallel ranks, of one copy of a model."""

from __future__ import annotations

from collections import deque
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


class StageMessages:
    """What travels between the stages of a copy while it generates; nobody waits for a send.

    Activations and what goes with them travel in one group from each stage to the next, and in another what the last stage tells the
    first: with two stages they would else meet. On NCCL two ranks then had one queue for both ways, and a send ends when it is received:
    the second group's activations would wait for ids to be taken that stand behind them.
    """

    MOST_UNDER_WAY = 8
    """Sends per stage that are not waited for: a bound on the memory that they hold."""

    def __init__(self, groups: ModelGroups) -> None:
        self._groups = groups
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()

    def send(self, values: Tensor, target: int) -> None:
        """Hand `values` to the stage `target`, the next one or from the last the first."""
        values = values.contiguous()
        work = dist.isend(values, dst=self._rank(target), group=self._group(target == 0))
        self._sent.append((work, values))
        while len(self._sent) > self.MOST_UNDER_WAY * self._groups.layout.pp:
            self._sent.popleft()[0].wait()

    def receive(self, shape: Shape, dtype: torch.dtype, source: int) -> Tensor:
        """What the stage before, or on the first stage the last one, has sent."""
        values = torch.empty(shape, dtype=dtype, device=self._groups.device)
        dist.recv(values, src=self._rank(source), group=self._group(self._groups.is_first_stage))
        return values

    def finish(self) -> None:
        """Wait until all that was sent has arrived."""
        while self._sent:
            self._sent.popleft()[0].wait()

    def _rank(self, stage: int) -> int:
        place = self._groups.coordinates
        return self._groups.layout.rank(tp=place.tp, dp=place.dp, pp=stage)

    def _group(self, to_first: bool) -> dist.ProcessGroup:
        return self._groups.pp_back if to_first else self._groups.pp


def gather_over_tensor_parallel(values: Tensor, tp: dist.ProcessGroup | None) -> Tensor:
    """[...] of each tensor-parallel rank -> [tp, ...] on all of them."""
    if tp is None or tp.size() == 1:
        return values.unsqueeze(0)
    gathered = torch.empty(tp.size(), *values.shape, dtype=values.dtype, device=values.device)
    dist.all_gather(list(gathered.unbind()), values.contiguous(), group=tp)
    return gathered
