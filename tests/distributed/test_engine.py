"""The engine: whatever the layout, the micro-batches and the recomputation, the same outputs, losses, gradients and weights."""

import dataclasses
import itertools

import pytest
import torch

from megarlhf.batch import TextBatch
from megarlhf.engine.frozen import FrozenEngine
from megarlhf.engine.terms import LanguageModelLoss, PolicyLoss, RankingLoss, Term
from megarlhf.parallel.groups import World
from megarlhf.parallel.layout import ParallelLayout
from tests.distributed.training import (
    ADAM,
    LEARNING_RATE,
    SPECS,
    VOCAB,
    assembled,
    build,
    dense_objective,
    dense_outputs,
    experience,
    fill,
    local_weights,
    outputs,
    rankings,
    terms_of,
    texts,
)

STEPS = 2
SP = {"sequence_parallel": True}
EVERY_LAYOUT = [
    *({}, {"tp": 2}, {"tp": 4}, {"pp": 2}, {"pp": 4}, {"tp": 2, "pp": 2}),
    *({"tp": 2, **SP}, {"tp": 4, **SP}, {"tp": 2, "pp": 2, **SP}),
]
CASES = {
    "gpt2": [({"recompute": "selective"}, EVERY_LAYOUT), ({"recompute": "full", "micro_batch_size": 3}, [{"tp": 2, "pp": 2, **SP}])],
    "deep": [  # ten layers in eight chunks
        ({}, [{"pp": 4, "virtual_pp": 2}, {"pp": 2, "virtual_pp": 4}, {"tp": 2, "pp": 2, "virtual_pp": 2, **SP}]),
        ({"recompute": "full", "micro_batch_size": 1}, [{"pp": 2, "virtual_pp": 2}]),
    ],
    "llama": [({}, [{"tp": 4}, {"pp": 4}, {"tp": 2, "pp": 2, **SP}])],
    "qwen3": [({}, [{"tp": 2}, {"tp": 4}, {"tp": 4, **SP}, {"pp": 4}, {"tp": 2, "pp": 2, **SP}]), ({"recompute": "full"}, [{"tp": 4}])],
    "qwen2": [({}, [{"tp": 2}, {"tp": 4}, {"pp": 4}, {"tp": 2, "pp": 2, **SP}]), ({"recompute": "selective"}, [{"tp": 4}])],
    "neox": [({}, [{"tp": 4, **SP}, {"pp": 4}, {"tp": 2, "pp": 2}]), ({"recompute": "full"}, [{"tp": 2, "pp": 2, **SP}])],
    "qwen3-reward": [({}, [{"tp": 4}, {"pp": 4}, {"tp": 2, "pp": 2, **SP}])],
    "value": [({}, [{}, {"tp": 4}, {"pp": 4}, {"tp": 2, "pp": 2, **SP}])],
}
"""Model -> how it is run, and in which layouts over four ranks."""


def trained(name, groups, **how):
    """What `STEPS` steps of an engine gave."""
    engine = build(name, groups, **how)
    before = outputs(engine)
    results = [engine.step(terms_of(name), learning_rate=LEARNING_RATE) for _ in range(STEPS)]
    return before, results, local_weights(engine)


def check_layouts(name, layouts, how):
    world = World.connect()
    return [trained(name, world.groups(world.layout(**axes)), **how) for axes in layouts]


def check_dense(name):
    """The same in plain torch: rows one by one, the objective written out, torch's AdamW."""
    world = World.connect()
    engine = FrozenEngine(SPECS[name], world.groups(world.layout()), micro_batch_size=1)
    fill(engine)
    (model,) = engine.transformers
    parameters = list(model.requires_grad_(True).parameters())
    decayed = [p for p in parameters if p.dim() > 1]
    groups = [{"params": decayed}, {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=ADAM.betas, eps=ADAM.eps, weight_decay=ADAM.weight_decay)
    with torch.no_grad():
        batch = experience()
        if SPECS[name].head == "lm":
            before = [torch.where(batch.response_mask, dense_outputs(model, batch, head="lm"), 0.0)]
        else:
            values, scores = dense_outputs(model, batch, head="scalar")
            before = [torch.where(batch.response_mask, values, 0.0), scores, dense_outputs(model, rankings(), head="scalar")[1]]
    results = []
    for _ in range(STEPS):
        adam.zero_grad()
        losses, objective = dense_objective(model, name)
        objective.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, ADAM.clip_grad)
        adam.step()
        results.append(({term: float(loss.detach()) for term, loss in losses.items()}, float(norm)))
    return before, results, {n: p.detach() for n, p in model.named_parameters()}


def assert_agree(name, layout, ranks, reference, stats):
    before, results, weights = reference
    for rank_before, rank_results, _ in ranks:
        for mine, theirs in zip(rank_before, before, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        for mine, (losses, norm) in zip(rank_results, results, strict=True):
            assert mine.losses == pytest.approx(losses, rel=1e-5, abs=1e-7)  # a policy's is a mean of terms of about 1 that cancel
            assert mine.grad_norm == pytest.approx(norm, rel=1e-5) and not mine.skipped
        assert rank_results[0].grad_norm == pytest.approx(results[0][1], rel=2e-6)
        assert rank_results == ranks[0][1]  # the same on every rank, bit for bit
        for mine, theirs in zip(rank_results, stats, strict=True):
            assert mine.stats.keys() == theirs.stats.keys()
            for statistic, (total, count) in mine.stats.items():
                assert count == theirs.stats[statistic][1]
                assert total == pytest.approx(theirs.stats[statistic][0], rel=1e-4, abs=1e-3), statistic
    whole = assembled([shards for *_, shards in ranks], name, layout)
    for parameter, value in whole.items():
        torch.testing.assert_close(value, weights[parameter], rtol=1e-5, atol=2e-6, msg=lambda m, p=parameter: f"{layout} {p}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_every_layout_agrees_with_plain_torch(name, ranks1, ranks2, ranks4):
    (reference,) = ranks1.run(check_dense, name)
    single = [ranks1.run(check_layouts, name, [{}], {"micro_batch_size": size})[0][0] for size in (100, 4, 1)]
    stats = single[0][1]
    for one in single:
        assert_agree(name, ParallelLayout(), [one], reference, stats)
    cases = [(ranks4, how, layouts) for how, layouts in CASES[name]]
    if name == "gpt2":
        cases.append((ranks2, {}, [{}, {"tp": 2}, {"pp": 2}]))
    if name == "deep":
        cases.append((ranks2, {"micro_batch_size": 2}, [{"pp": 2, "virtual_pp": 2}, {"pp": 2, "virtual_pp": 4}]))
    for ranks, how, layouts in cases:
        by_rank = ranks.run(check_layouts, name, layouts, how)
        for number, axes in enumerate(layouts):
            layout = ParallelLayout.over(ranks.world_size, **{"tp": 1, "pp": 1, **axes})
            assert_agree(name, layout, [results[number] for results in by_rank], reference, stats)


def check_micro_batches_hold_whole_prompts():
    world = World.connect()
    engine = build("reward", world.groups(world.layout(tp=2)), micro_batch_size=2)
    seen = []
    loss = RankingLoss()

    class Watched(RankingLoss):
        def __call__(self, output, batch):
            seen.append(sorted(batch.prompt_index.unique().tolist()))
            return loss(output, batch)

    engine.step([Term("ranking", Watched(), rankings())], learning_rate=1e-3)
    return seen


def test_a_prompts_comparisons_are_one_batch_element(ranks4):
    by_rank = ranks4.run(check_micro_batches_hold_whole_prompts)
    assert by_rank[0] == by_rank[1] and by_rank[2] == by_rank[3]
    assert sorted(itertools.chain(*by_rank[0], *by_rank[2])) == [0, 1, 2, 3, 4]


def check_values_are_the_scores_of_what_was_read_so_far():
    world = World.connect()
    engine = build("reward", world.groups(world.layout(tp=2, sequence_parallel=True)))
    batch = experience()
    everywhere = torch.arange(batch.tokens.shape[1] - 1) < batch.lengths[:, None] - 1
    values = engine.values(batch, everywhere)
    for t in range(1, 4):  # all rows are longer
        cut = TextBatch(tokens=batch.tokens[:, : t + 1], lengths=torch.full_like(batch.lengths, t + 1), loss_mask=everywhere[:, :t])
        torch.testing.assert_close(values[:, t], torch.where(everywhere[:, t], engine.scores(cut), 0.0), rtol=1e-5, atol=1e-5)


def test_values_are_the_scores_of_what_was_read_so_far(ranks2):
    ranks2.run(check_values_are_the_scores_of_what_was_read_so_far)


def check_ptx_weight_zero():
    world = World.connect()
    groups = world.groups(world.layout(tp=2))
    weights = []
    for weight in (None, 0.0):
        engine = build("gpt2", groups)
        ptx = [] if weight is None else [Term("ptx", LanguageModelLoss(), texts(), weight=weight)]
        for _ in range(2):
            engine.step([Term("policy", PolicyLoss(clip=0.2), experience()), *ptx], learning_rate=LEARNING_RATE)
        weights.append(local_weights(engine))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_ptx_weight_of_zero_is_exactly_ppo(ranks4):
    ranks4.run(check_ptx_weight_zero)


def check_refusals():
    world = World.connect()
    engine = build("gpt2", world.groups(world.layout(tp=2)))
    batch = texts()
    nothing = TextBatch(tokens=batch.tokens, lengths=batch.lengths, loss_mask=torch.zeros_like(batch.loss_mask))
    with pytest.raises(ValueError, match="the ptx term has nothing to learn from: none of its 7 rows counts in the loss"):
        engine.step([Term("ptx", LanguageModelLoss(), nothing)], learning_rate=LEARNING_RATE)
    few_keys = dataclasses.replace(SPECS["llama"].architecture, num_kv_heads=3)
    with pytest.raises(
        ValueError, match="the layout tp2 pp1 dp1 does not fit the model: num_kv_heads 3 must be divisible by tp 2, or tp by it"
    ):
        build("llama", world.groups(world.layout(tp=2)), architecture=few_keys)


def test_what_the_engine_refuses(ranks2):
    ranks2.run(check_refusals)


def check_a_frozen_model_stays():
    world = World.connect()
    frozen = FrozenEngine(SPECS["gpt2"], world.groups(world.layout(pp=2)), micro_batch_size=4)
    fill(frozen)
    engine = build("gpt2", world.groups(world.layout(tp=2)))
    before = frozen.fingerprint()
    batch = experience()
    logprobs = frozen.logprobs(batch, batch.response_mask)
    torch.testing.assert_close(engine.logprobs(batch, batch.response_mask), logprobs, rtol=1e-5, atol=1e-5)
    for _ in range(2):
        engine.step(terms_of("gpt2"), learning_rate=LEARNING_RATE)
    assert torch.equal(frozen.logprobs(batch, batch.response_mask), logprobs)
    assert frozen.fingerprint() == before
    assert not any(parameter.requires_grad for parameter in frozen.parameters().values())
    with torch.no_grad():
        next(iter(frozen.parameters().values())).view(-1)[0].add_(1e-3)
    assert frozen.fingerprint() != before


def test_a_frozen_model_stays(ranks2):
    ranks2.run(check_a_frozen_model_stays)


def check_counts_and_entropy(axes):
    world = World.connect()
    engine = build("gpt2", world.groups(world.layout(**axes)), micro_batch_size=1)
    batch, text = experience(), texts()
    result = engine.step([Term("policy", PolicyLoss(clip=0.2), batch), Term("ptx", LanguageModelLoss(), text)], learning_rate=0.0)
    assert result.tokens == int(batch.lengths.sum() + text.lengths.sum())
    split = engine.groups.layout.tp if engine.groups.layout.sequence_parallel else 1
    assert result.positions == sum(-(-length // split) * split for length in [*batch.lengths.tolist(), *text.lengths.tolist()])
    engine.micro_batch_size = 100
    packed = engine.step([Term("policy", PolicyLoss(clip=0.2), batch)], learning_rate=0.0)
    assert packed.tokens == int(batch.lengths.sum())
    assert packed.tokens <= packed.positions <= packed.tokens + (split - 1) * engine.groups.layout.dp
    return result.stats["policy/entropy"]


def test_tokens_padding_and_entropy_are_reported(ranks1, ranks2, ranks4):
    (reference,) = ranks1.run(check_dense_entropy)
    for ranks, axes in ((ranks2, {}), (ranks2, {"tp": 2}), (ranks4, {"tp": 2, "pp": 2, **SP})):
        for total, count in ranks.run(check_counts_and_entropy, axes):
            assert (total, count) == (pytest.approx(reference[0], rel=1e-5), reference[1])


def check_dense_entropy():
    """Entropy of the whole distribution at every response position, from each row by itself."""
    world = World.connect()
    engine = FrozenEngine(SPECS["gpt2"], world.groups(world.layout()), micro_batch_size=1)
    fill(engine)
    (model,) = engine.transformers
    batch, total = experience(), 0.0
    with torch.no_grad():
        for row, length, mask in zip(batch.tokens, batch.lengths.tolist(), batch.response_mask, strict=True):
            hidden = model(row[None, :length], torch.arange(length)[None], None)
            logits = hidden[:-1, 0] @ model.embedding.word_embeddings.weight[:VOCAB].T
            total += float(torch.distributions.Categorical(logits=logits.double()).entropy()[mask[: length - 1]].sum())
    return total, int(batch.response_mask.sum())


def check_average(precision, axes):
    world = World.connect()
    engine = build("gpt2", world.groups(world.layout(**axes)), precision=precision)
    engine.start_ema(0.9)
    masters = {shard.parameter: shard.main for shard in engine.optimizer.shards()}
    expected = {parameter: main.detach().double() for parameter, main in masters.items()}
    for _ in range(3):
        engine.step(terms_of("gpt2"), learning_rate=LEARNING_RATE)
        engine.ema.update()
        expected = {p: 0.9 * average + 0.1 * masters[p].detach().double() for p, average in expected.items()}
    for parameter, average in engine.ema.averages.items():
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), expected[parameter], rtol=1e-5, atol=1e-7)
    batch = experience()
    before, logprobs = local_weights(engine), engine.logprobs(batch, batch.response_mask)
    before_masters = {p: main.detach().clone() for p, main in masters.items()}
    averages = {p: average.clone() for p, average in engine.ema.averages.items()}
    with engine.ema.swapped_in():
        inside = local_weights(engine)
        assert not torch.equal(engine.logprobs(batch, batch.response_mask), logprobs)
    assert all(torch.equal(value, before[name]) for name, value in local_weights(engine).items())
    assert all(torch.equal(main, before_masters[p]) for p, main in masters.items())
    assert all(torch.equal(average, averages[p]) for p, average in engine.ema.averages.items())
    assert torch.equal(engine.logprobs(batch, batch.response_mask), logprobs)
    names = {parameter: name for name, parameter in engine.parameters().items()}
    for shard in engine.optimizer.shards():
        part = inside[names[shard.parameter]].view(-1)[shard.start : shard.start + shard.main.numel()]
        assert torch.equal(part, averages[shard.parameter].to(part.dtype).view(-1))
    engine.step(terms_of("gpt2"), learning_rate=LEARNING_RATE)
    return inside, local_weights(engine)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_average_is_the_naive_one_and_swaps_in_and_out(ranks4, precision):
    layout = ParallelLayout(tp=1, pp=2, dp=2)
    by_rank = ranks4.run(check_average, precision, {"pp": 2})
    for number in range(2):  # every copy has all of it
        assembled([both[number] for both in by_rank], "gpt2", layout)


def check_dropout(axes):
    world = World.connect()
    groups = world.groups(world.layout(**axes))
    engines = [build("gpt2", groups, dropout=0.2, seed=seed) for seed in (1, 1, 2)]
    for engine in engines:
        fill(engine, seed=1)
        batch = experience()
        assert torch.equal(engine.logprobs(batch, batch.response_mask), engine.logprobs(batch, batch.response_mask))  # none in evaluation
    results = [[engine.step(terms_of("gpt2"), learning_rate=LEARNING_RATE) for _ in range(2)] for engine in engines]
    assert results[0] == results[1]
    assert results[0][0].losses["ptx"] != results[2][0].losses["ptx"]
    assert engines[0].spec.dropout and results[0][0].losses["ptx"] == pytest.approx(results[2][0].losses["ptx"], rel=0.1)
    weights = [local_weights(engine) for engine in engines]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    return weights[0]


@pytest.mark.parametrize("axes", [{"tp": 2}, {"tp": 2, "pp": 2}, {"tp": 2, **SP}], ids=str)
def test_dropout_repeats_with_its_seed_and_peers_stay_equal(ranks4, axes):
    assembled(ranks4.run(check_dropout, axes), "gpt2", ParallelLayout.over(4, **{"pp": 1, **axes}))
