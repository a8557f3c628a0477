"""Rewards per token: the reward model's score at the end, a KL penalty on the way (Ouyang et al. 2022, equation 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megarlhf.algorithms.kl import ESTIMATORS, Estimator
from megarlhf.algorithms.masked import standardize


def last_response_position(response_mask: Tensor) -> Tensor:
    """[batch] int64: the last True position of each row of [batch, seq - 1]; every row must have one."""
    assert bool(response_mask.any(dim=1).all()), "every row needs a response token"
    positions = torch.arange(response_mask.shape[1], device=response_mask.device)
    return torch.where(response_mask, positions, -1).max(dim=1).values


def kl_shaped_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, *, kl_coef: float, estimator: Estimator = "k1"
) -> Tensor:
    """R_t = -kl_coef * KL_t, plus the score on the last response token (Stiennon et al. 2020, section 3.4).

    KL_t is log pi - log pi_ref by the paper's estimator k1; see `megarlhf.algorithms.kl` for the others.

    Args:
        scores: [batch] of the reward model.
        logprobs, ref_logprobs: [batch, seq - 1] of the acting policy and the reference; no gradient flows through them.
        response_mask: [batch, seq - 1] bool.

    Returns: [batch, seq - 1] float32, 0 outside the responses. Every row must have a response token.
    """
    rewards = torch.where(response_mask, -kl_coef * ESTIMATORS[estimator](logprobs, ref_logprobs), 0.0).detach()
    return rewards.scatter_add(1, last_response_position(response_mask).unsqueeze(1), scores.detach().float().unsqueeze(1))


def penalize_unfinished(scores: Tensor, finished: Tensor, *, penalty: float | None) -> Tensor:
    """Scores [batch] with those of responses that never ended replaced by a fixed penalty (Ziegler et al. 2019); None: unchanged."""
    return scores if penalty is None else torch.where(finished, scores, penalty)


def weighted_rewards(rewards: Sequence[Tensor], weights: Sequence[float], *, normalize: bool) -> Tensor:
    """[batch]: sum of weight * reward over several rewards [batch]; with `normalize` each at mean 0 and variance 1 over the batch first."""
    if normalize:
        rewards = [standardize(reward, torch.ones_like(reward, dtype=torch.bool)) for reward in rewards]
    return torch.stack([weight * reward for weight, reward in zip(weights, rewards, strict=True)]).sum(dim=0)
