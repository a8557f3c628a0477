"""`megarlhf plan --search`: which layout is fastest among those that fit, by a cheap model made of a few small dry runs.

Every candidate of the space is estimated, so no other of them is better by the same estimate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megarlhf.config import ConfigError
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.planning.cheap_model import CheapModel, Estimate
from megarlhf.planning.choices import RECOMPUTE, VIRTUAL, Choice
from megarlhf.planning.hardware import Cluster


@dataclass(frozen=True)
class Found:
    """The outcome of a search."""

    best: Sequence[Estimate]
    """Those that fit, the fastest first."""
    too_large: Sequence[Estimate]
    """Those that do not, the smallest first."""
    beside: Mapping[str, ParallelLayout]
    """The models whose layouts are not searched, with those that the configuration gives them."""


def candidates(model: CheapModel) -> Iterator[Choice]:
    """The whole space."""
    ranks, layers = model.cluster.num_ranks, model.plan.architecture.num_layers
    for tp in model.tensor_sizes():
        stages = [pp for pp in range(1, layers + 1) if ranks // tp % pp == 0]
        for pp, virtual in itertools.product(stages, VIRTUAL):
            if (virtual > 1 and (pp == 1 or layers % (pp * virtual))) or pp * virtual > layers:
                continue
            layout = ParallelLayout.over(ranks, tp=tp, pp=pp, virtual_pp=virtual, sequence_parallel=tp > 1)
            for size, recompute in itertools.product(model.sizes, RECOMPUTE):
                if model.role == "policy":
                    kinds = itertools.product((False, True) if pp > 1 else (False,), (False, True))
                    yield from (Choice(layout, size, recompute, gathered, offload) for gathered, offload in kinds)
                else:
                    yield Choice(layout, size, recompute)


def search(model: CheapModel) -> Found:
    """All candidates, ranked. ConfigError where there is none."""
    estimates = [model.estimate(choice) for choice in candidates(model)]
    if not estimates:
        raise ConfigError(f"no layout of {model.cluster.num_ranks} ranks holds {model.role}")
    usable = model.cluster.usable_bytes
    fitting = sorted((e for e in estimates if e.peak_bytes <= usable), key=lambda e: e.seconds)
    too_large = sorted((e for e in estimates if e.peak_bytes > usable), key=lambda e: e.peak_bytes)
    return Found(fitting, too_large, {role: plan.layout for role, plan in model.others.items()})


def as_text(found: Found, cluster: Cluster, *, shown: int = 10) -> str:
    """The best candidates, and why others fell out."""
    lines = [f"{len(found.best) + len(found.too_large)} layouts, {len(found.best)} of which fit {cluster}; by estimated time of a step:"]
    for estimate in found.best[:shown]:
        lines.append(f"  {estimate.seconds:8.1f} s  {estimate.peak_bytes / 1e9:6.1f} GB in {estimate.phase:8}  {estimate.choice}")
    if found.too_large:
        lines.append("fell out for their memory, those that miss least first:")
    for estimate in found.too_large[: math.ceil(shown / 2)]:
        missing = (estimate.peak_bytes - cluster.usable_bytes) / 1e9
        lines.append(f"  {estimate.seconds:8.1f} s  {missing:6.1f} GB missing in {estimate.phase:8}  {estimate.choice}")
    if found.beside:
        beside = ", ".join(f"{role} {layout}" for role, layout in found.beside.items())
        lines.append(f"not searched, as configured: {beside}; give them other layouts where they take much")
    return "\n".join(lines) + "\n"
