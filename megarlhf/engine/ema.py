"""An exponential moving average of the weights, in float32, sharded as the optimizer's master weights are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from megarlhf.engine.offload import Offload
from megarlhf.engine.optimizer import Optimizer


class ExponentialMovingAverage:
    """average <- decay * average + (1 - decay) * weights, once per PPO iteration (Ouyang et al. 2022, Appendix C.4: 0.992).

    The paper does not say per what; once per iteration gives the average a horizon of a quarter of its 500 iterations.
    Kept in float32 beside the master weights (4 / dp bytes per parameter): bfloat16 would lose increments of 0.008.
    """

    def __init__(self, optimizer: Optimizer, *, decay: float, offload: Offload) -> None:
        """Args: offload: of the engine, whose weights and optimizer must be here."""
        self.optimizer = optimizer
        self.offload = offload
        self.decay = decay
        self.averages = {shard.parameter: shard.main.detach().clone() for shard in optimizer.shards()}
        """Parameter -> [n] float32, this rank's shard of its average."""

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights."""
        self.offload.need("weights", "optimizer", "average")
        for shard in self.optimizer.shards():
            self.averages[shard.parameter].lerp_(shard.main.detach(), 1.0 - self.decay)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within this context the model's weights are the average; the weights come back after it, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        self.offload.need("weights", "optimizer", "average")
        for shard in self.optimizer.shards():
            weights = shard.main.detach().clone()
            shard.main.data.copy_(self.averages[shard.parameter])
            self.averages[shard.parameter].copy_(weights)
        self.optimizer.publish_masters()
