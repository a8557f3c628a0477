"""Sampling from logits: the noise is noise, and the tokens are those of the distribution that was asked for."""

import itertools
import math
from unittest import mock

import pytest
import torch

from megarlhf.generation import sampling
from megarlhf.generation.sampling import FAMILY, GOLDEN, MIX, Sampling, gumbel_noise, noise_bits, noise_keys, sample_tokens

VOCAB, PADDED = 20, 32  # two families
ROWS = 40000
EULER = 0.5772156649015329
SETTINGS = [
    {},
    {"temperature": 0.6},
    {"top_k": 4},
    {"top_p": 0.7},
    {"temperature": 1.5, "top_k": 5, "top_p": 0.8},
]


def logits(rows, *, seed=0):
    """[rows, PADDED]; the padded ids would always win, were they not excluded."""
    drawn = 2 * torch.randn(rows, PADDED, generator=torch.Generator().manual_seed(seed))
    drawn[:, VOCAB:] = 50.0
    return drawn


def sample(values, *, samples=None, positions=None, seed=1, iteration=0, vocab_size=VOCAB, **settings):
    rows = torch.arange(len(values))
    return sample_tokens(
        values,
        Sampling(**settings),
        vocab_size=vocab_size,
        tp=None,
        seed=seed,
        iteration=iteration,
        samples=rows if samples is None else samples,
        positions=torch.zeros_like(rows) if positions is None else positions,
    )[0]


def naive_scores(row, *, temperature=1.0, top_k=None, top_p=None):
    """What can be sampled of one row and its logit / temperature, as {id: score}; without ties."""
    scores = sorted(((float(row[token]) / temperature, token) for token in range(VOCAB)), reverse=True)[:top_k]
    total = sum(math.exp(score) for score, _ in scores)
    kept, probability = {}, 0.0
    for score, token in scores:
        if probability < (top_p or 1.0):
            kept[token] = score
        probability += math.exp(score) / total
    return kept


def chi_square(counts, probabilities):
    """Pearson's statistic and a bound that one in about 30000 draws of the distribution exceeds (Wilson and Hilferty 1931)."""
    expected = probabilities * counts.sum()
    degrees = int((probabilities > 0).sum()) - 1
    assert counts[probabilities == 0].sum() == 0
    real = probabilities > 0
    statistic = float(((counts - expected)[real] ** 2 / expected[real]).sum())
    return statistic, degrees * (1 - 2 / (9 * degrees) + 4.0 * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("key", ["samples", "positions"])
def test_frequencies_are_the_distributions(key, settings):
    row = logits(1)
    numbers = torch.arange(ROWS)
    keys = {"samples": torch.full_like(numbers, 7), "positions": torch.full_like(numbers, 5), key: numbers}
    tokens = sample(row.expand(ROWS, -1), **keys, **settings)
    kept = naive_scores(row[0], **settings)
    weights = torch.tensor([math.exp(kept[token]) if token in kept else 0.0 for token in range(VOCAB)])
    statistic, bound = chi_square(torch.bincount(tokens, minlength=VOCAB).double(), (weights / weights.sum()).double())
    assert statistic < bound


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_token_is_the_best_of_its_family_and_that_the_best_of_all_with_their_noise(settings):
    values = logits(60)
    samples, positions = torch.arange(60) % 9, torch.arange(60) // 9
    tokens = sample(values, samples=samples, positions=positions, seed=3, iteration=2, **settings)
    keys = noise_keys(3, 2, samples, positions)
    noise, of_families = gumbel_noise(keys, torch.arange(PADDED)), gumbel_noise(keys, -1 - torch.arange(PADDED // FAMILY))
    families = set()
    for row in range(60):
        kept = naive_scores(values[row], **settings)
        whole = {}
        for token, score in kept.items():
            whole[token // FAMILY] = whole.get(token // FAMILY, 0.0) + math.exp(score)
        family = max(whole, key=lambda one: math.log(whole[one]) + float(of_families[row, one]))
        families.add(family)
        members = [token for token in kept if token // FAMILY == family]
        assert tokens[row] == max(members, key=lambda token: kept[token] + float(noise[row, token]))
    assert families == {0, 1}


def test_a_family_without_weight_beside_another_loses_in_silence():
    values = torch.full((50, PADDED), -1e4)
    values[::2, 3] = 1e4
    values[1::2, 17] = 1e4
    tokens, logprobs = sample_tokens(
        values, Sampling(), vocab_size=VOCAB, tp=None, seed=1, iteration=0, samples=torch.arange(50), positions=torch.arange(50)
    )
    assert tokens.tolist() == [3, 17] * 25 and not logprobs.any()


def test_limits_of_the_settings():
    values = logits(200)
    likeliest = values[:, :VOCAB].argmax(dim=-1)
    assert torch.equal(sample(values, temperature=0.0), likeliest)
    assert torch.equal(sample(values, top_k=1), likeliest)
    assert torch.equal(sample(values, top_p=1e-6), likeliest)
    free = sample(values)
    assert not torch.equal(free, likeliest)
    for off in ({"top_k": 0}, {"top_k": VOCAB}, {"top_k": 10 * PADDED}, {"top_p": 1.0}):
        assert torch.equal(sample(values, **off), free)
    assert Sampling(temperature=0.7).logprob_temperature == 0.7 and Sampling(temperature=0.0).logprob_temperature == 1.0


def test_equal_logits_go_to_the_smallest_id_and_stay_together_at_a_threshold():
    values = torch.zeros(500, PADDED)
    values[:, [2, 5, 9]] = 1.0
    assert sample(values, temperature=0.0).eq(2).all()
    assert set(sample(values, top_k=2).tolist()) == set(sample(values, top_p=0.05).tolist()) == {2, 5, 9}


def test_a_token_depends_on_its_own_keys_only():
    values = logits(64)
    samples, positions = torch.arange(64) + 100, torch.arange(64) % 7
    whole = sample(values, samples=samples, positions=positions)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:20]
    assert torch.equal(sample(values[order], samples=samples[order], positions=positions[order]), whole[order])
    wider = torch.cat([values, torch.full((64, 16), 60.0)], dim=1)
    assert torch.equal(sample(wider, samples=samples, positions=positions), whole)
    noise = gumbel_noise(noise_keys(1, 0, samples, positions), torch.arange(40))
    assert torch.equal(gumbel_noise(noise_keys(1, 0, samples[order], positions[order]), torch.arange(13, 29)), noise[order, 13:29])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_logprob_is_that_of_the_whole_vocabulary(settings):
    values, rows = logits(60), torch.arange(60)
    keys = {"vocab_size": VOCAB, "tp": None, "seed": 1, "iteration": 0, "samples": rows, "positions": rows}
    tokens, logprobs = sample_tokens(values, Sampling(**settings), **keys)
    expected = (values[:, :VOCAB].double() / settings.get("temperature", 1.0)).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert logprobs.dtype == torch.float32 and (logprobs - expected).abs().max() < 1e-5
    with mock.patch.object(sampling, "BLOCK", 3 * PADDED):  # a few rows at a time
        assert all(torch.equal(*pair) for pair in zip(sample_tokens(values, Sampling(**settings), **keys), (tokens, logprobs), strict=True))


def test_noise_is_standard_gumbel():
    keys, ids = noise_keys(1, 0, torch.arange(500), torch.arange(500) % 5), torch.arange(400)
    bits, noise = noise_bits(keys, ids).flatten(), gumbel_noise(keys, ids).flatten()
    n = noise.numel()
    exact = -(-((bits.double() + 0.5) * 2.0**-52).log()).log()
    assert noise.dtype == torch.float32 and noise.isfinite().all() and bits.unique().numel() == n
    large = exact > -1  # below, where a token hardly ever wins, the rest of 1 is held to 2**-24 only
    assert ((noise - exact).abs() / exact.abs().clamp(min=1))[large].max() < 1e-6
    noise = noise.double()
    assert abs(noise.mean() - EULER) < 4 * math.pi / math.sqrt(6 * n)
    variance = math.pi**2 / 6
    assert abs(noise.var() - variance) < 4 * variance * math.sqrt(4.4 / n)  # a Gumbel's kurtosis is 5.4
    uniform = (-(-noise).exp()).exp().sort().values
    assert (uniform - torch.arange(n) / n).abs().max() < 2.3 / math.sqrt(n)  # Kolmogorov and Smirnov, one in 20000


def uniform_along(key, n):
    """[n, 64] uniforms: along the rows `key` counts, along the columns another key, so that each column is one sequence."""
    counting, other = torch.arange(n), torch.arange(64)
    if key in ("seed", "iteration"):
        keys = [noise_keys(*((i, 3) if key == "seed" else (3, i)), torch.tensor([4]), torch.tensor([5])) for i in range(n)]
        noise = gumbel_noise(torch.cat(keys), other)
    elif key == "vocabulary":
        noise = gumbel_noise(noise_keys(3, 3, other, torch.full_like(other, 5)), counting).T
    else:
        fixed = torch.full_like(counting, 5)
        samples, positions = (counting, fixed) if key == "sample" else (fixed, counting)
        noise = gumbel_noise(noise_keys(3, 3, samples, positions), other)
    return (-(-noise).exp()).exp()


@pytest.mark.parametrize("lag", [1, 2, 16])
@pytest.mark.parametrize("key", ["seed", "iteration", "sample", "position", "vocabulary"])
def test_noise_is_independent_along_every_key(key, lag):
    uniform = uniform_along(key, 400)
    first, second = uniform[:-lag].flatten(), uniform[lag:].flatten()
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 4 / math.sqrt(first.numel())
    cells = torch.bincount((first * 8).long() * 8 + (second * 8).long(), minlength=64).double()
    statistic, bound = chi_square(cells, torch.full((64,), 1 / 64, dtype=torch.float64))
    assert statistic < bound


def splitmix(state):
    """The next number of splitmix64, an increment and two multiplications of 64 bits, as its authors write it."""
    state = (state + GOLDEN) % 2**64
    for shift, factor in MIX:
        state = (state ^ (state >> shift)) * factor % 2**64
    return state ^ (state >> 31)


def test_noise_is_splitmix64_of_one_key_after_the_other():
    """So that the same seed gives the same responses in every release; negative numbers are those of 64 bits."""
    for seed, iteration, sample, position in ((0, 0, 0, 0), (2**63 - 1, 2**40, 2**50, 2**20), (-(2**63), -1, -5, 7), (3, 1, 4, 159)):
        found = noise_bits(noise_keys(seed, iteration, torch.tensor([sample]), torch.tensor([position])), torch.tensor([-3, 0, 50256]))
        key = splitmix(splitmix(splitmix(splitmix(seed) ^ iteration % 2**64) ^ sample % 2**64) ^ position)
        assert found[0].tolist() == [splitmix(key + (vocab_id - 1) * GOLDEN) >> 12 for vocab_id in (-3, 0, 50256)]


def test_keys_do_not_stand_for_each_other():
    """Swapped or shifted keys give other noise: no sum or exclusive or of the keys decides it."""
    ids = torch.arange(8)
    keys = list(itertools.product(range(5), repeat=4))
    bits = [noise_bits(noise_keys(a, b, torch.tensor([c]), torch.tensor([d])), ids) for a, b, c, d in keys]
    assert torch.cat(bits).unique().numel() == len(keys) * len(ids)
    assert gumbel_noise(noise_keys(2**63 - 1, 2**40, torch.tensor([2**50]), torch.tensor([2**20])), ids).isfinite().all()
