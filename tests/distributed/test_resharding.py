"""Resharding over gloo ranks: a model arrives as if it had been built in the other layout, and comes back bitwise."""

import dataclasses
import itertools
import os
import random
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megarlhf.models.architecture import Architecture
from megarlhf.models.parameters import parameter_specs, shards_held
from megarlhf.models.transformer import ModelSpec, build_model, initialize, named_parameters, take_shard
from megarlhf.parallel.groups import World
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.planning.hardware import GPUS, Cluster
from megarlhf.planning.reshard_command import as_text, traffic
from megarlhf.resharding import near_memory
from megarlhf.resharding.execute import Resharder
from megarlhf.resharding.near_memory import NearMemory
from megarlhf.resharding.plan import plan_reshard
from megarlhf.resharding.publish import Publisher

SIZES = {"num_layers": 4, "hidden_size": 32, "num_heads": 4, "ffn_size": 64, "vocab_size": 200, "max_seq_len": 8}
GPT2 = Architecture(num_kv_heads=4, **SIZES)
LLAMA = Architecture(
    **{**SIZES, "num_heads": 8}, num_kv_heads=4, norm="rmsnorm", activation="swiglu", positions="rotary", bias=False, tied_embeddings=False
)
SHARED_HEADS = dataclasses.replace(LLAMA, num_layers=5, num_kv_heads=1, head_size=6, qk_norm=True, qkv_bias=True)
CLUSTER = Cluster(gpu=GPUS["h100-80gb"], nodes=1, gpus_per_node=4, inside=1e11, between=1e10)
MODELS = {
    "tied": ModelSpec(architecture=GPT2, head="lm"),
    "llama": ModelSpec(architecture=LLAMA, head="lm", precision="bf16"),
    "shared-heads": ModelSpec(architecture=SHARED_HEADS, head="lm", precision="bf16"),
    "scalar": ModelSpec(architecture=GPT2, head="scalar", precision="bf16"),  # its head is float32: two dtypes in one message
}
PAIRS = [
    ({"tp": 2, "pp": 2, "virtual_pp": 2}, {"tp": 4}),
    ({"pp": 2}, {"tp": 2, "sequence_parallel": True}),
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


def check_there_and_back():
    world, message_sizes = World.connect(), itertools.cycle((1, 600, 2**18))  # all slices by themselves, some, all packed
    for spec in MODELS.values():
        for source_axes, target_axes in PAIRS:
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
            how = {"bucket_bytes": 3000, "direct_bytes": direct_bytes, "reads": False}  # many buckets
            Resharder(plan, target_groups, **how).run(target, source)
            assert_same(source, before)


def test_a_model_there_and_back(ranks4):
    ranks4.run(check_there_and_back)


LAYOUTS = [
    ({"tp": 4}, {"pp": 4}),
    ({"tp": 2, "pp": 2}, {"dp": 4}),
    ({"pp": 2, "dp": 2}, {"tp": 2, "dp": 2}),
    ({"pp": 4}, {"pp": 2, "virtual_pp": 2, "dp": 2}),
    ({"tp": 4}, {"tp": 2, "dp": 2, "tp_stride": 2}),
    ({"tp": 2, "pp": 2}, {"dp": 2}),  # two of the four ranks generate
    ({"tp": 2}, {"dp": 2, "first_rank": 2}),  # none of those that train
    ({"pp": 2, "first_rank": 1}, {"tp": 4}),
    ({"tp": 2, "pp": 2}, {"first_rank": 3}),
]


def random_layout(chance):
    """Over some of four ranks; all of `MODELS` fit."""
    tp, pp = chance.choice([(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (4, 1)])
    dp = chance.randint(1, 4 // (tp * pp))
    stride = chance.choice([n for n in range(1, pp * dp + 1) if pp * dp % n == 0])
    first = chance.randint(0, 4 - tp * pp * dp)
    return ParallelLayout(tp=tp, pp=pp, dp=dp, virtual_pp=chance.choice([1, 2]) if pp == 2 else 1, tp_stride=stride, first_rank=first)


def random_weights(spec):
    """Name -> full parameter, the same on every rank."""
    generator, dtypes = torch.Generator().manual_seed(0), {"fp32": torch.float32, "bf16": torch.bfloat16}
    return {
        of.name: torch.randn(of.shape, generator=generator).to(torch.float32 if "scalar" in of.name else dtypes[spec.precision])
        for of in parameter_specs(spec.architecture, spec.head)
    }


def cut(whole, spec, groups):
    """What this rank holds of full parameters in a layout, if it is in it."""
    if not groups.is_member:
        return {}
    held = shards_held(spec.architecture, spec.head, groups.layout, groups.coordinates)
    return {name: take_shard(whole[name], shard) for name, shard in held.items()}


def check_any_pair():
    """Tensors in place of models, cut out of the full parameters: read there from the other ranks' memory, and sent back."""
    world, chance = World.connect(), random.Random(1)
    pairs = [tuple(ParallelLayout(**axes) for axes in pair) for pair in LAYOUTS]
    pairs += [(random_layout(chance), random_layout(chance)) for _ in range(28)]
    for pair, spec in zip(pairs, itertools.cycle(MODELS.values()), strict=False):
        source_groups, target_groups = map(world.groups, pair)
        whole = random_weights(spec)
        source = cut(whole, spec, source_groups)
        publisher = Publisher(spec.architecture, spec.head, source_groups, target_groups)
        expected = cut(whole, spec, target_groups)
        target = source if publisher.in_place else {name: torch.full_like(part, -1) for name, part in expected.items()}
        publisher.publish(source, target, version=1)
        assert_same(target, expected)
        publisher.verify(source, target)
        target = {name: part.clone() for name, part in target.items()}
        back = {name: torch.full_like(part, -1) for name, part in source.items()}
        how = {"bucket_bytes": chance.choice([2000, 50_000]), "direct_bytes": chance.choice([1, 700, 2**18]), "reads": False}
        Resharder(plan_reshard(spec.architecture, spec.head, *reversed(pair)), target_groups, **how).run(target, back)
        assert_same(back, source)


def test_any_layout_to_any_other_over_whichever_of_four_ranks(ranks4):
    ranks4.run(check_any_pair)


def check_traffic():
    """What `plan reshard` says for four ranks, and the bytes that each was seen to keep, send and receive."""
    world, spec, found = World.connect(), dataclasses.replace(MODELS["tied"], precision="bf16"), []
    for source_axes, target_axes in LAYOUTS:
        source, target = ParallelLayout(**source_axes), ParallelLayout(**target_axes)
        moved = traffic(spec.architecture, source, target, gpus_per_node=4)
        source_groups, target_groups = world.groups(source), world.groups(moved.plan.target)
        whole = random_weights(spec)
        held, wanted = cut(whole, spec, source_groups), cut(whole, spec, target_groups)
        counted = Counter()

        def send_and_count(operations, counted=counted, batch=dist.batch_isend_irecv):
            for operation in operations:
                counted[operation.op] += operation.tensor.nbytes
            return batch(operations)

        with mock.patch.object(dist, "batch_isend_irecv", send_and_count):
            Resharder(moved.plan, target_groups, reads=False).run(held, wanted)
        kept = sum(part.nbytes for part in wanted.values()) - counted[dist.irecv]
        found.append((as_text(moved, CLUSTER), f"rank {world.rank}: bytes kept {kept:,}, sent {counted[dist.isend]:,}, received "
                      f"{counted[dist.irecv]:,}\n"))  # fmt: skip
    return found


def test_what_plan_reshard_prints_is_what_ranks_send(ranks4):
    for of_rank in ranks4.run(check_traffic):
        for text, line in of_rank:
            assert line in text


SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")
READING_IS_ALLOWED = sys.platform == "linux" and (not SCOPE.exists() or SCOPE.read_text(encoding="ascii").strip() == "0")


def check_ranges(memory, rank, before):
    """Ranges of any size and number arrive, side by side or apart; what cannot be read is an error."""
    mine = torch.arange(5000) + 10_000 * rank
    there = memory.addresses([mine])[before][0]
    for step_there, step_here in ((2, 1), (1, 2), (1, 1)):
        got = torch.full((5000,), -1)
        number = torch.arange(2500)  # more ranges than one call takes
        with mock.patch.object(near_memory, "MOST_BYTES", 4000):
            memory.read(before, there + 8 * step_there * number, got.data_ptr() + 8 * step_here * number, torch.full((2500,), 8))
        assert torch.equal(got[: 2500 * step_here : step_here], step_there * number + 10_000 * before)
        assert int((got == -1).sum()) == 2500
    memory.done()
    with pytest.raises(OSError, match=f"0 of 8 bytes were read from the memory of rank {before}: Bad address"):
        memory.read(before, torch.tensor([8]), torch.tensor([got.data_ptr()]), torch.tensor([8]))


def check_reading():
    """Memory is read where that is allowed; a rank that cannot read its peers, or is not who it said, has all ranks send messages."""
    world = World.connect()
    before = (world.rank - 1) % world.size
    memory = NearMemory(dist.group.WORLD, {before})
    assert memory.reachable == READING_IS_ALLOWED
    if memory.reachable:
        check_ranges(memory, world.rank, before)
    spec = MODELS["tied"]
    pair = world.groups(ParallelLayout(tp=2)), world.groups(ParallelLayout(pp=2))
    whole = random_weights(spec)
    reads = []
    for pid in (os.getpid(), os.getppid() if world.rank else os.getpid()):  # another process, whose memory is not rank 1's
        target = {name: torch.full_like(part, -1) for name, part in cut(whole, spec, pair[1]).items()}
        asked = mock.Mock(side_effect=NearMemory.addresses)
        patched = mock.patch.object(NearMemory, "addresses", lambda memory, tensors, asked=asked: asked(memory, tensors))
        with mock.patch.object(os, "getpid", lambda pid=pid: pid), patched:
            resharder = Resharder(plan_reshard(spec.architecture, spec.head, *(groups.layout for groups in pair)), pair[0])
            resharder.run(cut(whole, spec, pair[0]), target)
        reads.append(asked.call_count)
        assert_same(target, cut(whole, spec, pair[1]))
    return reads


def test_memory_of_the_same_host_is_read_and_no_other(ranks2):
    assert ranks2.run(check_reading) == [[int(READING_IS_ALLOWED), 0]] * 2


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
