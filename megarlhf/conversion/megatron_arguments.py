"""From the arguments of a Megatron-LM training to our architecture; what we cannot compute exactly is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megarlhf.conversion.configuration import Reader
from megarlhf.models.architecture import Architecture

OFF: dict[str, tuple[Any, ...]] = {
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "attention_output_gate": (False,),
    "experimental_attention_variant": (None,),
    "group_query_attention_per_layer": (None,),
    "heterogeneous_layers_config_path": (None,),
    "hybrid_attention_ratio": (None, 0, 0.0),
    "hybrid_layer_pattern": (None,),
    "hybrid_override_pattern": (None,),
    "is_hybrid_model": (False,),
    "linear_attention_type": (None,),
    "mtp_num_layers": (None, 0),
    "multi_latent_attention": (False,),
    "no_rope_freq": (None,),
    "num_experts": (None, 0),
    "qk_l2_norm": (False,),
    "quick_geglu": (False,),
    "rotary_interleaved": (False,),
    "softmax_type": ("vanilla",),
    "squared_relu": (False,),
    "use_mup": (False,),
    "window_size": (None,),
}
"""Argument -> the values at which it changes nothing; at any other the model computes what ours does not. Absent ones are off."""
NORMS = {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"}


def architecture_from_megatron(arguments: Mapping[str, Any], *, vocab_rows: int) -> Architecture:
    """The architecture that the arguments describe, exactly, with all `vocab_rows` ids that its embedding has.

    ValueError names every argument that is missing, malformed or not supported: experts, sliding windows, latent attention, ...
    """
    reader = Reader(arguments)
    for name, harmless in OFF.items():
        value = arguments.get(name, harmless[0])
        if not any(type(value) is type(other) and value == other for other in harmless):
            reader.problems.append(f"{name} {value!r} is not supported")
    hidden, heads = reader.number("hidden_size"), reader.number("num_attention_heads")
    grouped, bias = reader.flag("group_query_attention", False), reader.flag("add_bias_linear", True)
    norm = arguments.get("normalization", "LayerNorm")
    if norm not in NORMS:
        reader.problems.append(f"normalization {norm!r} is not supported, only {' and '.join(NORMS)}")
    fields = {
        "num_layers": reader.number("num_layers"),
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": reader.number("num_query_groups") if grouped else heads,
        "head_size": reader.number("kv_channels", max(1, hidden // heads)),
        "ffn_size": reader.number("ffn_hidden_size", 4 * hidden),
        "max_seq_len": reader.number("max_position_embeddings"),
        "norm": NORMS.get(norm, "layernorm"),
        "norm_eps": reader.number("norm_epsilon" if "norm_epsilon" in arguments else "layernorm_epsilon", 1e-5, kind=float),
        "activation": _activation(reader, bias),
        "bias": bias,
        "qkv_bias": reader.flag("add_qkv_bias", False),
        "qk_norm": reader.flag("qk_layernorm", False),
        "tied_embeddings": not reader.flag("untie_embeddings_and_output_weights", False),
        **_positions(reader),
    }
    if reader.problems:
        raise ValueError("; ".join(reader.problems))
    architecture = Architecture(vocab_size=vocab_rows, **fields)
    if found := architecture.violations():
        raise ValueError("; ".join(found))
    return architecture


def _activation(reader: Reader, bias: bool) -> str:
    """Megatron's fused bias and GeLU, the default where layers have biases, is the tanh approximation; without it GeLU is exact."""
    if reader.flag("swiglu", False):
        return "swiglu"
    approximate = reader.flag("openai_gelu", False) or (bias and reader.flag("bias_gelu_fusion", True))
    return "gelu_tanh" if approximate else "gelu"


def _positions(reader: Reader) -> dict:
    kind = reader.config.get("position_embedding_type", "learned_absolute")
    if kind == "learned_absolute":
        if reader.flag("use_rotary_position_embeddings", False):
            reader.problems.append("use_rotary_position_embeddings with position_embedding_type 'learned_absolute' is not supported")
        return {"positions": "learned"}
    if kind != "rope":
        reader.problems.append(f"position_embedding_type {kind!r} is not supported, only 'learned_absolute' and 'rope'")
    fields = {
        "positions": "rotary",
        "rotary_base": reader.number("rotary_base", 10000.0, kind=float),
        "rotary_fraction": reader.number("rotary_percent", 1.0, kind=float),
    }
    linear, llama3 = reader.config.get("rotary_seq_len_interpolation_factor"), reader.flag("use_rope_scaling", False)
    if linear is not None and llama3:
        reader.problems.append("rotary_seq_len_interpolation_factor with use_rope_scaling is not supported")
    if linear is not None:
        factor = reader.number("rotary_seq_len_interpolation_factor", kind=float)
        return {**fields, "rotary_scaling": "linear", "rotary_scaling_factor": factor}
    if llama3:  # its other numbers are written in megatron-core's code, and are our defaults
        return {**fields, "rotary_scaling": "llama3", "rotary_scaling_factor": reader.number("rope_scaling_factor", 8.0, kind=float)}
    return fields
