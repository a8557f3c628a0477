"""Which parameters a model has, and which slice of each a rank holds: the one description of sharding.

Initialisation, resharding and checkpoints all read it. It is a pure function of the architecture and the layout,
so that it can be had for any layout without building a model.
"""

from __future__ import annotations

import math
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
    groups: int = 1
    """Equal groups along split_dim, whole ones on a rank while there are enough: a fused query, key and value projection has one
    per key-value head. Only a parameter of one block has several."""
    shared: int = 0
    """The last elements of each group along split_dim (its key and value) that ranks hold alike where several share a group;
    they divide the rest of it (its queries)."""


@dataclass(frozen=True)
class Slice:
    """One range of a parameter along its split_dim, as one rank holds it."""

    start: int
    """Where it starts in the full parameter."""
    size: int
    copies: int = 1
    """How many tensor-parallel ranks hold this very range."""
    copy: int = 0
    """Which of them this one is; copy 0 speaks for it."""


@dataclass(frozen=True)
class Shard:
    """The part of a parameter that one rank holds: its slices along split_dim, one after another.

    A parameter that is not split is one slice, of its first dimension, with as many copies as there are ranks.
    """

    spec: ParameterSpec
    slices: tuple[Slice, ...]

    @property
    def dim(self) -> int:
        """The dimension that the slices are ranges of."""
        return self.spec.split_dim or 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what the rank holds."""
        shape = list(self.spec.shape)
        shape[self.dim] = sum(part.size for part in self.slices)
        return tuple(shape)

    @property
    def copies(self) -> int:
        """The most ranks that hold one of its slices: 1 where each element is on one rank only."""
        return max(part.copies for part in self.slices)

    def placed(self) -> Iterator[tuple[int, Slice]]:
        """(where it starts along `dim` of what the rank holds, slice) of each slice."""
        start = 0
        for part in self.slices:
            yield start, part
            start += part.size

    def flat_ranges_spoken_for(self) -> list[tuple[int, int]]:
        """(start, stop) in the flattened tensor that the rank holds, of the elements for which it speaks among its peers of tp."""
        row = math.prod(self.shape[1:])
        if all(part.copy == 0 for part in self.slices):
            return [(0, self.shape[0] * row)]
        assert self.dim == 0  # else a slice is no range of the flattened tensor
        return [(start * row, (start + part.size) * row) for start, part in self.placed() if part.copy == 0]


def parameter_specs(architecture: Architecture, head: Head) -> list[ParameterSpec]:
    """Every parameter of the whole model, in order of depth."""
    a = architecture
    h, q = a.hidden_size, a.num_heads * a.head_size
    gate = 2 if a.activation == "swiglu" else 1

    def norm(name: str, place, size: int = h) -> Iterator[ParameterSpec]:
        yield ParameterSpec(f"{name}.weight", (size,), None, 1, place, "ones")
        if a.norm == "layernorm":
            yield ParameterSpec(f"{name}.bias", (size,), None, 1, place, "zeros")

    def column(name: str, rows: int, place: int, *, bias: bool, blocks: int = 1, **grouped: int) -> Iterator[ParameterSpec]:
        yield ParameterSpec(f"{name}.weight", (rows, h), 0, blocks, place, "normal", **grouped)
        if bias:
            yield ParameterSpec(f"{name}.bias", (rows,), 0, blocks, place, "zeros", **grouped)

    def row(name: str, columns: int, place: int) -> Iterator[ParameterSpec]:
        yield ParameterSpec(f"{name}.weight", (h, columns), 1, 1, place, "residual")
        if a.bias:
            yield ParameterSpec(f"{name}.bias", (h,), None, 1, place, "zeros")

    specs = [ParameterSpec(TIED_NAME, (a.padded_vocab_size, h), 0, 1, "first", "normal")]
    if a.positions == "learned":
        specs.append(ParameterSpec("embedding.position_embeddings.weight", (a.max_seq_len, h), None, 1, "first", "normal"))
    qkv = {"groups": a.num_kv_heads, "shared": 2 * a.head_size}
    for layer in range(a.num_layers):
        prefix = f"decoder.layers.{layer}"
        specs += norm(f"{prefix}.input_layernorm", layer)
        rows = q + qkv["groups"] * qkv["shared"]
        specs += column(f"{prefix}.self_attention.linear_qkv", rows, layer, bias=a.has_qkv_bias, **qkv)
        if a.qk_norm:
            specs += norm(f"{prefix}.self_attention.q_layernorm", layer, a.head_size)
            specs += norm(f"{prefix}.self_attention.k_layernorm", layer, a.head_size)
        specs += row(f"{prefix}.self_attention.linear_proj", q, layer)
        specs += norm(f"{prefix}.pre_mlp_layernorm", layer)
        specs += column(f"{prefix}.mlp.linear_fc1", gate * a.ffn_size, layer, bias=a.bias, blocks=gate)
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
        return Shard(spec, (Slice(0, spec.shape[0], copies=tp, copy=tp_rank),))
    if not shares_groups(spec, tp):
        block = spec.shape[spec.split_dim] // spec.blocks
        size = block // tp
        return Shard(spec, tuple(Slice(b * block + tp_rank * size, size) for b in range(spec.blocks)))
    group, sharing = spec.shape[spec.split_dim] // spec.groups, tp // spec.groups
    first, member = tp_rank // sharing * group, tp_rank % sharing
    own = (group - spec.shared) // sharing
    shared = Slice(first + group - spec.shared, spec.shared, copies=sharing, copy=member)
    return Shard(spec, (Slice(first + member * own, own), shared))


def shares_groups(spec: ParameterSpec, tp: int) -> bool:
    """Whether several tensor-parallel ranks hold the shared elements of one group."""
    return spec.shared > 0 and tp > spec.groups


def kv_heads_per_rank(architecture: Architecture, tp: int) -> int:
    """Key-value heads on a tensor-parallel rank: at least one, where there are fewer than ranks."""
    return max(architecture.num_kv_heads, tp) // tp


def shards_held(architecture: Architecture, head: Head, layout: ParallelLayout, place: Coordinates) -> dict[str, Shard]:
    """Canonical name -> what the rank at `place` holds. A tied embedding appears once, whichever end holds it."""
    return {
        spec.name: shard_of(spec, place.tp, layout.tp)
        for spec in parameter_specs(architecture, head)
        if place.pp in stages_of(spec, architecture, head, layout)
    }


def layout_violations(architecture: Architecture, layout: ParallelLayout) -> list[str]:
    """Every way in which `layout` cannot hold a model of this architecture."""
    a = architecture
    return layout.violations(
        num_layers=a.num_layers,
        num_heads=a.num_heads,
        num_kv_heads=a.num_kv_heads,
        hidden_size=a.hidden_size,
        ffn_size=a.ffn_size,
        padded_vocab_size=a.padded_vocab_size,
    )


def flat_ranges_counted(
    shard: Shard, architecture: Architecture, head: Head, layout: ParallelLayout, place: Coordinates
) -> list[tuple[int, int]]:
    """(start, stop) in the flattened tensor of the elements for which the rank at `place` speaks: each of a copy once.

    What several tensor-parallel ranks hold counts on the first of them, a tied embedding on the first stage.
    """
    first_stage = stages_of(shard.spec, architecture, head, layout)[0]
    return shard.flat_ranges_spoken_for() if place.pp == first_stage else []
