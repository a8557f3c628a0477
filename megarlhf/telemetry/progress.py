"""How far a stage is: a bar on a terminal and in a notebook, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from tqdm.auto import tqdm


class Progress:
    """Progress of `description` over `total` steps, with the time left and a few metrics.

    On a terminal it is a bar, and in a notebook, by its widgets where they are installed. Elsewhere it is a plain line for the
    first step, for the last, and at most every `interval_seconds` between them, so that a log stays readable. With `enabled`
    False, as on every rank but one, it is silent. `initial` steps, done before a resume, do not count towards the pace.
    """

    def __init__(
        self,
        description: str,
        total: int,
        *,
        initial: int = 0,
        enabled: bool = True,
        interval_seconds: float = 30.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._description, self._total, self._initial = description, total, initial
        self._enabled = enabled
        self._interval = interval_seconds
        self._stream = stream or sys.stderr
        self._clock = clock
        self._start, self._printed = clock(), None
        self._done = initial
        self._bar = None
        in_notebook = "ipykernel" in sys.modules  # whose stderr is no terminal
        if enabled and (self._stream.isatty() or in_notebook):
            self._bar = tqdm(desc=description, total=total, initial=initial, file=self._stream, dynamic_ncols=True)

    def update(self, metrics: Mapping[str, float] | None = None, *, steps: int = 1) -> None:
        """Advance by `steps` and show `metrics`."""
        self._done += steps
        if not self._enabled:
            return
        shown = {name: f"{value:.4g}" for name, value in (metrics or {}).items()}
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(steps)
            return
        now = self._clock()
        if self._printed is None or now - self._printed >= self._interval or self._done >= self._total:
            self._printed = now
            print(self._line(now - self._start, shown), file=self._stream, flush=True)

    def expect(self, total: int) -> None:
        """There are `total` steps, as it turns out."""
        self._total = total
        if self._bar is not None:
            self._bar.total = total

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _line(self, elapsed: float, shown: Mapping[str, str]) -> str:
        left = elapsed / max(1, self._done - self._initial) * (self._total - self._done)
        times = f"{_clock_time(elapsed)} passed, {_clock_time(left)} left"
        return "  ".join([f"{self._description} {self._done}/{self._total}", times, *(f"{name} {value}" for name, value in shown.items())])


def _clock_time(seconds: float) -> str:
    """h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
