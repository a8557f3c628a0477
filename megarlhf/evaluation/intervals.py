"""How sure a mean is."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959964
"""Standard errors to either side of a 95 % interval."""


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of numbers in [0, 1] and its 95 % Wilson interval: (mean, low, high).

    The numbers must be independent of each other. Those inside (0, 1) vary less than zeros and ones of the same mean, so
    with them the interval is on the wide side.

    Raises:
        ValueError: there are no numbers.
    """
    if not values:
        raise ValueError("a mean needs at least one number; there is none")
    count, mean = len(values), math.fsum(values) / len(values)
    middle = (mean + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z * math.sqrt(max(0.0, mean * (1 - mean)) / count + Z**2 / (4 * count**2)) / (1 + Z**2 / count)
    return mean, max(0.0, middle - half), min(1.0, middle + half)


def interval_metrics(name: str, values: Sequence[float]) -> dict[str, float]:
    """{name, name_low, name_high, name_count} of `mean_interval`; nothing where there are no numbers."""
    if not values:
        return {}
    mean, low, high = mean_interval(values)
    return {name: mean, f"{name}_low": low, f"{name}_high": high, f"{name}_count": float(len(values))}


def win_rate(preferences: Sequence[float]) -> tuple[float, float, float]:
    """The mean of `preferences` (a tie is half a win) and its 95 % Wilson interval: (rate, low, high).

    A tie varies less than a win or a loss, so the interval is on the wide side.

    Raises:
        ValueError: there are no preferences.
    """
    if not preferences:
        raise ValueError("a win rate needs at least one comparison; there is none")
    return mean_interval(preferences)
