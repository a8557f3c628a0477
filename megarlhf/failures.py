"""What a user reads when a run ends before its end: one clear text, said once by one rank, and the exit status.

2 for what the user wrote wrong, 1 for what went wrong while running, 130 after Ctrl-C. torchrun prints a table of its own about
processes that fail; it is given the text for it, and sees one process of each machine fail first.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from megarlhf.config import ConfigError
from megarlhf.endings import INTERRUPTED, USER_WROTE_WRONG, WENT_WRONG
from megarlhf.parallel.alarm import LOOK_SECONDS, Alarm, Rung, Whereabouts, first_sentence, is_broken_connection
from megarlhf.parallel.launch import Place
from megarlhf.runs.agreement import RunError
from megarlhf.storage.files import system_error

TOGETHER_SECONDS = 5.0
"""How long a rank leaves the word to rank 0 for an error that all ranks raise."""
SPOKEN_SECONDS = 5.0
"""How long a rank waits for the one that speaks to have spoken."""
HEARD_SECONDS = 3 * LOOK_SECONDS
"""How long the rank that spoke stays, so that the others hear it and leave."""
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "CUDA out of memory")


def described(error: BaseException) -> tuple[str, int]:
    """(what to say of it, exit status). An error that nobody foresaw is a fault of this program, and said with its traceback."""
    if isinstance(error, ConfigError):
        return str(error), USER_WROTE_WRONG
    if isinstance(error, RunError):
        return str(error), getattr(error, "exit_status", WENT_WRONG)
    if isinstance(error, KeyboardInterrupt):
        return "stopped by Ctrl-C", INTERRUPTED
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _says_memory(error):
        first = (str(error).splitlines() or [""])[0]
        way_out = "a smaller micro_batch_size, recompute: full, or more ranks with tp and pp need less"
        return f"memory ran out{f' ({first})' if first else ''}: {way_out}", WENT_WRONG
    if isinstance(error, OSError):
        return _of_the_system(error), WENT_WRONG
    if is_broken_connection(error):
        return f"the connection to another rank broke: it has ended, or did not answer in time ({first_sentence(error)})", WENT_WRONG
    if isinstance(error, ValueError) and _is_ours(error):
        return str(error), WENT_WRONG
    return "this should not have happened:\n" + "".join(traceback.format_exception(error)).rstrip(), WENT_WRONG


def speak(command: str, error: BaseException, alarm: Alarm, place: Place) -> int:
    """Say what went wrong, if this rank is the one to say it; returns the exit status. Does not wait for ranks that hang.

    Errors of the configuration, and RunError, are raised by all ranks alike: rank 0 says them. Of others the first rank does.
    """
    text, status = described(error)
    together = isinstance(error, ConfigError | RunError)
    patience = TOGETHER_SECONDS if together and place.rank > 0 else 0.0
    if not alarm.claim(patience=patience):
        rung = alarm.wait(SPOKEN_SECONDS)
        return status if rung is None else status_of_other(rung, place)
    if is_broken_connection(error):
        text += f"\n{missing_from_roll(alarm.call_the_roll(place.size))}"
    where = f" (rank {place.rank} of {place.size})" if place.size > 1 and not together else ""
    say(command + where, text, place)
    alarm.ring(status)
    if place.size > 1:
        time.sleep(HEARD_SECONDS)  # the others leave before a launcher ends them, and before rank 0's store is gone
    return status


def missing_from_roll(found: Sequence[Whereabouts | None]) -> str:
    """Who kept the others waiting, as far as the roll says: ranks that do not answer, else those that wait for nobody."""
    if silent := [rank for rank, answer in enumerate(found) if answer is None]:
        last = next(answer.doing for answer in found if answer is not None)
        return f"{_ranks(silent)} of {len(found)} did not answer when the roll was called in {last}: ended, stopped or out of reach"
    busy = [(rank, answer) for rank, answer in enumerate(found) if answer is not None and not answer.waits]
    lines = [f"rank {rank} of {len(found)} was not waiting for others, in {answer.doing}, at\n{answer.stack}" for rank, answer in busy]
    return "\n".join(lines or [f"all {len(found)} ranks answered when the roll was called, and all were waiting for others"])


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def status_of_other(rung: Rung, place: Place) -> int:
    """The exit status of a rank that leaves the word to another.

    torchrun prints a table of all processes of a machine that end with another status than 0, and one is enough: the one that
    spoke, and on other machines the first.
    """
    listed = not place.under_torchrun or (rung.host != socket.gethostname() and place.local_rank == 0)
    return rung.status if listed else 0


def say(command: str, text: str, place: Place) -> None:
    """Print a text, in a box where the lines of other processes stand around it, and leave it to torchrun."""
    said = f"megarlhf {command}: {text}"
    line = "=" * min(100, max(map(len, said.splitlines())))
    print(f"{line}\n{said}\n{line}" if place.size > 1 else said, file=sys.stderr, flush=True)
    leave_word(f"rank {place.rank} of {place.size} has said why, in the box above")


def leave_word(text: str) -> None:
    """Write what went wrong where torchrun looks for it (the format of torch.distributed.elastic's error handler)."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        content = {"message": {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}}
        Path(file).write_text(json.dumps(content), encoding="utf-8")


def leave(status: int) -> NoReturn:
    """End this process now, whatever hangs in it, without the last words of libraries; with the processes that it started."""
    sys.stdout.flush()
    sys.stderr.flush()
    for process in multiprocessing.active_children():
        process.terminate()
    os._exit(status)


def _of_the_system(error: OSError) -> str:
    text = system_error(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        text += "; make room and start the same command again: it goes on from its newest checkpoint"
    return text


def _says_memory(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY)


def _is_ours(error: BaseException) -> bool:
    """Whether the error was raised by this package itself, whose ValueErrors are words for the user."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parent)
