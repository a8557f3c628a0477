"""Dense log-probabilities and entropies; under tensor parallelism see parallel/vocab.py."""

from __future__ import annotations

import torch
from torch import Tensor


def logprobs_from_logits(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) of the tokens that came next.

    Args: logits [batch, seq, vocab]; tokens [batch, seq].
    Returns: [batch, seq - 1] float32; position t is about tokens[:, t + 1].
    """
    logprobs = (logits[:, :-1].float() / temperature).log_softmax(dim=-1)
    return logprobs.gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)


def entropy_from_logits(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature): [batch, seq, vocab] -> [batch, seq - 1] float32.

    A logit of -inf excludes its id.
    """
    logprobs = (logits[:, :-1].float() / temperature).log_softmax(dim=-1)
    logprobs = logprobs.clamp(min=torch.finfo(torch.float32).min)  # 0 * -inf would be nan
    return -(logprobs.exp() * logprobs).sum(dim=-1)


def response_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:
    """[batch] float64: the log-probability of each row's True positions together; both [batch, seq - 1].

    In float64 the sum depends neither on the padding nor on the order of additions.
    """
    return torch.where(mask, logprobs, 0.0).sum(dim=1, dtype=torch.float64)
