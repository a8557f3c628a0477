"""The families of Hugging Face transformers' models that we can hold: for each of our parameters, which of theirs it is made of.

Plain data. A name that no table has is not converted, and a parameter without an entry cannot be read: nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Form = Literal["same", "vocabulary", "after_two_rows", "transposed", "stacked", "grouped", "thirds", "thirds_transposed"]
"""How their tensors become ours; conversion/forms.py says what each means."""


@dataclass(frozen=True)
class Source:
    """What one of our parameters is made of."""

    names: tuple[str, ...]
    """Their names, with {layer} for the layer's number from 0."""
    form: Form = "same"


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one family's files name their tensors."""

    model_type: str
    """What config.json calls it."""
    language_model: str
    """Class of the language model, as config.json's `architectures` names it."""
    classifier: str
    """Class of the sequence classifier, which with one label is a reward model."""
    prefix: str
    """What the trunk's names begin with in files of either class; files of a bare trunk leave it out."""
    trunk: Mapping[str, Source]
    """Our name, with {layer}, -> theirs after the prefix. Entries for biases that an architecture has not are not used."""
    unembedding: str = "lm_head.weight"
    """The head of a language model whose embeddings are not tied; a tied one's file may repeat the embedding under it."""
    score: str = "score.weight"
    """The head of a classifier, [labels, hidden]; it has no bias."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names under which transformers writes a tensor -> the name here."""
    buffers: tuple[str, ...] = ()
    """Regular expressions of names, prefix left out, that hold no weights and are computed anew: masks, frequencies."""
    tied_by_default: bool = False
    """tie_word_embeddings where config.json leaves it out, as the class has it."""

    def source(self, name: str) -> Source:
        """Theirs for one of our parameters, whole names. KeyError where the family has no such parameter."""
        if name == "output_layer.weight":
            return Source((self.unembedding,), "vocabulary")
        if name == "scalar_head.weight":
            return Source((self.score,))
        parts = name.split(".")
        layer = parts[2] if name.startswith("decoder.layers.") else ""
        entry = self.trunk[".".join([*parts[:2], "{layer}", *parts[3:]]) if layer else name]
        return Source(tuple(self.prefix + theirs.format(layer=layer) for theirs in entry.names), entry.form)


def _module(ours: str, theirs: str | tuple[str, ...], form: Form = "same", bias: Form | None = "same") -> dict[str, Source]:
    """Weight and bias (not where `bias` is None) of one of our modules."""
    names = (theirs,) if isinstance(theirs, str) else theirs
    entries = {f"{ours}.weight": Source(tuple(f"{name}.weight" for name in names), form)}
    if bias is not None:
        entries[f"{ours}.bias"] = Source(tuple(f"{name}.bias" for name in names), bias)
    return entries


_LAYER = "decoder.layers.{layer}"
_QKV, _PROJ = f"{_LAYER}.self_attention.linear_qkv", f"{_LAYER}.self_attention.linear_proj"
_FC1, _FC2 = f"{_LAYER}.mlp.linear_fc1", f"{_LAYER}.mlp.linear_fc2"
_NORM1, _NORM2, _LAST_NORM = f"{_LAYER}.input_layernorm", f"{_LAYER}.pre_mlp_layernorm", "decoder.final_layernorm"
_WORDS, _POSITIONS = "embedding.word_embeddings", "embedding.position_embeddings"

_GPT2 = {
    **_module(_WORDS, "wte", "vocabulary", bias=None),
    **_module(_POSITIONS, "wpe", bias=None),
    **_module(_NORM1, "h.{layer}.ln_1"),
    **_module(_QKV, "h.{layer}.attn.c_attn", "thirds_transposed", bias="thirds"),
    **_module(_PROJ, "h.{layer}.attn.c_proj", "transposed"),
    **_module(_NORM2, "h.{layer}.ln_2"),
    **_module(_FC1, "h.{layer}.mlp.c_fc", "transposed"),
    **_module(_FC2, "h.{layer}.mlp.c_proj", "transposed"),
    **_module(_LAST_NORM, "ln_f"),
}
_NEOX = {
    **_module(_WORDS, "embed_in", "vocabulary", bias=None),
    **_module(_NORM1, "layers.{layer}.input_layernorm"),
    **_module(_QKV, "layers.{layer}.attention.query_key_value"),  # head by head its query, key and value, as ours with a group a head
    **_module(_PROJ, "layers.{layer}.attention.dense"),
    **_module(_NORM2, "layers.{layer}.post_attention_layernorm"),
    **_module(_FC1, "layers.{layer}.mlp.dense_h_to_4h"),
    **_module(_FC2, "layers.{layer}.mlp.dense_4h_to_h"),
    **_module(_LAST_NORM, "final_layer_norm"),
}
_OPT = {
    **_module(_WORDS, "decoder.embed_tokens", "vocabulary", bias=None),
    **_module(_POSITIONS, "decoder.embed_positions", "after_two_rows", bias=None),
    **_module(_NORM1, "decoder.layers.{layer}.self_attn_layer_norm"),
    **_module(_QKV, tuple(f"decoder.layers.{{layer}}.self_attn.{x}_proj" for x in "qkv"), "grouped", bias="grouped"),
    **_module(_PROJ, "decoder.layers.{layer}.self_attn.out_proj"),
    **_module(_NORM2, "decoder.layers.{layer}.final_layer_norm"),
    **_module(_FC1, "decoder.layers.{layer}.fc1"),
    **_module(_FC2, "decoder.layers.{layer}.fc2"),
    **_module(_LAST_NORM, "decoder.final_layer_norm"),
}
_LLAMA = {
    **_module(_WORDS, "embed_tokens", "vocabulary", bias=None),
    **_module(_NORM1, "layers.{layer}.input_layernorm", bias=None),
    **_module(_QKV, tuple(f"layers.{{layer}}.self_attn.{x}_proj" for x in "qkv"), "grouped", bias="grouped"),
    **_module(f"{_LAYER}.self_attention.q_layernorm", "layers.{layer}.self_attn.q_norm", bias=None),
    **_module(f"{_LAYER}.self_attention.k_layernorm", "layers.{layer}.self_attn.k_norm", bias=None),
    **_module(_PROJ, "layers.{layer}.self_attn.o_proj"),
    **_module(_NORM2, "layers.{layer}.post_attention_layernorm", bias=None),
    **_module(_FC1, tuple(f"layers.{{layer}}.mlp.{x}_proj" for x in ("gate", "up")), "stacked", bias="stacked"),
    **_module(_FC2, "layers.{layer}.mlp.down_proj"),
    **_module(_LAST_NORM, "norm", bias=None),
}


def _like_llama(model_type: str, class_name: str) -> Family:
    return Family(
        model_type=model_type,
        language_model=f"{class_name}ForCausalLM",
        classifier=f"{class_name}ForSequenceClassification",
        prefix="model.",
        trunk=_LLAMA,
        buffers=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"rotary_emb\.inv_freq"),
    )


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        model_type="gpt2",
        language_model="GPT2LMHeadModel",
        classifier="GPT2ForSequenceClassification",
        prefix="transformer.",
        trunk=_GPT2,
        buffers=(r"h\.\d+\.attn\.(masked_)?bias",),
        tied_by_default=True,
    ),
    "gpt_neox": Family(
        model_type="gpt_neox",
        language_model="GPTNeoXForCausalLM",
        classifier="GPTNeoXForSequenceClassification",
        prefix="gpt_neox.",
        trunk=_NEOX,
        unembedding="embed_out.weight",
        aliases={"lm_head.weight": "embed_out.weight"},
        buffers=(r"layers\.\d+\.attention\.(masked_)?bias", r"layers\.\d+\.attention\.rotary_emb\.inv_freq", r"rotary_emb\.inv_freq"),
    ),
    "opt": Family(
        model_type="opt",
        language_model="OPTForCausalLM",
        classifier="OPTForSequenceClassification",
        prefix="model.",
        trunk=_OPT,
        tied_by_default=True,
    ),
    "llama": _like_llama("llama", "Llama"),  # Llama 1 to 3, SmolLM2
    "mistral": _like_llama("mistral", "Mistral"),
    "qwen2": _like_llama("qwen2", "Qwen2"),  # Qwen2.5 too
    "qwen3": _like_llama("qwen3", "Qwen3"),
}
"""config.json's model_type -> family."""
