"""The layer whose attention and feed-forward both read its input, as in GPT-NeoX."""

from __future__ import annotations

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class ParallelResidualLayer(TransformerLayer):
    """x + attention(norm(x)) + mlp(norm'(x)), with megatron's modules under their usual names."""

    def forward(self, hidden_states: Tensor, attention_mask: object = None, **unused: object) -> tuple[Tensor, None]:
        """hidden_states [seq (/ tp), batch, h] -> the same shape, and no context."""
        attention = self.self_attention(self.input_layernorm(hidden_states), attention_mask=attention_mask)
        feed_forward = self.mlp(self.pre_mlp_layernorm(hidden_states))
        add = self.mlp_bda(self.training, self.config.bias_dropout_fusion)  # (output, bias), residual, dropout -> sum
        return add(feed_forward, add(attention, hidden_states, self.hidden_dropout), self.hidden_dropout), None
