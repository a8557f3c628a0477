"""megatron-core's GPTModel with our norm, attention and heads, built for one place of one layout."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megarlhf.models.activation import gelu_tanh
from megarlhf.models.architecture import Architecture
from megarlhf.models.attention import SdpaAttention, packed_rows_of_layers
from megarlhf.models.layer import Layer, ParallelResidualLayer
from megarlhf.models.linear import ColumnLinear, RowLinear, few_by_many
from megarlhf.models.norm import Norm
from megarlhf.models.parameters import TIED_NAME, Head, Shard, kv_heads_per_rank, layout_violations, shards_held
from megarlhf.models.rotary import Rotary
from megarlhf.models.scalar_head import ScalarHead
from megarlhf.models.vocab_head import head_logprobs
from megarlhf.parallel.groups import ModelGroups
from megarlhf.parallel.seed import derive_seed

Precision = Literal["fp32", "bf16", "fp16"]
Recompute = Literal["none", "selective", "full"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": gelu_tanh, "relu": F.relu, "swiglu": F.silu}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """All that decides how a model is built, besides its weights."""

    architecture: Architecture
    head: Head
    precision: Precision = "fp32"
    recompute: Recompute = "none"
    dropout: float = 0.0
    """Residual and embedding dropout while training."""


class Transformer(GPTModel):
    """One chunk of a model: its forward ends at the last hidden states, and the heads are methods.

    Heads apart from the trunk let the caller choose the tokens of packed rows that need logits: `wanted` [n] int64 on the device. The
    last layer goes on with these alone, unless sequence parallelism has them on several ranks.
    """

    shares_heads: bool
    """Whether several ranks hold the same key-value heads of it."""

    def wanting(self, wanted: Tensor) -> dict[str, object]:
        """What the chunk's forward is given beside tokens, positions and lengths, so that it ends with the `wanted` tokens' [n, 1, h]."""
        return {"extra_block_kwargs": {"context_mask": wanted}} if self.ends_with_wanted else {}

    @property
    def ends_with_wanted(self) -> bool:
        """Whether the forward pass ends with the wanted tokens; otherwise with all of the chunk's."""
        return self.post_process and not self.config.sequence_parallel

    def _postprocess(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return hidden_states

    def setup_embeddings_and_output_layer(self) -> None:
        """Mark the embedding's weights for megatron; equal copies of a tied one come from initialisation and checkpoints."""
        weights = [self.embedding.word_embeddings.weight] if self.pre_process else []
        weights += [self.output_layer.weight] if self.post_process and self.output_layer.weight is not None else []
        for weight in weights:
            weight.is_embedding_or_output_parameter = True
            weight.shared_embedding = self.share_embeddings_and_output_weights and self.config.pipeline_model_parallel_size > 1

    def full_hidden(self, hidden: Tensor) -> Tensor:
        """Hidden states [seq (/ tp), batch, h] of all positions [seq, batch, h]: gathered under sequence parallelism."""
        if not self.config.sequence_parallel:
            return hidden
        return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.pg_collection.tp)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[..., h] chosen from `full_hidden` -> [..., padded_vocab / tp] float32, this rank's shard of the vocabulary; no gradient."""
        return few_by_many(hidden.flatten(0, -2), self._head_weight()).unflatten(0, hidden.shape[:-1])

    def predictions(
        self, hidden: Tensor, wanted: Tensor, targets: Tensor, *, vocab_size: int, temperature: float, entropy_too: bool
    ) -> tuple[Tensor, Tensor]:
        """The forward's hidden states, ids [n] behind the `wanted` -> the ids' log-probabilities, and entropies: see `head_logprobs`."""
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = self.full_hidden(hidden).squeeze(1).index_select(0, wanted)
        else:
            hidden = hidden.squeeze(1)
            # Its backward sums over tp, but only where the gradient is contiguous: so here, on the rows that are multiplied.
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        how = {"vocab_size": vocab_size, "temperature": temperature, "entropy_too": entropy_too}
        return head_logprobs(hidden, self._head_weight(), targets, tp=group, **how)

    def _head_weight(self) -> Tensor:
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight

    def scalars(self, hidden: Tensor, wanted: Tensor) -> Tensor:
        """The forward's hidden states -> the scalar head's numbers at the `wanted` tokens: [n] float32.

        Only these pass through the head; under sequence parallelism all do, since one number of each is less to gather than h.
        """
        if not self.config.sequence_parallel:
            return self.scalar_head(hidden.squeeze(1))
        values = self.scalar_head(hidden)
        values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False, group=self.pg_collection.tp)
        return values.squeeze(1).index_select(0, wanted)


def build_model(spec: ModelSpec, groups: ModelGroups) -> list[Transformer]:
    """This rank's chunks of the model, with unset weights: fill them with `initialize` or a checkpoint.

    ValueError lists every way in which the layout does not fit the architecture.
    """
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    layout, place, a = groups.layout, groups.coordinates, spec.architecture
    found = layout_violations(a, layout)
    if found:
        raise ValueError(f"the layout {layout} does not fit the model: " + "; ".join(found))
    chunks = []
    for number, layers in enumerate(layout.chunks(a.num_layers, place.pp)):
        config = _transformer_config(spec, groups)
        tied = a.tied_embeddings and spec.head == "lm"
        first, last = layers.start == 0, layers.stop == a.num_layers
        with groups.device:  # built where it stays: moved afterwards it would need a second place, and lose megatron's marks
            chunk = Transformer(
                config=config,
                transformer_layer_spec=_block_spec(spec, len(layers)),
                vocab_size=a.padded_vocab_size,
                max_sequence_length=a.max_seq_len,
                pre_process=first,
                post_process=last,
                share_embeddings_and_output_weights=tied,
                position_embedding_type="learned_absolute" if a.positions == "learned" else "none",
                pg_collection=groups.collection(tied_embeddings=tied),
                vp_stage=number if layout.virtual_pp > 1 else None,
            )
        if spec.head == "scalar" and last:
            del chunk.output_layer
        for layer, module in zip(layers, chunk.decoder.layers, strict=True):  # megatron numbers them from 1, as if all stages were equal
            module.ends_trunk = last and layer == a.num_layers - 1
            module.layer_number = module.self_attention.layer_number = module.self_attention.core_attention.layer_number = layer + 1
        chunk.to(dtype=DTYPES[spec.precision])
        if spec.head == "scalar" and last:
            chunk.scalar_head = ScalarHead(a.hidden_size, sequence_parallel=layout.sequence_parallel, device=groups.device)
        chunks.append(chunk)
    held = shards_held(a, spec.head, layout, place)
    for name, parameter in named_parameters(chunks, groups).items():
        parameter.shard = held[name]
    for chunk in chunks:  # the gradients of slices that several ranks hold are summed over them
        chunk.shares_heads = any(p.shard.copies > 1 and p.shard.spec.split_dim is not None for p in chunk.parameters())
    return chunks


def _block_spec(spec: ModelSpec, num_layers: int) -> TransformerBlockSubmodules:
    layer = get_gpt_layer_local_spec()
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    rotary = Rotary(spec.architecture) if spec.architecture.positions == "rotary" else None
    attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp
    attention.core_attention = functools.partial(SdpaAttention, rotary=rotary, packed_rows=packed_rows_of_layers())
    if spec.architecture.qk_norm:
        attention.q_layernorm = attention.k_layernorm = Norm
    layer.module = ParallelResidualLayer if spec.architecture.parallel_residual else Layer
    # a ModuleSpec in older releases of megatron-core, a partial in newer ones
    feed_forward = mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules
    attention.linear_qkv = feed_forward.linear_fc1 = ColumnLinear
    attention.linear_proj = feed_forward.linear_fc2 = RowLinear
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=Norm)


def _transformer_config(spec: ModelSpec, groups: ModelGroups) -> TransformerConfig:
    a, layout, dtype = spec.architecture, groups.layout, DTYPES[spec.precision]
    recompute = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }[spec.recompute]
    return TransformerConfig(
        num_layers=a.num_layers,
        hidden_size=a.hidden_size,
        num_attention_heads=a.num_heads,
        num_query_groups=kv_heads_per_rank(a, layout.tp) * layout.tp,  # to megatron, equal heads on several ranks are heads like others
        kv_channels=a.head_size,
        qk_layernorm=a.qk_norm,
        ffn_hidden_size=a.ffn_size,
        normalization="LayerNorm" if a.norm == "layernorm" else "RMSNorm",
        layernorm_epsilon=a.norm_eps,
        activation_func=ACTIVATIONS[a.activation],
        gated_linear_unit=a.activation == "swiglu",
        add_bias_linear=a.bias,
        add_qkv_bias=a.has_qkv_bias,
        hidden_dropout=spec.dropout,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=spec.precision == "bf16",
        fp16=spec.precision == "fp16",
        perform_initialization=False,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.virtual_pp if layout.virtual_pp > 1 else None,
        sequence_parallel=layout.sequence_parallel,
        calculate_per_token_loss=True,  # losses are sums divided by one global count, see engine/schedule.py
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        attention_backend=AttnBackend.unfused,
        **recompute,
    )


def named_parameters(chunks: list[Transformer], groups: ModelGroups) -> dict[str, torch.nn.Parameter]:
    """Canonical name -> this rank's parameter, over all of its chunks (see parameters.py).

    A tied embedding's second copy on the last stage carries the embedding's name.
    """
    held: dict[str, torch.nn.Parameter] = {}
    layout, place = groups.layout, groups.coordinates
    for chunk, layers in zip(chunks, layout.chunks(chunks[0].config.num_layers, place.pp), strict=True):
        tied = chunk.share_embeddings_and_output_weights
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if name.startswith("decoder.layers."):
                parts[2] = str(layers.start + int(parts[2]))
                name = ".".join(parts)
            if name == "output_layer.weight" and tied:
                name = TIED_NAME
            held[name] = parameter
    return held


@torch.no_grad()
def initialize(
    chunks: list[Transformer],
    spec: ModelSpec,
    groups: ModelGroups,
    *,
    seed: int,
    std: float = 0.02,
    names: Collection[str] | None = None,
) -> None:
    """Set every weight (or those of `names`) from (seed, canonical name): the same model whatever the layout.

    Normal(std), projections into the residual stream Normal(std / sqrt(2 layers)) (GPT-2's initialisation), biases 0,
    norms 1; the scalar head Normal(1 / sqrt(hidden + 1)) with bias 0 (Stiennon et al. 2020, Appendix B.1).
    """
    a = spec.architecture
    stds = {"normal": std, "residual": std / math.sqrt(2 * a.num_layers), "head": 1 / math.sqrt(a.hidden_size + 1)}
    held = shards_held(a, spec.head, groups.layout, groups.coordinates)
    for name, parameter in named_parameters(chunks, groups).items():
        if names is not None and name not in names:
            continue
        init = held[name].spec.init
        if init in stds:
            generator = torch.Generator().manual_seed(derive_seed(seed, name))
            full = torch.randn(held[name].spec.shape, generator=generator) * stds[init]
            parameter.copy_(take_shard(full, held[name]))
        else:
            parameter.fill_(0.0 if init == "zeros" else 1.0)


def take_shard(full: Tensor, shard: Shard) -> Tensor:
    """The rank's part of a full parameter."""
    return torch.cat([full.narrow(shard.dim, part.start, part.size) for part in shard.slices], dim=shard.dim)


@contextlib.contextmanager
def sequence_parallel_off(chunks: list[Transformer]) -> Iterator[None]:
    """Run a sequence-parallel model without it, for decoding one position at a time; the weights are the same."""
    flags = ("sequence_parallel", "reduce_scatter_embeddings", "scatter_to_sequence_parallel")
    owners = [*(module for chunk in chunks for module in chunk.modules()), *(chunk.config for chunk in chunks)]
    switched = [(owner, flag) for owner in owners for flag in flags if getattr(owner, flag, False)]
    for owner, flag in switched:
        setattr(owner, flag, False)
    try:
        yield
    finally:
        for owner, flag in switched:
            setattr(owner, flag, True)
