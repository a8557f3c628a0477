"""Generation against the slow obvious loop, and the same responses whatever the layout and the batching."""

import dataclasses
from unittest import mock

import pytest
import torch

from megarlhf.batch import Prompts
from megarlhf.generation import generator as generators
from megarlhf.generation.generator import Generator
from megarlhf.generation.in_flight import Listener
from megarlhf.generation.sampling import FAMILY, Sampling, gumbel_noise, noise_keys, sample_tokens
from megarlhf.models.architecture import Architecture
from megarlhf.models.parameters import TIED_NAME, shards_held
from megarlhf.models.transformer import ModelSpec, build_model, initialize, named_parameters
from megarlhf.parallel.groups import World

VOCAB, CONTEXT, EOS, PAD = 200, 24, 3, 1  # the vocabulary is padded to 256
SIZES = {"num_layers": 4, "hidden_size": 32, "vocab_size": VOCAB, "max_seq_len": CONTEXT}
ARCHITECTURES = {
    "gpt2": Architecture(num_heads=4, num_kv_heads=4, ffn_size=64, **SIZES),
    "llama": Architecture(
        num_heads=8,
        num_kv_heads=4,
        ffn_size=48,
        norm="rmsnorm",
        activation="swiglu",
        positions="rotary",
        bias=False,
        tied_embeddings=False,
        **SIZES,
    ),
}
ARCHITECTURES["shared-heads"] = dataclasses.replace(
    ARCHITECTURES["llama"], num_layers=5, num_kv_heads=1, head_size=6, qk_norm=True, rotary_fraction=0.7, qkv_bias=True
)
LAYOUTS = {
    1: [{}],
    2: [{"tp": 2}, {"pp": 2}, {"pp": 2, "virtual_pp": 2}, {}, {"tp": 2, "sequence_parallel": True}],
    4: [{"tp": 2, "pp": 2}, {"tp": 2, "pp": 2, "virtual_pp": 2, "sequence_parallel": True}, {"tp": 4}, {"pp": 4}, {"pp": 2}, {}],
}
MAX_NEW = 9
SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
]
LOGPROB_TOLERANCE = 1e-4


def prompts(num_rows=14):
    """Ragged prompts, padded wider than they need; one is a single token, one leaves room for one token, one for three."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 12, (num_rows,), generator=generator)
    lengths[:3] = torch.tensor([1, CONTEXT - 1, CONTEXT - 3])
    tokens = torch.randint(4, VOCAB, (num_rows, CONTEXT + 2), generator=generator)
    tokens = torch.where(torch.arange(CONTEXT + 2) < lengths[:, None], tokens, PAD)
    return Prompts(tokens=tokens, lengths=lengths, ids=torch.arange(num_rows) * 3 + 1)


def build(name, groups):
    """A model in training mode, with dropout, whose responses end now and then: EOS's row of the head is longer than others'."""
    spec = ModelSpec(architecture=ARCHITECTURES[name], head="lm", dropout=0.3)
    chunks = build_model(spec, groups)
    initialize(chunks, spec, groups, seed=1, std=0.1)
    head = TIED_NAME if spec.architecture.tied_embeddings else "output_layer.weight"
    held = shards_held(spec.architecture, "lm", groups.layout, groups.coordinates)
    if head in held and held[head].slices[0].start <= EOS < held[head].slices[0].start + held[head].slices[0].size:
        named_parameters(chunks, groups)[head].data[EOS - held[head].slices[0].start] *= 8
    for chunk in chunks:
        chunk.train()
    return chunks, Generator(chunks, groups, architecture=spec.architecture, eos_id=EOS, pad_id=PAD)


def slow_response(chunk, prompt, sample, *, temperature, top_k=None, top_p=None, seed, iteration):
    """(tokens, log-probabilities) of one response: each token from a forward pass over all before it, in one piece."""
    tokens, logprobs = list(prompt), []
    while len(logprobs) < MAX_NEW and len(tokens) < CONTEXT:
        row = torch.tensor([tokens])
        hidden = chunk(row, torch.arange(len(tokens))[None], None)
        scaled = chunk.logits(hidden[-1])[0, :VOCAB].double() / (temperature or 1.0)
        scores = scaled.clone()
        if temperature:
            scores[scaled.argsort(descending=True)[top_k or VOCAB :]] = -torch.inf
            order = scores.argsort(descending=True)
            before = scores[order].softmax(0).cumsum(0).roll(1)
            before[0] = 0.0
            scores[order[before >= (top_p or 2.0)]] = -torch.inf
            keys = noise_keys(seed, iteration, torch.tensor([sample]), torch.tensor([len(tokens)]))
            families = torch.stack([part.logsumexp(0) for part in scores.split(FAMILY)])
            family = int((families + gumbel_noise(keys, -1 - torch.arange(len(families)))[0]).argmax())
            scores += gumbel_noise(keys, torch.arange(VOCAB))[0]
            scores[torch.arange(VOCAB) // FAMILY != family] = -torch.inf
        tokens.append(int(scores.argmax()))
        logprobs.append(float(scaled.log_softmax(0)[tokens[-1]]))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :], logprobs


@torch.no_grad()
def check_slow_loop(name):
    """On one rank; returns how the responses ended, so that the test can see that every way was tried."""
    world = World.connect()
    (chunk,), generator = build(name, world.groups(world.layout()))
    given = prompts()
    endings = set()
    for settings in SETTINGS:
        rollouts = generator.generate(given, max_new_tokens=MAX_NEW, seed=5, iteration=2, **settings)
        assert chunk.training and all(module.training for module in chunk.modules())
        chunk.eval()
        for row, (start, sample) in enumerate(zip(given.lengths.tolist(), given.ids.tolist(), strict=True)):
            response, logprobs = slow_response(chunk, given.tokens[row, :start].tolist(), sample, seed=5, iteration=2, **settings)
            end = start + len(response)
            assert rollouts.tokens[row, :end].tolist() == given.tokens[row, :start].tolist() + response
            assert rollouts.tokens[row, end:].eq(PAD).all()
            assert rollouts.lengths[row] == end and rollouts.prompt_lengths[row] == start
            assert rollouts.response_mask[row].nonzero().flatten().tolist() == list(range(start - 1, end - 1))
            assert (rollouts.logprobs[row, start - 1 : end - 1] - torch.tensor(logprobs)).abs().max() < LOGPROB_TOLERANCE
            assert not rollouts.logprobs[row][~rollouts.response_mask[row]].any()
            assert rollouts.finished[row] == (response[-1] == EOS)
            endings.add("eos" if response[-1] == EOS else "context" if end == CONTEXT else "limit")
            endings.add("eos at once" if response == [EOS] else "more")
        chunk.train()
        assert rollouts.tokens.shape[1] == rollouts.lengths.max() and rollouts.logprobs.dtype == torch.float32
    return endings


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_responses_and_logprobs_are_those_of_full_forward_passes(ranks1, name):
    (endings,) = ranks1.run(check_slow_loop, name)
    assert endings >= {"eos", "context", "limit", "more"}


def rollouts_of(name, layouts, batch_sizes):
    """{(layout, setting, batch size): rollouts}, and that generating leaves the model as it was."""
    world = World.connect()
    found = {}
    for number, axes in enumerate(layouts):
        chunks, generator = build(name, world.groups(world.layout(**axes)))
        before = [parameter.clone() for chunk in chunks for parameter in chunk.parameters()]
        for setting, settings in enumerate(SETTINGS):
            for size in batch_sizes:
                found[number, setting, size] = generator.generate(
                    prompts(), max_new_tokens=MAX_NEW, seed=5, iteration=2, max_batch_size=size, **settings
                )
        assert all(chunk.training and chunk.config.sequence_parallel == axes.get("sequence_parallel", False) for chunk in chunks)
        after = [parameter for chunk in chunks for parameter in chunk.parameters()]
        assert all(torch.equal(old, new) and new.requires_grad for old, new in zip(before, after, strict=True))
    return found


def assert_same(rollouts, expected):
    for field in dataclasses.fields(expected):
        value, target = getattr(rollouts, field.name), getattr(expected, field.name)
        if field.name == "logprobs":
            assert (value - target).abs().max() < LOGPROB_TOLERANCE
        else:
            assert torch.equal(value, target), field.name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_responses_do_not_depend_on_layout_or_batching(ranks1, ranks2, ranks4, name):
    (alone,) = ranks1.run(rollouts_of, name, LAYOUTS[1], [None, 1, 5])
    for (_, setting, _), rollouts in alone.items():
        assert_same(rollouts, alone[0, setting, None])
    for ranks, size in ((ranks2, 4), (ranks4, None)):
        for found in ranks.run(rollouts_of, name, LAYOUTS[ranks.world_size], [size]):
            assert len(found) == len(LAYOUTS[ranks.world_size]) * len(SETTINGS)
            for (_, setting, _), rollouts in found.items():
                assert_same(rollouts, alone[0, setting, None])


def check_keys():
    """Other seeds, iterations and samples give other responses, a sample's neighbours none; and copies without rows take part."""
    world = World.connect()
    _, generator = build("gpt2", world.groups(world.layout()))
    given = prompts()

    def generate(rows=given, seed=5, iteration=2):
        return generator.generate(rows, max_new_tokens=MAX_NEW, seed=seed, iteration=iteration)

    first = generate()
    assert_same(generate(), first)
    for other in (generate(seed=6), generate(iteration=3), generate(dataclasses.replace(given, ids=given.ids + 1))):
        assert not torch.equal(other.lengths, first.lengths) or not torch.equal(other.tokens, first.tokens)
    few = torch.tensor([9, 0, 4])
    assert_same(generate(given.rows(few)), first.rows(few))
    with pytest.raises(ValueError, match=f"a prompt of {CONTEXT} tokens leaves no room in a context of {CONTEXT}"):
        generate(dataclasses.replace(given, lengths=given.lengths.clamp(min=CONTEXT)))


def test_responses_depend_on_their_keys_only(ranks4):
    ranks4.run(check_keys)


class Counting(Listener):
    """How many rows were expected and how many were answered here."""

    def __init__(self):
        self.expected, self.answered = [], 0

    def expect(self, rows):
        self.expected.append(rows)

    def end(self, row, tokens):
        self.answered += 1


def check_levelling():
    """One copy is dealt all rows but one, and the others take of those that wait: the same responses. Returns who answered how many."""
    world, given, found = World.connect(), prompts(), []
    for axes in ({}, {"pp": 2}):
        _, generator = build("gpt2", world.groups(world.layout(**axes)))
        how = {"max_new_tokens": MAX_NEW, "seed": 5, "iteration": 2, "max_batch_size": 2}
        expected, counting = generator.generate(given, **how), Counting()
        with mock.patch.object(generators, "STEPS_BETWEEN_LEVELLINGS", 3), mock.patch.object(generators, "dealt", all_but_one_to_the_first):
            assert_same(generator.generate(given, **how, listener=counting), expected)
        found.append((counting.answered, counting.expected))
    return found


def all_but_one_to_the_first(rows, copies):
    return [rows[:-1], rows[-1:]] + [[]] * (copies - 2)


def test_rows_that_wait_go_to_copies_that_have_fewer(ranks4):
    whole, halves = zip(*ranks4.run(check_levelling), strict=True)
    for found, copies, stages in ((whole, 4, 1), (halves, 2, 2)):
        answered = [rows for rows, _ in found]
        assert sum(answered) == 14 * stages and min(answered) > 1 and len(answered) == copies * stages
        assert sorted(expected[0] for _, expected in found) == sorted([13, 1, *[0] * (copies - 2)] * stages)
        assert all(expected[-1] == rows for rows, expected in found)


def check_sampling_over_shards():
    world = World.connect()
    groups = world.groups(world.layout(tp=world.size))
    keys = {"seed": 1, "iteration": 0, "samples": torch.arange(40), "positions": torch.arange(40) % 3}
    for padded, vocab_size in ((256, 250), (256, 70), (32 + 16, 40)):  # with 70, some shards are all padding; of 48, shards cut families
        shard, first = padded // world.size, padded // world.size * groups.coordinates.tp
        whole = (2 * torch.randn(40, padded, generator=torch.Generator().manual_seed(0))).round(decimals=1)  # with ties
        for settings in [*SETTINGS, {"top_k": 3}, {"top_k": 150}, {"top_p": 0.3}, {"top_p": 1.0, "temperature": 3.0}]:
            sampling = Sampling(**settings)
            expected = sample_tokens(whole, sampling, vocab_size=vocab_size, tp=None, **keys)
            found = sample_tokens(whole[:, first : first + shard], sampling, vocab_size=vocab_size, tp=groups.tp, **keys)
            assert torch.equal(found[0], expected[0]) and found[0].max() < vocab_size
            assert (found[1] - expected[1]).abs().max() < 1e-5 and found[1].max() <= 0


def test_sampling_over_vocabulary_shards_is_that_of_the_whole(ranks2, ranks4):
    ranks2.run(check_sampling_over_shards)
    ranks4.run(check_sampling_over_shards)
