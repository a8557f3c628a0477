"""What the vocabulary's head says of chosen tokens, a chunk of positions at a time: the logits of all are never held.

Chunks are cut by the number of positions and the vocabulary alone, so that training and scoring multiply the same matrices and give
the same numbers, bit for bit. Of several chunks the backward pass multiplies the logits again, a fourth product beside three; what fits
one chunk is kept instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megarlhf.models.linear import add_float32_product, float32_product
from megarlhf.parallel.groups import ProcessGroup
from megarlhf.parallel.vocab import NEVER, SoftmaxParts, first_vocab_id

CHUNK_ELEMENTS = 2**26
"""Most logits at once: 256 MiB. A GPU then still multiplies far longer than it adds a chunk's gradient to the weight's."""


def head_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    tp: ProcessGroup,
    temperature: float = 1.0,
    entropy_too: bool = False,
) -> tuple[Tensor, Tensor]:
    """log pi(target) [n] float32 under softmax(hidden weight^T / temperature), differentiable, and the entropy in nats [n], which is not.

    Args:
        hidden: [n, h]; its gradient is this rank's part, to be summed over tp.
        weight: [padded_vocab / tp, h] of the same dtype.
        targets: [n] int64 vocabulary ids.
        vocab_size: ids at and above it are padding and have no probability.

    Returns: equal on all tensor-parallel ranks; the entropy is empty unless entropy_too.
    """
    return _HeadLogprobs.apply(hidden, weight, targets, vocab_size, tp if tp.size() > 1 else None, temperature, entropy_too)


class _HeadLogprobs(torch.autograd.Function):
    """The gradient of log softmax at a target is its one-hot minus the probabilities: all that is left of the logits."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab_size, tp, temperature, entropy_too):
        first = first_vocab_id(weight.shape[0], tp)
        ctx.real, ctx.rows, ctx.temperature = vocab_size - first, max(1, CHUNK_ELEMENTS // weight.shape[0]), temperature
        chunks = hidden.split(ctx.rows)
        found, exps = [], None
        for rows, wanted in zip(chunks, targets.split(ctx.rows), strict=True):
            del exps  # of the chunk before
            exps = _logits(rows, weight, ctx.real, temperature)
            found.append(SoftmaxParts.of(exps, wanted - first, entropy_too=entropy_too))  # exps are in place of the logits
        parts = SoftmaxParts.together(found)
        local_top = parts.top
        parts = parts.over(tp)
        if len(chunks) == 1:
            kept, scale = exps, (local_top - parts.top).exp() / parts.total
        else:
            kept, scale = None, 1 / parts.total
        ctx.save_for_backward(hidden, weight, targets - first, parts.top, scale, kept)
        entropy = parts.entropy() if entropy_too else torch.zeros(0, device=hidden.device)
        ctx.mark_non_differentiable(entropy)
        return parts.logprobs(), entropy

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor):
        hidden, weight, targets, top, scale, kept = ctx.saved_tensors
        grad = grad / ctx.temperature
        here = (targets >= 0) & (targets < weight.shape[0])
        index, at_target = torch.where(here, targets, 0).unsqueeze(1), torch.where(here, grad, 0.0).unsqueeze(1)
        shares = (-grad * scale).unsqueeze(1)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = None
        for start in range(0, max(1, len(hidden)), ctx.rows):
            chunk = slice(start, start + ctx.rows)
            if kept is None:
                grad_logits = _logits(hidden[chunk], weight, ctx.real, ctx.temperature)
                grad_logits.sub_(top[chunk].unsqueeze(1)).exp_().mul_(shares[chunk])
            else:
                grad_logits = kept * shares
            grad_logits.scatter_add_(1, index[chunk], at_target[chunk])
            if grad_hidden is not None:
                grad_hidden[chunk] = float32_product(grad_logits, weight)
            if ctx.needs_input_grad[1]:
                grad_weight = add_float32_product(grad_weight, grad_logits.t(), hidden[chunk])
            del grad_logits  # before the next chunk's are made
        return grad_hidden, grad_weight if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None, None


def _logits(rows: Tensor, weight: Tensor, real: int, temperature: float) -> Tensor:
    """[n, padded_vocab / tp] float32 of this rank's own, to be written over; the ids from `real` on are never drawn."""
    logits = float32_product(rows, weight.t())
    if temperature != 1.0:
        logits.div_(temperature)
    if real < weight.shape[0]:
        logits[:, max(0, real) :] = NEVER
    return logits
