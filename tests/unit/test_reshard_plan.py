"""Reshard plans: every element once, from the nearest holder, by senders that share the work."""

import dataclasses
import itertools
import math
import random
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarlhf.models.architecture import Architecture
from megarlhf.models.parameters import parameter_specs, shards_held
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.resharding.plan import NODE_SIZE, nearest_layout, plan_reshard

SIZES = {"num_layers": 4, "hidden_size": 24, "num_heads": 12, "ffn_size": 48, "vocab_size": 300, "max_seq_len": 5}
GPT2 = Architecture(num_kv_heads=12, **SIZES)
LLAMA = Architecture(num_kv_heads=6, norm="rmsnorm", activation="swiglu", positions="rotary", bias=False, tied_embeddings=False, **SIZES)
QWEN3 = dataclasses.replace(LLAMA, num_layers=7, num_kv_heads=2, head_size=4, qk_norm=True)  # 2 key-value heads on up to 6 ranks
QWEN2 = dataclasses.replace(QWEN3, num_layers=5, num_kv_heads=1, qk_norm=False, qkv_bias=True)
SIZES_TO_DIVIDE = ("num_layers", "num_heads", "num_kv_heads", "hidden_size", "ffn_size", "padded_vocab_size")
MODELS = [(GPT2, "lm"), (LLAMA, "lm"), (GPT2, "scalar"), (LLAMA, "scalar"), (QWEN3, "lm"), (QWEN2, "lm")]
MODEL_IDS = ["tied", "llama", "scalar", "llama-scalar", "qwen3", "qwen2"]


def layouts(num_ranks, *, architecture=GPT2):
    """Every layout over `num_ranks` ranks that fits the architecture."""
    sizes = {name: getattr(architecture, name) for name in SIZES_TO_DIVIDE}
    for tp, pp, virtual_pp in itertools.product(range(1, 9), range(1, 9), (1, 2)):
        if num_ranks % (tp * pp) == 0:
            layout = ParallelLayout.over(num_ranks, tp=tp, pp=pp, virtual_pp=virtual_pp)
            if not layout.violations(**sizes):
                yield layout


def pairs(architecture):
    """Some pairs of layouts over 1 to 8 ranks, always the same."""
    for num_ranks in (1, 2, 3, 4, 6, 8):
        every = list(itertools.product(layouts(num_ranks, architecture=architecture), repeat=2))
        yield from random.Random(0).sample(every, min(len(every), 10))


def whole_model(architecture, head):
    """Canonical name -> full parameter; no two elements of the model are equal."""
    start = 0
    whole = {}
    for spec in parameter_specs(architecture, head):
        size = torch.Size(spec.shape).numel()
        whole[spec.name] = torch.arange(start, start + size).view(spec.shape)
        start += size
    return whole


def sharded(whole, architecture, head, layout):
    """What each rank holds of the model, cut out of the full parameters."""
    ranks = []
    for rank in range(layout.num_ranks):
        held = shards_held(architecture, head, layout, layout.coordinates(rank))
        ranks.append({name: cut(whole[name], shard) for name, shard in held.items()})
    return ranks


def cut(full, shard):
    index = torch.tensor([part.start + i for part in shard.slices for i in range(part.size)])
    return full.index_select(shard.dim, index)


@pytest.mark.parametrize(("architecture", "head"), MODELS, ids=MODEL_IDS)
def test_ranks_that_hold_the_same_send_about_the_same(architecture, head):
    for source, target in pairs(architecture):
        plan = plan_reshard(architecture, head, source, target)
        sent = [plan.bytes_sent(rank, element_size=1) for rank in range(source.num_ranks)]
        for replicas in source.peers("dp"):
            messages = [route.elements for route in plan.routes if route.source in replicas and route.source != route.target]
            assert max(sent[rank] for rank in replicas) - min(sent[rank] for rank in replicas) <= max(messages, default=0)


def test_same_layout_sends_nothing():
    for layout in layouts(8):
        plan = plan_reshard(GPT2, "lm", layout, layout)
        assert all(plan.bytes_received(rank, element_size=1) == 0 for rank in range(8))


def test_a_holder_on_the_same_node_is_preferred():
    architecture = Architecture(**{**SIZES, "hidden_size": 32, "num_heads": 16, "ffn_size": 64}, num_kv_heads=16)
    source, target = ParallelLayout(tp=8, dp=4), ParallelLayout(tp=2, dp=16)
    plan = plan_reshard(architecture, "lm", source, target)
    assert all(route.source // NODE_SIZE == route.target // NODE_SIZE for route in plan.routes)


def test_holders_on_other_nodes_share_the_work():
    # stage 0 is on nodes 0 and 1, stage 1 on nodes 2 and 3; everyone ends with everything
    plan = plan_reshard(GPT2, "scalar", ParallelLayout(tp=4, pp=2, dp=4), ParallelLayout(tp=4, dp=8))
    sent = [plan.bytes_sent(rank, element_size=1) for rank in range(32)]
    assert sum(sent) == sum(plan.bytes_received(rank, element_size=1) for rank in range(32))
    assert len(set(sent[:16])) == 1 and len(set(sent[16:])) == 1


def check_buckets(plan, architecture, *, max_bytes):
    """Names by bucket; every element of every parameter is in one bucket, and no rank holds more of a bucket than it may."""
    specs = {spec.name: spec for spec in parameter_specs(architecture, "lm")}
    buckets = plan.buckets(dict.fromkeys(specs, 4), max_bytes=max_bytes)
    rows = {name: [] for name in specs}
    for portion in itertools.chain(*buckets):
        rows[portion.name] += [portion.rows or (0, specs[portion.name].shape[0])]
        assert portion.rows is None or specs[portion.name].split_dim == 1
    for name, cuts in rows.items():
        assert cuts[0][0] == 0 and cuts[-1][1] == specs[name].shape[0]
        assert all(before[1] == after[0] for before, after in itertools.pairwise(cuts))
    for layout in (plan.source, plan.target):
        for rank in range(layout.num_ranks):
            held = shards_held(architecture, "lm", layout, layout.coordinates(rank))
            for bucket in buckets:
                of_rank = [portion for portion in bucket if portion.name in held]
                total = 0
                for portion in of_rank:
                    shape = held[portion.name].shape
                    share = 1 if portion.rows is None else (portion.rows[1] - portion.rows[0]) / specs[portion.name].shape[0]
                    total += round(4 * math.prod(shape) * share)
                assert total <= max_bytes or (len(bucket) == 1 and specs[bucket[0].name].split_dim != 1)
    return [[portion.name for portion in bucket] for bucket in buckets]


def test_buckets_hold_each_element_once_within_their_bytes():
    source, target = ParallelLayout(tp=2, pp=2, dp=2, virtual_pp=2), ParallelLayout(tp=1, pp=1, dp=8)
    plan = plan_reshard(LLAMA, "lm", source, target)
    names = check_buckets(plan, LLAMA, max_bytes=40_000)
    assert 1 < len(names) < len(parameter_specs(LLAMA, "lm"))
    both_stages = [bucket for bucket in names if {name.split(".")[2] for name in bucket if ".layers." in name} & {"0", "1"} == {"0", "1"}]
    assert both_stages, "stages take turns, so that all of them send"
    small = check_buckets(plan, LLAMA, max_bytes=1500)
    assert len([bucket for bucket in small if "decoder.layers.0.mlp.linear_fc2.weight" in bucket]) > 2, "what must be packed is cut"


def test_what_is_a_contiguous_part_of_what_a_rank_holds_is_a_view_of_it():
    for architecture, head in MODELS[::2]:
        whole = whole_model(architecture, head)
        for source_layout, target_layout in list(pairs(architecture))[::4]:
            plan = plan_reshard(architecture, head, source_layout, target_layout)
            source, wanted = sharded(whole, architecture, head, source_layout), sharded(whole, architecture, head, target_layout)
            for rank in range(source_layout.num_ranks):
                views = plan.views(rank)
                for name, tensor in wanted[rank].items():
                    flat, found = source[rank].get(name, torch.zeros(0)).flatten(), False
                    at = (flat == tensor.flatten()[0]).nonzero()
                    if len(at):
                        found = torch.equal(flat[int(at) : int(at) + tensor.numel()], tensor.flatten())
                    assert (name in views) == found, (source_layout, target_layout, rank, name)
                    if found:
                        view = source[rank][name].narrow(views[name].dim, views[name].source_start, views[name].size)
                        assert view.is_contiguous() and torch.equal(view, tensor)


NESTING = [(4, 1, 1, 2, 1), (8, 8, 16, 4, 4), (8, 2, 1, 2, 4), (4, 2, 2, 1, 1), (8, 1, 2, 2, 2), (4, 1, 1, 2, 2), (2, 2, 1, 2, 1)]
FOR_NESTING = Architecture(num_kv_heads=16, num_layers=8, hidden_size=64, num_heads=16, ffn_size=128, vocab_size=250, max_seq_len=4)


@pytest.mark.parametrize(("tp", "pp", "dp", "target_tp", "target_pp"), NESTING)
def test_each_training_shard_lies_in_its_generation_shard(tp, pp, dp, target_tp, target_pp):
    source = ParallelLayout(tp=tp, pp=pp, dp=dp)
    target = nearest_layout(FOR_NESTING, "lm", source, ParallelLayout.over(source.num_ranks, tp=target_tp, pp=target_pp))
    for rank in range(source.num_ranks):
        a, b = (shards_held(FOR_NESTING, "lm", layout, layout.coordinates(rank)) for layout in (source, target))
        for name in a.keys() & b.keys():
            mine, wanted = ({i for part in side[name].slices for i in range(part.start, part.start + part.size)} for side in (a, b))
            assert mine <= wanted, (rank, name)


def test_from_tp4_to_tp2_each_rank_receives_a_quarter_of_the_weights():
    source = ParallelLayout(tp=4)
    usual = ParallelLayout(tp=2, dp=2)
    target = nearest_layout(FOR_NESTING, "lm", source, usual)
    assert target == ParallelLayout(tp=2, dp=2, tp_stride=2)
    split = sum(math.prod(spec.shape) for spec in parameter_specs(FOR_NESTING, "lm") if spec.split_dim is not None)
    plans = {layout: plan_reshard(FOR_NESTING, "lm", source, layout) for layout in (usual, target)}
    received = {layout: [plan.bytes_received(rank, element_size=1) for rank in range(4)] for layout, plan in plans.items()}
    assert received == {usual: [split // 4, split // 2, split // 2, split // 4], target: [split // 4] * 4}


def test_only_a_layout_over_the_same_ranks_is_put_in_another_order():
    source = ParallelLayout(tp=4)
    for target in (ParallelLayout(tp=2), ParallelLayout(tp=2, dp=2, first_rank=4), ParallelLayout(tp=2, dp=2, first_rank=2)):
        assert nearest_layout(FOR_NESTING, "lm", source, target) == target


MOST_RANKS = 64
WIDE = Architecture(  # to tp 16, with 4 key-value heads, gated, untied
    num_kv_heads=4, num_layers=5, hidden_size=32, num_heads=16, ffn_size=64, vocab_size=250, max_seq_len=3, norm="rmsnorm",
    activation="swiglu", positions="rotary", bias=False, tied_embeddings=False,
)  # fmt: skip
ANY_MODEL = [*MODELS, (WIDE, "lm"), (dataclasses.replace(WIDE, num_kv_heads=1, tied_embeddings=True), "lm")]


@st.composite
def any_layout(draw, architecture):
    """A layout that holds the architecture, over some of 64 ranks."""
    sizes = {name: getattr(architecture, name) for name in SIZES_TO_DIVIDE}
    fitting = [
        (tp, pp, virtual_pp)
        for tp, pp, virtual_pp in itertools.product(range(1, 17), range(1, 8), (1, 2))
        if tp * pp <= MOST_RANKS and not ParallelLayout(tp=tp, pp=pp, virtual_pp=virtual_pp).violations(**sizes)
    ]
    tp, pp, virtual_pp = draw(st.sampled_from(fitting))
    dp = draw(st.integers(1, MOST_RANKS // (tp * pp)))
    stride = draw(st.sampled_from([n for n in range(1, pp * dp + 1) if pp * dp % n == 0]))
    first = draw(st.integers(0, MOST_RANKS - tp * pp * dp))
    return ParallelLayout(tp=tp, pp=pp, dp=dp, virtual_pp=virtual_pp, tp_stride=stride, first_rank=draw(st.sampled_from([0, first])))


def indices_held(architecture, head, layout, rank):
    """Name -> the places along its split dimension that `rank` holds, in its tensor's order; nothing off the layout."""
    if rank not in layout.ranks:
        return {}
    held = shards_held(architecture, head, layout, layout.coordinates(rank))
    return {name: [part.start + i for part in shard.slices for i in range(part.size)] for name, shard in held.items()}


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_between_any_two_layouts_each_missing_byte_arrives_once_and_no_other(data):
    """Exact cover, and bytes as few as can be: what a rank needs and does not hold, counted element by element."""
    architecture, head = data.draw(st.sampled_from(ANY_MODEL))
    source, target = data.draw(any_layout(architecture)), data.draw(any_layout(architecture))
    shapes = {spec.name: spec.shape for spec in parameter_specs(architecture, head)}
    split = {spec.name: spec.split_dim or 0 for spec in parameter_specs(architecture, head)}
    width = {name: math.prod(shape) // shape[split[name]] for name, shape in shapes.items()}
    plan = plan_reshard(architecture, head, source, target)
    held = [indices_held(architecture, head, source, rank) for rank in range(MOST_RANKS)]
    received_from, sent_to = defaultdict(list), defaultdict(list)
    for rank in range(MOST_RANKS):
        mine, wanted = plan.for_rank(rank), indices_held(architecture, head, target, rank)
        arrived = {name: [None] * len(places) for name, places in wanted.items()}
        for piece in mine.local + mine.receives:
            assert piece.target == rank and piece.dim == split[piece.name]
            at = slice(piece.target_start, piece.target_start + piece.size)
            assert arrived[piece.name][at] == [None] * piece.size, "nothing arrives twice"
            arrived[piece.name][at] = held[piece.source][piece.name][piece.source_start : piece.source_start + piece.size]
        assert arrived == wanted
        missing = {name: len(set(places) - set(held[rank].get(name, ()))) for name, places in wanted.items()}
        assert plan.bytes_received(rank, element_size=2) == sum(2 * count * width[name] for name, count in missing.items())
        whole = sum(2 * len(places) * width[name] for name, places in wanted.items())
        assert plan.bytes_local(rank, element_size=2) == whole - plan.bytes_received(rank, element_size=2)
        assert plan.bytes_sent(rank, element_size=2) == sum(2 * piece.size * width[piece.name] for piece in mine.sends)
        for piece in mine.receives:
            received_from[piece.source, rank].append(piece)
        for piece in mine.sends:
            sent_to[rank, piece.target].append(piece)
    assert sent_to == received_from


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_order_of_a_layouts_ranks_that_is_looked_at_keeps_more(data):
    architecture, head = data.draw(st.sampled_from(ANY_MODEL))
    source, target = data.draw(any_layout(architecture)), data.draw(any_layout(architecture))
    kept = {
        layout: plan_reshard(architecture, head, source, layout)
        for layout in (target, nearest_layout(architecture, head, source, target))
    }
    total = [sum(plan.bytes_local(rank, element_size=1) for rank in range(MOST_RANKS)) for plan in kept.values()]
    assert total[-1] >= total[0]
