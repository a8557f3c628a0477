"""The algorithms against slow float64 loops, torch's own losses, and invariances of padding, order and micro-batching."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from megarlhf.algorithms.advantages import advantages_without_values, gae, group_relative, leave_one_out
from megarlhf.algorithms.dpo import dpo_loss
from megarlhf.algorithms.kl import k1, k2, k3
from megarlhf.algorithms.language_model import language_model_loss
from megarlhf.algorithms.masked import explained_variance, standardize
from megarlhf.algorithms.ppo import clipped_policy_loss, clipped_value_loss
from megarlhf.algorithms.ranking import count_prompts, ranking_loss
from megarlhf.algorithms.rewards import kl_shaped_rewards, weighted_rewards
from megarlhf.batch import Experience
from megarlhf.engine.terms import PolicyLoss

SEEDS = pytest.mark.parametrize("seed", range(4))
CLIP = 0.2


def batch(seed, *, rows=6, width=12, contiguous=False, dtype=torch.float32):
    """Four random [rows, width] tensors and a mask with a True in every row (one run of them where contiguous)."""
    generator = torch.Generator().manual_seed(seed)
    if contiguous:
        first = torch.randint(0, width // 2, (rows, 1), generator=generator)
        length = torch.randint(1, width // 2 + 1, (rows, 1), generator=generator)
        position = torch.arange(width)
        mask = (position >= first) & (position < first + length)
    else:
        mask = torch.rand(rows, width, generator=generator) < 0.6
        mask[:, width // 2] = True
    return *torch.randn(4, rows, width, generator=generator, dtype=dtype), mask


def rankings(seed, *, prompts=7):
    """(scores, ranks, prompt_index) of 2 to 9 completions per prompt, some tied, rows in random order; one prompt all tied."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, 10, (prompts,), generator=generator)
    prompt_index = torch.arange(prompts).mul(13).remainder(11).repeat_interleave(sizes)
    ranks = torch.randint(1, 6, (len(prompt_index),), generator=generator)
    ranks[prompt_index == prompt_index[0]] = 2
    order = torch.randperm(len(ranks), generator=generator)
    return torch.randn(len(ranks), generator=generator), ranks[order], prompt_index[order]


def slow_gae(rewards, values, mask, gamma, lam):
    """One episode at a time: A_t as the sum of its definition, over the unmasked steps only."""
    advantages = torch.zeros(mask.shape, dtype=torch.float64)
    for row in range(len(mask)):
        steps = [t for t in range(mask.shape[1]) if mask[row, t]]
        r, v = [float(rewards[row, t]) for t in steps], [float(values[row, t]) for t in steps] + [0.0]
        deltas = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(steps))]
        for i, t in enumerate(steps):
            advantages[row, t] = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[i:]))
    return advantages


@SEEDS
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.9), (1.0, 1.0), (1.0, 0.0)])
def test_gae_is_its_definition(seed, gamma, lam):
    rewards, values, _, _, mask = batch(seed)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    expected = slow_gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages.double(), expected, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(returns.double(), torch.where(mask, expected + values, 0), atol=2e-6, rtol=2e-6)


@SEEDS
def test_undiscounted_returns_with_lambda_1_are_the_rewards_to_come(seed):
    rewards, values, _, _, mask = batch(seed, contiguous=True)
    _, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_come = torch.where(mask, rewards, 0).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, torch.where(mask, to_come, 0), atol=5e-6, rtol=1e-5)


@SEEDS
def test_shaped_rewards_are_their_definition(seed):
    logprobs, ref_logprobs, scores, _, mask = batch(seed)
    rewards = kl_shaped_rewards(scores[:, 0], logprobs, ref_logprobs, mask, kl_coef=0.02)
    for row, t in itertools.product(range(mask.shape[0]), range(mask.shape[1])):
        expected = 0.0
        if mask[row, t]:
            is_last = not mask[row, t + 1 :].any()
            expected = -0.02 * float(logprobs[row, t] - ref_logprobs[row, t]) + is_last * float(scores[row, 0])
        assert float(rewards[row, t]) == pytest.approx(expected, abs=1e-6)


@SEEDS
def test_language_model_loss_is_cross_entropy_with_ignored_targets(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 7, 19, generator=generator).requires_grad_()
    tokens = torch.randint(19, (3, 7), generator=generator)
    mask = torch.rand(3, 6, generator=generator) < 0.5
    logprobs = logits[:, :-1].log_softmax(dim=-1).gather(-1, tokens[:, 1:, None])[..., 0]
    ours, stats = language_model_loss(logprobs, mask)
    targets = torch.where(mask, tokens[:, 1:], -100)
    theirs = F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, logits)[0], torch.autograd.grad(theirs, logits)[0])
    assert [float(x) for x in stats["nll"]] == pytest.approx([ours.item(), int(mask.sum())])


def slow_policy_loss(logprobs, old_logprobs, advantages, mask):
    losses, clipped, kls, ratios = [], 0, [], []
    for row, t in mask.nonzero().tolist():
        log_ratio = float(logprobs[row, t]) - float(old_logprobs[row, t])
        ratio, advantage = math.exp(log_ratio), float(advantages[row, t])
        objective = min(ratio * advantage, min(max(ratio, 1 - CLIP), 1 + CLIP) * advantage)
        losses.append(-objective)
        clipped += objective < ratio * advantage
        kls.append(ratio - 1 - log_ratio)
        ratios.append(ratio)
    return sum(losses), {"clip_fraction": clipped, "approx_kl": sum(kls), "ratio": sum(ratios)}


def slow_value_loss(values, old_values, returns, mask, clip):
    losses, clipped, errors = [], 0, []
    for row, t in mask.nonzero().tolist():
        value, old, target = (float(x[row, t]) for x in (values, old_values, returns))
        error = (value - target) ** 2
        moved = error if clip is None else (min(max(value, old - clip), old + clip) - target) ** 2
        losses.append(0.5 * max(error, moved))
        clipped += moved > error + 1e-12
        errors.append(error)
    totals = {"clip_fraction": clipped, "error": sum(errors), "returns": float(returns[mask].sum()), "values": float(values[mask].sum())}
    return sum(losses), totals


def assert_totals(stats, expected, count):
    assert {name: float(total) for name, (total, _) in stats.items()} == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert all(int(n) == count for _, n in stats.values())


@SEEDS
def test_ppo_losses_are_their_definitions(seed):
    new, old, advantages, returns, mask = batch(seed)
    new = old + 0.4 * new
    loss, stats = clipped_policy_loss(new, old, advantages, mask, clip=CLIP)
    expected, totals = slow_policy_loss(new, old, advantages, mask)
    assert float(loss) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert 0 < totals["clip_fraction"] < mask.sum()
    assert_totals(stats, totals, int(mask.sum()))
    for clip in (CLIP, None):
        loss, stats = clipped_value_loss(new, old, returns, mask, clip=clip)
        expected, totals = slow_value_loss(new, old, returns, mask, clip)
        assert float(loss) == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert_totals(stats, totals, int(mask.sum()))


@SEEDS
def test_ppo_gradients_are_finite_differences(seed):
    new, old, advantages, returns, mask = batch(seed, rows=2, width=5, dtype=torch.float64)
    new = (old + 0.4 * new).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: clipped_policy_loss(x, old, advantages, mask, clip=CLIP)[0], new)
    for clip in (CLIP, None):
        assert torch.autograd.gradcheck(lambda x, clip=clip: clipped_value_loss(x, old, returns, mask, clip=clip)[0], new)


def slow_ranking_loss(scores, ranks, prompt_index):
    """Every comparison scored by itself: two completions, one logsigmoid; then the mean of each prompt's."""
    total, right, gaps = torch.zeros((), dtype=torch.float64), 0, []
    for prompt in sorted(set(prompt_index.tolist())):
        rows = [i for i in range(len(ranks)) if prompt_index[i] == prompt]
        pairs = [(w, l) for w in rows for l in rows if ranks[w] < ranks[l]]  # noqa: E741
        for winner, loser in pairs:
            gap = scores[winner] - scores[loser]
            total = total - F.logsigmoid(gap) / len(pairs)
            right += gap.item() > 0
            gaps.append(gap.item())
    return total, {"accuracy": right, "score_gap": sum(gaps)}, len(gaps)


@SEEDS
def test_one_forward_per_completion_equals_one_per_comparison(seed):
    scores, ranks, prompt_index = rankings(seed)
    ours, theirs = scores.requires_grad_(), scores.detach().double().requires_grad_()
    loss, stats = ranking_loss(ours, ranks, prompt_index)
    expected, totals, pairs = slow_ranking_loss(theirs, ranks, prompt_index)
    torch.testing.assert_close(loss.double(), expected)
    assert_totals(stats, totals, pairs)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-6, rtol=1e-5)


@SEEDS
def test_ranking_loss_ignores_shifts_order_and_names_of_prompts(seed):
    scores, ranks, prompt_index = rankings(seed)
    loss, _ = ranking_loss(scores, ranks, prompt_index)
    order = torch.randperm(len(ranks), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(ranking_loss(scores[order], ranks[order], prompt_index[order])[0], loss)
    per_prompt = torch.randn(11, generator=torch.Generator().manual_seed(seed))[prompt_index]
    torch.testing.assert_close(ranking_loss(scores + per_prompt, 10 * ranks, 1000 - prompt_index)[0], loss, atol=1e-5, rtol=1e-5)


@SEEDS
def test_prompts_of_micro_batches_add_up(seed):
    scores, ranks, prompt_index = rankings(seed)
    whole, stats = ranking_loss(scores, ranks, prompt_index)
    first = prompt_index < 5
    parts = [ranking_loss(scores[half], ranks[half], prompt_index[half]) for half in (first, ~first)]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    counts = [count_prompts(ranks[half], prompt_index[half]) for half in (first, ~first)]
    compared = sum(len(ranks[prompt_index == prompt].unique()) > 1 for prompt in range(11))
    assert sum(counts) == count_prompts(ranks, prompt_index) == compared
    for name, pair in stats.items():
        for i, number in enumerate(pair):
            assert float(parts[0][1][name][i] + parts[1][1][name][i]) == pytest.approx(float(number), abs=1e-4)


def token_losses(new, old, advantages, returns, mask):
    """Every token-wise loss of a batch, by name: (sum, stats)."""
    return {
        "policy": clipped_policy_loss(new, old, advantages, mask, clip=CLIP),
        "value": clipped_value_loss(new, old, returns, mask, clip=CLIP),
        "language": language_model_loss(new, mask),
    }


def flat(losses):
    """Each loss with its statistics, as one vector."""
    return {
        name: torch.stack([loss.double(), *(number.double() for pair in stats.values() for number in pair)])
        for name, (loss, stats) in losses.items()
    }


@SEEDS
def test_rows_of_micro_batches_add_up(seed):
    tensors = batch(seed, rows=8)
    whole = flat(token_losses(*tensors))
    for size in (1, 3, 4):
        parts = [flat(token_losses(*(x[i : i + size] for x in tensors))) for i in range(0, 8, size)]
        for name, expected in whole.items():
            torch.testing.assert_close(sum(part[name] for part in parts), expected, atol=1e-5, rtol=1e-5)


@SEEDS
def test_padding_and_order_of_rows_change_nothing(seed):
    *floats, mask = batch(seed, contiguous=True)
    order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))
    others = [*(F.pad(x[order], (0, 5), value=math.nan) for x in floats), F.pad(mask[order], (0, 5), value=False)]
    rewards = kl_shaped_rewards(floats[0][:, 0], floats[0], floats[1], mask, kl_coef=0.02)
    other_rewards = kl_shaped_rewards(others[0][:, 0], others[0], others[1], others[-1], kl_coef=0.02)
    assert torch.equal(other_rewards[:, :-5], rewards[order])
    for padded, plain in zip(
        gae(other_rewards, others[2], others[-1], gamma=1.0, lam=0.95), gae(rewards, floats[2], mask, gamma=1.0, lam=0.95), strict=True
    ):
        assert torch.equal(padded[:, :-5], plain[order]) and not padded[:, -5:].any()
    torch.testing.assert_close(standardize(others[0], others[-1])[:, :-5], standardize(floats[0], mask)[order])
    torch.testing.assert_close(explained_variance(others[0], others[1], others[-1]), explained_variance(floats[0], floats[1], mask))
    for name, expected in flat(token_losses(*floats, mask)).items():
        torch.testing.assert_close(flat(token_losses(*others))[name], expected, atol=1e-5, rtol=1e-5)


def test_kl_estimators_average_to_the_kl():
    """k1 and k3 over all outcomes, weighed by pi, are the KL exactly; k2's gradient over samples of pi is the KL's."""
    logits, ref_logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits.requires_grad_()
    logprobs, ref_logprobs = logits.log_softmax(0), ref_logits.log_softmax(0)
    kl = F.kl_div(ref_logprobs, logprobs, log_target=True, reduction="sum")
    for estimator in (k1, k3):
        torch.testing.assert_close((logprobs.exp() * estimator(logprobs, ref_logprobs)).sum(), kl)
    sampled = (logprobs.exp().detach() * k2(logprobs, ref_logprobs)).sum()
    torch.testing.assert_close(torch.autograd.grad(sampled, logits, retain_graph=True)[0], torch.autograd.grad(kl, logits)[0])


# Policy gradients without a value function


def groups_of_rewards(seed, *, rows=6, width=12):
    """Rewards [rows, width] whose first two rows, a group, have one return, and a mask."""
    rewards, _, _, _, mask = batch(seed, rows=rows, width=width)
    rewards = torch.where(mask, rewards, 0.0)
    rewards[0] = 0.0
    rewards[0, mask[0].nonzero()[0]] = rewards[1].sum()
    return rewards, mask


def slow_advantages(estimator, rewards, mask, *, gamma, group_size, divide_by_std):
    """Row by row and token by token, in Python's float64."""
    whole = [sum(float(x) for x in row[kept]) for row, kept in zip(rewards, mask, strict=True)]
    expected = torch.zeros(mask.shape, dtype=torch.float64)
    for row, t in mask.nonzero().tolist():
        group = whole[row - row % group_size :][:group_size]
        mean = sum(group) / group_size
        if estimator == "grpo":
            std = math.sqrt(sum((x - mean) ** 2 for x in group) / (group_size - 1))
            expected[row, t] = (whole[row] - mean) / (std + 1e-4 if divide_by_std else 1.0)
        elif estimator == "rloo":
            expected[row, t] = whole[row] - (sum(group) - whole[row]) / (group_size - 1)
        else:
            later = [float(rewards[row, s]) for s in range(t, mask.shape[1]) if mask[row, s]]
            expected[row, t] = sum(gamma**k * reward for k, reward in enumerate(later))
    return expected


@SEEDS
@pytest.mark.parametrize("group_size", [2, 3])
@pytest.mark.parametrize(("estimator", "divide"), [("grpo", True), ("grpo", False), ("rloo", True), ("reinforce_pp", True)])
def test_advantages_without_values_are_their_definitions(seed, estimator, divide, group_size):
    rewards, mask = groups_of_rewards(seed)
    how = {"gamma": 0.9, "group_size": group_size, "divide_by_std": divide}
    ours = advantages_without_values(estimator, rewards, mask, **how)
    atol = 1e-3 if divide else 1e-6  # the rounding of a float32 sum, over the epsilon of a group that ties
    torch.testing.assert_close(ours.double(), slow_advantages(estimator, rewards, mask, **how), atol=atol, rtol=1e-5)
    assert not ours[~mask].any()


def test_a_group_that_ties_teaches_nothing():
    for divide in (True, False):
        advantages = group_relative(torch.tensor([0.1, 0.1, 0.1, 1.0, 0.0, 0.2]), group_size=3, divide_by_std=divide)
        assert not advantages[:3].abs().gt(1e-9).any() and advantages[3:].abs().gt(0.1).any()
    assert not leave_one_out(torch.full((3,), 0.1), group_size=3).abs().gt(1e-9).any()


def slow_grpo_loss(logprobs, old, ref, advantages, mask, *, clip, clip_high, kl_coef, estimator, normalization, max_len):
    """The objective in float64, one response after the other, each token by itself."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(mask)):
        of_row = torch.zeros((), dtype=torch.float64)
        for t in mask[row].nonzero()[:, 0].tolist():
            ratio, advantage = (logprobs[row, t] - old[row, t]).exp(), advantages[row, t]
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip_high) * advantage)
            x = logprobs[row, t] - ref[row, t]
            kl = {"k1": x, "k2": x * x / 2, "k3": (-x).exp() - 1 + x}[estimator]
            of_row = of_row - surrogate + kl_coef * kl
        total = total + (of_row / mask[row].sum() if normalization == "sequence" else of_row)
    return total / {"token": int(mask.sum()), "sequence": len(mask), "constant": len(mask) * max_len}[normalization]


@SEEDS
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("normalization", ["token", "sequence", "constant"])
def test_the_policy_loss_and_its_gradient_are_their_definitions(seed, estimator, normalization):
    new, old, ref, advantages, mask = batch(seed)
    new, ref = old + 0.4 * new, old + 0.3 * ref
    how = {"clip": 0.2, "clip_high": 0.35, "kl_coef": 0.1, "normalization": normalization, "max_len": 17}
    rows = Experience(
        tokens=torch.zeros(len(mask), mask.shape[1] + 1, dtype=torch.int64), lengths=torch.full((len(mask),), mask.shape[1] + 1),
        response_mask=mask, old_logprobs=old, ref_logprobs=ref, advantages=advantages,
    )  # fmt: skip
    term = PolicyLoss(kl_estimator=estimator, **how)
    ours, theirs = new.clone().requires_grad_(), new.double().requires_grad_()
    loss = term(torch.stack([ours, torch.zeros_like(ours)]), rows)[0] / term.count(rows)
    expected = slow_grpo_loss(theirs, old.double(), ref.double(), advantages.double(), mask, estimator=estimator, **how)
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-5)
    grads = [torch.autograd.grad(of, x)[0].double() for of, x in ((loss, ours), (expected, theirs))]
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-5)


def test_micro_batches_of_every_normalization_add_up():
    new, old, ref, advantages, mask = batch(0, rows=8)
    rows = Experience(
        tokens=torch.zeros(8, 13, dtype=torch.int64), lengths=torch.full((8,), 13), response_mask=mask, old_logprobs=old, ref_logprobs=ref,
        advantages=advantages,
    )  # fmt: skip
    for normalization in ("token", "sequence", "constant"):
        term = PolicyLoss(clip=0.2, kl_coef=0.1, normalization=normalization, max_len=20)
        parts = [torch.arange(0, 3), torch.arange(3, 4), torch.arange(4, 8)]
        whole = term(torch.stack([new, new]), rows)[0]
        torch.testing.assert_close(sum(term(torch.stack([new[i], new[i]]), rows.rows(i))[0] for i in parts), whole)
        assert sum(term.count(rows.rows(i)) for i in parts) == term.count(rows)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_kl_in_the_reward_is_that_of_its_estimator(estimator):
    logprobs, ref_logprobs, scores, _, mask = batch(1)
    rewards = kl_shaped_rewards(scores[:, 0], logprobs, ref_logprobs, mask, kl_coef=0.3, estimator=estimator)
    for row in range(len(mask)):
        x = [float(logprobs[row, t] - ref_logprobs[row, t]) for t in mask[row].nonzero()[:, 0].tolist()]
        kl = sum({"k1": v, "k2": v * v / 2, "k3": math.exp(-v) - 1 + v}[estimator] for v in x)
        assert float(rewards[row].sum()) == pytest.approx(float(scores[row, 0]) - 0.3 * kl, rel=1e-4, abs=1e-5)


# Direct preference optimisation


def slow_dpo_loss(logprobs, ref_logprobs, lengths, ranks, prompt_index, kind, beta, smoothing):
    """Every comparison by itself in float64, then the mean of each prompt's, then the sum over prompts."""
    total, right, margins = torch.zeros((), dtype=torch.float64), 0, []
    for prompt in sorted(set(prompt_index.tolist())):
        rows = [i for i in range(len(ranks)) if prompt_index[i] == prompt]
        pairs = [(w, l) for w in rows for l in rows if ranks[w] < ranks[l]]  # noqa: E741
        for winner, loser in pairs:
            gains = [logprobs[i] - ref_logprobs[i] for i in (winner, loser)]
            if kind == "ipo":
                margin = gains[0] / int(lengths[winner]) - gains[1] / int(lengths[loser])
                loss = (margin - 1 / (2 * beta)) ** 2
            else:
                margin = gains[0] - gains[1]
                right_way = 1 / (1 + (-beta * margin).exp())
                loss = -(1 - smoothing) * right_way.log() - smoothing * (1 - right_way).log()
            total = total + loss / len(pairs)
            right += margin.item() > 0
            margins.append(beta * margin.item())
    return total, right, margins


@SEEDS
@pytest.mark.parametrize(("kind", "beta", "smoothing"), [("sigmoid", 0.1, 0.0), ("sigmoid", 0.5, 0.2), ("ipo", 0.1, 0.0)])
def test_dpo_and_its_gradient_are_their_definitions(seed, kind, beta, smoothing):
    scores, ranks, prompt_index = rankings(seed)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 20, ranks.shape, generator=generator)
    ref_logprobs = -20 + torch.randn(len(ranks), generator=generator)
    ours, theirs = (-20 + 2 * scores).requires_grad_(), (-20 + 2 * scores).double().requires_grad_()
    how = {"kind": kind, "beta": beta, "label_smoothing": smoothing}
    loss, stats = dpo_loss(ours, ref_logprobs, lengths, ranks, prompt_index, **how)
    expected, right, margins = slow_dpo_loss(theirs, ref_logprobs.double(), lengths, ranks, prompt_index, kind, beta, smoothing)
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad(of, x)[0].double() for of, x in ((loss, ours), (expected, theirs))]
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-5)
    assert int(stats["accuracy"][0]) == right and all(int(count) == len(margins) for _, count in stats.values())
    assert float(stats["margin"][0]) == pytest.approx(sum(margins), rel=1e-4, abs=1e-4)
    assert float(stats["reward_chosen"][0] - stats["reward_rejected"][0]) == pytest.approx(sum(margins), rel=1e-4, abs=1e-4)


def test_dpo_of_a_model_that_is_its_reference_is_ln_2():
    scores, ranks, prompt_index = rankings(0)
    loss, stats = dpo_loss(scores, scores, torch.ones_like(ranks), ranks, prompt_index, kind="sigmoid", beta=0.1, label_smoothing=0.3)
    assert float(loss) == pytest.approx(math.log(2) * count_prompts(ranks, prompt_index))
    assert float(stats["margin"][0]) == 0 and int(stats["accuracy"][0]) == 0


@SEEDS
@pytest.mark.parametrize("normalize", [False, True])
def test_several_rewards_add_up_by_their_weights(seed, normalize):
    one, other = torch.randn(2, 9, generator=torch.Generator().manual_seed(seed)) * 3 + 1
    expected = []
    for i in range(9):
        parts = [float(x[i]) for x in (one, other)]
        if normalize:
            moments = [(float(x.double().mean()), float(x.double().std(correction=0))) for x in (one, other)]
            parts = [(part - mean) / std for part, (mean, std) in zip(parts, moments, strict=True)]
        expected.append(0.5 * parts[0] - 2 * parts[1])
    assert weighted_rewards([one, other], [0.5, -2.0], normalize=normalize).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert torch.equal(weighted_rewards([one], [1.0], normalize=False), one)
