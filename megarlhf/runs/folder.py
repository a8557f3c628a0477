"""A run's folder: its configuration, logs and checkpoints, and how it goes on after an interruption.

    run.json       the run's id and stage, and when it began: what makes it this run
    config.yaml    the resolved configuration, for people
    environment.json  what it was last started on, for people
    metrics.jsonl, samples.jsonl, ...
    checkpoints/   step_00000010/ ..., and best.json where validation chose one
    lock           held by the process that works here
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from megarlhf.config import ConfigError, dump_yaml
from megarlhf.config.loader import to_dict
from megarlhf.config.stage import StageConfig
from megarlhf.engine.trainable import TrainEngine
from megarlhf.parallel.collectives import gather_objects
from megarlhf.parallel.groups import World
from megarlhf.runs.agreement import RunError, on_rank_0, refuse_together
from megarlhf.runs.checkpoints import best_as_of, own_checkpoints, prune, write_best
from megarlhf.runs.environment import ENVIRONMENT_FILE, environment
from megarlhf.runs.interruption import Interruption
from megarlhf.runs.lock import FolderLock, not_fresh
from megarlhf.runs.resume import config_changes
from megarlhf.runs.saving import Saving
from megarlhf.storage.checkpoints import Saved
from megarlhf.storage.files import read_json, system_error, write_atomically
from megarlhf.telemetry.samples import SampleLog
from megarlhf.telemetry.sinks import Sink, make_sinks

CONFIG_FILE = "config.yaml"
RUN_FILE = "run.json"


class Run:
    """One stage's folder. Only rank 0 writes beside checkpoints; opening, saving and resuming are collectives of the whole world."""

    def __init__(
        self,
        config: StageConfig,
        world: World,
        *,
        fresh: bool = False,
        callbacks: Sequence[Callable[[int, dict], None]] = (),
        asked: Interruption | None = None,
    ) -> None:
        """Look at the folder, find the checkpoint to go on from, and write nothing yet.

        Args:
            callbacks: called with each step that is logged and its metrics, on every rank.
            asked: where the process listens for signals that ask it to stop before, between and after the steps of runs.
        ConfigError when it belongs to another stage, is in use, with `fresh` when it holds anything, when its newest checkpoint is
        damaged, and when the configuration changes what a run must keep.
        """
        self.started = time.monotonic()
        """When: what run.stop_after_minutes counts from."""
        self.stage = config.stage
        self.config = config.run
        self.tokenizer = config.tokenizer
        self.world = world
        self.dir = Path(config.run.dir)
        self.fingerprints: dict[str, str] = {}
        """Of the data and the tokenizer: what a resume must find again."""
        self.began: datetime.datetime
        """When the run first started: what a chat template that writes the date is told on every rank, and after every resume."""
        self.sources: dict[str, dict] = {}
        """Role -> where a model's weights came from, see runs/models.py."""
        self.asked = asked
        self._whole = config
        self._callbacks = callbacks
        self._sinks: list[Sink] = []
        self._samples: SampleLog | None = None
        self._lock: FolderLock | None = None
        self.resumed: Saved | None = None
        """The checkpoint that the run goes on from; None at its beginning."""
        self._changed: list[str] = []
        self._best: int | None = None
        self.saving = Saving(self.checkpoints, world, in_background=self.config.save_in_background, after=self._after_save)
        """Its checkpoints as they are written."""
        try:
            self._open(fresh)
        except BaseException:
            self.close()  # a refused start holds on to nothing
            raise

    def _open(self, fresh: bool) -> None:
        self.id, self.began, found, notes = on_rank_0(self.world, self._look, fresh)
        self.resumed = self._first_sound(found, notes)
        if self.resumed is not None:
            problems, self._changed = config_changes(self.resumed.state["config"], to_dict(self._whole))
            refuse_together([f"{problem}; keep it, or choose another run.dir than {self.dir}" for problem in problems], self.world)
        for note in notes:
            self.say(note)

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes and prints."""
        return self.world.rank == 0

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.dir / "checkpoints"

    def say(self, text: str) -> None:
        """Print a line, once."""
        if self.is_writer:
            tqdm.write(f"[{self.stage}] {text}", file=sys.stderr)  # above a progress bar, where there is one
            sys.stderr.flush()

    def keep(self, fingerprints: Mapping[str, str], *, but: Collection[str] = ()) -> list[str]:
        """Remember the fingerprints of what the run reads; returns how they differ from those that it began with, `but` some."""
        self.fingerprints |= fingerprints
        before = self.resumed.state["fingerprints"] if self.resumed is not None else {}
        return [
            f"{name} is not what the run in {self.dir} began with: its content has changed; bring that back, or choose another run.dir"
            for name in before.keys() & fingerprints.keys()
            if before[name] != fingerprints[name] and name not in but
        ]

    def introduce(self, notes: Sequence[str]) -> None:
        """Write the configuration, and say what the run is about to use, a line for each note."""
        on_rank_0(self.world, self._settle)
        for note in notes:
            self.say(note)

    def write(self, name: str, text: str) -> None:
        """Write a result of the run into its folder; a collective."""
        on_rank_0(self.world, lambda: write_atomically(self.dir / name, text))

    def remove(self, names: Iterable[str]) -> None:
        """Remove results of before that this run does not write; a collective."""
        on_rank_0(self.world, lambda: [(self.dir / name).unlink(missing_ok=True) for name in names])

    def say_changes(self) -> None:
        """Say where the run goes on, and what has changed since then."""
        assert self.resumed is not None
        self.say(f"going on from {self.resumed.path}")
        for change in self._changed:
            self.say(f"changed since then: {change}")

    def open_logs(self, step: int) -> None:
        """Open the logs, without what was written after `step`: those steps come again.

        ConfigError on every rank where a sink cannot be opened, or a log of before is broken.
        """
        on_rank_0(self.world, self._open_logs, step)

    def find_best(self) -> bool:
        """Know the best checkpoint so far; False where the one that was it is there no more. A collective."""
        state = self.resumed.state if self.resumed is not None else {"step": 0}
        self._best, changed = on_rank_0(self.world, best_as_of, self.checkpoints, state["step"], state.get("best_step"))
        if changed:
            self.say(changed)
        return self._best is not None or not changed

    def log(self, step: int, metrics: Mapping[str, float], samples: Sequence[Mapping[str, object]] = ()) -> None:
        """Write one step's metrics to every sink, and its sampled responses; then call the callbacks."""
        for sink in self._sinks:
            sink.write(self.stage, step, metrics)
        if self._samples is not None:
            for sample in samples:
                self._samples.write(self.stage, step, **sample)
        for callback in self._callbacks:
            callback(step, dict(metrics))

    def save(
        self,
        step: int,
        models: Mapping[str, TrainEngine],
        cursors: dict,
        *,
        alerts: Mapping[str, Sequence[float]],
        of: int,
        best: bool = False,
        last: bool = False,
    ) -> bool:
        """Write the checkpoint of `step` `of` so many, remember it as the best if it is, and remove the oldest beyond keep_checkpoints.

        Returns whether it is written. With run.save_in_background that is done beside the steps that follow, and `saving.finish` is for
        the caller to call; not the `last`, which is whole at the return. Where the disk has no room for it that is said and the run goes
        on, unless it is the `last`: a RunError then, as when writing fails, on every rank. What was there before stays.
        """
        state = {
            "stage": self.stage,
            "run": self.id,
            "step": step,
            "total_steps": of,
            "best_step": step if best else self._best,
            "cursors": cursors,
            "alerts": alerts,
            "config": to_dict(self._whole),
            "sources": self.sources,
            "fingerprints": self.fingerprints,
        }
        if no_room := self.saving.start(state, models, best=best, wait=last):
            if last:
                raise RunError(f"{no_room}; make room and start the same command again: {self.newest()}")
            self.say(f"{no_room}; it is not written, and training goes on")
            return False
        self._best = state["best_step"]
        return True

    def newest(self) -> str:
        """Which checkpoint is the newest, in words, once the one that is being written is whole; on every rank."""
        self.saving.finish()
        found = own_checkpoints(self.checkpoints, run=self.id, skip_damaged=True)[0]
        return f"the newest checkpoint is {found[0].path}" if found else "there is no checkpoint before it"

    def close(self) -> None:
        """Flush and close what is open, and let go of the folder."""
        self.saving.join()  # nothing writes here once the lock is another's
        with contextlib.ExitStack() as closing:
            for log in (*self._sinks, *([self._samples] if self._samples else [])):
                closing.callback(log.close)
            if self._lock is not None:
                closing.callback(self._lock.release)
        self._sinks, self._samples = [], None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # On rank 0

    def _look(self, fresh: bool) -> tuple[str, datetime.datetime, list[Saved], list[str]]:
        """(id of the run, when it began, its checkpoints from the newest back, what is to be said of the folder)."""
        with _naming_run_dir():
            if fresh and (problem := not_fresh(self.dir)):
                raise ConfigError(problem)
            if self.dir.is_dir():
                self._lock = FolderLock(self.dir)
            known = read_json(self.dir / RUN_FILE) if (self.dir / RUN_FILE).exists() else {"stage": self.stage, "id": uuid.uuid4().hex}
        if known.get("stage") != self.stage:
            raise ConfigError(f"run.dir: {self.dir} holds a run of {known.get('stage')}; choose another folder for {self.stage}")
        newest_good = self.config.resume == "newest_good"
        found, notes = own_checkpoints(self.checkpoints, run=known["id"], skip_damaged=newest_good)
        return known["id"], _beginning(known, self.dir / RUN_FILE), found if newest_good else found[:1], notes

    def _settle(self) -> None:
        with _naming_run_dir():
            self.dir.mkdir(parents=True, exist_ok=True)
            self._lock = self._lock or FolderLock(self.dir)
            known = {"id": self.id, "stage": self.stage, "began": self.began.isoformat()}
            write_atomically(self.dir / RUN_FILE, json.dumps(known) + "\n")
            write_atomically(self.dir / CONFIG_FILE, dump_yaml(self._whole))
            write_atomically(self.dir / ENVIRONMENT_FILE, json.dumps(environment(self.world), indent=1) + "\n")

    def _open_logs(self, step: int) -> None:
        whole = to_dict(self._whole)
        self._sinks = make_sinks(self.config.sinks, self.dir, name=self.dir.name, wandb_mode=self.config.wandb_mode, config=whole)
        self._samples = SampleLog(self.dir / "samples.jsonl")
        for log in (*self._sinks, self._samples):
            log.truncate_after(self.stage, step)

    def _after_save(self, step: int, best: bool) -> None:
        if best:
            write_best(self.checkpoints, step)
        prune(self.checkpoints, run=self.id, keep=self.config.keep_checkpoints, keep_every=self.config.keep_every)

    # On every rank

    def _first_sound(self, found: Sequence[Saved], notes: list[str]) -> Saved | None:
        """The newest checkpoint whose files are what was written, each rank reading its share of them.

        ConfigError where it is damaged and `resume` does not allow an older one.
        """
        for saved in found:
            damages = sorted({wrong for of_rank in gather_objects(saved.damages(self.world.rank, self.world.size)) for wrong in of_rank})
            if not damages:
                return saved
            if self.config.resume == "newest":
                way_out = f"remove {saved.path}, or set run.resume: newest_good, to go on from the one before"
                raise ConfigError("\n".join([*damages, way_out]))
            notes += [*damages, f"{saved.path} is left alone: run.resume is newest_good"]
        if found:
            raise ConfigError(f"run.resume: none of the {len(found)} checkpoints in {self.checkpoints} is whole; choose another run.dir")
        return None


def _beginning(known: Mapping[str, str], file: Path) -> datetime.datetime:
    """When a run began, as its `file` says. ValueError for what is no time."""
    try:
        return datetime.datetime.fromisoformat(known["began"]) if "began" in known else datetime.datetime.now()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: it must say when the run began, got {known['began']!r:.60}") from error


@contextlib.contextmanager
def _naming_run_dir() -> Iterator[None]:
    """What the system says of the folder that the user named is theirs to mend."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"run.dir: {system_error(error)}") from error
