"""A model's sizes and forms."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Literal

from megarlhf.config.rules import TOKENS, Range

Preset = Literal["gpt3-125m", "gpt3-350m", "gpt3-760m", "gpt3-1.3b", "gpt3-2.7b", "gpt3-6.7b", "gpt3-13b", "gpt3-175b"]
SIZES = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "ffn_size", "max_seq_len")
"""What a preset fixes, or lets follow from what it fixes."""
LLAMA3 = ("rotary_low_frequency_factor", "rotary_high_frequency_factor", "rotary_original_context")
SCALING = ("rotary_scaling_factor", *LLAMA3)
ROTARY = ("rotary_base", "rotary_fraction", "rotary_scaling")


@dataclass(frozen=True, kw_only=True)
class ArchitectureConfig:
    """A model built from nothing: a GPT-3 preset, or sizes, or a preset with some sizes replaced."""

    preset: Preset | None = None
    """Sizes of Brown et al. 2020, Table 2.1; a size that stands beside it takes the place of the preset's, which is said."""
    num_layers: Annotated[int, Range(1, 10_000)] | None = None
    """Transformer layers."""
    hidden_size: Annotated[int, Range(1, 2**18)] | None = None
    """Width of the residual stream."""
    num_heads: Annotated[int, Range(1, 2**16)] | None = None
    """Attention heads."""
    num_kv_heads: Annotated[int, Range(1, 2**16)] | None = None
    """Key-value heads (grouped-query attention); None: as many as heads."""
    ffn_size: Annotated[int, Range(1, 2**20)] | None = None
    """Width of the feed-forward layer; None: four times hidden_size."""
    max_seq_len: Annotated[int, Range(2, TOKENS)] | None = None
    """Context in tokens; None: 2048."""
    head_size: Annotated[int, Range(1, 2**16)] | None = None
    """Width of one attention head; None: hidden_size / num_heads."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before each sublayer."""
    norm_eps: Annotated[float, Range(1e-20, 1)] = 1e-5
    """Added to the variance."""
    activation: Literal["gelu", "gelu_tanh", "relu", "swiglu"] = "gelu_tanh"
    """Feed-forward activation; gelu_tanh is GPT-2's."""
    parallel_residual: bool = False
    """Attention and feed-forward both read the layer's input (GPT-NeoX)."""
    qk_norm: bool = False
    """Normalise each head's queries and keys (Qwen3)."""
    positions: Literal["learned", "rotary"] = "learned"
    """Position embedding."""
    rotary_base: Annotated[float, Range(1, 1e12, above=True)] = 10000.0
    """Base period of rotary positions."""
    rotary_fraction: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Share of each head that rotary positions turn (GPT-NeoX: 0.25)."""
    rotary_scaling: Literal["none", "linear", "llama3"] = "none"
    """How rotary frequencies are changed for a lengthened context: not, all divided by the factor, or the slow ones (Llama 3.1)."""
    rotary_scaling_factor: Annotated[float, Range(1, 1e6)] = 1.0
    """What frequencies are divided by."""
    rotary_low_frequency_factor: Annotated[float, Range(0, 1e6, above=True)] = 1.0
    """llama3: frequencies that turn less often than this in the original context are divided."""
    rotary_high_frequency_factor: Annotated[float, Range(0, 1e6, above=True)] = 4.0
    """llama3: frequencies that turn more often than this in the original context stay."""
    rotary_original_context: Annotated[int, Range(1, TOKENS)] = 8192
    """llama3: the context in tokens before it was lengthened."""
    bias: bool = True
    """Biases in linear layers."""
    qkv_bias: bool = False
    """Biases in the projections to queries, keys and values where `bias` is off (Qwen2)."""
    tied_embeddings: bool = True
    """Whether the language-model head is the embedding."""
    init_std: Annotated[float, Range(0, 10, above=True)] = 0.02
    """Standard deviation of initial weights (GPT-2)."""

    def violations(self) -> list[str]:
        """Rules within the section."""
        missing = [name for name in ("num_layers", "hidden_size", "num_heads") if getattr(self, name) is None]
        if self.preset is None and missing:
            return [f"preset or {', '.join(missing)} must be given"]
        found = []
        width, heads, kv_heads = self.hidden_size, self.num_heads, self.num_kv_heads
        if width and heads and not self.head_size and width % heads:
            rest = f"{width} % {heads} = {width % heads}"
            found.append(f"hidden_size {width} must be divisible by num_heads {heads}, or head_size be given; {rest}")
        if heads and kv_heads and heads % kv_heads:
            found.append(f"num_heads {heads} must be divisible by num_kv_heads {kv_heads}; {heads} % {kv_heads} = {heads % kv_heads}")
        return found

    def doubts(self) -> list[str]:
        """What is hardly meant."""
        replaced = [f"{name} {getattr(self, name)}" for name in SIZES if getattr(self, name) is not None]
        found = [f"preset {self.preset} with {', '.join(replaced)} in place of its own"] if self.preset and replaced else []
        if self.positions != "rotary":
            idle, why = (*ROTARY, *SCALING), f"positions {self.positions}"
        else:
            idle, why = {"none": SCALING, "linear": LLAMA3}.get(self.rotary_scaling, ()), f"rotary_scaling {self.rotary_scaling}"
            if self.rotary_scaling != "none" and not self._is_given("rotary_scaling_factor"):
                found.append(f"rotary_scaling {self.rotary_scaling} with rotary_scaling_factor 1 leaves positions as they are")
        found += [f"{name} {self._said(name)} has no effect with {why}" for name in idle if self._is_given(name)]
        if self.qkv_bias and self.bias:
            found.append("qkv_bias has no effect with bias true: all linear layers have biases")
        return found

    def _said(self, name: str) -> str:
        value = getattr(self, name)
        return f"{value:g}" if isinstance(value, float) else str(value)

    def _is_given(self, name: str) -> bool:
        return getattr(self, name) != next(field.default for field in fields(self) if field.name == name)
