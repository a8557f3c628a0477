"""Real gloo ranks for tests: processes that stay alive and run one check after another.

Importing torch and megatron-core costs seconds, joining a process group milliseconds. So the processes are kept, and each
check gets a fresh default group over as many of them as it asks for:

    def check_sum(value):  # runs in each rank
        total = torch.tensor(value)
        dist.all_reduce(total)
        return total

    def test_sum(ranks4):
        assert ranks4.run(check_sum, 3) == [12, 12, 12, 12]
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, TextIO

START_SECONDS = 300.0  # for a process to import torch, on a machine that is busy
DEFAULT_TIMEOUT = 180.0  # for one check; its first run in a process includes importing what it uses
OTHERS_SECONDS = 3.0  # for the other ranks to report, after one has failed; those that do not are said to be running
LAST_FRAME = "in <module>\n"  # a dump ends with the main thread's outermost frame


class RanksFailed(Exception):
    """A check did not return on every rank: carries the traceback or the stack of each rank that did not."""


@dataclass(frozen=True)
class Ranks:
    """A world of `world_size` ranks: what the fixtures `ranks1`, `ranks2` and `ranks4` give."""

    processes: RankProcesses
    world_size: int

    def run(self, check: Callable[..., Any], *args: Any, timeout: float = DEFAULT_TIMEOUT) -> list[Any]:
        """Call `check(*args)` in each rank and return the results in rank order. See `RankProcesses.run`."""
        return self.processes.run(check, *args, world_size=self.world_size, timeout=timeout)


def run_ranks(check: Callable[..., Any], world_size: int, *args: Any, timeout: float = DEFAULT_TIMEOUT) -> list[Any]:
    """Call `check(*args)` in `world_size` new processes, which end with it: where a test needs an untouched process."""
    with RankProcesses() as processes:
        return processes.run(check, *args, world_size=world_size, timeout=timeout)


class RankProcesses:
    """Processes kept alive between checks; started on demand, and started anew after a failure or a hang."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[connection.Connection] = []
        self._runs = 0

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()
        self._folder.cleanup()

    def run(self, check: Callable[..., Any], *args: Any, world_size: int, timeout: float = DEFAULT_TIMEOUT) -> list[Any]:
        """Call `check(*args)` in ranks 0 .. world_size-1 of a new gloo world and return their results in rank order.

        `check` is a function of a module; its arguments and results are pickled. torch's generator is seeded alike before
        each check. RanksFailed where a rank raises, ends, or takes more than `timeout` seconds; the other ranks are ended.
        """
        call = pickle.dumps((check, args))
        try:
            self._start(world_size)
            self._runs += 1
            job = pickle.dumps((world_size, f"{self._folder.name}/rendezvous{self._runs}", timeout, call))
            for pipe in self._pipes[:world_size]:
                pipe.send_bytes(job)
            answers, failures = self._gather(world_size, timeout)
            if len(answers) < world_size:
                name = f"{check.__module__}.{check.__qualname__}"
                raise RanksFailed(f"{name} on {world_size} ranks\n{self._report(failures, answers, world_size, timeout)}")
        except BaseException:
            self._end()
            raise
        return [pickle.loads(answers[rank]) for rank in range(world_size)]

    def _start(self, world_size: int) -> None:
        """Have `world_size` processes ready for a job."""
        old = len(self._processes)
        spawn = multiprocessing.get_context("spawn")
        for rank in range(old, world_size):
            pipe, far_end = spawn.Pipe()
            # Not a daemon: a check may start processes of its own, which daemons may not.
            process = spawn.Process(target=_serve, args=(rank, self._stack_file(rank), far_end), name=f"rank{rank}")
            process.start()
            far_end.close()
            self._processes.append(process)
            self._pipes.append(pipe)
        for rank, pipe in enumerate(self._pipes[old:], old):
            if not pipe.poll(START_SECONDS):
                raise RanksFailed(f"rank {rank} has not started after {START_SECONDS:g} s")
            pipe.recv_bytes()

    def _gather(self, world_size: int, seconds: float) -> tuple[dict[int, bytes], dict[int, str]]:
        """Each rank's result, or its traceback, until all have reported or the time is over."""
        answers, failures = {}, {}
        ranks = {pipe: rank for rank, pipe in enumerate(self._pipes[:world_size])}
        deadline = time.monotonic() + seconds
        while ranks and (left := deadline - time.monotonic()) > 0:
            for pipe in connection.wait(list(ranks), left):
                rank = ranks.pop(pipe)
                try:
                    succeeded, payload = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionError):
                    self._processes[rank].join()
                    succeeded, payload = False, f"the process ended with exit code {self._processes[rank].exitcode}\n"
                if succeeded:
                    answers[rank] = payload
                else:
                    failures[rank] = payload
                    deadline = min(deadline, time.monotonic() + OTHERS_SECONDS)
        return answers, failures

    def _report(self, failures: dict[int, str], answers: dict[int, bytes], world_size: int, timeout: float) -> str:
        """What each rank that did not return did instead; the first to fail comes first."""
        parts = [f"-- rank {rank} failed:\n{reason}" for rank, reason in failures.items()]
        for rank in sorted(set(range(world_size)) - set(failures) - set(answers)):
            if failures:
                parts.append(f"-- rank {rank} was still running {OTHERS_SECONDS:g} s after the first failure, and was ended\n")
            else:
                parts.append(f"-- rank {rank} did not return within {timeout:g} s:\n{self._stack(rank)}")
        return "".join(parts)

    def _stack(self, rank: int) -> str:
        """The stack that a hung rank's watchdog writes when its time is over, once it is there as a whole."""
        deadline = time.monotonic() + START_SECONDS
        while not (text := self._stack_file(rank).read_text()).endswith(LAST_FRAME) and time.monotonic() < deadline:
            time.sleep(0.05)
        return text

    def _stack_file(self, rank: int) -> Path:
        return Path(self._folder.name) / f"stack{rank}"

    def _end(self) -> None:
        """End all processes, and those that they started. They have nothing to put away, so at once."""
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()  # one that has no group yet
            pipe.close()
        for process in self._processes:
            process.join()
        self._processes.clear()
        self._pipes.clear()


def _serve(rank: int, stack_file: Path, pipe: connection.Connection) -> None:
    """One rank's process: runs job after job until it is ended."""
    os.setpgid(0, 0)  # a group of its own, with the processes that a check starts
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # gloo's ranks are a CPU's, whatever else is there
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    import torch  # here, because it reads OMP_NUM_THREADS when it is imported

    torch.set_num_threads(1)
    pipe.send_bytes(b"ready")
    from megarlhf.parallel import platform

    platform.prepare_megatron()  # before a check's own imports do it, more slowly
    with stack_file.open("w") as stack:
        while True:
            job = pipe.recv_bytes()
            try:
                answer = (True, _run(job, rank, stack))
            except BaseException:
                answer = (False, traceback.format_exc())
            pipe.send_bytes(pickle.dumps(answer))


def _run(job: bytes, rank: int, stack: TextIO) -> bytes:
    """Join the job's world, make its call, leave the world. The result is pickled plainly: its tensors travel as bytes."""
    import torch
    import torch.distributed as dist

    world_size, rendezvous, timeout, call = pickle.loads(job)
    faulthandler.dump_traceback_later(timeout, file=stack)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="localhost", MASTER_PORT="29500")
    check, args = pickle.loads(call)
    patience = datetime.timedelta(seconds=timeout + 60)  # a hang is ours to report, not gloo's
    store = dist.FileStore(rendezvous, world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=patience)
    await_all(store, rank, world_size)
    torch.manual_seed(0)
    result = pickle.dumps(check(*args))
    if dist.is_initialized():  # not where the check itself left its world
        dist.barrier()
        dist.destroy_process_group()
    gc.collect()  # models are cycles, and hold process groups with their threads
    faulthandler.cancel_dump_traceback_later()
    return result


def await_all(store: Any, rank: int, world_size: int) -> None:
    """Return when every rank is connected: one whose check leaves its world sooner would break off the others' connecting."""
    store.set(f"joined/{rank}", "")
    store.wait([f"joined/{other}" for other in range(world_size)])


def _end_with_parent() -> None:
    """End this process when pytest's has ended, however it did."""
    multiprocessing.parent_process().join()
    os.killpg(0, signal.SIGKILL)
