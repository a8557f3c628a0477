"""How much better than expected an action was: with a value function, or against other samples of the same prompt."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["gae", "grpo", "rloo", "reinforce_pp"]
GROUP_STD_EPS = 1e-4
"""Added to a group's standard deviation, as TRL does: a group whose rewards are all equal teaches nothing."""


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """A_t = sum_k (gamma lam)^k delta_{t+k}, delta_t = R_t + gamma V_{t+1} - V_t (Schulman et al. 2016), over the True positions of a row.

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


def group_relative(returns: Tensor, *, group_size: int, divide_by_std: bool) -> Tensor:
    """Each return against its group's mean, over the group's standard deviation (GRPO: Shao et al. 2024, section 4.1.2).

    Without the division the groups of middling difficulty no longer weigh less than the others (Dr. GRPO: Liu et al. 2025).

    Args: returns [batch], the samples of a prompt beside each other, group_size of them.
    Returns: [batch] float32.
    """
    groups = returns.double().view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    if divide_by_std:
        centred = centred / (groups.std(dim=1, keepdim=True) + GROUP_STD_EPS)
    return centred.flatten().float()


def leave_one_out(returns: Tensor, *, group_size: int) -> Tensor:
    """Each return less the mean of its group's others (RLOO: Kool et al. 2019; Ahmadian et al. 2024, section 3.3).

    Args: see `group_relative`. Returns: [batch] float32.
    """
    groups = returns.double().view(-1, group_size)
    others = (groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten().float()


def advantages_without_values(
    estimator: Estimator, rewards: Tensor, mask: Tensor, *, gamma: float, group_size: int, divide_by_std: bool
) -> Tensor:
    """The advantages of an estimator that needs no value function.

    "grpo" and "rloo" give every token of a response the same, from the sum of its rewards; "reinforce_pp" gives each the
    discounted sum of the rewards to come (REINFORCE++: Hu 2025), which is `gae` with values of 0 and lambda 1.

    Args: rewards [batch, seq - 1] float32, mask [batch, seq - 1] bool; see `group_relative` for the order of rows.
    Returns: [batch, seq - 1] float32, 0 where masked.
    """
    if estimator == "reinforce_pp":
        return gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)[0]
    returns = torch.where(mask, rewards, 0.0).sum(dim=1)
    if estimator == "grpo":
        of_response = group_relative(returns, group_size=group_size, divide_by_std=divide_by_std)
    else:
        of_response = leave_one_out(returns, group_size=group_size)
    return torch.where(mask, of_response[:, None], 0.0)
