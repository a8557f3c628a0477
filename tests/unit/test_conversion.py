"""Hugging Face configurations as architectures: what they mean, and every refusal by name."""

import random

import pytest
import torch

from megarlhf.conversion.configuration import architecture_from_hf
from megarlhf.conversion.families import FAMILIES
from megarlhf.conversion.forms import their_shapes, to_ours, to_theirs
from megarlhf.models.architecture import Architecture
from megarlhf.models.parameters import parameter_specs

SIZES = {
    "vocab_size": 200,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "intermediate_size": 48,
}
LLAMA = {"model_type": "llama", "hidden_act": "silu", "num_key_value_heads": 2, "rms_norm_eps": 1e-5, **SIZES}
OF_FAMILY = {
    "gpt2": {"model_type": "gpt2", "vocab_size": 200, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {"model_type": "gpt_neox", **SIZES},
    "opt": {"model_type": "opt", **SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "llama": LLAMA,
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": None},
    "qwen2": {**LLAMA, "model_type": "qwen2"},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 16},
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def test_old_and_new_files_say_the_same():
    """Before transformers 5: rope_theta, rope_scaling with "type", rotary_pct, no key for what is as the class has it."""
    new = architecture_from_hf({**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}})
    assert new == architecture_from_hf({**LLAMA, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}})
    assert (new.rotary_scaling, new.rotary_scaling_factor, new.rotary_original_context, new.rotary_base) == ("llama3", 8.0, 32, 5e5)
    linear = architecture_from_hf({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2}})
    assert (linear.rotary_scaling, linear.rotary_scaling_factor, linear.rotary_base) == ("linear", 2.0, 10000.0)
    neox = architecture_from_hf({**OF_FAMILY["gpt_neox"], "rotary_pct": 0.5, "rotary_emb_base": 20000})
    assert (neox.rotary_fraction, neox.rotary_size, neox.rotary_base, neox.parallel_residual) == (0.5, 4, 20000.0, True)
    assert architecture_from_hf(OF_FAMILY["gpt_neox"]).rotary_fraction == 0.25


@pytest.mark.parametrize(
    ("family", "tied", "others"),
    [
        ("gpt2", True, {"ffn_size": 128, "activation": "gelu_tanh", "positions": "learned", "bias": True}),
        ("gpt_neox", False, {"activation": "gelu", "positions": "rotary", "bias": True}),
        ("opt", True, {"ffn_size": 48, "activation": "relu", "positions": "learned", "bias": True}),
        ("llama", False, {"num_kv_heads": 2, "head_size": 8, "norm": "rmsnorm", "activation": "swiglu", "bias": False, "qkv_bias": False}),
        ("mistral", False, {"num_kv_heads": 2, "qkv_bias": False, "qk_norm": False}),
        ("qwen2", False, {"qkv_bias": True, "bias": False}),
        ("qwen3", False, {"qk_norm": True, "qkv_bias": False, "head_size": 16}),
    ],
)
def test_what_a_file_leaves_out_is_as_the_class_has_it(family, tied, others):
    found = architecture_from_hf(OF_FAMILY[family])
    assert found.tied_embeddings == tied and architecture_from_hf({**OF_FAMILY[family], "tie_word_embeddings": not tied}) != found
    assert {name: getattr(found, name) for name in others} == others


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"model_type": "falcon"}, "model_type 'falcon' is not supported; there are: gpt2, gpt_neox, opt, llama, mistral, qwen2"),
        ("mistral", {"sliding_window": 32}, "sliding_window 32 is not supported where it is shorter than max_position_embeddings 64"),
        ("mistral", {"sliding_window": "all"}, "sliding_window 'all' is not supported"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window 8 is not supported"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types .*'sliding_attention'.* is not supported"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rotary scaling 'yarn' is not supported, only default, linear"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rotary scaling 'dynamic' is not supported"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rotary positions: factor must be a positive number, got None"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "beta is not supported with linear rotary positions"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor must be a positive number, got None"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not supported in this family"),
        ("gpt_neox", {"rope_parameters": {"rope_theta": 10000.0}}, "rope_parameters must say partial_rotary_factor"),
        ("gpt_neox", {"rotary_pct": 0.1}, "head_size 8 .* must be even and above 0, got 0"),
        ("gpt_neox", {"attention_bias": False}, "attention_bias False is not supported, only True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu'"),
        ("opt", {"activation_function": "swish"}, "activation_function 'swish' is not supported, only gelu, gelu_new,"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim 16 is not supported, only 32"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before False is not supported, only True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True is not supported"),
        ("llama", {"attention_bias": True}, "attention_bias True with another mlp_bias is not supported"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantized weights are not supported"),
        ("llama", {"num_attention_heads": 5}, "hidden_size 32 must be divisible by num_heads 5.*; num_heads 5 must be divisible by num_kv"),
        ("llama", {"vocab_size": None, "num_hidden_layers": "2"}, "num_hidden_layers must be a positive integer, got '2'; vocab_size"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, got 'no'"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(family, changes, message):
    with pytest.raises(ValueError, match=message):
        architecture_from_hf({**OF_FAMILY[family], **changes})


def test_broken_configurations_give_clear_errors_only():
    generator = random.Random(0)
    numbers = [0, -1, 1.5, float("nan"), float("inf"), 10**30]
    values = [None, True, False, *numbers, "", "llama", [], [1], {}, {"factor": []}, {"rope_type": []}]
    optional = ["rope_scaling", "rope_parameters", "rope_theta", "layer_types", "sliding_window", "head_dim", "rotary_pct", "n_inner"]
    refused = 0
    for _ in range(4000):
        config = dict(generator.choice(list(OF_FAMILY.values())))
        for key in generator.sample([*config, *optional], generator.randint(1, 3)):
            config[key] = generator.choice(values)
        try:
            assert isinstance(architecture_from_hf(config), Architecture)
        except ValueError as error:
            refused += 1
            assert str(error).startswith((f"{config.get('model_type')}: ", "model_type "))
    assert refused > 2000


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_there_and_back_is_bit_for_bit_and_each_of_their_tensors_is_one_of_ours(family, head):
    architecture = architecture_from_hf(OF_FAMILY[family])
    seen = set()
    for spec in parameter_specs(architecture, head):
        if spec.name == "scalar_head.bias":  # their classifiers have none
            continue
        source = FAMILIES[family].source(spec.name)
        shapes = their_shapes(source.form, spec.shape, architecture)
        theirs = [torch.randn(shape) for shape in shapes]
        ours = to_ours(source.form, theirs, architecture)
        assert ours.shape == spec.shape and len(theirs) == len(source.names) and not seen & set(source.names)
        seen |= set(source.names)
        for back, given, shape in zip(to_theirs(source.form, ours, architecture), theirs, shapes, strict=True):
            assert back.shape == shape
            assert torch.equal(back, given) or (source.form == "after_two_rows" and torch.equal(back[2:], given[2:]))
    assert not any("{" in name for name in seen)
    with pytest.raises(KeyError):
        FAMILIES[family].source("decoder.layers.0.self_attention.linear_q.weight")
