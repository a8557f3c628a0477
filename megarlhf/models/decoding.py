"""A forward pass over packed tokens, for generation: the model's own weights without the cost of megatron's layers.

Tokens of any rows stand one after the other, so that nothing is padded; only attention, which the caller brings, knows which
token belongs to which row. A step of decoding is a handful of small kernels, beside which the modules of megatron's layer
(reshapes, dropout, hooks, fused and unfused paths) cost as much as the arithmetic.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor, nn

from megarlhf.models.layer import ParallelResidualLayer
from megarlhf.models.transformer import Transformer

Angles = tuple[Tensor, Tensor]


class PackedAttention(Protocol):
    """What knows to which rows packed tokens belong, and what those rows hold already."""

    def attend(self, layer_number: int, query: Tensor, key_value: Tensor) -> Tensor:
        """Store the new keys and values of a layer and attend over all that is stored.

        Args: query [wanted, kv_heads, heads per kv head, head_size], of the first tokens: all, or those that are decoded; key_value
        [tokens, kv_heads, 2, head_size]: key, value; queries and keys are rotated.
        Returns: [wanted, heads * head_size].
        """
        ...


def packed_forward(
    chunk: Transformer, tokens: Tensor, positions: Tensor, hidden: Tensor | None, attention: PackedAttention, *, wanted: int
) -> Tensor:
    """What `chunk(...)` gives for each of the packed tokens; dropout and sequence parallelism must be off.

    Args: tokens, positions [n] int64; hidden [n, h] from the chunk before, None for the first. wanted: how many of the first tokens are
        asked for what the model makes of them, of the others it keeps keys and values alone: those decoded.
    Returns: [n, h]; on the last chunk [wanted, h], after the last norm.
    """
    if chunk.pre_process:
        hidden = chunk.embedding(tokens[None], positions[None]).squeeze(1)
    angles: Angles | None = None
    for layer in chunk.decoder.layers:
        rotary = layer.self_attention.core_attention.rotary
        if rotary is not None and angles is None:
            cos, sin = rotary.angles(positions)
            angles = cos[:, None], sin[:, None]  # the same for all heads and all layers
        hidden = _layer(layer, hidden, angles, attention, wanted if layer.ends_trunk else len(tokens))
    return hidden if chunk.decoder.final_layernorm is None else chunk.decoder.final_layernorm(hidden)


def _layer(layer: nn.Module, hidden: Tensor, angles: Angles | None, attention: PackedAttention, wanted: int) -> Tensor:
    attended = _attend(layer.self_attention, layer.layer_number, layer.input_layernorm(hidden), angles, attention, wanted)
    hidden = hidden[:wanted]
    if not wanted:
        return hidden
    if isinstance(layer, ParallelResidualLayer):
        return attended.add_(hidden).add_(_feed_forward(layer.mlp, layer.pre_mlp_layernorm(hidden)))
    hidden = attended.add_(hidden)
    return _feed_forward(layer.mlp, layer.pre_mlp_layernorm(hidden)).add_(hidden)


def _attend(
    module: nn.Module, layer_number: int, x: Tensor, angles: Angles | None, attention: PackedAttention, wanted: int
) -> Tensor:
    size, kv_heads = module.hidden_size_per_attention_head, module.num_query_groups_per_partition
    qkv = F.linear(x, module.linear_qkv.weight, module.linear_qkv.bias).view(len(x), kv_heads, -1, size)
    turned = qkv[:, :, :-1]  # queries, and the key after them; behind these the value
    if module.config.qk_layernorm:
        turned = torch.cat([module.q_layernorm(turned[:, :, :-1]), module.k_layernorm(turned[:, :, -1:])], dim=2)
    if angles is not None:
        cos, sin = angles
        turned = module.core_attention.rotary.turned(turned, cos[:, None], sin[:, None])
    if module.config.qk_layernorm or angles is not None:
        qkv[:, :, :-1] = turned
    attended = attention.attend(layer_number, qkv[:wanted, :, :-2], qkv[:, :, -2:])
    return _row_linear(module.linear_proj, attended) if wanted else attended


def _feed_forward(module: nn.Module, x: Tensor) -> Tensor:
    config = module.config
    x = F.linear(x, module.linear_fc1.weight, module.linear_fc1.bias)
    if config.gated_linear_unit:
        gate, up = x.chunk(2, dim=-1)
        return _row_linear(module.linear_fc2, config.activation_func(gate).mul_(up))
    return _row_linear(module.linear_fc2, config.activation_func(x))


def _row_linear(linear: nn.Module, x: Tensor) -> Tensor:
    """Input features split over tp: the sum over its ranks, and the bias once."""
    if linear.tp_group.size() == 1:
        return F.linear(x, linear.weight, linear.bias)
    out = reduce_from_tensor_model_parallel_region(F.linear(x, linear.weight), group=linear.tp_group)
    return out if linear.bias is None else out.add_(linear.bias)
