"""The table of parameters: GPT-3's counts, and every element held where it should be."""

import dataclasses
import itertools
import math

import pytest
import torch

from megarlhf.models.architecture import PRESETS, Architecture, make_architecture
from megarlhf.models.parameters import TIED_NAME, Slice, flat_ranges_counted, kv_heads_per_rank, parameter_specs, shard_of, shards_held
from megarlhf.parallel.layout import ParallelLayout

SIZES = {"num_layers": 4, "hidden_size": 24, "num_heads": 12, "ffn_size": 48, "vocab_size": 300, "max_seq_len": 5}
GPT2 = Architecture(num_kv_heads=12, **SIZES)
LLAMA = Architecture(num_kv_heads=6, norm="rmsnorm", activation="swiglu", positions="rotary", bias=False, tied_embeddings=False, **SIZES)
QWEN3 = dataclasses.replace(LLAMA, num_layers=5, num_kv_heads=2, head_size=4, qk_norm=True)
QWEN2 = dataclasses.replace(QWEN3, num_kv_heads=1, qk_norm=False, qkv_bias=True)
MODELS = [(GPT2, "lm"), (LLAMA, "lm"), (GPT2, "scalar"), (LLAMA, "scalar"), (QWEN3, "lm"), (QWEN2, "lm")]
MODEL_IDS = ["tied", "llama", "scalar", "llama-scalar", "qwen3", "qwen2"]
COUNTED = {
    "gpt3-1.3b": 1_315_723_264,
    "gpt3-2.7b": 2_651_553_280,
    "gpt3-6.7b": 6_658_404_352,
    "gpt3-13b": 12_853_386_240,
    "gpt3-175b": 174_604_259_328,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_parameters_that_gpt3_has(preset):
    architecture = make_architecture(preset, vocab_size=50257)
    padding = (architecture.padded_vocab_size - 50257) * architecture.hidden_size
    assert architecture.num_parameters() == sum(math.prod(spec.shape) for spec in parameter_specs(architecture, "lm")) - padding
    if preset in COUNTED:
        assert architecture.num_parameters() == COUNTED[preset]
    else:
        assert architecture.num_parameters() == pytest.approx(float(preset.split("-")[1].rstrip("m")) * 1e6, rel=0.02)


FITTING = [
    pytest.param(architecture, head, *axes, id=f"{name}-{axes}")
    for (architecture, head), name in zip(MODELS, MODEL_IDS, strict=True)
    for axes in [(1, 1, 1), (3, 1, 1), (1, 4, 1), (2, 2, 1), (6, 2, 2)]
    if architecture.num_kv_heads % axes[0] == 0 or axes[0] % architecture.num_kv_heads == 0
]


@pytest.mark.parametrize(("architecture", "head", "tp", "pp", "virtual_pp"), FITTING)
def test_each_copy_holds_every_element_and_only_replicated_ones_twice(architecture, head, tp, pp, virtual_pp):
    layout = ParallelLayout(tp=tp, pp=pp, dp=2, virtual_pp=virtual_pp)
    spec_of = {spec.name: spec for spec in parameter_specs(architecture, head)}
    for dp in range(2):
        holders = {spec.name: torch.zeros(spec.shape, dtype=torch.int64) for spec in parameter_specs(architecture, head)}
        spoken_for = {name: torch.zeros_like(count) for name, count in holders.items()}
        for tp_rank, pp_rank in itertools.product(range(tp), range(pp)):
            place = layout.coordinates(layout.rank(tp=tp_rank, dp=dp, pp=pp_rank))
            for name, shard in shards_held(architecture, head, layout, place).items():
                for part in shard.slices:
                    holders[name].narrow(shard.dim, part.start, part.size).add_(1)
                flat = torch.zeros(math.prod(shard.shape), dtype=torch.int64)
                for start, stop in flat_ranges_counted(shard, architecture, head, layout, place):
                    flat[start:stop] += 1
                for start, part in shard.placed():
                    counted = flat.view(shard.shape).narrow(shard.dim, start, part.size)
                    spoken_for[name].narrow(shard.dim, part.start, part.size).add_(counted)
        for name, count in holders.items():
            ends = 2 if name == TIED_NAME and architecture.tied_embeddings and head == "lm" and pp > 1 else 1
            shards = [shard_of(spec_of[name], rank, tp) for rank in range(tp)]
            copies = {i: part.copies for shard in shards for part in shard.slices for i in range(part.start, part.start + part.size)}
            expected = torch.tensor([ends * copies[i] for i in range(count.shape[shards[0].dim])])
            assert (count == (expected if shards[0].dim else expected.view(-1, *[1] * (count.dim() - 1)))).all(), name
            assert (spoken_for[name] == 1).all(), name


def test_a_tensor_parallel_rank_holds_its_part_of_gate_and_up():
    held = shards_held(LLAMA, "lm", ParallelLayout(tp=2), ParallelLayout(tp=2).coordinates(1))
    assert held["decoder.layers.0.mlp.linear_fc1.weight"].slices == (Slice(24, 24), Slice(48 + 24, 24))
    assert held["decoder.layers.0.self_attention.linear_qkv.weight"].slices == (Slice(24, 24),)  # whole query groups are contiguous


def test_ranks_that_share_a_key_value_head_divide_its_queries_and_hold_its_key_and_value_alike():
    # 12 heads of 4 in 2 groups of 6 queries, a key and a value: 32 rows a group; 3 ranks share a group, 2 heads each
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    spec = next(spec for spec in parameter_specs(QWEN3, "lm") if spec.name == name)
    assert spec.shape == (64, 24)
    assert shard_of(spec, 0, 6).slices == (Slice(0, 8), Slice(24, 8, copies=3, copy=0))
    assert shard_of(spec, 2, 6).slices == (Slice(16, 8), Slice(24, 8, copies=3, copy=2))
    assert shard_of(spec, 4, 6).slices == (Slice(32 + 8, 8), Slice(32 + 24, 8, copies=3, copy=1))
    assert shard_of(spec, 4, 6).flat_ranges_spoken_for() == [(0, 8 * 24)]
    assert shard_of(spec, 3, 6).flat_ranges_spoken_for() == [(0, 16 * 24)]
    assert [shard_of(spec, 1, tp).slices for tp in (2,)] == [(Slice(32, 32),)]
    assert [kv_heads_per_rank(QWEN3, tp) for tp in (1, 2, 6)] == [2, 1, 1]


@pytest.mark.parametrize("architecture", dict.fromkeys(architecture for architecture, _ in MODELS))
def test_an_architecture_counts_its_parameters(architecture):
    padding = (architecture.padded_vocab_size - architecture.vocab_size) * architecture.hidden_size
    for head, rows in (("lm", 1 if architecture.tied_embeddings else 2), ("scalar", 1)):
        specs = parameter_specs(architecture, head)
        assert architecture.num_parameters(head) == sum(math.prod(s.shape) for s in specs) - padding * rows


def test_what_an_architecture_refuses():
    with pytest.raises(ValueError, match="unknown preset 'gpt3-1b'; there are: gpt3-125m,"):
        make_architecture("gpt3-1b", vocab_size=100)
    with pytest.raises(ValueError, match=r"a model needs a preset \(.*\) or num_heads"):
        make_architecture(None, vocab_size=100, num_layers=2, hidden_size=8)
    with pytest.raises(
        ValueError,
        match="hidden_size 10 must be divisible by num_heads 4, or head_size be given; num_heads 4 must be divisible by num_kv_heads 3",
    ):
        make_architecture(None, vocab_size=100, num_layers=2, hidden_size=10, num_heads=4, num_kv_heads=3)
    sizes = {"vocab_size": 100, "num_layers": 2, "hidden_size": 12, "num_heads": 2, "positions": "rotary"}
    with pytest.raises(ValueError, match=r"head_size 6 \* rotary_fraction 0.25 must be even and above 0, got 1"):
        make_architecture(None, **sizes, rotary_fraction=0.25)
    with pytest.raises(ValueError, match="rotary_high_frequency_factor 2.0 must be above rotary_low_frequency_factor 2.0"):
        make_architecture(None, **sizes, rotary_scaling="llama3", rotary_low_frequency_factor=2.0, rotary_high_frequency_factor=2.0)
