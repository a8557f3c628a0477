"""Copies between host and device beside the computation: on a CUDA stream of their own; on the CPU at once."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


class SideStream:
    """One queue of copies for all models of a rank, so that what is needed first comes first.

    On CUDA the copies run while kernels do; on the CPU the same calls copy and return when they have.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._stalls: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    def run(self, copies: Callable[[], None]) -> torch.cuda.Event | None:
        """Queue `copies` behind what the device has been given up to now; returns what `wait` waits for."""
        if not torch.cuda.is_available():
            since = time.perf_counter()
            copies()
            self._seconds += time.perf_counter() - since
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            copies()
            return self._stream.record_event()

    def wait(self, done: torch.cuda.Event | None) -> None:
        """Let what the device is given from now on wait for `done`; the host goes on."""
        if done is None:
            return
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        torch.cuda.current_stream().wait_event(done)
        after.record()
        self._stalls.append((before, after))

    def uses(self, tensor: torch.Tensor) -> None:
        """Keep the allocator from giving `tensor`'s memory away before the copies that were queued up to now are done."""
        if tensor.is_cuda and self._stream is not None:
            tensor.record_stream(self._stream)

    def take_seconds(self) -> float:
        """Seconds for which the computation stood still for copies, since the last call; waits for the device."""
        seconds, stalls = self._seconds, self._stalls
        self._seconds, self._stalls = 0.0, []
        for before, after in stalls:
            after.synchronize()
            seconds += before.elapsed_time(after) / 1000
        return seconds


LEAST_PIECE = 16 * 2**20
"""Bytes of the smallest piece of `host_buffers` that is worth a copy of its own."""


def host_buffers(num_bytes: int) -> list[torch.Tensor]:
    """`num_bytes` in pieces, the largest first: torch takes pinned memory in powers of two, of one piece up to twice what is asked for."""
    pieces = []
    while num_bytes:
        size = 2 ** (num_bytes.bit_length() - 1)
        pieces.append(size if size >= LEAST_PIECE else num_bytes)
        num_bytes -= pieces[-1]
    return [host_buffer(size) for size in pieces]


def host_buffer(num_bytes: int) -> torch.Tensor:
    """[num_bytes] uint8 on the host, in pinned memory where there is CUDA, which copies from and to it without the processor."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
