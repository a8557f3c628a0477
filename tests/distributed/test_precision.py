"""Precision: what stays float32, what is exact whatever the precision, and what happens when numbers overflow."""

import dataclasses
import math
from unittest import mock

import pytest
import torch

from megarlhf.batch import Prompts
from megarlhf.engine.optimizer import AdamSettings
from megarlhf.engine.terms import PolicyLoss, Term, ValueLoss
from megarlhf.generation.generator import Generator
from megarlhf.models import linear, vocab_head
from megarlhf.parallel.groups import World
from tests.distributed.training import ADAM, LEARNING_RATE, build, experience, local_weights, outputs, terms_of, value_targets

SP = {"sequence_parallel": True}
MODEST = dataclasses.replace(ADAM, initial_loss_scale=1024.0)
"""A loss scale at which no gradient overflows in fp16."""
ROUNDING = {"fp32": 1e-5, "fp16": 0.1, "bf16": 0.5}
"""What a row's log-probabilities may differ by beside other rows."""


def check_first_minibatch(precision, axes):
    """Rows of many widths, scored all together and trained a few at a time."""
    world = World.connect()
    engine = build("gpt2", world.groups(world.layout(**axes)), micro_batch_size=3, precision=precision, adam=MODEST)
    whole = experience()
    minibatches = list(torch.randperm(whole.num_rows, generator=torch.Generator().manual_seed(3)).split(4))
    scored = engine.logprobs(whole, whole.response_mask, temperature=0.7, minibatches=minibatches)
    torch.testing.assert_close(scored, engine.logprobs(whole, whole.response_mask, temperature=0.7), rtol=0, atol=ROUNDING[precision])
    batch = dataclasses.replace(whole, old_logprobs=scored)
    for index in minibatches:  # none is moved: each sees the policy that was scored
        minibatch = batch.rows(index)
        result = engine.step([Term("policy", PolicyLoss(clip=0.2, temperature=0.7), minibatch)], learning_rate=0.0)
        count = int(minibatch.response_mask.sum())
        assert result.stats["policy/clip_fraction"] == (0.0, count)
        assert result.stats["policy/ratio"] == (count, count)
        assert result.stats["policy/approx_kl"] == (0.0, count)
        mean = minibatch.advantages[minibatch.response_mask].mean()
        assert result.losses["policy"] == pytest.approx(-float(mean), abs=1e-5)

    critic = build("value", engine.groups, micro_batch_size=3, precision=precision, adam=MODEST)
    batch = dataclasses.replace(value_targets(), old_values=critic.values(whole, whole.response_mask, minibatches=minibatches))
    result = critic.step([Term("value", ValueLoss(clip=1e-30), batch.rows(minibatches[0]))], learning_rate=0.0)
    assert result.stats["value/clip_fraction"][0] == 0  # no value has changed at all


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_first_minibatch_has_a_ratio_of_exactly_one_and_no_kl(ranks1, ranks2, ranks4, precision):
    ranks1.run(check_first_minibatch, precision, {})
    for axes in ({}, {"tp": 2}, {"pp": 2}, {"tp": 2, **SP}):
        ranks2.run(check_first_minibatch, precision, axes)
    ranks4.run(check_first_minibatch, precision, {"pp": 2, "virtual_pp": 2})


def check_float32_logits(precision, axes):
    """Logits are the product of the hidden states and the embedding as they stand in low precision, in float32."""
    world = World.connect()
    groups = world.groups(world.layout(**axes))
    for name in ("gpt2", "llama"):
        engine = build(name, groups, precision=precision)
        (model,) = engine.transformers
        generator = torch.Generator().manual_seed(world.rank * 0)
        hidden = (torch.randn(50, model.config.hidden_size, generator=generator) * 4).to(model.config.params_dtype)
        tied = model.share_embeddings_and_output_weights
        weight = model.embedding.word_embeddings.weight if tied else model.output_layer.weight
        logits = model.logits(hidden)
        exact = hidden.double() @ weight.detach().double().T
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits.double(), exact, rtol=1e-6, atol=1e-5)
        assert (logits - exact).abs().max() < 1e-3 * (exact - exact.to(weight.dtype).double()).abs().max()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_logits_are_float32_whatever_the_precision(ranks1, ranks2, precision):
    ranks1.run(check_float32_logits, precision, {})
    ranks2.run(check_float32_logits, precision, {"tp": 2})
    ranks2.run(check_float32_logits, precision, {"tp": 2, **SP})


def check_every_use_of_logits(precision):
    """Training, scoring and generation multiply hidden states and embedding by the same product, which is not rounded."""
    world = World.connect()
    engine = build("gpt2", world.groups(world.layout(tp=2)), precision=precision)
    seen, product = [], linear.float32_product
    (model,) = engine.transformers

    def noted(a, b):
        found = product(a, b)
        if b.shape[1] == model.vocab_size // 2:  # not the gradient of the hidden states
            seen.append(found.clone())
        return found

    batch = experience()
    with mock.patch.object(vocab_head, "float32_product", noted), mock.patch.object(linear, "float32_product", noted):
        engine.logprobs(batch, batch.response_mask)
        engine.step([Term("policy", PolicyLoss(clip=0.2), batch)], learning_rate=0.0)
        assert len(seen) > 3
        generator = Generator(engine.transformers, engine.groups, architecture=engine.spec.architecture, eos_id=0, pad_id=0)
        prompts = Prompts(tokens=batch.tokens[:, :4], lengths=torch.full_like(batch.lengths, 4), ids=torch.arange(batch.num_rows))
        generator.generate(prompts, max_new_tokens=3, seed=1, iteration=0)
    assert len(seen) > 5
    for found in seen:
        assert found.dtype == torch.float32
        rounded = found.to(model.config.params_dtype).float()
        assert (rounded != found)[found != 0].float().mean() > 0.9


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_scoring_and_generation_see_the_same_float32_logits(ranks2, precision):
    ranks2.run(check_every_use_of_logits, precision)


def check_low_precision(name, precision, axes):
    world = World.connect()
    adam = dataclasses.replace(ADAM, initial_loss_scale=1024.0)
    engine = build(name, world.groups(world.layout(**axes)), precision=precision, adam=adam)
    exact = build(name, world.groups(world.layout()))
    heads = {n: p.dtype for n, p in engine.parameters().items() if n.startswith("scalar_head")}
    assert set(heads.values()) <= {torch.float32}
    for low, full in zip(outputs(engine), outputs(exact), strict=True):
        torch.testing.assert_close(low, full, rtol=0.05, atol=0.1)
    results = [engine.step(terms_of(name), learning_rate=1e-3) for _ in range(6)]
    reference = exact.step(terms_of(name), learning_rate=1e-3)
    first, last = results[0], results[-1]
    assert first.losses == pytest.approx(reference.losses, rel=0.05, abs=0.05)
    assert first.grad_norm == pytest.approx(reference.grad_norm, rel=0.05)
    assert first.loss_scale == (1024.0 if precision == "fp16" else 1.0)
    objective = [sum(term.weight * r.losses[term.name] for term in terms_of(name)) for r in (first, last)]
    assert objective[1] < 0.97 * objective[0]
    assert not any(result.skipped for result in results)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains(ranks4, precision):
    ranks4.run(check_low_precision, "gpt2", precision, {"tp": 2})
    ranks4.run(check_low_precision, "reward", precision, {"tp": 2, "pp": 2, **SP})


def check_overflow():
    world = World.connect()
    engine = build("gpt2", world.groups(world.layout(tp=2)), precision="fp16", adam=AdamSettings(initial_loss_scale=2.0**30))
    before = local_weights(engine)
    scale, skipped = 2.0**30, 0
    while (result := engine.step(terms_of("gpt2"), learning_rate=LEARNING_RATE)).skipped:
        scale, skipped = scale / 2, skipped + 1
        assert result.loss_scale == scale
        assert all(torch.equal(value, before[name]) for name, value in local_weights(engine).items())
        assert engine.optimizer.updates == 0
    assert 1 < skipped < 25 and engine.steps == skipped + 1 and engine.optimizer.updates == 1
    assert math.isfinite(result.grad_norm)
    assert any(not torch.equal(value, before[name]) for name, value in local_weights(engine).items())


def test_an_overflow_is_skipped_and_halves_the_loss_scale(ranks4):
    ranks4.run(check_overflow)


def check_a_search_for_a_scale():
    """An overflow is part of a search while it halves the scale; at the floor it is not any more."""
    world = World.connect()
    groups = world.groups(world.layout(tp=2))
    engine = build("gpt2", groups, precision="fp16", adam=AdamSettings(initial_loss_scale=8.0, min_loss_scale=2.0))
    batch = experience()
    batch.advantages[batch.response_mask] = math.inf  # overflows whatever the scale
    hopeless = [Term("policy", PolicyLoss(clip=0.2), batch)]
    results = [engine.step(hopeless, learning_rate=LEARNING_RATE) for _ in range(4)]
    assert [result.loss_scale for result in results] == [4.0, 2.0, 2.0, 2.0]
    assert [result.searching_loss_scale for result in results] == [True, True, False, False]
    assert [result.consecutive_skips for result in results] == [1, 2, 3, 4]
    assert engine.optimizer.at_smallest_loss_scale and engine.optimizer.consecutive_skips == 4
    result = engine.step(terms_of("gpt2"), learning_rate=LEARNING_RATE)
    assert (result.skipped, result.consecutive_skips, result.searching_loss_scale) == (False, 0, False)
    for precision in ("fp32", "bf16"):
        engine = build("gpt2", groups, precision=precision)
        results = [engine.step(hopeless, learning_rate=LEARNING_RATE) for _ in range(2)]
        assert [(r.consecutive_skips, r.searching_loss_scale) for r in results] == [(1, False), (2, False)]
        assert not engine.optimizer.at_smallest_loss_scale


def test_skips_are_counted_and_told_from_the_search_for_a_loss_scale(ranks2):
    ranks2.run(check_a_search_for_a_scale)


def check_divergence(precision, rate, axes):
    """A run that diverges is noticed: its steps are skipped one after another, or its weights are not finite."""
    world = World.connect()
    engine = build("gpt2", world.groups(world.layout(**axes)), precision=precision, adam=MODEST)
    assert engine.weights_are_finite()
    results = [engine.step(terms_of("gpt2"), learning_rate=rate) for _ in range(20)]
    skipped = results[-1].consecutive_skips >= 3 and not results[-1].searching_loss_scale
    assert skipped or not engine.weights_are_finite(), results[-1]


@pytest.mark.parametrize(("precision", "rate"), [("fp32", 1e30), ("fp32", 1e38), ("bf16", 1e30), ("fp16", 1e4)])
def test_a_run_that_diverges_is_noticed(ranks2, precision, rate):
    ranks2.run(check_divergence, precision, rate, {"tp": 2})
    ranks2.run(check_divergence, precision, rate, {})


def check_finite_weights(spoil):
    world = World.connect()
    engine = build("gpt2", world.groups(world.layout(pp=2)), precision="bf16")
    engine.start_ema(0.9)
    assert engine.weights_are_finite()
    if world.rank == 1:  # one element on one rank, which every rank is told of
        held = {
            "weight": next(iter(engine.parameters().values())).data,
            "master": next(engine.optimizer.shards()).main.data,
            "average": next(iter(engine.ema.averages.values())),
        }[spoil]
        held.view(-1)[0] = math.nan if spoil == "average" else -math.inf
    assert not engine.weights_are_finite()


@pytest.mark.parametrize("spoil", ["weight", "master", "average"])
def test_weights_that_are_not_finite_are_seen_on_every_rank(ranks2, spoil):
    ranks2.run(check_finite_weights, spoil)


def check_not_finite(axes):
    world = World.connect()
    engine = build("gpt2", world.groups(world.layout(**axes)))
    before = local_weights(engine)
    batch = experience()
    batch.advantages[6, 3] = math.nan  # one row, which one copy computes
    assert batch.response_mask[6, 3]
    result = engine.step([Term("policy", PolicyLoss(clip=0.2), batch)], learning_rate=LEARNING_RATE)
    assert result.skipped and not math.isfinite(result.grad_norm)
    assert all(torch.equal(value, before[name]) for name, value in local_weights(engine).items())
    result = engine.step(terms_of("gpt2"), learning_rate=LEARNING_RATE)
    assert not result.skipped and math.isfinite(result.grad_norm)


def test_a_gradient_that_is_not_finite_is_skipped_on_every_rank(ranks4):
    ranks4.run(check_not_finite, {"tp": 2})
    ranks4.run(check_not_finite, {"pp": 2})
