"""What any rank found wrong is said of every rank, and all ranks stop together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

from megarlhf.config import ConfigError
from megarlhf.config.fields import show, values_of
from megarlhf.config.stage import StageConfig
from megarlhf.parallel.collectives import broadcast_object, gather_objects
from megarlhf.parallel.groups import World
from megarlhf.storage.files import system_error

T = TypeVar("T")
ABSENT = "absent"
"""Stands for a key of a section that one rank has and the other has not."""


class RunError(RuntimeError):
    """What went wrong while a run was running, in words for its user; raised alike on every rank."""

    exit_status: ClassVar[int] = 1


def require_same_config(config: StageConfig, world: World) -> None:
    """ConfigError on every rank when the ranks were not given the same configuration; a collective of the world.

    It names every key that differs, with both values.
    """
    gathered = gather_objects(config)
    if all(other is config for other in gathered):
        return
    given = [dict(values_of(config)) for config in gathered]
    ranks: dict[str, list[int]] = {}
    for rank, values in enumerate(given):
        for key in [*given[0], *(key for key in values if key not in given[0])]:
            if values.get(key, ABSENT) != given[0].get(key, ABSENT):
                difference = f"{key} is {show(values.get(key, ABSENT))}, and {show(given[0].get(key, ABSENT))} on rank 0"
                ranks.setdefault(difference, []).append(rank)
    if ranks:
        lines = [f"rank {', '.join(map(str, those))} of {world.size}: {difference}" for difference, those in ranks.items()]
        raise ConfigError("\n".join(["the ranks were given different configurations:", *lines]))


def refuse_together(problems: Sequence[str], world: World, *, error: type[Exception] = ConfigError) -> None:
    """Raise `error` on every rank when any rank has problems; a collective of the world.

    The message lists each problem once, with its ranks where not all have it: a file that one machine lacks.
    """
    found = gather_objects(list(problems))
    lines = []
    for problem in dict.fromkeys(problem for of_rank in found for problem in of_rank):
        ranks = [rank for rank in range(world.size) if problem in found[rank]]
        where = "" if len(ranks) == world.size else f"rank {', '.join(map(str, ranks))} of {world.size}: "
        lines.append(where + problem)
    if lines:
        raise error("\n".join(lines))


def on_rank_0(world: World, function: Callable[..., T], *args: object) -> T:
    """What `function(*args)` returns on rank 0, on every rank; a collective of the world, whatever happens in it.

    ConfigError on every rank where it raised a ValueError, RunError where an OSError; of any other error rank 0 raises the error
    itself and the others a RunError that names it, so that nobody waits.
    """
    value, refused, failed, unexpected = None, None, None, None
    if world.rank == 0:
        try:
            value = function(*args)
        except ValueError as error:
            refused = str(error)
        except OSError as error:
            failed = system_error(error)
        except Exception as error:
            unexpected = error
    value, refused, failed = broadcast_object((value, refused, failed or (unexpected and f"rank 0: {unexpected!r}")))
    if unexpected is not None:
        raise unexpected
    if refused is not None:
        raise ConfigError(refused)
    if failed is not None:
        raise RunError(failed)
    return value
