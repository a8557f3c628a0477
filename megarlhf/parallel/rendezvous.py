"""How the ranks of a run find one another: each registers under its number, and who is missing is said while the others wait."""

from __future__ import annotations

import datetime
import os
import socket
import sys
import time
from collections.abc import Iterator

import torch.distributed as dist

from megarlhf.parallel.launch import Place

FIRST_WORD_SECONDS = 5.0
"""How long ranks wait before they say for whom; then each time twice as long."""
MOST_NAMED = 8


class RanksMissing(TimeoutError):
    """Some ranks did not come in time."""

    def __init__(self, message: str, *, speaks: bool) -> None:
        super().__init__(message)
        self.speaks = speaks
        """Whether this rank is the one to say so, among those that came."""


def meet(place: Place, *, timeout: datetime.timedelta, about: str) -> tuple[dist.Store, list[str]]:
    """The store that all ranks share, once all have come, and what each tells `about` itself, in rank order.

    RanksMissing when some have not come within `timeout`. ValueError when rank 0 cannot open its port.
    """
    waiting = _Waiting(place, timeout.total_seconds())
    is_host = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not is_host:
        _await_host(place, waiting)
    store = connect_store(place, is_host=is_host, timeout=timeout)
    return store, _told(store, "place", about, place, waiting, _CHECK)


def tell_all(store: dist.Store, name: str, about: str, place: Place, *, timeout: datetime.timedelta) -> list[str]:
    """What each rank tells under `name`, in rank order, once all have told it: an exchange that needs no process group.

    RanksMissing names those that have not come to it within `timeout`. Each name serves once.
    """
    return _told(store, name, about, place, _Waiting(place, timeout.total_seconds()), "they were there before: they hang, or have ended")


def _told(store: dist.Store, name: str, about: str, place: Place, waiting: _Waiting, question: str) -> list[str]:
    """One request of the store for each look, however many ranks there are, but where it is time to say who is missing."""
    keys = [f"{name}/{rank}" for rank in range(place.size)]
    store.set(keys[place.rank], about)
    for _ in waiting.pauses():
        if store.check(keys):
            return [told.decode() for told in store.multi_get(keys)]
        if waiting.is_time_for_a_word():
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            waiting.say(f"waiting for {_named(missing, place.size)}", speaks=place.rank == _first_there(missing, place.size))
    missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
    raise RanksMissing(
        f"{_named(missing, place.size)} did not come within {_duration(waiting.seconds)}: {question}",
        speaks=place.rank == _first_there(missing, place.size),
    )


def _first_there(missing: list[int], size: int) -> int | None:
    """The first rank that came, which speaks for those that did."""
    return next((rank for rank in range(size) if rank not in set(missing)), None)


def connect_store(place: Place, *, is_host: bool, timeout: datetime.timedelta) -> dist.Store:
    """This attempt's part of the store at the run's address; rank 0 serves it where torchrun does not."""
    try:
        store = dist.TCPStore(place.address, place.port, is_master=is_host, timeout=timeout, wait_for_workers=False, multi_tenant=True)
    except (dist.DistError, RuntimeError) as error:
        where = f"{place.address}:{place.port}"
        if is_host:
            taken = "is MASTER_PORT taken by another process?"
            raise ValueError(f"rank 0 cannot open {where} for the others ({taken}): {_line(error)}") from error
        raise RanksMissing(f"what answers at {where} is not rank 0 of this run: {_line(error)}", speaks=True) from error
    return dist.PrefixStore(f"megarlhf/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


_CHECK = "was each of them started, with the same MASTER_ADDR and MASTER_PORT?"


def _await_host(place: Place, waiting: _Waiting) -> None:
    """Wait until something listens at the run's address."""
    problem = ""
    for _ in waiting.pauses():
        try:
            socket.create_connection((place.address, place.port), timeout=2).close()
            return
        except OSError as error:
            problem = f"{place.address}:{place.port} does not answer ({error.strerror or error})"
        waiting.say(f"waiting for rank 0 of {place.size}: {problem}", speaks=True)
    raise RanksMissing(f"rank 0 of {place.size} did not come within {_duration(waiting.seconds)}: {problem}; {_CHECK}", speaks=True)


class _Waiting:
    """A deadline, and words on the way to it: after FIRST_WORD_SECONDS, then after twice that, and so on."""

    def __init__(self, place: Place, seconds: float) -> None:
        self.seconds = seconds
        self._place = place
        self._start = time.monotonic()
        self._next_word = FIRST_WORD_SECONDS

    def pauses(self) -> Iterator[None]:
        """One item per look, a little later each time, until the time is over."""
        pause = 0.01
        while time.monotonic() - self._start < self.seconds:
            yield
            time.sleep(pause)
            pause = min(1.0, 1.3 * pause)

    def is_time_for_a_word(self) -> bool:
        """Whether `say` would print."""
        return time.monotonic() - self._start >= self._next_word

    def say(self, text: str, *, speaks: bool) -> None:
        """Print `text` with the time left, where it is time for it."""
        if not self.is_time_for_a_word():
            return
        self._next_word *= 2
        passed = time.monotonic() - self._start
        if speaks:
            left = _duration(max(0.0, self.seconds - passed))
            print(f"megarlhf: rank {self._place.rank}: {text}; for {left} more", file=sys.stderr, flush=True)


def _named(ranks: list[int], size: int) -> str:
    names = ", ".join(map(str, ranks[:MOST_NAMED])) + (f" and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {names} of {size}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"


def _line(error: Exception) -> str:
    return str(error).splitlines()[0]
