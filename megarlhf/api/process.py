"""This process's world while runs and models need it: torch has one default process group for each process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megarlhf.config.stage import StageConfig
from megarlhf.parallel.groups import World


@dataclass
class _Shared:
    """The world that this process has joined, and how many hold it."""

    world: World | None = None
    holders: int = 0
    is_ours: bool = False
    """Whether the default group was made for it, and goes with it."""


_SHARED = _Shared()


def join(config: StageConfig) -> World:
    """The world of this process, joined where it is not yet, as `config` says; each `join` needs a `leave`."""
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    if _SHARED.world is None or not World.is_joined():
        _SHARED.is_ours = not World.is_joined()
        _SHARED.world, _SHARED.holders = World.connect(timeout_minutes=config.run.timeout_minutes), 0
    _SHARED.holders += 1
    return _SHARED.world


def leave(world: World) -> None:
    """Let go of a world. A process alone leaves it with its last holder; several ranks, which could not meet a second time, stay."""
    if world is not _SHARED.world:
        return
    _SHARED.holders -= 1
    if _SHARED.holders == 0 and world.size == 1 and _SHARED.is_ours:
        world.close()
        _SHARED.world = None


@contextmanager
def world_of_process(config: StageConfig) -> Iterator[World]:
    """`join` and `leave`."""
    world = join(config)
    try:
        yield world
    finally:
        leave(world)
