"""Refusing a run: what any rank found wrong is said of every rank, and all ranks stop together."""

from __future__ import annotations

from collections.abc import Sequence

from megarlhf.config import ConfigError
from megarlhf.config.fields import show, values_of
from megarlhf.config.stages import StageConfig
from megarlhf.parallel.collectives import gather_objects
from megarlhf.parallel.groups import World

ABSENT = "absent"
"""Stands for a key of a section that one rank has and the other has not."""


class RunError(RuntimeError):
    """What went wrong while a run was running, in words for its user; raised alike on every rank, or on one that ends the others."""


def require_same_config(config: StageConfig, world: World) -> None:
    """ConfigError on every rank when the ranks were not given the same configuration; a collective of the world.

    It names every key that differs, with both values.
    """
    given = [dict(values_of(config)) for config in gather_objects(config)]
    ranks: dict[str, list[int]] = {}
    for rank, values in enumerate(given):
        for key in [*given[0], *(key for key in values if key not in given[0])]:
            if values.get(key, ABSENT) != given[0].get(key, ABSENT):
                difference = f"{key} is {show(values.get(key, ABSENT))}, and {show(given[0].get(key, ABSENT))} on rank 0"
                ranks.setdefault(difference, []).append(rank)
    if ranks:
        lines = [f"rank {', '.join(map(str, those))} of {world.size}: {difference}" for difference, those in ranks.items()]
        raise ConfigError("\n".join(["the ranks were given different configurations:", *lines]))


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
