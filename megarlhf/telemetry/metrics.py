"""Metrics as sums and counts, so that a mean over micro-batches is weighted rightly and the device is read once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Number = Tensor | float


class Metrics:
    """Sums and counts by name; a mean is one division at the end, never a mean of means.

    Tensors stay on their device, added up in float64, until `means` brings all of them to the host in one copy.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Number] = {}
        self._counts: dict[str, Number] = {}
        self._gauges: dict[str, Number] = {}

    def add(self, name: str, total: Number, count: Number = 1) -> None:
        """Add `count` observations that sum to `total`; both python numbers or tensors of shape []."""
        self._sums[name] = self._sums.get(name, 0.0) + _float64(name, total)
        self._counts[name] = self._counts.get(name, 0.0) + _float64(name, count)

    def update(self, stats: Mapping[str, tuple[Number, Number]], prefix: str = "") -> None:
        """Add the (sum, count) of every name in `stats`, as `prefix` + name."""
        for name, (total, count) in stats.items():
            self.add(prefix + name, total, count)

    def set(self, name: str, value: Number) -> None:
        """A plain value, such as the learning rate; the latest stands."""
        self._gauges[name] = _float64(name, value)

    def means(self) -> dict[str, float]:
        """sum / count of every name with a count, and the plain values. A name whose count is 0 has no mean and is left out."""
        names, gauges = list(self._sums), list(self._gauges)
        host = iter(_on_host([*self._sums.values(), *self._counts.values(), *self._gauges.values()]))
        sums = [next(host) for _ in names]
        counts = [next(host) for _ in names]
        means = {name: total / count for name, total, count in zip(names, sums, counts, strict=True) if count}
        return means | dict(zip(gauges, host, strict=True))


def _float64(name: str, value: Number) -> Number:
    """A copy that later in-place changes of a tensor do not reach."""
    if not isinstance(value, Tensor):
        return float(value)
    assert value.dim() == 0, f"metric {name}: expected shape [], got {list(value.shape)}"
    return value.detach().to(torch.float64, copy=True)


def _on_host(values: list[Number]) -> list[float]:
    """The values as python floats, all tensors in one copy."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        return values
    numbers = iter(torch.stack([tensor.to(tensors[0].device) for tensor in tensors]).tolist())
    return [next(numbers) if isinstance(value, Tensor) else value for value in values]
