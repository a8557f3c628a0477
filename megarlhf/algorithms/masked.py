"""Statistics over the positions that a mask keeps."""

from __future__ import annotations

import torch
from torch import Tensor

Stats = dict[str, tuple[Tensor, Tensor]]
"""Name -> (sum, count), detached scalars: what adds up over micro-batches and ranks."""


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x where mask is True, whatever stands elsewhere; both [...]."""
    return torch.where(mask, x, 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask is True; 0 where nothing is."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def one_over_length(mask: Tensor) -> Tensor:
    """[batch, 1] float32: one over the True positions of each row of [batch, seq]; 1 for a row without any."""
    return 1 / mask.sum(dim=1, keepdim=True).clamp(min=1).float()


def masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    """Biased variance of x where mask is True."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def standardize(x: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """x to mean 0 and (biased) variance 1 over the True positions, 0 elsewhere (Ziegler et al. 2019's whitening).

    In float64: the float32 mean of equal numbers is not that number, and what is left over would pass for their deviation.
    """
    exact = x.double()
    return torch.where(mask, (exact - masked_mean(exact, mask)) * torch.rsqrt(masked_variance(exact, mask) + eps), 0.0).to(x.dtype)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the True positions: 1 is a perfect critic, 0 a constant one.

    Where the returns do not vary at all there is nothing to explain and the answer is 0.
    """
    # compared exactly: the variance of equal numbers, with their rounded mean, need not be 0
    vary = torch.where(mask, returns, -torch.inf).max() > torch.where(mask, returns, torch.inf).min()
    unexplained = masked_variance(returns.double() - values.double(), mask)
    return torch.where(vary, 1 - unexplained / masked_variance(returns.double(), mask), 0.0)
