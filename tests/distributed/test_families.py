"""Every family against transformers, in every kind of layout: log-probabilities, loss, gradients, a step, and greedy responses."""

import pytest
import torch

from megarlhf.batch import Prompts
from megarlhf.conversion.families import FAMILIES
from megarlhf.conversion.forms import their_shapes, to_theirs
from megarlhf.engine.terms import LanguageModelLoss, Term
from megarlhf.engine.trainable import TrainEngine
from megarlhf.generation.generator import Generator
from megarlhf.models.parameters import parameter_specs, shards_held
from megarlhf.models.transformer import ModelSpec, take_shard
from megarlhf.parallel.groups import World
from megarlhf.parallel.layout import ParallelLayout
from tests.distributed.families import CONFIGS, NEW_TOKENS, expected_of, make, prompt_lengths, read
from tests.distributed.training import ADAM, LEARNING_RATE, VOCAB, assemble, local_weights, texts

LAYOUTS = [{"tp": 4}, {"pp": 2}, {"tp": 2, "pp": 2, "sequence_parallel": True}, {"tp": 2}, {"pp": 4}]
"""Over four ranks: five layers on two and four stages, one and two key-value heads on four ranks, and two and four copies of a model."""
TOLERANCE = 2e-5


def in_layouts(architecture, weights, layouts):
    """(log-probabilities, loss, gradient norm, weights after a step, greedy responses) in each layout."""
    world, found, batch = World.connect(), [], texts()
    for axes in layouts:
        groups = world.groups(world.layout(**axes))
        engine = TrainEngine(ModelSpec(architecture=architecture, head="lm"), groups, micro_batch_size=4, adam=ADAM, seed=1)
        held = shards_held(architecture, "lm", groups.layout, groups.coordinates)
        with torch.no_grad():
            for name, parameter in engine.parameters().items():
                parameter.copy_(take_shard(weights[name], held[name]))
        engine.optimizer.adopt_parameters()
        logprobs = engine.logprobs(batch, batch.loss_mask)
        lengths = torch.tensor(prompt_lengths(batch))
        prompts = Prompts(tokens=batch.tokens[:, :8], lengths=lengths, ids=torch.arange(batch.num_rows))
        generator = Generator(engine.transformers, groups, architecture=architecture, eos_id=VOCAB, pad_id=0)
        rollouts = generator.generate(prompts, max_new_tokens=NEW_TOKENS, temperature=0.0, seed=1, iteration=0)
        greedy = [row[:length].tolist() for row, length in zip(rollouts.tokens, rollouts.lengths.tolist(), strict=True)]
        step = engine.step([Term("text", LanguageModelLoss(), batch)], learning_rate=LEARNING_RATE)
        found.append((logprobs, step.losses["text"], step.grad_norm, local_weights(engine), greedy))
    return found


def largest_difference(architecture, expected, found, layout, stepped):
    """After checking one layout over all of its ranks."""
    logprobs, loss, norm, greedy = expected
    for rank_logprobs, rank_loss, rank_norm, _, rank_greedy in found:
        torch.testing.assert_close(rank_logprobs, logprobs, rtol=0, atol=TOLERANCE)
        assert rank_loss == pytest.approx(loss, rel=1e-5) and rank_norm == pytest.approx(norm, rel=1e-5)
        assert rank_greedy == greedy
    whole = assemble([weights for *_, weights, _ in found], architecture, "lm", layout)
    for name, value in whole.items():
        torch.testing.assert_close(value, stepped[name], rtol=1e-5, atol=5e-6, msg=lambda m, n=name: f"{layout} {n}: {m}")
    return float((found[0][0] - logprobs).abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_layout_agrees_with_transformers(name, ranks1, ranks4, tmp_path):
    pytest.importorskip("transformers")
    model = make(name, tmp_path)
    architecture, weights, theirs = read(tmp_path)
    expected = expected_of(model)
    assert expected[0].std() > 0.5
    alone = ranks1.run(in_layouts, architecture, weights, [{}])
    stepped = alone[0][0][3]
    assert any(not torch.equal(stepped[name], weights[name]) for name in weights)
    difference = largest_difference(architecture, expected, [alone[0][0]], ParallelLayout(), stepped)
    layouts = [axes for axes in LAYOUTS if architecture.num_heads % axes.get("tp", 1) == 0]
    by_rank = ranks4.run(in_layouts, architecture, weights, layouts)
    for number, axes in enumerate(layouts):
        layout = ParallelLayout.over(4, **{"tp": 1, "pp": 1, **axes})
        found = [results[number] for results in by_rank]
        difference = max(difference, largest_difference(architecture, expected, found, layout, stepped))
    print(f"{name}: the largest difference of a log-probability is {difference:.1e}")
    assert_comes_back(architecture, weights, theirs, FAMILIES[model.config.model_type])


def assert_comes_back(architecture, weights, theirs, family):
    """Bit for bit, but for OPT's two rows of positions that mean nothing; and nothing in their file is left over."""
    written = {}
    for spec in parameter_specs(architecture, "lm"):
        source = family.source(spec.name)
        parts = to_theirs(source.form, weights[spec.name], architecture)
        assert [tuple(part.shape) for part in parts] == their_shapes(source.form, spec.shape, architecture)
        written.update(zip(source.names, parts, strict=True))
    assert written.keys() == theirs.keys()
    for name, tensor in theirs.items():
        cut = 2 if name.endswith("embed_positions.weight") else 0
        assert torch.equal(written[name][cut:], tensor[cut:]) and not written[name][:cut].any(), name
