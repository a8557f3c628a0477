"""Wall-clock seconds of the phases of an iteration."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Timers:
    """Seconds by name: ``with timers("generate_seconds"): ...``.

    `synchronize` (``torch.cuda.synchronize`` on GPUs) waits for the device before a clock is read, so that a phase is
    charged for the work it launched.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self._synchronize = synchronize
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the seconds that the body takes to `name`; a body that raises is not counted."""
        start = self._now()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - start

    def collect(self) -> dict[str, float]:
        """The seconds of every name since the last call, which starts them afresh."""
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _now(self) -> float:
        if self._synchronize is not None:
            self._synchronize()
        return time.perf_counter()
