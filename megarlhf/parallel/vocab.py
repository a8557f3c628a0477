"""Log-probabilities and entropy over a vocabulary that is split along tensor-parallel ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

NEVER = -1e30
"""The logit of a padded vocabulary id: its exp is exactly 0 in float32, and it stays finite in sums."""


def mask_padded_vocab(logits: Tensor, *, vocab_size: int, first_id: int) -> Tensor:
    """Logits with the padded vocabulary ids excluded, so that results do not depend on the padding.

    Args: logits [..., shard] for ids first_id .. first_id + shard - 1; vocab_size: ids that mean something.
    """
    real = max(0, min(logits.shape[-1], vocab_size - first_id))
    if real == logits.shape[-1]:
        return logits
    keep = torch.arange(logits.shape[-1], device=logits.device) < real
    return torch.where(keep, logits, NEVER)


class _VocabParallelLogprobs(torch.autograd.Function):
    """log softmax(logits)[target] with three reductions of [...] over tp: max, sum of exp, target's logit."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, first_id: int, tp: dist.ProcessGroup | None):
        shifted, log_total = _shifted(logits, tp)
        local = targets - first_id
        here = (local >= 0) & (local < logits.shape[-1])
        index = torch.where(here, local, 0).unsqueeze(-1)
        target = torch.where(here, shifted.gather(-1, index).squeeze(-1), 0.0)
        if tp is not None:
            dist.all_reduce(target, group=tp)
        shifted.sub_(log_total.unsqueeze(-1)).exp_()
        ctx.save_for_backward(shifted, index, here)
        return target - log_total

    @staticmethod
    def backward(ctx, grad: Tensor):
        probabilities, index, here = ctx.saved_tensors
        grad_logits = probabilities * (-grad).unsqueeze(-1)
        grad_logits.scatter_add_(-1, index, torch.where(here, grad, 0.0).unsqueeze(-1))
        return grad_logits, None, None, None


def _shifted(logits: Tensor, tp: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """(logits minus their maximum over the vocabulary [..., shard], log of the sum of their exp [...])."""
    top = logits.max(dim=-1).values
    if tp is not None:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=tp)
    shifted = logits - top.unsqueeze(-1)
    total = shifted.exp().sum(dim=-1)
    if tp is not None:
        dist.all_reduce(total, group=tp)
    return shifted, total.log()


def _peers(tp: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    return tp if tp is not None and tp.size() > 1 else None


def first_vocab_id(shard_size: int, tp: dist.ProcessGroup | None) -> int:
    """The first vocabulary id of this tensor-parallel rank's shard."""
    return 0 if tp is None else shard_size * tp.rank()


def vocab_parallel_logprobs(
    logits: Tensor, targets: Tensor, *, vocab_size: int, tp: dist.ProcessGroup | None, temperature: float = 1.0
) -> Tensor:
    """log pi(target) under softmax(logits / temperature), in float32, differentiable, equal on all tensor-parallel ranks.

    Args:
        logits: [..., padded_vocab / tp] any float type; left as it was.
        targets: [...] int64 vocabulary ids.
        vocab_size: ids at and above it are padding and have no probability.
        tp: the tensor-parallel group, None for one rank.

    Returns: [...] float32.
    """
    tp = _peers(tp)
    first = first_vocab_id(logits.shape[-1], tp)
    scaled = logits.float() if temperature == 1.0 else logits.float() / temperature
    masked = mask_padded_vocab(scaled, vocab_size=vocab_size, first_id=first)
    return _VocabParallelLogprobs.apply(masked, targets, first, tp)


@torch.no_grad()
def vocab_parallel_entropy(logits: Tensor, *, vocab_size: int, tp: dist.ProcessGroup | None, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature); shapes as `vocab_parallel_logprobs`, not differentiable."""
    tp = _peers(tp)
    first = first_vocab_id(logits.shape[-1], tp)
    shifted, log_total = _shifted(mask_padded_vocab(logits.float() / temperature, vocab_size=vocab_size, first_id=first), tp)
    logprobs = shifted - log_total.unsqueeze(-1)
    entropy = -torch.where(logprobs < NEVER / 2, 0.0, logprobs.exp() * logprobs).sum(dim=-1)
    if tp is not None:
        dist.all_reduce(entropy, group=tp)
    return entropy
