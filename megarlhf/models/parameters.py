"""Which parameters a model has, and which slice of each a rank holds: the one description of sharding.

Initialisation, resharding and checkpoints all read it. It is a pure function of the architecture and the layout,
so that it can be had for any layout without building a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megarlhf.models.architecture import Architecture
from megarlhf.parallel.layout import Coordinates, ParallelLayout

Head = Literal["lm", "scalar"]
TIED_NAME = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of the whole model, under its canonical name (layers numbered globally from 0)."""

    name: str
    shape: tuple[int, ...]
    """Full shape, vocabulary padded."""
    split_dim: int | None
    """The dimension that tensor parallelism splits; None where every tensor-parallel rank holds all of it."""
    blocks: int
    """Equal blocks along split_dim of which each is split on its own: 2 for a fused gate and up projection, else 1."""
    place: Literal["first", "last"] | int
    """Which stage holds it: the first, the last, or the one with this layer."""
    init: Literal["normal", "residual", "zeros", "ones", "head"]
    """How it starts: normal(std), normal(std / sqrt(2 layers)) for projections into the residual stream, or the scalar head's."""


@dataclass(frozen=True)
class Shard:
    """The part of a parameter that one rank holds: as many equal slices of split_dim as it has blocks, one after another."""

    spec: ParameterSpec
    starts: tuple[int, ...]
    """Where each slice starts along split_dim of the full parameter; (0,) when it is not split."""
    size: int
    """Length of each slice along split_dim; the full parameter has this many when it is not split: shape[0]."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what the rank holds."""
        if self.spec.split_dim is None:
            return self.spec.shape
        shape = list(self.spec.shape)
        shape[self.spec.split_dim] = self.size * len(self.starts)
        return tuple(shape)


def parameter_specs(architecture: Architecture, head: Head) -> list[ParameterSpec]:
    """Every parameter of the whole model, in order of depth."""
    a = architecture
    h, kv = a.hidden_size, a.num_kv_heads * a.head_size
    gate = 2 if a.activation == "swiglu" else 1

    def norm(name: str, place) -> Iterator[ParameterSpec]:
        yield ParameterSpec(f"{name}.weight", (h,), None, 1, place, "ones")
        if a.norm == "layernorm":
            yield ParameterSpec(f"{name}.bias", (h,), None, 1, place, "zeros")

    def column(name: str, rows: int, place: int, blocks: int = 1) -> Iterator[ParameterSpec]:
        yield ParameterSpec(f"{name}.weight", (rows, h), 0, blocks, place, "normal")
        if a.bias:
            yield ParameterSpec(f"{name}.bias", (rows,), 0, blocks, place, "zeros")

    def row(name: str, columns: int, place: int) -> Iterator[ParameterSpec]:
        yield ParameterSpec(f"{name}.weight", (h, columns), 1, 1, place, "residual")
        if a.bias:
            yield ParameterSpec(f"{name}.bias", (h,), None, 1, place, "zeros")

    specs = [ParameterSpec(TIED_NAME, (a.padded_vocab_size, h), 0, 1, "first", "normal")]
    if a.positions == "learned":
        specs.append(ParameterSpec("embedding.position_embeddings.weight", (a.max_seq_len, h), None, 1, "first", "normal"))
    for layer in range(a.num_layers):
        prefix = f"decoder.layers.{layer}"
        specs += norm(f"{prefix}.input_layernorm", layer)
        specs += column(f"{prefix}.self_attention.linear_qkv", h + 2 * kv, layer)
        specs += row(f"{prefix}.self_attention.linear_proj", h, layer)
        specs += norm(f"{prefix}.pre_mlp_layernorm", layer)
        specs += column(f"{prefix}.mlp.linear_fc1", gate * a.ffn_size, layer, blocks=gate)
        specs += row(f"{prefix}.mlp.linear_fc2", a.ffn_size, layer)
    specs += norm("decoder.final_layernorm", "last")
    if head == "scalar":
        specs.append(ParameterSpec("scalar_head.weight", (1, h), None, 1, "last", "head"))
        specs.append(ParameterSpec("scalar_head.bias", (1,), None, 1, "last", "zeros"))
    elif not a.tied_embeddings:
        specs.append(ParameterSpec("output_layer.weight", (a.padded_vocab_size, h), 0, 1, "last", "normal"))
    return specs


def stages_of(spec: ParameterSpec, architecture: Architecture, head: Head, layout: ParallelLayout) -> tuple[int, ...]:
    """The pipeline stages that hold the parameter: one, or the first and the last for a tied embedding."""
    if isinstance(spec.place, int):
        return (layout.stage_of_layer(architecture.num_layers, spec.place),)
    first, last = 0, layout.pp - 1
    if spec.name == TIED_NAME and head == "lm" and architecture.tied_embeddings:
        return (first,) if first == last else (first, last)
    return (first,) if spec.place == "first" else (last,)


def shard_of(spec: ParameterSpec, tp_rank: int, tp: int) -> Shard:
    """The part that tensor-parallel rank `tp_rank` of `tp` holds."""
    if spec.split_dim is None:
        return Shard(spec, (0,), spec.shape[0])
    block = spec.shape[spec.split_dim] // spec.blocks
    size = block // tp
    return Shard(spec, tuple(b * block + tp_rank * size for b in range(spec.blocks)), size)


def shards_held(architecture: Architecture, head: Head, layout: ParallelLayout, place: Coordinates) -> dict[str, Shard]:
    """Canonical name -> what the rank at `place` holds. A tied embedding appears once, whichever end holds it."""
    return {
        spec.name: shard_of(spec, place.tp, layout.tp)
        for spec in parameter_specs(architecture, head)
        if place.pp in stages_of(spec, architecture, head, layout)
    }


def counts_here(shard: Shard, architecture: Architecture, head: Head, layout: ParallelLayout, place: Coordinates) -> bool:
    """Whether the rank at `place` speaks for what it holds, so that each element of a copy of the model is counted once.

    Replicated parameters count on the first tensor-parallel rank, a tied embedding on the first stage.
    """
    first_stage = stages_of(shard.spec, architecture, head, layout)[0]
    return place.pp == first_stage and (shard.spec.split_dim is not None or place.tp == 0)
