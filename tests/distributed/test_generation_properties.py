"""Any schedule of rows gives each row what it is given alone: random prompts, limits, ends and numbers of slots, drawn by hypothesis.

The slow obvious version is a full forward pass per token, without a cache. A greedy token is a function of the tokens before it, so
that what such passes have said is remembered across schedules.
"""

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from megarlhf.batch import Prompts
from megarlhf.generation.generator import Generator
from megarlhf.models.architecture import Architecture
from megarlhf.models.transformer import ModelSpec, build_model, initialize
from megarlhf.parallel.groups import World

VOCAB, CONTEXT, PAD = 40, 20, 0
SIZES = {"num_layers": 4, "hidden_size": 16, "num_heads": 4, "vocab_size": VOCAB, "max_seq_len": CONTEXT}
ARCHITECTURES = (
    Architecture(num_kv_heads=4, ffn_size=32, **SIZES),
    Architecture(
        num_kv_heads=2, ffn_size=32, norm="rmsnorm", activation="swiglu", positions="rotary", bias=False, tied_embeddings=False, **SIZES
    ),
)
LAYOUTS = ({}, {"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}, {"pp": 4}, {"tp": 4})
LIMIT = st.one_of(st.just(1), st.integers(1, CONTEXT))
SCHEDULE = st.fixed_dictionaries(
    {
        "prompts": st.lists(st.integers(1, CONTEXT - 1), min_size=1, max_size=5),  # the lengths of the distinct ones
        "rows": st.lists(st.tuples(st.integers(0, 4), LIMIT), min_size=1, max_size=14),  # (prompt, limit)
        "slots": st.integers(1, 6),
        "seed": st.integers(0, 3),
        "ends": st.sampled_from(("none", "some", "most")),
    }
)
ENDS = {"none": [], "some": [3, 17, 31], "most": list(range(0, VOCAB, 2))}


def model(architecture, groups):
    spec = ModelSpec(architecture=architecture, head="lm")
    chunks = build_model(spec, groups)
    initialize(chunks, spec, groups, seed=1, std=0.3)
    return chunks


def prompts_of(schedule):
    generator = torch.Generator().manual_seed(schedule["seed"])
    distinct = [torch.randint(1, VOCAB, (length,), generator=generator) for length in schedule["prompts"]]
    rows = [distinct[number % len(distinct)] for number, _ in schedule["rows"]]
    return Prompts(
        tokens=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD),
        lengths=torch.tensor([len(row) for row in rows]),
        ids=torch.arange(len(rows)),
    )


class Recording(TorchDispatchMode):
    """Every operation of a function, to be done again on the same memory: a graph of a CPU, which sees nothing else of the host."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation is not torch.ops.aten._local_scalar_dense.default, "a capture cannot read a number"
        found = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, found))
        return found

    def repeat(self):
        made = {}

        def again(value):
            return made.get(id(value), value)

        for operation, args, kwargs, before in self.calls:
            found = operation(*tree_map(again, args), **tree_map(again, kwargs))
            results = tree_flatten(found)[0]
            for work in results:
                if isinstance(work, torch.ScriptObject):  # a message that is under way
                    work.wait()
            made |= {id(old): new for old, new in zip(tree_flatten(before)[0], results, strict=True)}


class Graphs:
    """Captures as `CudaGraphs` does: once warmed up, once recorded, then repeated."""

    def __init__(self, seen):
        self.seen = seen

    def __call__(self, function):
        function()
        recording = Recording()
        with recording:
            function()
        self.seen["captured"] += 1

        def repeat():
            self.seen["repeated"] += 1
            recording.repeat()

        return repeat


def answered(chunks, groups, architecture, schedule, graphs=None):
    """Each row's response, greedy; with `graphs` by steps that they repeat."""
    prompts, ends = prompts_of(schedule), ENDS[schedule["ends"]]
    how = {"architecture": architecture, "eos_id": ends[0] if ends else -1, "pad_id": PAD, "stop_ids": ends}
    limits = [limit for _, limit in schedule["rows"]]
    generator, more = Generator(chunks, groups, **how), {"seed": 1, "iteration": 0, "max_batch_size": schedule["slots"]}
    generator.make_capture = lambda: graphs
    rollouts = generator.generate(prompts, max_new_tokens=limits, temperature=0.0, cuda_graphs=graphs is not None, **more)
    parts = zip(rollouts.tokens.tolist(), rollouts.prompt_lengths.tolist(), rollouts.lengths.tolist(), strict=True)
    return [row[start:stop] for row, start, stop in parts]


class OneByOne:
    """Full forward passes of single rows."""

    def __init__(self, chunk):
        self.chunk = chunk.eval()
        self.known = {}

    def next_token(self, tokens):
        if tokens not in self.known:
            hidden = self.chunk(torch.tensor([tokens]), torch.arange(len(tokens))[None], None)
            self.known[tokens] = int(self.chunk.logits(hidden[-1])[0, :VOCAB].argmax())
        return self.known[tokens]

    def response(self, prompt, limit, ends):
        tokens = tuple(prompt)
        while len(tokens) < min(CONTEXT, len(prompt) + limit):
            tokens += (self.next_token(tokens),)
            if tokens[-1] in ends:
                break
        return list(tokens[len(prompt) :])

    def answers(self, schedule):
        prompts, ends = prompts_of(schedule), ENDS[schedule["ends"]]
        rows = zip(prompts.tokens.tolist(), prompts.lengths.tolist(), schedule["rows"], strict=True)
        return [self.response(row[:length], limit, ends) for row, length, (_, limit) in rows]


def drawn(strategy, examples):
    """That many different examples, the same each time."""
    found = []

    @settings(max_examples=examples, database=None, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def collect(example):
        found.append(example)

    collect()
    return found


@torch.no_grad()
def check_alone(examples):
    """On one rank; returns how often what was tried."""
    world = World.connect()
    groups = world.groups(world.layout())
    seen = Counter()
    for architecture in ARCHITECTURES:
        (chunk,) = model(architecture, groups)
        slow = OneByOne(chunk)
        for number, schedule in enumerate(drawn(SCHEDULE, examples)):
            expected = slow.answers(schedule)
            assert answered([chunk], groups, architecture, schedule) == expected, schedule
            if number % 3 == 0:
                assert answered([chunk], groups, architecture, schedule, Graphs(seen)) == expected, ("repeated", schedule)
            seen["rows that waited"] += max(0, len(expected) - schedule["slots"])
            for response, (_, limit) in zip(expected, schedule["rows"], strict=True):
                ended = response[-1] in ENDS[schedule["ends"]]
                seen["ended at once" if ended and len(response) == 1 and limit > 1 else "one token" if limit == 1 else "other"] += 1
        many = {"prompts": [1, 5, 9], "rows": [(i % 3, 1 + i % 3) for i in range(1000)], "slots": 6, "seed": 0, "ends": "some"}
        assert answered([chunk], groups, architecture, many) == slow.answers(many), "six slots, used 1000 times"
    return seen


def test_random_schedules_are_full_forward_passes_row_by_row(ranks1):
    (seen,) = ranks1.run(check_alone, 24)
    assert min(seen["rows that waited"], seen["ended at once"], seen["one token"]) > 5
    assert 10 < seen["captured"] < seen["repeated"] / 3


@torch.no_grad()
def check_in_layouts(examples):
    """On several ranks, in every layout, one after the other in one world."""
    world = World.connect()
    schedules = drawn(SCHEDULE, examples)
    found, seen = [], Counter()
    for architecture in ARCHITECTURES:
        for axes in LAYOUTS:
            if architecture.num_kv_heads % axes.get("tp", 1) and axes.get("tp", 1) % architecture.num_kv_heads:
                continue
            groups = world.groups(world.layout(**axes))
            chunks = model(architecture, groups)
            found.append([answered(chunks, groups, architecture, schedule) for schedule in schedules])
            repeated = answered(chunks, groups, architecture, schedules[-1], Graphs(seen))
            assert repeated == found[-1][-1], axes
    assert seen["captured"] and seen["repeated"]
    return found


@torch.no_grad()
def expected_of(examples):
    """What single rows are given, for each architecture."""
    world = World.connect()
    groups = world.groups(world.layout())
    schedules = drawn(SCHEDULE, examples)
    return [[slow.answers(s) for s in schedules] for slow in (OneByOne(*model(a, groups)) for a in ARCHITECTURES)]


def test_random_schedules_give_the_same_in_every_layout_of_four_ranks(ranks1, ranks4):
    (expected,) = ranks1.run(expected_of, 3)
    for found in ranks4.run(check_in_layouts, 3):
        assert len(found) == len(ARCHITECTURES) * len(LAYOUTS)
        for number, answers in enumerate(found):
            assert answers == expected[number // len(LAYOUTS)], (LAYOUTS[number % len(LAYOUTS)], number // len(LAYOUTS))


@pytest.mark.parametrize("limits", [[1, 2], [3]])
def test_a_limit_for_each_row_or_one_for_all(limits):
    from megarlhf.generation.generator import _waiting_rows

    prompts = Prompts(
        tokens=torch.ones(len(limits), 3, dtype=torch.int64), lengths=torch.full((len(limits),), 3), ids=torch.arange(2)[: len(limits)]
    )
    assert [row.limit for row in _waiting_rows(prompts, limits, 5)] == [min(limit, 2) for limit in limits]
    with pytest.raises(ValueError, match="zip"):
        _waiting_rows(prompts, [*limits, 1], 5)
