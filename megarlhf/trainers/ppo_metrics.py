"""What an iteration's episodes looked like, as metrics: see docs/metrics.md."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megarlhf.algorithms.kl import k1, k3
from megarlhf.algorithms.masked import explained_variance, masked_mean, masked_variance
from megarlhf.batch import Rollouts
from megarlhf.runs.agreement import RunError


def rollout_metrics(rollouts: Rollouts, *, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor) -> dict[str, float]:
    """Rewards, lengths, and the KL against the reference by both estimators, per response and per token.

    Args: scores [batch]; logprobs and ref_logprobs [batch, seq - 1] of the acting policy and the reference.
    """
    mask, count = rollouts.response_mask, rollouts.response_mask.sum()
    metrics = {}
    for suffix, estimator in (("", k1), ("_k3", k3)):
        kl = torch.where(mask, estimator(logprobs.double(), ref_logprobs.double()), 0.0)
        metrics[f"rollout/kl{suffix}"] = float(kl.sum(dim=1).mean())
        metrics[f"rollout/kl{suffix}_per_token"] = float(kl.sum() / count)
    gap = torch.where(mask, logprobs - rollouts.logprobs, 0.0).abs().double()
    lengths = (rollouts.lengths - rollouts.prompt_lengths).double()
    return metrics | {
        "rollout/reward_mean": float(scores.double().mean()),
        "rollout/reward_std": float(scores.double().std(correction=0)),
        "rollout/response_len": float(lengths.mean()),
        "rollout/finished_fraction": float(rollouts.finished.double().mean()),
        "rollout/generator_logprob_gap": float(gap.max()),
        "rollout/generator_logprob_gap_mean": float(gap.sum() / count),
    }


def require_same_policy(metrics: Mapping[str, float], *, most: float | None) -> None:
    """RunError where the mean gap of `rollout_metrics` is above `most`: what was sampled is not of the policy that would learn from it.

    Every rank holds all rollouts, so that it is raised on all. NaN is left to the update, which knows of it.
    """
    mean, largest = metrics["rollout/generator_logprob_gap_mean"], metrics["rollout/generator_logprob_gap"]
    if most is not None and mean > most:
        raise RunError(
            f"the generator's log-probabilities are {mean:.3g} nats from the trainer's in the mean over this iteration's tokens "
            f"({largest:.3g} at most), and generation.max_logprob_gap is {most:g}: these responses are not the policy's, and nothing was "
            "learned from them. In fp32 that is a fault to report; in bf16 and fp16 look at how far rounding goes, and raise the limit"
        )


def value_metrics(values: Tensor, returns: Tensor, mask: Tensor) -> dict[str, float]:
    """Mean and standard deviation of values and returns [batch, seq - 1] over the responses, before the update."""
    metrics = {"value/explained_variance": float(explained_variance(values, returns, mask))}
    for name, x in (("rollout/value", values.double()), ("rollout/return", returns.double())):
        metrics[f"{name}_mean"] = float(masked_mean(x, mask))
        metrics[f"{name}_std"] = float(masked_variance(x, mask).sqrt())
    return metrics


def group_metrics(scores: Tensor, *, group_size: int) -> dict[str, float]:
    """How the samples of one prompt differ: the mean standard deviation of their scores, and the share of groups that all tie."""
    groups = scores.double().view(-1, group_size)
    tied = (groups == groups[:, :1]).all(dim=1)
    return {"rollout/group_std": float(groups.std(dim=1).mean()), "rollout/tied_groups": float(tied.double().mean())}
