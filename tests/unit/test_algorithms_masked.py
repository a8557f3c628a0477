"""Masked statistics, log-probabilities and KL estimators: exact cases and what stands outside the mask."""

import math

import pytest
import torch

from megarlhf.algorithms.kl import adapted_kl_coef, k1, k2, k3
from megarlhf.algorithms.masked import explained_variance, masked_mean, masked_sum, standardize

ROWS = torch.tensor([[1.0, 2.0, 3.0], [6.0, -1.0, 0.0]])
MASK = torch.tensor([[True, False, True], [True, True, False]])


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e38])
@pytest.mark.parametrize("function", [masked_sum, masked_mean, standardize])
def test_nothing_outside_the_mask_is_seen(function, poison):
    poisoned = torch.where(MASK, ROWS, poison)
    assert torch.equal(function(poisoned, MASK), function(ROWS, MASK))


def test_nothing_outside_the_mask_is_explained():
    poisoned = torch.where(MASK, ROWS, math.nan)
    assert explained_variance(poisoned, 2 * poisoned, MASK) == explained_variance(ROWS, 2 * ROWS, MASK)


def test_gradient_of_a_masked_sum_stays_inside_the_mask():
    x = torch.where(MASK, ROWS, math.nan).requires_grad_()
    masked_sum(x, MASK).backward()
    assert torch.equal(x.grad, MASK.float())


def test_an_empty_mask_gives_zeros():
    none = torch.zeros_like(MASK)
    for function in (masked_sum, masked_mean, standardize):
        assert not function(ROWS, none).any()
    assert explained_variance(ROWS, ROWS, none) == 0


def test_standardize():
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 3 + 7
    mask = torch.rand(5, 40, generator=torch.Generator().manual_seed(1)) < 0.6
    scaled = standardize(x, mask)
    torch.testing.assert_close(scaled[mask].mean(), torch.tensor(0.0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(scaled[mask].var(correction=0), torch.tensor(1.0))
    assert not scaled[~mask].any()
    assert torch.equal(scaled[mask].argsort(), x[mask].argsort())


def test_what_does_not_vary_is_standardized_to_zero():
    assert not standardize(torch.full((2, 3), 2.0), MASK).any()
    for constant in (0.1, -3.7, 1000.1, 12345.678, 1e30):
        for count in (1, 3, 7, 100, 509):  # whose mean is not the constant in float32
            assert standardize(torch.full((count,), constant), torch.ones(count, dtype=torch.bool)).abs().max() < 1e-3


def test_explained_variance():
    returns = torch.tensor([[1.0, 9.0, 3.0], [5.0, 7.0, 9.0]])
    assert explained_variance(returns + 5, returns, MASK) == 1
    assert explained_variance(torch.full_like(returns, 4.0), returns, MASK) == 0
    assert explained_variance(-returns, returns, MASK) == 1 - 4
    for constant in (0.1, 0.3, -1.0):  # 0.3: its mean over 7 in floating point is not 0.3
        assert explained_variance(torch.randn(1, 7), torch.full((1, 7), constant), torch.ones(1, 7, dtype=torch.bool)) == 0


def test_kl_of_equal_policies_is_zero():
    logprobs = -torch.rand(3, 5) * 10
    for estimator in (k1, k2, k3):
        assert torch.equal(estimator(logprobs, logprobs.clone()), torch.zeros(3, 5))


@pytest.mark.parametrize("estimator", [k2, k3])
def test_k2_and_k3_are_never_negative(estimator):
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-7, 1e-5, 1e-3, 1e-1, 1.0, 10.0):  # the small ones are where exp(x) - 1 - x loses its digits
        x = torch.randn(10_000, generator=generator) * scale
        assert (estimator(x, torch.zeros_like(x)) >= 0).all()
        assert (estimator(torch.zeros_like(x), x) >= 0).all()


def test_adapted_kl_coef():
    step = {"target": 6.0, "horizon": 10_000, "num_episodes": 512}
    assert adapted_kl_coef(0.15, kl_per_episode=6.0, **step) == 0.15
    assert adapted_kl_coef(0.15, kl_per_episode=6.6, **step) == pytest.approx(0.15 * (1 + 0.1 * 0.0512))
    for far in (8.0, 600.0):
        assert adapted_kl_coef(0.15, kl_per_episode=far, **step) == pytest.approx(0.15 * (1 + 0.2 * 0.0512))
    for far in (0.0, -3.0):  # k1 can be negative
        assert adapted_kl_coef(0.15, kl_per_episode=far, **step) == pytest.approx(0.15 * (1 - 0.2 * 0.0512))
