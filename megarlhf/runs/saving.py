"""Checkpoints written beside the training: the state is copied to the host between two steps, and a thread writes the copy.

One checkpoint is under way at a time. It gets its name when every rank has written its part, which the ranks find out in an exchange
that follows each step anyway (runs/loop.py); until then it is a partial folder, which nothing reads.
"""

from __future__ import annotations

import copy
import functools
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megarlhf.engine import checkpoint
from megarlhf.engine.checkpoint import OwnPart
from megarlhf.engine.trainable import TrainEngine
from megarlhf.parallel.collectives import gather_on_rank_0, largest_of_world, sum_of_world
from megarlhf.parallel.groups import World
from megarlhf.parallel.platform import free_host_memory
from megarlhf.runs.agreement import RunError, on_rank_0, refuse_together
from megarlhf.storage.checkpoints import Part, finish, partial_folder
from megarlhf.storage.files import no_room, system_error


@dataclass
class _Writing:
    """A checkpoint that this rank is writing its part of."""

    path: Path
    state: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]]
    best: bool
    written: Part | None = None
    problem: str | None = None
    thread: threading.Thread | None = field(default=None, repr=False)

    def write(self, part: OwnPart, rank: int) -> None:
        """Write this rank's part; what goes wrong is kept for `finish`, where all ranks hear of it."""
        try:
            self.written = part.write(self.path, rank)
        except OSError as error:
            self.problem = system_error(error)
        except Exception as error:  # in a thread of its own nobody else would see it
            self.problem = repr(error)


class Saving:
    """Writes a run's checkpoints into `folder`; starting and finishing one are collectives of the world."""

    def __init__(self, folder: Path, world: World, *, in_background: bool, after: Callable[[int, bool], None]) -> None:
        """Args: after: called on rank 0 with (step, whether it is the best) once a checkpoint has its name."""
        self._folder = folder
        self._world = world
        self._in_background = in_background
        self._after = after
        self._writing: _Writing | None = None
        self._seconds = 0.0

    @property
    def is_writing(self) -> bool:
        """Whether this rank is still writing."""
        return self._writing is not None and self._writing.thread is not None and self._writing.thread.is_alive()

    def take_seconds(self) -> float:
        """Seconds for which training stood still for saves, since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def start(self, state: Mapping[str, Any], models: Mapping[str, TrainEngine], *, best: bool, wait: bool) -> str | None:
        """Begin the checkpoint of `state`["step"], after the one before is whole; it is whole at the return with `wait`.

        Returns what is wrong where the disk has no room for it. RunError, on every rank, where writing fails.
        """
        self.finish()
        since = time.monotonic()
        path = self._folder / f"step_{state['step']:08d}"
        part = checkpoint.own_part(models)
        beside = self._in_background and not wait
        needed, short_ranks = sum_of_world([part.bytes, int(beside and self._is_short_of_memory_for(part.bytes))], self._world)
        if problem := on_rank_0(self._world, _make_room, path, needed):
            return problem
        described = {name: checkpoint.describe(engine) for name, engine in models.items()}
        self._writing = writing = _Writing(path, copy.deepcopy(state), described, best)
        if beside := beside and not short_ranks:
            writing.thread = threading.Thread(target=writing.write, args=(part.on_host(), self._world.rank), daemon=True, name="saving")
            writing.thread.start()
        else:
            writing.write(part, self._world.rank)
        self._seconds += time.monotonic() - since
        if not beside:
            self.finish()
        return None

    def finish(self) -> None:
        """Wait for every rank's part, and give the checkpoint its name. RunError, on every rank, where any could not write."""
        writing, since = self._writing, time.monotonic()
        if writing is None:
            return
        self.join()
        self._writing = None
        step = writing.state["step"]
        problems = [f"the checkpoint of step {step} cannot be written: {writing.problem}"] if writing.problem else []
        refuse_together(problems, self._world, error=RunError)
        parts = gather_on_rank_0(writing.written, self._world)
        on_rank_0(self._world, self._give_name, writing, parts)
        self._seconds += time.monotonic() - since

    def join(self) -> None:
        """Wait until this rank writes no more."""
        if self._writing is not None and self._writing.thread is not None:
            self._writing.thread.join()

    @functools.cached_property
    def _ranks_of_machine(self) -> int:
        """How many ranks share a machine, at most; asked for first in a collective."""
        return 1 + largest_of_world([self._world.local_rank], self._world)[0]

    def _is_short_of_memory_for(self, num_bytes: int) -> bool:
        """Whether copies as large as this rank's would take more than half of the memory that is free on its machine."""
        return num_bytes * self._ranks_of_machine > free_host_memory() // 2

    def _give_name(self, writing: _Writing, parts: list[Part]) -> None:
        finish(writing.path, parts, writing.state, writing.models)
        self._after(writing.state["step"], writing.best)


def _make_room(path: Path, num_bytes: int) -> str | None:
    """Make an empty folder to write into; returns what is wrong where the disk has no room for `num_bytes`."""
    partial, folder = partial_folder(path), path.parent
    folder.mkdir(parents=True, exist_ok=True)
    if partial.exists():
        shutil.rmtree(partial)
    if num_bytes > (free := shutil.disk_usage(folder).free):
        return no_room(path, num_bytes, free)
    partial.mkdir()
    return None
