"""Resharding over gloo ranks: a model arrives as if it had been built in the other layout, and comes back bitwise."""

import dataclasses
import itertools

import pytest
import torch

from megarlhf.models.architecture import Architecture
from megarlhf.models.transformer import ModelSpec, build_model, initialize, named_parameters
from megarlhf.parallel.groups import World
from megarlhf.resharding.execute import Resharder
from megarlhf.resharding.plan import plan_reshard
from megarlhf.resharding.publish import Publisher

SIZES = {"num_layers": 4, "hidden_size": 32, "num_heads": 4, "ffn_size": 64, "vocab_size": 200, "max_seq_len": 8}
GPT2 = Architecture(num_kv_heads=4, **SIZES)
LLAMA = Architecture(
    **{**SIZES, "num_heads": 8}, num_kv_heads=4, norm="rmsnorm", activation="swiglu", positions="rotary", bias=False, tied_embeddings=False
)
SHARED_HEADS = dataclasses.replace(LLAMA, num_layers=5, num_kv_heads=1, head_size=6, qk_norm=True, qkv_bias=True)
MODELS = {
    "tied": ModelSpec(architecture=GPT2, head="lm"),
    "llama": ModelSpec(architecture=LLAMA, head="lm", precision="bf16"),
    "shared-heads": ModelSpec(architecture=SHARED_HEADS, head="lm", precision="bf16"),
    "scalar": ModelSpec(architecture=GPT2, head="scalar", precision="bf16"),  # its head is float32: two dtypes in one message
}
PAIRS_OF_TWO = [({"tp": 2}, {"pp": 2}), ({"pp": 2}, {}), ({"pp": 2, "virtual_pp": 2}, {"tp": 2})]
PAIRS_OF_FOUR = [
    ({"tp": 4}, {"pp": 4}),
    ({"tp": 2, "pp": 2}, {}),
    ({"tp": 2, "pp": 2, "virtual_pp": 2}, {"tp": 4}),
    ({"pp": 2}, {"tp": 2, "sequence_parallel": True}),
    ({"pp": 4}, {"pp": 2, "virtual_pp": 2}),
    ({"tp": 4}, {"tp": 2, "tp_stride": 2}),
    ({"tp": 4}, {"tp": 2, "pp": 2, "tp_stride": 2}),
]


def built(spec, groups, *, seed):
    """A new model's canonical name -> parameter."""
    chunks = build_model(spec, groups)
    initialize(chunks, spec, groups, seed=seed)
    return named_parameters(chunks, groups)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def layouts(publisher):
    return publisher.source_groups.layout, publisher.target_groups.layout


def check_there_and_back(pairs):
    world, message_sizes = World.connect(), itertools.cycle((1, 600, 2**18))  # all slices by themselves, some, all packed
    for spec in MODELS.values():
        for source_axes, target_axes in pairs:
            source_groups, target_groups = world.groups(world.layout(**source_axes)), world.groups(world.layout(**target_axes))
            source, target = built(spec, source_groups, seed=1), built(spec, target_groups, seed=1)
            for parameter in target.values():
                torch.nn.init.constant_(parameter, -1.0)
            there = Publisher(spec.architecture, spec.head, source_groups, target_groups)
            with pytest.raises(RuntimeError, match="embedding.word_embeddings.weight differs between the layouts"):
                there.verify(source, target)
            there.publish(source, target, version=7)
            assert there.version == 7 and not there.in_place
            assert_same(target, built(spec, target_groups, seed=1))
            there.verify(source, target)
            for name, parameter in target.items():  # what a rank holds as a contiguous part is no copy
                shared = name in source and parameter.untyped_storage().data_ptr() == source[name].untyped_storage().data_ptr()
                assert shared == (name in plan_reshard(spec.architecture, spec.head, *layouts(there)).views(world.rank)), name
            apart = {name: parameter.detach().clone() for name, parameter in target.items()}
            there.release(target)
            assert there.version is None and not any(parameter.numel() for parameter in target.values())
            there.publish(source, target, version=8)
            assert_same(target, apart)
            target = apart

            direct_bytes = next(message_sizes)
            before = {name: parameter.detach().clone() for name, parameter in source.items()}
            for parameter in source.values():
                torch.nn.init.zeros_(parameter)
            plan = plan_reshard(spec.architecture, spec.head, target_groups.layout, source_groups.layout)
            Resharder(plan, target_groups, bucket_bytes=3000, direct_bytes=direct_bytes).run(target, source)  # many buckets
            assert_same(source, before)


def test_there_and_back_on_two_ranks(ranks2):
    ranks2.run(check_there_and_back, PAIRS_OF_TWO)


def test_there_and_back_on_four_ranks(ranks4):
    ranks4.run(check_there_and_back, PAIRS_OF_FOUR)


def check_same_layout():
    world = World.connect()
    groups = world.groups(world.layout(tp=2))
    with_sequence_parallel = world.groups(world.layout(tp=2, sequence_parallel=True))
    publisher = Publisher(GPT2, "lm", with_sequence_parallel, groups)
    parameters = built(MODELS["tied"], with_sequence_parallel, seed=1)
    assert publisher.in_place
    publisher.publish(parameters, parameters, version=1)
    publisher.verify(parameters, parameters)
    assert publisher.version == 1


def test_same_layout_is_in_place(ranks2):
    ranks2.run(check_same_layout)


def check_one_wrong_copy_is_found():
    world = World.connect()
    source_groups, target_groups = world.groups(world.layout(pp=2)), world.groups(world.layout(tp=2))
    spec = MODELS["tied"]
    source = built(spec, source_groups, seed=1)
    publisher = Publisher(GPT2, "lm", source_groups, target_groups)

    target = built(spec, target_groups, seed=1)
    name = "decoder.layers.2.self_attention.linear_qkv.weight"
    if world.rank == 0:  # two rows change places: no sum of their elements would tell
        target[name].data[[0, 1]] = target[name].data[[1, 0]]
    with pytest.raises(RuntimeError, match=f"{name} differs between the layouts"):
        publisher.verify(source, target)

    target = built(spec, target_groups, seed=1)
    if world.rank == 1:
        target["decoder.layers.1.input_layernorm.bias"].data[3] = 1e-30
    with pytest.raises(RuntimeError, match="decoder.layers.1.input_layernorm.bias is not the same in all copies of the model"):
        publisher.verify(source, target)

    if world.rank == 1:  # the tied embedding's second copy
        source["embedding.word_embeddings.weight"].data[5, 5] += 1
    with pytest.raises(RuntimeError, match="embedding.word_embeddings.weight is not the same in all copies .* in layout tp1 pp2"):
        publisher.verify(source, target)


def check_one_wrong_shared_head_is_found():
    world = World.connect()
    source_groups, target_groups = world.groups(world.layout(pp=2)), world.groups(world.layout(tp=2))
    spec = MODELS["shared-heads"]
    publisher = Publisher(spec.architecture, "lm", source_groups, target_groups)
    name = "decoder.layers.3.self_attention.linear_qkv.weight"
    for every_rank in (True, False):
        target = built(spec, target_groups, seed=1)
        if every_rank or world.rank == 1:
            target[name].data[-1, -1] += 1  # the last row of the one value, which both ranks hold
        what = "differs between the layouts" if every_rank else "is not the same in all copies of the model in layout tp2"
        with pytest.raises(RuntimeError, match=f"{name} {what}"):
            publisher.verify(built(spec, source_groups, seed=1), target)


def test_one_wrong_shared_head_is_found(ranks2):
    ranks2.run(check_one_wrong_shared_head_is_found)


def test_one_wrong_copy_is_found(ranks2):
    ranks2.run(check_one_wrong_copy_is_found)


def check_dtypes_must_agree():
    world = World.connect()
    source_groups, target_groups = world.groups(world.layout(tp=2)), world.groups(world.layout(pp=2))
    spec = MODELS["tied"]
    source = built(spec, source_groups, seed=1)
    target = built(dataclasses.replace(spec, precision="bf16"), target_groups, seed=1)
    with pytest.raises(ValueError, match="is torch.float32 and torch.bfloat16 in layouts tp2 pp1 dp1 and tp1 pp2 dp1"):
        Publisher(GPT2, "lm", source_groups, target_groups).publish(source, target, version=1)


def test_dtypes_must_agree(ranks2):
    ranks2.run(check_dtypes_must_agree)
