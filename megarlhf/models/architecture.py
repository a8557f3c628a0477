"""What a transformer is, as data: sizes, norm, activation, positions; and the GPT-3 table as presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

VOCAB_MULTIPLE = 128
"""Vocabularies are padded to a multiple of this whatever the layout, so that every tp that divides it holds the same rows."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder-only transformer with pre-normalisation."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    vocab_size: int
    """Ids that mean something; the embedding holds `padded_vocab_size` rows."""
    max_seq_len: int
    head_size: int = 0
    """Width of one attention head; 0 stands for hidden_size / num_heads, and is replaced by it."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    activation: Literal["gelu", "gelu_tanh", "relu", "swiglu"] = "gelu_tanh"
    parallel_residual: bool = False
    """Whether attention and feed-forward both read the layer's input, x + attention(norm(x)) + mlp(norm'(x)), as in GPT-NeoX."""
    qk_norm: bool = False
    """Whether each head's queries and keys are normalised, before rotary positions, with weights that the heads share (Qwen3)."""
    positions: Literal["learned", "rotary"] = "learned"
    rotary_base: float = 10000.0
    rotary_fraction: float = 1.0
    """Share of each head that is rotated, its first `rotary_size` elements (GPT-NeoX)."""
    rotary_scaling: Literal["none", "linear", "llama3"] = "none"
    """How the rotary frequencies of a lengthened context are changed; see models/rotary.py."""
    rotary_scaling_factor: float = 1.0
    rotary_low_frequency_factor: float = 1.0
    """llama3 only, with the two below."""
    rotary_high_frequency_factor: float = 4.0
    rotary_original_context: int = 8192
    """Context before it was lengthened."""
    bias: bool = True
    """Whether linear layers have biases."""
    qkv_bias: bool = False
    """Whether the projections to queries, keys and values have biases where `bias` is off (Qwen2)."""
    tied_embeddings: bool = True
    """Whether the language-model head is the embedding."""

    def __post_init__(self) -> None:
        if not self.head_size and self.hidden_size % self.num_heads == 0:
            object.__setattr__(self, "head_size", self.hidden_size // self.num_heads)

    @property
    def rotary_size(self) -> int:
        """Elements of a head that rotary positions turn."""
        return int(self.head_size * self.rotary_fraction)

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the projections to queries, keys and values have biases."""
        return self.bias or self.qkv_bias

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def num_parameters(self, head: str = "lm") -> int:
        """Parameters with the head "lm" or "scalar", without the padding of the vocabulary (instructgpt facts, section 7)."""
        h, f, q, kv = self.hidden_size, self.ffn_size, self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        norm = 2 if self.norm == "layernorm" else 1
        gate = 2 if self.activation == "swiglu" else 1
        weights = h * (q + 2 * kv) + q * h + gate * h * f + f * h
        biases = (q + 2 * kv if self.has_qkv_bias else 0) + (h + gate * f + h if self.bias else 0)
        norms = 2 * norm * h + (2 * norm * self.head_size if self.qk_norm else 0)
        embedding = self.vocab_size * h * (1 if self.tied_embeddings or head == "scalar" else 2) + (h + 1 if head == "scalar" else 0)
        positions = self.max_seq_len * h if self.positions == "learned" else 0
        return self.num_layers * (weights + biases + norms) + norm * h + embedding + positions

    def violations(self) -> list[str]:
        """Every rule between the sizes that does not hold."""
        found = []
        if not self.head_size:
            found.append(f"hidden_size {self.hidden_size} must be divisible by num_heads {self.num_heads}, or head_size be given")
        if self.num_heads % self.num_kv_heads:
            found.append(f"num_heads {self.num_heads} must be divisible by num_kv_heads {self.num_kv_heads}")
        if not 0 < self.rotary_fraction <= 1:
            found.append(f"rotary_fraction must be in (0, 1], got {self.rotary_fraction}")
        elif self.positions == "rotary" and self.head_size and (self.rotary_size < 2 or self.rotary_size % 2):
            found.append(
                f"rotary positions turn pairs of elements: head_size {self.head_size} * rotary_fraction {self.rotary_fraction} "
                f"must be even and above 0, got {self.rotary_size}"
            )
        if self.rotary_scaling == "llama3" and self.rotary_high_frequency_factor <= self.rotary_low_frequency_factor:
            found.append(
                f"rotary_high_frequency_factor {self.rotary_high_frequency_factor} must be above "
                f"rotary_low_frequency_factor {self.rotary_low_frequency_factor}"
            )
        return found


def _gpt3(num_layers: int, hidden_size: int, num_heads: int) -> dict:
    return {"num_layers": num_layers, "hidden_size": hidden_size, "num_heads": num_heads, "max_seq_len": 2048}


PRESETS: dict[str, dict] = {
    "gpt3-125m": _gpt3(12, 768, 12),
    "gpt3-350m": _gpt3(24, 1024, 16),
    "gpt3-760m": _gpt3(24, 1536, 16),
    "gpt3-1.3b": _gpt3(24, 2048, 16),  # 16 heads as in Stiennon et al. 2020, Table 3; GPT-3's printed 24 does not give 1.3B
    "gpt3-2.7b": _gpt3(32, 2560, 32),
    "gpt3-6.7b": _gpt3(32, 4096, 32),
    "gpt3-13b": _gpt3(40, 5120, 40),
    "gpt3-175b": _gpt3(96, 12288, 96),
}
"""GPT-3's sizes (Brown et al. 2020, Table 2.1): learned positions, tied embeddings, four times wider feed-forward."""


def make_architecture(preset: str | None, *, vocab_size: int, **fields: object) -> Architecture:
    """The architecture of a preset with some fields replaced, or of the fields alone; fields that are None are left out.

    Defaults: as many key-value heads as heads, a feed-forward four times the hidden size, max_seq_len 2048.
    ValueError names an unknown preset, missing sizes and every broken rule.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; there are: {', '.join(PRESETS)}")
    given = {**(PRESETS[preset] if preset else {}), **{name: value for name, value in fields.items() if value is not None}}
    missing = [name for name in ("num_layers", "hidden_size", "num_heads") if name not in given]
    if missing:
        raise ValueError(f"a model needs a preset ({', '.join(PRESETS)}) or {', '.join(missing)}")
    given.setdefault("max_seq_len", 2048)
    given.setdefault("num_kv_heads", given["num_heads"])
    given.setdefault("ffn_size", 4 * given["hidden_size"])
    made = Architecture(vocab_size=vocab_size, **given)
    if found := made.violations():
        raise ValueError("; ".join(found))
    return made


def architecture_to_dict(architecture: Architecture) -> dict:
    """Plain values, for checkpoints; `Architecture(**values)` reads them back."""
    return dataclasses.asdict(architecture)
