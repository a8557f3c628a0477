"""From a Hugging Face config.json to our architecture; what we cannot compute exactly is refused by name, nothing is guessed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from megarlhf.conversion.families import FAMILIES
from megarlhf.models.architecture import Architecture

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""Of feed-forwards without a gate."""
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Kind of rotary scaling -> what it needs; a file with other keys means something that we do not compute."""
ROPE_BASE = 10000.0
"""rope_theta where a file leaves it out, as transformers has it."""

ABSENT = object()


class Reader:
    """Takes keys from a configuration and collects all that is wrong with them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.problems: list[str] = []

    def number(self, key: str, default: Any = ABSENT, *, kind: type = int) -> Any:
        """A positive number; `default` where the key is absent or null, else a problem."""
        value = self.config.get(key)
        if value is None and default is not ABSENT:
            return default
        accepted = (int,) if kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, accepted) or not 0 < value < math.inf:
            self.problems.append(f"{key} must be a positive {'integer' if kind is int else 'number'}, got {value!r}")
            return kind(1)
        return kind(value)

    def mapping(self, key: str) -> Mapping[str, Any]:
        """An object; empty where the key is absent or null."""
        value = self.config.get(key)
        if value is not None and not isinstance(value, Mapping):
            self.problems.append(f"{key} must be an object, got {value!r}")
        return value if isinstance(value, Mapping) else {}

    def flag(self, key: str, default: bool) -> bool:
        """true or false; `default`, the class's own, where the key is absent."""
        value = self.config.get(key, default)
        if not isinstance(value, bool):
            self.problems.append(f"{key} must be true or false, got {value!r}")
            return default
        return value

    def only(self, key: str, supported: Any, default: Any = ABSENT) -> None:
        """A key of which we support one value, which is the class's default too unless one is given."""
        value = self.config.get(key, supported if default is ABSENT else default)
        if value != supported:
            self.problems.append(f"{key} {value!r} is not supported, only {supported!r}")

    def activation(self, key: str, default: str) -> str:
        """Of a feed-forward without a gate."""
        value = self.config.get(key, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            self.problems.append(f"{key} {value!r} is not supported, only {', '.join(ACTIVATIONS)}")
            return "gelu"
        return ACTIVATIONS[value]


def architecture_from_hf(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json describes, exactly.

    ValueError names every field that is missing, malformed or not supported: an unknown model_type, a sliding window that is
    shorter than the context, a kind of rotary scaling or an activation that we do not have, quantized weights.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported; there are: {', '.join(FAMILIES)}")
    reader = Reader(config)
    if config.get("quantization_config") is not None:
        reader.problems.append("quantization_config: quantized weights are not supported; save the model dequantized")
    fields = READERS[model_type](reader)
    fields["tied_embeddings"] = reader.flag("tie_word_embeddings", FAMILIES[model_type].tied_by_default)
    fields["vocab_size"] = reader.number("vocab_size")
    if reader.problems:
        raise ValueError(f"{model_type}: " + "; ".join(reader.problems))
    architecture = Architecture(**fields)
    if found := architecture.violations():
        raise ValueError(f"{model_type}: " + "; ".join(found))
    return architecture


def _gpt2(reader: Reader) -> dict:
    reader.only("scale_attn_weights", True)
    reader.only("scale_attn_by_inverse_layer_idx", False)
    reader.only("add_cross_attention", False)
    hidden, heads = reader.number("n_embd"), reader.number("n_head")
    return {
        "num_layers": reader.number("n_layer"),
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": heads,
        "ffn_size": reader.number("n_inner", 4 * hidden),
        "max_seq_len": reader.number("n_positions"),
        "norm_eps": reader.number("layer_norm_epsilon", 1e-5, kind=float),
        "activation": reader.activation("activation_function", "gelu_new"),
    }


def _gpt_neox(reader: Reader) -> dict:
    reader.only("attention_bias", True)
    heads = reader.number("num_attention_heads")
    return {
        **_sizes(reader),
        "num_kv_heads": heads,
        "norm_eps": reader.number("layer_norm_eps", 1e-5, kind=float),
        "activation": reader.activation("hidden_act", "gelu"),
        "parallel_residual": reader.flag("use_parallel_residual", True),
        **_rope(reader, base_key="rotary_emb_base", fraction_key="rotary_pct", fraction=0.25),
    }


def _opt(reader: Reader) -> dict:
    reader.only("do_layer_norm_before", True)
    reader.only("_remove_final_layer_norm", False)
    reader.only("layer_norm_elementwise_affine", True)
    reader.only("enable_bias", True)
    hidden, heads = reader.number("hidden_size"), reader.number("num_attention_heads")
    reader.only("word_embed_proj_dim", hidden)
    return {
        **_sizes(reader, ffn="ffn_dim"),
        "num_kv_heads": heads,
        "activation": reader.activation("activation_function", "relu"),
    }


def _llama(reader: Reader) -> dict:
    bias = reader.flag("attention_bias", False)
    if reader.flag("mlp_bias", False) != bias:
        reader.problems.append(f"attention_bias {bias} with another mlp_bias is not supported, only biases in all linear layers or in none")
    return {**_like_llama(reader), "bias": bias}


def _mistral(reader: Reader) -> dict:
    _no_window(reader, reader.config.get("sliding_window", 4096))
    return _like_llama(reader)


def _qwen2(reader: Reader) -> dict:
    _no_window_in_layers(reader)
    return {**_like_llama(reader), "qkv_bias": True}


def _qwen3(reader: Reader) -> dict:
    _no_window_in_layers(reader)
    reader.only("attention_bias", False)
    return {**_like_llama(reader, head_size=reader.number("head_dim", 128)), "qk_norm": True}


READERS: dict[str, Callable[[Reader], dict]] = {
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}


def _sizes(reader: Reader, ffn: str = "intermediate_size") -> dict:
    return {
        "num_layers": reader.number("num_hidden_layers"),
        "hidden_size": reader.number("hidden_size"),
        "num_heads": reader.number("num_attention_heads"),
        "ffn_size": reader.number(ffn),
        "max_seq_len": reader.number("max_position_embeddings"),
    }


def _like_llama(reader: Reader, head_size: int | None = None) -> dict:
    """Llama and what followed it: RMS norms, a gated feed-forward, rotary positions, grouped queries, no biases."""
    reader.only("hidden_act", "silu")
    sizes = _sizes(reader)
    return {
        **sizes,
        "num_kv_heads": reader.number("num_key_value_heads", sizes["num_heads"]),
        "head_size": head_size or reader.number("head_dim", 0),
        "norm": "rmsnorm",
        "norm_eps": reader.number("rms_norm_eps", 1e-6, kind=float),
        "activation": "swiglu",
        "bias": False,
        **_rope(reader),
    }


def _rope(reader: Reader, base_key: str = "rope_theta", fraction_key: str | None = None, fraction: float = 1.0) -> dict:
    """Rotary positions, from `rope_parameters`, or from `rope_theta` and `rope_scaling` as files from before transformers 5 have them."""
    named = {"rope_theta": reader.config.get(base_key), "partial_rotary_factor": reader.config.get(fraction_key or "partial_rotary_factor")}
    found = {**named, **reader.mapping("rope_scaling"), **reader.mapping("rope_parameters")}
    kinds = [found.pop(key) for key in ("rope_type", "type") if key in found] or ["default"]
    kind = kinds[0]
    if not isinstance(kind, str) or kind not in ROPE_KEYS or kinds[-1] != kind:
        reader.problems.append(f"rotary scaling {' and '.join(map(repr, kinds))} is not supported, only {', '.join(ROPE_KEYS)}")
        return {}
    rope = Reader(found)
    turned = rope.number("partial_rotary_factor", fraction, kind=float)
    if fraction_key and reader.mapping("rope_parameters") and found["partial_rotary_factor"] is None:
        rope.problems.append("rope_parameters must say partial_rotary_factor in this family")
    if fraction_key is None and turned != 1:
        rope.problems.append(f"partial_rotary_factor {turned} is not supported in this family")
    fields = {
        "positions": "rotary",
        "rotary_base": rope.number("rope_theta", ROPE_BASE, kind=float),
        "rotary_fraction": turned,
        "rotary_scaling": {"default": "none"}.get(kind, kind),
    }
    if kind != "default":
        fields["rotary_scaling_factor"] = rope.number("factor", kind=float)
    if kind == "llama3":
        fields["rotary_low_frequency_factor"] = rope.number("low_freq_factor", kind=float)
        fields["rotary_high_frequency_factor"] = rope.number("high_freq_factor", kind=float)
        fields["rotary_original_context"] = rope.number("original_max_position_embeddings")
    unknown = [key for key in found if key not in ("rope_theta", "partial_rotary_factor", *ROPE_KEYS[kind])]
    rope.problems += [f"{key} is not supported with {kind} rotary positions" for key in unknown]
    reader.problems += [f"rotary positions: {problem}" for problem in rope.problems]
    return fields


def _no_window(reader: Reader, window: Any) -> None:
    context = reader.config.get("max_position_embeddings")
    if window is not None and not (isinstance(window, int) and isinstance(context, int) and window >= context):
        reader.problems.append(
            f"sliding_window {window!r} is not supported where it is shorter than max_position_embeddings {context!r}; on rows of at most "
            f"{window!r} tokens it changes nothing: lower max_position_embeddings to that to use the model on such rows"
        )


def _no_window_in_layers(reader: Reader) -> None:
    if reader.flag("use_sliding_window", False):
        _no_window(reader, reader.config.get("sliding_window", 4096))
        return
    kinds = reader.config.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)):
        reader.problems.append(f"layer_types {kinds!r} is not supported, only 'full_attention' in all layers")
