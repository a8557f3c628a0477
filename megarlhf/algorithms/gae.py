"""Generalised advantage estimation (Schulman et al. 2016)."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """A_t = sum_k (gamma lam)^k delta_{t+k}, delta_t = R_t + gamma V_{t+1} - V_t, over the True positions of each row.

    Masked positions are stepped over: the next True position is the next time step. The episode ends after the last
    one, so its V_{t+1} is 0.

    Args: rewards, values [batch, seq - 1] float32; mask [batch, seq - 1] bool.
    Returns: (advantages, returns = advantages + values), both [batch, seq - 1], 0 where masked.
    """
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        here = mask[:, t]
        advantages[:, t] = torch.where(here, advantage, 0.0)
        next_advantage = torch.where(here, advantage, next_advantage)
        next_value = torch.where(here, values[:, t], next_value)
    return advantages, torch.where(mask, advantages + values, 0.0)
