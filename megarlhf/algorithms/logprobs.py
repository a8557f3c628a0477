"""Log-probabilities of responses; those of tokens are models/vocab_head.py's."""

from __future__ import annotations

import torch
from torch import Tensor


def response_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:
    """[batch] float64: the log-probability of each row's True positions together; both [batch, seq - 1].

    In float64 the sum depends neither on the padding nor on the order of additions.
    """
    return torch.where(mask, logprobs, 0.0).sum(dim=1, dtype=torch.float64)
