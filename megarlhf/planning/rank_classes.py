"""Ranks that do the same: what a dry run of one of them shows holds for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megarlhf.parallel.layout import ParallelLayout
from megarlhf.planning.models import RunModels


@dataclass(frozen=True)
class RankClass:
    """Ranks with the same kinds of stages of every model."""

    name: str
    rank: int
    """Of those that hold most micro-batches at once, the first: what is shown of it is the most of its class."""
    num_ranks: int
    stages: Mapping[str, int]
    """Model (and "generation") -> how many of its stages are of this class."""


def rank_classes(models: RunModels) -> list[RankClass]:
    """The distinct ranks of a run, from the first stage on."""
    layouts = {role: (plan.layout, plan.architecture.num_layers) for role, plan in models.plans.items()}
    if models.generation is not None:
        layouts["generation"] = (models.generation, models.plans["policy"].architecture.num_layers)
    members: dict[tuple, list[int]] = {}
    for rank in range(models.num_ranks):
        key = tuple(_kind(layout, num_layers, rank) for layout, num_layers in layouts.values())
        members.setdefault(key, []).append(rank)
    return [
        RankClass(
            _name({role: layout for role, (layout, _) in layouts.items()}, ranks[0]),
            ranks[0],
            len(ranks),
            {role: len({layout.coordinates(rank).pp for rank in ranks}) for role, (layout, _) in layouts.items()},
        )
        for ranks in members.values()
    ]


def _kind(layout: ParallelLayout, num_layers: int, rank: int) -> tuple:
    stage = layout.coordinates(rank).pp
    return stage == 0, stage == layout.pp - 1, tuple(map(len, layout.chunks(num_layers, stage)))


def _name(layouts: Mapping[str, ParallelLayout], rank: int) -> str:
    said: dict[str, list[str]] = {}
    for role, layout in layouts.items():
        if layout.pp == 1:
            continue
        stage = layout.coordinates(rank).pp
        kind = "first stage" if stage == 0 else "last stage" if stage == layout.pp - 1 else "middle stage"
        said.setdefault(f"{kind} of {layout.pp}", []).append(role)
    return "; ".join(f"{kind} ({', '.join(roles)})" for kind, roles in said.items()) or "every rank"
