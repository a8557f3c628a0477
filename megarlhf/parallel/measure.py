"""How fast this rank multiplies matrices and the ranks exchange messages, and how far their clocks stand apart."""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist

from megarlhf.parallel import platform
from megarlhf.parallel.groups import World

LEAST_SECONDS = 0.2
ROUNDS = 5


def matrix_product_flops(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a product of two square matrices, on this rank alone, by the fastest of several."""
    size = 8192 if device.type == "cuda" else 768
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best, start = float("inf"), time.perf_counter()
    for _ in range(2):
        a @ b
    while time.perf_counter() - start < LEAST_SECONDS or best == float("inf"):
        platform.synchronize()
        before = time.perf_counter()
        a @ b
        platform.synchronize()
        best = min(best, time.perf_counter() - before)
    return 2 * size**3 / best


def all_reduce_seconds(num_bytes: int, world: World) -> float:
    """Seconds of a sum of `num_bytes` of float32 over all ranks, the median of several; a collective of the world."""
    values = torch.zeros(num_bytes // 4, device=world.device)
    seconds = []
    for _ in range(ROUNDS + 1):
        dist.barrier()
        platform.synchronize()
        before = time.perf_counter()
        dist.all_reduce(values)
        platform.synchronize()
        seconds.append(time.perf_counter() - before)
    return statistics.median(seconds[1:])  # the first opens connections


def clock_offset(world: World) -> float:
    """Seconds by which this rank's clock is ahead of rank 0's, the median of several looks; a collective of the world.

    Ranks leave a barrier some milliseconds apart; it tells no more than that.
    """
    offsets = []
    for _ in range(ROUNDS):
        dist.barrier()
        now = torch.tensor([time.time()], dtype=torch.float64, device=world.device)
        of_first = now.clone()
        dist.broadcast(of_first, src=0)
        offsets.append(float(now - of_first))
    return statistics.median(offsets)
