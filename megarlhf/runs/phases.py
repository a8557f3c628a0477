"""What the phases of a step cost: seconds, tokens per second, and memory where it can be told apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megarlhf.parallel import platform
from megarlhf.telemetry.timers import Timers


class Phases:
    """Costs by phase: ``with phases("generate"): ...``."""

    def __init__(self) -> None:
        self._timers = Timers(platform.synchronize)
        self._peaks: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Charge the body to the phase `name`; a body that raises is not counted."""
        platform.forget_peak_memory()
        with self._timers(name), platform.named_range(name):
            yield
        self._peaks[name] = max(self._peaks.get(name, 0), platform.peak_memory_bytes())

    def metrics(self, **tokens: int) -> dict[str, float]:
        """The costs since the last call, as metrics; `tokens` are those that a phase is to be measured by.

        "time/<phase>_seconds"; "throughput/<phase>_tokens_per_second"; and this rank's memory at its highest:
        "memory/<phase>_peak_bytes" on CUDA, elsewhere one "memory/peak_bytes" of the whole process since its start.
        """
        seconds, peaks = self._timers.collect(), self._peaks
        self._peaks = {}
        metrics = {f"time/{name}_seconds": value for name, value in seconds.items()}
        metrics |= {f"throughput/{name}_tokens_per_second": count / max(seconds[name], 1e-9) for name, count in tokens.items()}
        if platform.peak_memory_is_of_phases():
            return metrics | {f"memory/{name}_peak_bytes": float(peak) for name, peak in peaks.items()}
        return metrics | {"memory/peak_bytes": float(platform.peak_memory_bytes())}
