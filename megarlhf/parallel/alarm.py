"""When something goes wrong: which rank says it, and how the others hear that the run is over.

Any rank can fail while the others wait for it in a collective. Through the store in which the ranks met, one rank claims the
word; when it has spoken it rings, and every other rank ends without a word of its own. Where an exchange broke or took too long,
the one that speaks first calls the roll: who does not answer has ended or is stopped, and who is not waiting for others keeps them.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch.distributed as dist

SPEAKER, RUNG, ROLL = "alarm/speaker", "alarm/rung", "alarm/roll"
STIRRED = "alarm/stirred"
"""Set with any of the others but the first: what a rank looks for."""
ROLL_SECONDS = 3.0
"""How long ranks have to answer when the roll is called."""
LOOK_SECONDS = 0.5
BROKEN_CONNECTION = ("gloo/", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")


GLOO_PLACE = re.compile(r"^\[\S+/gloo/\S+\] ")


def first_sentence(error: BaseException) -> str:
    """What a library says of a broken connection, without the line of its source and its advice."""
    return GLOO_PLACE.sub("", (str(error).splitlines() or [""])[0]).split(". ")[0]


def is_broken_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank has ended or did not answer, as gloo and NCCL say it."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in BROKEN_CONNECTION)
    )


@dataclass(frozen=True)
class Rung:
    """What the rank that spoke tells the others."""

    status: int
    """The run's exit status."""
    host: str
    """Its machine."""


@dataclass(frozen=True)
class Whereabouts:
    """What a rank answers when the roll is called."""

    doing: str
    """What it said that it was doing: "step 12"."""
    waits: bool
    """Whether its main thread is in an exchange with other ranks."""
    stack: str
    """Of its main thread, innermost last, a line for each call."""


def _look(store: dist.Store) -> Rung | None:
    if not store.check([RUNG]):
        return None
    status, host = store.get(RUNG).decode().split(" ", 1)
    return Rung(int(status), host)


class Alarm:
    """One for each rank, over a store that they share."""

    def __init__(self, store: dist.Store, rank: int, reconnect: Callable[[], dist.Store] | None = None) -> None:
        """`reconnect` opens a second connection to the store, for a thread that must not wait for the first."""
        self._store = store
        self._rank = rank
        self._reconnect = reconnect
        self._over = threading.Event()
        self.speaks = False
        """Whether this rank speaks or has spoken."""
        self.doing = "its start"
        """What this rank is at, in words."""

    def claim(self, *, patience: float) -> bool:
        """Whether this rank is the one to speak. With `patience` it first leaves the word to another for so many seconds."""
        if patience and self.wait(patience) is not None:
            return False
        try:
            self.speaks = self._store.compare_set(SPEAKER, "", str(self._rank)) == str(self._rank).encode()
        except (RuntimeError, dist.DistError):  # the rank that served the store is gone: better said twice than not at all
            self.speaks = True
        return self.speaks

    def ring(self, status: int) -> None:
        """Tell the others that all is said, the exit status, and from which machine."""
        with contextlib.suppress(RuntimeError, dist.DistError):
            self._store.set(RUNG, f"{status} {socket.gethostname()}")
            self._store.set(STIRRED, "")

    def call_the_roll(self, size: int) -> list[Whereabouts | None]:
        """Where each of `size` ranks is, None for those that have not answered within `ROLL_SECONDS`: called after an exchange failed.

        Where the store itself does not answer that is rank 0, which serves it, and nothing is known of the others.
        """
        waiting = Whereabouts(self.doing, waits=True, stack="")
        found: list[Whereabouts | None] = [waiting if rank == self._rank else None for rank in range(size)]
        end = time.monotonic() + ROLL_SECONDS
        try:
            self._store.set(ROLL, "")
            self._store.set(STIRRED, "")
            while None in found and time.monotonic() < end:
                time.sleep(0.05)
                for rank in [rank for rank in range(size) if found[rank] is None and self._store.check([f"{ROLL}/{rank}"])]:
                    found[rank] = Whereabouts(**json.loads(self._store.get(f"{ROLL}/{rank}")))
        except (RuntimeError, dist.DistError):
            return [None, *(waiting for _ in range(size - 1))]
        return found

    def _whereabouts(self) -> Whereabouts:
        stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
        waits = any("torch/distributed/" in frame.filename for frame in stack[-4:])
        return Whereabouts(self.doing, waits, "".join(traceback.format_list(stack[-12:])).rstrip())

    def wait(self, seconds: float) -> Rung | None:
        """What another rank rang; None when none did within so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(RuntimeError, dist.DistError):
                if (rung := _look(self._store)) is not None:
                    return rung
            time.sleep(0.02)
        return None

    def watch(self, leave: Callable[[Rung], None]) -> None:
        """Call `leave` from a thread when another rank has rung."""

        def look() -> None:
            with contextlib.suppress(RuntimeError, OSError, dist.DistError):
                store, answered = self._reconnect(), False
                while not self._over.wait(LOOK_SECONDS):
                    if self.speaks or not store.check([STIRRED]):
                        continue
                    if (rung := _look(store)) is not None:
                        leave(rung)
                    elif not answered and store.check([ROLL]):
                        store.set(f"{ROLL}/{self._rank}", json.dumps(asdict(self._whereabouts())))
                        answered = True

        if self._reconnect is not None:
            threading.Thread(target=look, name="alarm", daemon=True).start()

    def close(self) -> None:
        """Stop watching."""
        self._over.set()
