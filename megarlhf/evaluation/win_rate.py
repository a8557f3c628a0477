"""Win rates with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class WinRate:
    """How often A was preferred to B, a tie counting one half."""

    rate: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    comparisons: int

    def __str__(self) -> str:
        return f"{self.rate:.3f} [{self.low:.3f}, {self.high:.3f}]"


def win_rate(preferences: Sequence[float]) -> WinRate:
    """The mean of preferences (1: A, 0: B, 0.5: tie) with a normal 95 % interval from their own spread, within [0, 1].

    ValueError when there is nothing to compare.
    """
    n = len(preferences)
    if n == 0:
        raise ValueError("a win rate needs at least one comparison")
    mean = sum(preferences) / n
    variance = sum((p - mean) ** 2 for p in preferences) / max(1, n - 1)
    half = 1.96 * math.sqrt(variance / n)
    return WinRate(mean, max(0.0, mean - half), min(1.0, mean + half), n)
