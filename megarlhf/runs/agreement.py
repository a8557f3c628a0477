"""Refusing a run: what any rank found wrong is said of every rank, and all ranks stop together."""

from __future__ import annotations

from collections.abc import Sequence

from megarlhf.config import ConfigError, dump_yaml
from megarlhf.config.stages import StageConfig
from megarlhf.parallel.collectives import gather_objects
from megarlhf.parallel.groups import World


class RunError(RuntimeError):
    """What went wrong while a run was running, in words for its user; raised alike on every rank, or on one that ends the others."""


def require_same_config(config: StageConfig, world: World) -> None:
    """ConfigError on every rank when the ranks were not given the same configuration; a collective of the world."""
    texts = gather_objects(dump_yaml(config))
    others = [str(rank) for rank in range(world.size) if texts[rank] != texts[0]]
    if others:
        raise ConfigError(f"rank {', '.join(others)} of {world.size} was given another configuration than rank 0: is its file the same?")


def refuse_together(problems: Sequence[str], world: World) -> None:
    """Raise ConfigError on every rank when any rank has problems; a collective of the world.

    The message lists each problem once, with its ranks where not all have it: a file that one machine lacks.
    """
    found = gather_objects(list(problems))
    lines = []
    for problem in dict.fromkeys(problem for of_rank in found for problem in of_rank):
        ranks = [rank for rank in range(world.size) if problem in found[rank]]
        where = "" if len(ranks) == world.size else f"rank {', '.join(map(str, ranks))} of {world.size}: "
        lines.append(where + problem)
    if lines:
        raise ConfigError("\n".join(lines))
