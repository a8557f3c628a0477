"""Rotary position embedding (Su et al. 2021), halves rotated as in Llama and GPT-NeoX."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megarlhf.models.architecture import Architecture


def frequencies(architecture: Architecture) -> Tensor:
    """Radians per position of each rotated pair: [rotary_size / 2] float32.

    base ** (-2 i / rotary_size), then scaled. "linear" divides all by the factor (Chen et al. 2023, position interpolation).
    "llama3" (Llama 3.1's published code) divides those that turn less than low_frequency_factor times in the original context by
    the factor, leaves those that turn more than high_frequency_factor times, and mixes both in between.
    """
    a = architecture
    plain = a.rotary_base ** (-torch.arange(0, a.rotary_size, 2, dtype=torch.float32) / a.rotary_size)
    if a.rotary_scaling == "none":
        return plain
    if a.rotary_scaling == "linear":
        return plain / a.rotary_scaling_factor
    turns = a.rotary_original_context * plain / (2 * math.pi)
    low, high = a.rotary_low_frequency_factor, a.rotary_high_frequency_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / a.rotary_scaling_factor + kept * plain


class Rotary:
    """Turns queries and keys by their positions; not a module, so that no precision is cast."""

    def __init__(self, architecture: Architecture) -> None:
        self.size = architecture.rotary_size
        self._frequencies = frequencies(architecture)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) of positions [...], each [..., size / 2] float32."""
        if self._frequencies.device != positions.device:
            self._frequencies = self._frequencies.to(positions.device)
        angle = positions[..., None].float() * self._frequencies
        return angle.cos(), angle.sin()

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [..., head_size] turned by angles whose cos and sin [..., size / 2] broadcast with it; what is beyond `size` stays as it is."""
        first, second = x[..., : self.size].float().chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
        return turned if self.size == x.shape[-1] else torch.cat([turned, x[..., self.size :]], dim=-1)
