"""Estimators of KL(pi || pi_ref) from samples of pi (Schulman 2020), and the adaptive coefficient of Ziegler et al. 2019."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log pi - log pi_ref: unbiased, high variance, can be negative; any shape."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log pi - log pi_ref)^2 / 2: biased, never negative, and as a loss its gradient is the KL's."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(x) - 1 - x with x = log pi_ref - log pi: unbiased and never negative."""
    x = ref_logprobs - logprobs
    return x.expm1() - x  # exp(x) - 1 would lose a small x, and go below it


ESTIMATORS: dict[Estimator, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def adapted_kl_coef(kl_coef: float, *, kl_per_episode: float, target: float, horizon: int, num_episodes: int) -> float:
    """kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * num_episodes / horizon) (Ziegler et al. 2019, section 2.2 and code).

    kl_per_episode: nats summed over a response, averaged over the iteration's episodes, before its update.
    """
    error = min(max(kl_per_episode / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_episodes / horizon)
