"""When something goes wrong: which rank says it, and how the others hear that the run is over.

Any rank can fail while the others wait for it in a collective. Through the store in which the ranks met, one rank claims the
word; when it has spoken it rings, and every other rank ends without a word of its own.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

SPEAKER, RUNG = "alarm/speaker", "alarm/rung"
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
                store = self._reconnect()
                while not self._over.wait(LOOK_SECONDS):
                    if not self.speaks and (rung := _look(store)) is not None:
                        leave(rung)

        if self._reconnect is not None:
            threading.Thread(target=look, name="alarm", daemon=True).start()

    def close(self) -> None:
        """Stop watching."""
        self._over.set()
