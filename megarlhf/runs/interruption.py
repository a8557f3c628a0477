"""What asks a run to stop, signals and its clock: heard at the next safe point, where everything is saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from types import FrameType

from megarlhf.runs.agreement import RunError

ASKED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
CLOCK = -1
"""Stands for run.stop_after_minutes where the number of a signal would."""


class Interrupted(RunError):
    """The run was asked to stop, has saved its state, and goes on when it is started again.

    Exit status 75 (sysexits.h: a temporary failure, try again), by which a launcher knows to start it again; 130 after Ctrl-C.
    """

    def __init__(self, message: str, asked: int) -> None:
        """Args: asked: the number of a signal, or CLOCK."""
        super().__init__(message)
        self.exit_status = 130 if asked == signal.SIGINT else 75


class Interruption:
    """Within this context SIGTERM, SIGUSR1 and the first Ctrl-C are remembered; a second Ctrl-C stops at once.

    Signals reach a process's main thread only: elsewhere this does nothing.
    """

    def __init__(self, signals: Sequence[signal.Signals] = ASKED, *, within: Interruption | None = None) -> None:
        """Args: within: the context around this one: what it has heard is heard here, and what is heard here is left to it."""
        self._signals = signals
        self._within = within
        self._heard = 0
        self._before: dict[int, object] = {}

    @property
    def received(self) -> int:
        """Number of the signal that came, 0 while none has."""
        return self._heard or (self._within.received if self._within is not None else 0)

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in self._signals}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._within is not None and self._heard:
            self._within._heard = self._heard

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._heard == signal.SIGINT:
            raise KeyboardInterrupt
        self._heard = number
