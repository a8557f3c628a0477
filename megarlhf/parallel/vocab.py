"""Log-probabilities and entropy over a vocabulary that is split along tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

NEVER = -1e30
"""The logit of a padded vocabulary id: its exp is exactly 0 in float32, and it stays finite in sums."""


def first_vocab_id(shard_size: int, tp: dist.ProcessGroup | None) -> int:
    """The first vocabulary id of this tensor-parallel rank's shard."""
    return 0 if tp is None else shard_size * tp.rank()


@dataclass(frozen=True)
class SoftmaxParts:
    """All that is needed of each row's logits, over the ids of one rank or of all: numbers that combine. Each [n] float32."""

    top: Tensor
    """The largest logit."""
    total: Tensor
    """Sum of exp(logit - top)."""
    target: Tensor
    """The target's logit; 0 where another rank has it."""
    weighted: Tensor | None
    """Sum of exp(logit - top) (logit - top), for the entropy; None where that is not wanted."""

    @staticmethod
    def of(logits: Tensor, targets: Tensor, *, entropy_too: bool) -> SoftmaxParts:
        """Of logits [n, shard] float32, which become exp(logit - top) in place; targets [n] are counted from the shard's first id."""
        top = logits.max(dim=1).values
        here = (targets >= 0) & (targets < logits.shape[1])
        target = torch.where(here, logits.gather(1, torch.where(here, targets, 0).unsqueeze(1)).squeeze(1), 0.0)
        logits.sub_(top.unsqueeze(1))
        if not entropy_too:
            return SoftmaxParts(top, logits.exp_().sum(dim=1), target, None)
        shifted = logits.clone()
        total = logits.exp_().sum(dim=1)
        return SoftmaxParts(top, total, target, shifted.mul_(logits).sum(dim=1))

    @staticmethod
    def together(parts: Sequence[SoftmaxParts]) -> SoftmaxParts:
        """Of all rows, from those of their chunks."""
        if len(parts) == 1:
            return parts[0]
        columns = [[getattr(part, field.name) for part in parts] for field in fields(SoftmaxParts)]
        return SoftmaxParts(*(None if column[0] is None else torch.cat(column) for column in columns))

    def over(self, tp: dist.ProcessGroup | None) -> SoftmaxParts:
        """Of the whole vocabulary, on every rank of `tp`: two reductions, of n and of 3 n numbers.

        The order in which ranks are added may depend on a number's place in the message: so its form is the same without entropy.
        """
        if tp is None:
            return self
        top = self.top.clone()
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=tp)
        lower, scale = self.top - top, (self.top - top).exp()
        total = self.total * scale
        weighted = torch.zeros_like(top) if self.weighted is None else scale * (self.weighted + lower * self.total)
        sums = torch.stack([total, self.target, weighted])
        dist.all_reduce(sums, group=tp)
        return SoftmaxParts(top, sums[0], sums[1], None if self.weighted is None else sums[2])

    def logprobs(self) -> Tensor:
        """log softmax at the target [n]."""
        return self.target - self.top - self.total.log()

    def entropy(self) -> Tensor:
        """In nats [n]: log of the total minus the mean of what stands in it."""
        return self.total.log() - self.weighted / self.total
