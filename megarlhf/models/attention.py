"""Core attention over torch's scaled_dot_product_attention, with rotary positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarlhf.models.rotary import Rotary


class SdpaAttention(nn.Module):
    """Causal softmax(q k / sqrt(d)) v for megatron's self-attention.

    Rows are right padded, so the causal mask alone keeps padding out of every real position and the model is always
    called with ``attention_mask=None``. Generation has a forward pass of its own (models/decoding.py).
    """

    def __init__(self, *, config, layer_number: int, rotary: Rotary | None, **unused: object) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.rotary = rotary

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None = None, **unused: object) -> Tensor:
        """query [seq, batch, heads, head_size]; key, value [seq, batch, kv_heads, head_size] -> [seq, batch, heads * head_size]."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [batch, heads, seq, head_size]
        if self.rotary is not None:
            positions = torch.arange(q.shape[2], device=q.device)[None]
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
