"""From our architecture to a config.json that describes it exactly: the one that the model came with, or one written anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from megarlhf.conversion.configuration import ACTIVATIONS, architecture_from_hf
from megarlhf.conversion.families import FAMILIES
from megarlhf.conversion.hf_folder import SCORE_BIAS
from megarlhf.data.tokenizers import Tokenizer
from megarlhf.models.architecture import Architecture, architecture_to_dict
from megarlhf.models.parameters import Head

DTYPE_KEYS = ("torch_dtype", "dtype")
"""Before transformers 5, and since; all versions read the first."""
CLASSIFIER_KEYS = ("id2label", "label2id", "num_labels", "problem_type", SCORE_BIAS)


def config_of(
    architecture: Architecture, template: Mapping[str, Any] | None, family: str | None, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """A config.json for the trunk.

    The `template` (the config.json beside the tokenizer) where it describes this very architecture and `family` names no other; else
    a new one of the family that is named, of the template's, or of the first that can hold the architecture.
    ValueError where none can, or the named one cannot.
    """
    known = template if template is not None and template.get("model_type") in FAMILIES else {}
    if known and family in (None, known["model_type"]) and not _differences(known, architecture):
        return dict(known)
    if family is not None and family not in FAMILIES:
        raise ValueError(f"--family {family} is not supported; there are: {', '.join(FAMILIES)}")
    candidates = [family] if family is not None else list(dict.fromkeys([*([known["model_type"]] if known else []), *FAMILIES]))
    for name in candidates:
        config = {"model_type": name, **WRITERS[name](architecture), **_tokens(known, tokenizer)}
        config |= {"vocab_size": architecture.vocab_size, "tie_word_embeddings": architecture.tied_embeddings}
        if not (found := _differences(config, architecture)):
            return config
    reason = f"{family} cannot: {'; '.join(found)}" if family is not None else f"looked at {', '.join(FAMILIES)}"
    raise ValueError(f"no Hugging Face family describes this architecture ({reason}): {architecture}")


def finished(
    config: Mapping[str, Any], head: Head, dtype: torch.dtype, *, score_bias: float | None, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """The config.json of a model with that head: its class, its precision, and for a classifier its one label and its bias."""
    family = FAMILIES[config["model_type"]]
    done = {key: value for key, value in config.items() if key not in (*CLASSIFIER_KEYS, *DTYPE_KEYS, "_name_or_path")}
    done["architectures"] = [family.language_model if head == "lm" else family.classifier]
    done["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    if head == "scalar":
        done |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, SCORE_BIAS: score_bias}
        ends = done.get("eos_token_id")
        if tokenizer is not None and done.get("pad_token_id") in (None, *(ends if isinstance(ends, list) else [ends])):
            done["pad_token_id"] = tokenizer.pad_id  # transformers takes the score of the last token that is no padding
    return done


def _differences(config: Mapping[str, Any], architecture: Architecture) -> list[str]:
    """How the architecture that a configuration describes differs from `architecture`."""
    try:
        described = architecture_to_dict(architecture_from_hf(config))
    except ValueError as error:
        return [str(error)]
    wanted = architecture_to_dict(architecture)
    return [f"{key} would be {described[key]!r}, and is {wanted[key]!r}" for key in wanted if described[key] != wanted[key]]


def _tokens(template: Mapping[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The special ids: the template's, else the tokenizer's; not those that a class of transformers has by default."""
    own = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if tokenizer is not None:
        own |= {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    return {key: template.get(key, value) for key, value in own.items()}


def _activation(a: Architecture) -> str:
    return next((name for name, ours in ACTIVATIONS.items() if ours == a.activation), a.activation)


def _sizes(a: Architecture, ffn: str = "intermediate_size") -> dict[str, Any]:
    return {
        "num_hidden_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "num_attention_heads": a.num_heads,
        ffn: a.ffn_size,
        "max_position_embeddings": a.max_seq_len,
    }


def _gpt2(a: Architecture) -> dict[str, Any]:
    return {
        "n_layer": a.num_layers,
        "n_embd": a.hidden_size,
        "n_head": a.num_heads,
        "n_inner": a.ffn_size,
        "n_positions": a.max_seq_len,
        "layer_norm_epsilon": a.norm_eps,
        "activation_function": _activation(a),
    }


def _gpt_neox(a: Architecture) -> dict[str, Any]:
    return {
        **_sizes(a),
        "layer_norm_eps": a.norm_eps,
        "hidden_act": _activation(a),
        "use_parallel_residual": a.parallel_residual,
        "rotary_pct": a.rotary_fraction,
        "rotary_emb_base": a.rotary_base,
        **_scaling(a),
    }


def _opt(a: Architecture) -> dict[str, Any]:
    return {
        **_sizes(a, ffn="ffn_dim"),
        "word_embed_proj_dim": a.hidden_size,
        "do_layer_norm_before": True,
        "activation_function": _activation(a),
    }


def _like_llama(a: Architecture) -> dict[str, Any]:
    return {
        **_sizes(a),
        "num_key_value_heads": a.num_kv_heads,
        "head_dim": a.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": a.norm_eps,
        "rope_theta": a.rotary_base,
        **_scaling(a),
    }


def _scaling(a: Architecture) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": a.rotary_scaling, "factor": a.rotary_scaling_factor}
    if a.rotary_scaling == "llama3":
        scaling |= {
            "low_freq_factor": a.rotary_low_frequency_factor,
            "high_freq_factor": a.rotary_high_frequency_factor,
            "original_max_position_embeddings": a.rotary_original_context,
        }
    return {"rope_scaling": scaling if a.rotary_scaling != "none" else None}


WRITERS: dict[str, Callable[[Architecture], dict[str, Any]]] = {
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "llama": lambda a: {**_like_llama(a), "attention_bias": a.bias, "mlp_bias": a.bias},
    "mistral": lambda a: {**_like_llama(a), "sliding_window": None},
    "qwen2": lambda a: {**_like_llama(a), "use_sliding_window": False},
    "qwen3": lambda a: {**_like_llama(a), "use_sliding_window": False, "attention_bias": False},
}
"""model_type -> what of config.json follows from an architecture that the family can hold; `config_of` proves that it does."""
