"""Log-probabilities and entropy over a vocabulary that is split along tensor-parallel ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

ENTROPY_ROWS = 256
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
    """log softmax(logits)[target] with three reductions of [...] over tp: max, sum of exp, target's logit; and the entropy, if wanted."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, first_id: int, tp: dist.ProcessGroup | None, entropy_too: bool):
        shifted, log_total = _shifted(logits, tp)
        local = targets - first_id
        here = (local >= 0) & (local < logits.shape[-1])
        index = torch.where(here, local, 0).unsqueeze(-1)
        target = torch.where(here, shifted.gather(-1, index).squeeze(-1), 0.0)
        if tp is not None:
            dist.all_reduce(target, group=tp)
        shifted.sub_(log_total.unsqueeze(-1))
        entropy = _exponentiate(shifted, tp) if entropy_too else torch.zeros(0, device=shifted.device)
        if not entropy_too:
            shifted.exp_()
        ctx.save_for_backward(shifted, index, here)
        ctx.mark_non_differentiable(entropy)
        return target - log_total, entropy

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor):
        probabilities, index, here = ctx.saved_tensors
        grad_logits = probabilities * (-grad).unsqueeze(-1)
        grad_logits.scatter_add_(-1, index, torch.where(here, grad, 0.0).unsqueeze(-1))
        return grad_logits, None, None, None, None


def _exponentiate(logprobs: Tensor, tp: dist.ProcessGroup | None) -> Tensor:
    """Turn log-probabilities [..., shard] into probabilities in place; returns their entropy [...].

    A few rows at a time: their products need no second buffer of the size of the logits.
    """
    entropy = torch.empty(logprobs.shape[:-1], device=logprobs.device)
    rows = logprobs.view(-1, logprobs.shape[-1])
    for part, target in zip(rows.split(ENTROPY_ROWS), entropy.view(-1).split(ENTROPY_ROWS), strict=True):
        probabilities = part.exp()
        target.copy_((probabilities * part).sum(dim=-1).neg_())  # 0 for a padded id: its log-probability is finite
        part.copy_(probabilities)
    if tp is not None:
        dist.all_reduce(entropy, group=tp)
    return entropy


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
    return _logprobs(logits, targets, vocab_size, tp, temperature, entropy_too=False)[0]


def vocab_parallel_logprobs_and_entropy(
    logits: Tensor, targets: Tensor, *, vocab_size: int, tp: dist.ProcessGroup | None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`vocab_parallel_logprobs`, bit for bit, and from the same pass the entropy in nats [...] float32, which has no gradient."""
    return _logprobs(logits, targets, vocab_size, tp, temperature, entropy_too=True)


def _logprobs(
    logits: Tensor, targets: Tensor, vocab_size: int, tp: dist.ProcessGroup | None, temperature: float, *, entropy_too: bool
) -> tuple[Tensor, Tensor]:
    tp = _peers(tp)
    first = first_vocab_id(logits.shape[-1], tp)
    scaled = logits.float() if temperature == 1.0 else logits.float() / temperature
    masked = mask_padded_vocab(scaled, vocab_size=vocab_size, first_id=first)
    return _VocabParallelLogprobs.apply(masked, targets, first, tp, entropy_too)
