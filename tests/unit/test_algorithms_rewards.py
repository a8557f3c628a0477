"""Rewards, advantages and losses: hand-computed cases and exact invariances."""

import math

import pytest
import torch

from megarlhf.algorithms.advantages import gae
from megarlhf.algorithms.language_model import language_model_loss
from megarlhf.algorithms.ppo import clipped_policy_loss, clipped_value_loss
from megarlhf.algorithms.ranking import completions_by_prompt, count_prompts, ranking_loss
from megarlhf.algorithms.rewards import kl_shaped_rewards, last_response_position, penalize_unfinished

T, F = True, False


def means(stats):
    return {name: float(total / count) for name, (total, count) in stats.items()}


def test_the_score_sits_on_the_last_response_token():
    mask = torch.tensor([[F, T, T, F], [T, T, T, T], [F, F, T, F]])
    assert last_response_position(mask).tolist() == [2, 3, 2]
    logprobs = torch.where(mask, -1.0, math.nan)
    ref_logprobs = torch.where(mask, -1.5, -math.inf)
    rewards = kl_shaped_rewards(torch.tensor([1.0, 2.0, 3.0]), logprobs, ref_logprobs, mask, kl_coef=0.5)
    torch.testing.assert_close(rewards, torch.tensor([[0, -0.25, 0.75, 0], [-0.25, -0.25, -0.25, 1.75], [0, 0, 2.75, 0]]))


def test_rewards_of_an_episode_sum_to_score_minus_kl():
    generator = torch.Generator().manual_seed(0)
    logprobs, ref_logprobs = torch.randn(2, 6, 9, generator=generator)
    mask = torch.rand(6, 9, generator=generator) < 0.7
    scores = torch.randn(6, generator=generator)
    rewards = kl_shaped_rewards(scores, logprobs, ref_logprobs, mask, kl_coef=0.02)
    kl = torch.where(mask, logprobs - ref_logprobs, 0).sum(dim=1)
    torch.testing.assert_close(rewards.sum(dim=1), scores - 0.02 * kl)


def test_rewards_carry_no_gradient():
    mask = torch.ones(1, 2, dtype=torch.bool)
    scores, logprobs, ref_logprobs = torch.ones(1).requires_grad_(), torch.ones(1, 2).requires_grad_(), torch.ones(1, 2).requires_grad_()
    assert not kl_shaped_rewards(scores, logprobs, ref_logprobs, mask, kl_coef=0.1).requires_grad


def test_a_row_without_a_response_is_refused():
    with pytest.raises(AssertionError, match="response token"):
        last_response_position(torch.tensor([[T, F], [F, F]]))


def test_unfinished_responses_get_the_penalty():
    scores = torch.tensor([5.0, math.nan, -3.0])
    finished = torch.tensor([T, F, F])
    assert penalize_unfinished(scores, finished, penalty=-1.0).tolist() == [5.0, -1.0, -1.0]
    assert penalize_unfinished(scores, finished, penalty=None) is scores


def test_gae_by_hand():
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, 1.5]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=0.5)
    # deltas 1 + 1 - 0.5 = 1.5, 0 + 1.5 - 1 = 0.5, 2 + 0 - 1.5 = 0.5; backwards 0.5, 0.5 + 0.25, 1.5 + 0.375
    torch.testing.assert_close(advantages, torch.tensor([[1.875, 0.75, 0.5]]))
    torch.testing.assert_close(returns, torch.tensor([[2.375, 1.75, 2.0]]))
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.9, lam=0.5)
    # deltas 1 + 0.9 - 0.5 = 1.4, 1.35 - 1 = 0.35, 0.5; backwards 0.5, 0.35 + 0.45 * 0.5, 1.4 + 0.45 * 0.575
    torch.testing.assert_close(advantages, torch.tensor([[1.65875, 0.575, 0.5]]))


def test_gae_steps_over_masked_positions():
    nan = math.nan
    mask = torch.tensor([[F, T, F, F, T, T, F]])
    rewards = torch.tensor([[nan, 1.0, nan, nan, 0.0, 2.0, nan]])
    values = torch.tensor([[nan, 0.5, nan, nan, 1.0, 1.5, nan]])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[0, 1.875, 0, 0, 0.75, 0.5, 0]]))
    torch.testing.assert_close(returns, torch.tensor([[0, 2.375, 0, 0, 1.75, 2.0, 0]]))


@pytest.fixture
def episodes():
    """(logprobs, advantages, values, mask) of 5 rows, nan outside the mask."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(5, 8, generator=generator) < 0.6
    logprobs, advantages, values = (torch.where(mask, x, math.nan) for x in torch.randn(3, 5, 8, generator=generator))
    return logprobs - 3, advantages, values, mask


def test_the_first_minibatch_has_ratio_1_and_kl_0(episodes):
    logprobs, advantages, values, mask = episodes
    new = logprobs.clone().requires_grad_()
    loss, stats = clipped_policy_loss(new, logprobs, advantages, mask, clip=0.2)
    assert means(stats) == {"clip_fraction": 0.0, "approx_kl": 0.0, "ratio": 1.0}
    torch.testing.assert_close(loss, -advantages[mask].sum())
    loss.backward()  # the policy gradient: -A grad log pi, and nothing outside the mask
    assert torch.equal(new.grad, torch.where(mask, -advantages, 0.0))

    _, stats = clipped_value_loss(values, values, advantages, mask, clip=0.2)
    assert means(stats)["clip_fraction"] == 0.0


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped"),
    [
        (1.1, 2.0, -2.2, -2.2, 0),
        (1.5, 2.0, -2.4, 0.0, 1),  # has already gained what it may
        (1.5, -2.0, 3.0, 3.0, 0),  # got worse: the full gradient back
        (0.5, 2.0, -1.0, -1.0, 0),
        (0.5, -2.0, 1.6, 0.0, 1),
    ],
)
def test_policy_clipping_by_hand(ratio, advantage, loss, slope, clipped):
    logprobs = torch.tensor([[math.log(ratio)]]).requires_grad_()
    total, stats = clipped_policy_loss(logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.tensor([[T]]), clip=0.2)
    total.backward()
    assert total.item() == pytest.approx(loss)
    assert logprobs.grad.item() == pytest.approx(slope)
    assert means(stats) == pytest.approx({"clip_fraction": clipped, "approx_kl": ratio - 1 - math.log(ratio), "ratio": ratio})


@pytest.mark.parametrize("log_ratio", [-1e4, 1e4])
def test_a_wild_ratio_stays_finite(log_ratio):
    logprobs = torch.tensor([[log_ratio]]).requires_grad_()
    loss, stats = clipped_policy_loss(logprobs, torch.zeros(1, 1), torch.tensor([[-1.0]]), torch.tensor([[T]]), clip=0.2)
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite().all()
    assert all(math.isfinite(mean) for mean in means(stats).values())
    assert means(stats)["ratio"] == pytest.approx(math.exp(math.copysign(20, log_ratio)))


@pytest.mark.parametrize(
    ("value", "returned", "clip", "loss", "slope", "clipped"),
    [
        (1.1, 3.0, 0.2, 0.5 * 1.9**2, -1.9, 0),
        (1.5, 3.0, 0.2, 0.5 * 1.8**2, 0.0, 1),  # moved enough towards the return
        (1.5, 3.0, None, 0.5 * 1.5**2, -1.5, 0),
        (0.5, 3.0, 0.2, 0.5 * 2.5**2, -2.5, 0),  # moved away: the full gradient back
    ],
)
def test_value_clipping_by_hand(value, returned, clip, loss, slope, clipped):
    values = torch.tensor([[value]]).requires_grad_()
    total, stats = clipped_value_loss(values, torch.ones(1, 1), torch.tensor([[returned]]), torch.tensor([[T]]), clip=clip)
    total.backward()
    assert total.item() == pytest.approx(loss)
    assert values.grad.item() == pytest.approx(slope)
    expected = {"clip_fraction": clipped, "error": (value - returned) ** 2, "returns": returned, "values": value}
    assert means(stats) == pytest.approx(expected)


@pytest.mark.parametrize("poisoned", [("new",), ("old",), ("target",), ("new", "old", "target")])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_gradients_and_statistics_stay_inside_the_mask(episodes, poisoned, poison):
    *tensors, mask = episodes
    clean = {name: torch.where(mask, x, 0.0) for name, x in zip(("old", "target", "new"), tensors, strict=True)}
    dirty = {name: torch.where(mask, x, poison) if name in poisoned else x for name, x in clean.items()}
    losses = {
        "policy": lambda new, old, target: clipped_policy_loss(new, old, target, mask, clip=0.2),
        "value": lambda new, old, target: clipped_value_loss(new, old, target, mask, clip=0.2),
        "unclipped value": lambda new, old, target: clipped_value_loss(new, old, target, mask, clip=None),
        "language": lambda new, old, target: language_model_loss(new, mask),
    }
    for name, loss in losses.items():
        results = []
        for inputs in (clean, dirty):
            new = inputs["new"].clone().requires_grad_()
            total, stats = loss(**(inputs | {"new": new}))
            total.backward()
            assert not any(number.requires_grad for pair in stats.values() for number in pair), name
            results.append((total.item(), new.grad.tolist(), means(stats)))
        assert results[0] == results[1], name
        assert not new.grad[~mask].any(), name


def test_rankings_of_a_zero_head_cost_ln_2_per_prompt():
    prompt_index = torch.tensor([7, 7, 7, 2, 2, 2, 2])
    ranks = torch.tensor([1, 2, 3, 2, 1, 2, 4])
    loss, stats = ranking_loss(torch.zeros(7), ranks, prompt_index)
    torch.testing.assert_close(loss / count_prompts(ranks, prompt_index), torch.tensor(math.log(2)))
    assert float(stats["accuracy"][1]) == 3 + 5  # one tie of the second prompt dropped
    assert means(stats)["score_gap"] == 0.0


def test_all_tied_prompts_neither_count_nor_cost():
    scores = torch.tensor([3.0, -1.0, 2.0, 5.0, 1.0]).requires_grad_()
    prompt_index = torch.tensor([0, 0, 0, 1, 1])
    loss, stats = ranking_loss(scores, torch.tensor([1, 1, 1, 1, 2]), prompt_index)
    loss.backward()
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(torch.tensor(4.0)))
    assert scores.grad[:3].tolist() == [0.0, 0.0, 0.0] and scores.grad[3] < 0 < scores.grad[4]
    ranks = torch.tensor([1, 1, 1, 1, 2])
    assert count_prompts(ranks, prompt_index) == 1 and count_prompts(ranks[:3], prompt_index[:3]) == 0
    assert means(stats) == {"accuracy": 1.0, "score_gap": 4.0}

    alone = scores.detach()[:3].requires_grad_()
    loss, stats = ranking_loss(alone, torch.ones(3, dtype=torch.int64), prompt_index[:3])
    loss.backward()
    assert loss == 0 and alone.grad.tolist() == [0.0, 0.0, 0.0] and float(stats["accuracy"][1]) == 0


def test_extreme_scores_keep_the_ranking_loss_finite():
    scores = torch.tensor([-1e30, 1e30, 0.0]).requires_grad_()
    loss, _ = ranking_loss(scores, torch.tensor([1, 2, 3]), torch.tensor([0, 0, 0]))
    loss.backward()
    assert loss.isfinite() and scores.grad.isfinite().all()


def test_completions_by_prompt():
    prompt_index = torch.tensor([5, 1, 5, 9, 1, 5])
    assert completions_by_prompt(prompt_index).tolist() == [[1, 4, -1], [0, 2, 5], [3, -1, -1]]
