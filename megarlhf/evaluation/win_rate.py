"""Win rates with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence


def win_rate(preferences: Sequence[float]) -> tuple[float, float, float]:
    """The mean of `preferences` (a tie is half a win) and its 95 % Wilson interval: (rate, low, high).

    A tie varies less than a win or a loss, so the interval is on the wide side.

    Raises:
        ValueError: there are no preferences.
    """
    if not preferences:
        raise ValueError("a win rate needs at least one comparison; there is none")
    count, rate, z = len(preferences), sum(preferences) / len(preferences), 1.959964
    middle = (rate + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return rate, max(0.0, middle - half), min(1.0, middle + half)
