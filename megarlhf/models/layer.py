"""Megatron's transformer layer with fewer operations, the last of which goes on with the wanted tokens alone."""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

LinearOutput = tuple[Tensor, Tensor | None]
"""(output, bias that is still to be added or None), as megatron's linear layers give it."""


class Layer(TransformerLayer):
    """x + attention(norm(x)), and then y + mlp(norm'(y)), by megatron's modules under their usual names."""

    parallel_residual = False
    """Whether the feed-forward reads what the attention reads."""
    ends_trunk = False
    """Whether nothing but the final norm follows, so that the other tokens are needed for their keys and values only."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, context_mask: Tensor | None = None, **unused: object
    ) -> tuple[Tensor, None]:
        """hidden_states [seq (/ tp), batch, h] -> the same shape, and no context.

        Args:
            attention_mask: see `SdpaAttention`.
            context_mask: [n] int64, the tokens that are wanted of packed rows: the last layer returns these, [n, 1, h]. The name is
                megatron's, which has no use for it here and brings it to every layer, recomputed ones too.
        """
        wanted = context_mask if self.ends_trunk else None
        residual = hidden_states if wanted is None else hidden_states.index_select(0, wanted)
        hidden = self._add(self._attended(self.input_layernorm(hidden_states), attention_mask, wanted), residual)
        read = residual if self.parallel_residual else hidden
        return self._add(self.mlp(self.pre_mlp_layernorm(read)), hidden), None

    def _attended(self, x: Tensor, lengths: Tensor | None, wanted: Tensor | None) -> LinearOutput:
        module, core = self.self_attention, self.self_attention.core_attention
        mixed, _ = module.linear_qkv(x)
        parts = query_key_value(module, mixed.unflatten(-1, (module.num_query_groups_per_partition, -1, core.head_size)))
        if module.checkpoint_core_attention and self.training:
            attended = tensor_parallel.checkpoint(core, False, lengths, *parts)
        else:
            attended = core(lengths, *parts)
        return module.linear_proj(attended if wanted is None else attended.index_select(0, wanted))

    def _add(self, output: LinearOutput, residual: Tensor) -> Tensor:
        return self.mlp_bda(self.training, self.config.bias_dropout_fusion)(output, residual, self.hidden_dropout)


class ParallelResidualLayer(Layer):
    """x + attention(norm(x)) + mlp(norm'(x)), as in GPT-NeoX."""

    parallel_residual = True


def query_key_value(module: nn.Module, mixed: Tensor) -> tuple[Tensor, ...]:
    """What megatron's projection gives, [..., kv_heads, queries of a key-value head + 2, head_size], normed where the model does that.

    Returns: it as it is, or (queries with the key behind them, value).
    """
    if not module.config.qk_layernorm:  # megatron then has an operation there that does nothing
        return (mixed,)
    query, key, value = mixed.split([mixed.shape[-2] - 2, 1, 1], dim=-2)
    return torch.cat([module.q_layernorm(query), module.k_layernorm(key)], dim=-2), value
