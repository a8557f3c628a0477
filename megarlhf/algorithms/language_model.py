"""Next-token prediction."""

from __future__ import annotations

from torch import Tensor

from megarlhf.algorithms.masked import Stats, masked_sum


def language_model_loss(logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Stats]:
    """-sum log p(next token) over the True positions; logprobs [batch, seq - 1], mask bool. Stats: "nll" per token."""
    loss = -masked_sum(logprobs, mask)
    return loss, {"nll": (loss.detach(), mask.sum())}
