"""The table of parameters: GPT-3's counts, and every element held where it should be."""

import itertools
import math

import pytest
import torch

from megarlhf.models.architecture import PRESETS, Architecture, make_architecture
from megarlhf.models.parameters import TIED_NAME, parameter_specs, shards_held
from megarlhf.parallel.layout import ParallelLayout

SIZES = {"num_layers": 4, "hidden_size": 24, "num_heads": 12, "ffn_size": 48, "vocab_size": 300, "max_seq_len": 5}
GPT2 = Architecture(num_kv_heads=12, **SIZES)
LLAMA = Architecture(num_kv_heads=6, norm="rmsnorm", activation="swiglu", positions="rotary", bias=False, tied_embeddings=False, **SIZES)
MODELS = [(GPT2, "lm"), (LLAMA, "lm"), (GPT2, "scalar"), (LLAMA, "scalar")]
MODEL_IDS = ["tied", "llama", "scalar", "llama-scalar"]
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


@pytest.mark.parametrize(("architecture", "head"), MODELS, ids=MODEL_IDS)
@pytest.mark.parametrize(("tp", "pp", "virtual_pp"), [(1, 1, 1), (3, 1, 1), (1, 4, 1), (2, 2, 1), (6, 2, 2)])
def test_each_copy_holds_every_element_and_only_replicated_ones_twice(architecture, head, tp, pp, virtual_pp):
    layout = ParallelLayout(tp=tp, pp=pp, dp=2, virtual_pp=virtual_pp)
    for dp in range(2):
        holders = {spec.name: torch.zeros(spec.shape, dtype=torch.int64) for spec in parameter_specs(architecture, head)}
        split = {spec.name: spec.split_dim is not None for spec in parameter_specs(architecture, head)}
        for tp_rank, pp_rank in itertools.product(range(tp), range(pp)):
            place = layout.coordinates(layout.rank(tp=tp_rank, dp=dp, pp=pp_rank))
            for name, shard in shards_held(architecture, head, layout, place).items():
                dim = shard.spec.split_dim or 0
                for start in shard.starts:
                    holders[name].narrow(dim, start, shard.size).add_(1)
                assert shard.shape[dim] == shard.size * len(shard.starts)
        for name, count in holders.items():
            ends = 2 if name == TIED_NAME and architecture.tied_embeddings and head == "lm" and pp > 1 else 1
            assert (count == ends * (1 if split[name] else tp)).all(), name


def test_a_tensor_parallel_rank_holds_its_part_of_gate_and_up():
    held = shards_held(LLAMA, "lm", ParallelLayout(tp=2), ParallelLayout(tp=2).coordinates(1))
    assert held["decoder.layers.0.mlp.linear_fc1.weight"].starts == (24, 48 + 24)
    assert held["decoder.layers.0.self_attention.linear_qkv.weight"].starts == (24,)  # whole query groups are contiguous


def test_what_an_architecture_refuses():
    with pytest.raises(ValueError, match="unknown preset 'gpt3-1b'; there are: gpt3-125m,"):
        make_architecture("gpt3-1b", vocab_size=100)
    with pytest.raises(ValueError, match=r"a model needs a preset \(.*\) or num_heads"):
        make_architecture(None, vocab_size=100, num_layers=2, hidden_size=8)
    with pytest.raises(
        ValueError, match="hidden_size 10 must be divisible by num_heads 4; num_heads 4 must be divisible by num_kv_heads 3"
    ):
        make_architecture(None, vocab_size=100, num_layers=2, hidden_size=10, num_heads=4, num_kv_heads=3)
