"""Proximal policy optimisation: clipped policy and value losses, as sums."""

from __future__ import annotations

import torch
from torch import Tensor

from megarlhf.algorithms.kl import k3
from megarlhf.algorithms.masked import Stats, masked_sum

MAX_LOG_RATIO = 20.0
"""Where the log of the probability ratio is clamped, so that its exp stays finite."""


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float,
    clip_high: float | None = None,
    weights: Tensor | float = 1.0,
) -> tuple[Tensor, Stats]:
    """-sum w min(rho A, clip(rho, 1 - clip, 1 + clip_high) A) (Schulman et al. 2017, equation 7; w is 1 there).

    clip_high is clip where it is None; a wider one leaves rare tokens more room to become likely (Yu et al. 2025, equation 10).

    Args: logprobs of the policy being trained, old_logprobs of the one that acted, advantages: [batch, seq - 1]; mask bool;
    weights of the positions, such as [batch, 1].
    Returns: (sum over the mask, {"clip_fraction" (positions whose clipped term is the smaller), "approx_kl" (k3 of old
    against new), "ratio"}).
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    loss = masked_sum(weights * torch.maximum(unclipped, clipped), mask)
    count = mask.sum()
    with torch.no_grad():
        outside = masked_sum((clipped > unclipped).float(), mask)
        stats = {
            "clip_fraction": (outside, count),
            "approx_kl": (masked_sum(k3(torch.zeros_like(log_ratio), log_ratio), mask), count),
            "ratio": (masked_sum(ratio, mask), count),
        }
    return loss, stats


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None) -> tuple[Tensor, Stats]:
    """sum 0.5 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) (Ziegler et al. 2019's code); None does not clip.

    Args: all [batch, seq - 1]; mask bool.
    Returns: (sum over the mask, {"clip_fraction" (positions whose clipped error is the larger), "error" (squared),
    "returns", "values"}).
    """
    error = torch.where(mask, values - returns, 0.0) ** 2
    worst = error
    if clip is not None:
        change = torch.where(mask, values - old_values, 0.0)
        clipped = torch.maximum(error, (old_values + change.clamp(-clip, clip) - returns) ** 2)
        worst = torch.where(change.abs() > clip, clipped, error)  # old + (new - old) may round away from new where nothing is clipped
    count = mask.sum()
    with torch.no_grad():
        stats = {
            "clip_fraction": (masked_sum((worst > error).float(), mask), count),
            "error": (masked_sum(error, mask), count),
            "returns": (masked_sum(returns, mask), count),
            "values": (masked_sum(values, mask), count),
        }
    return 0.5 * masked_sum(worst, mask), stats
