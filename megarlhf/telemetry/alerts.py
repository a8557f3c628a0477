"""What stands out of a run's losses and KLs: a value far above the median of those before it.

Deviations are robust ones, 1.4826 times the median absolute deviation, which is the standard deviation of normal noise and which a spike
in the window hardly moves (Leys et al. 2013). A trend does not stand out of itself: it widens what it is measured by.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median

NORMAL = 1.4826
"""Standard deviation over median absolute deviation of normal noise."""
LEAST_SHARE = 0.01
"""A deviation is at least this share of the median: of a curve without noise a hair does not stand out."""
KLS = ("rollout/kl", "policy/approx_kl")
"""Watched, as is every metric that ends in /loss."""


class Alerts:
    """Watches a run's losses and KLs, each by itself. The same values give the same alerts, also where a resume lies between them."""

    def __init__(self, *, deviations: float | None, window: int) -> None:
        """Args: deviations: how many make an alert; None watches nothing. window: how many values before are looked at."""
        self._deviations = deviations
        self._window = window
        self._before: dict[str, deque[float]] = {}

    def look(self, metrics: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
        """(alert metrics of one step, a line for each value that stands out).

        "alert/loss" and "alert/kl": how many of the step's losses, and KLs, stand out or are not finite. None does before `window` values.
        """
        found: dict[str, float] = {}
        lines = []
        for name, value in metrics.items() if self._deviations is not None else ():
            kind = "kl" if name in KLS else "loss" if name.endswith("/loss") else None
            if kind is None:
                continue
            line = self._alert(name, value)
            found[f"alert/{kind}"] = found.get(f"alert/{kind}", 0.0) + (line is not None)
            lines += [line] if line is not None else []
        return found, lines

    def _alert(self, name: str, value: float) -> str | None:
        if not math.isfinite(value):
            return f"{name} is {value}"
        before = self._before.setdefault(name, deque(maxlen=self._window))
        line = self._judged(name, value, before) if len(before) == self._window else None
        before.append(value)
        return line

    def _judged(self, name: str, value: float, before: Sequence[float]) -> str | None:
        middle = median(before)
        deviation = max(NORMAL * median(abs(other - middle) for other in before), LEAST_SHARE * abs(middle))
        if value - middle <= self._deviations * deviation:
            return None
        how = f"{(value - middle) / deviation:.1f} deviations" if deviation else "any number of deviations"
        return f"{name} {value:.4g} is {how} above {middle:.4g}, the median of the {self._window} before"

    def state_dict(self) -> dict[str, list[float]]:
        """The values that the next are measured by, as JSON."""
        return {name: list(before) for name, before in self._before.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go on from saved values; the newest of them where the window is smaller now."""
        self._before = {name: deque(before, maxlen=self._window) for name, before in state.items()}
