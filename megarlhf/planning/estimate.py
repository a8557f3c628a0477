"""Seconds from counted operations: a plain roofline, and how pipelines fill."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megarlhf.planning.dry_run import Part
from megarlhf.planning.hardware import CALL_SECONDS, KERNEL_SECONDS, LINK_SHARE, MEMORY_SHARE, Cluster
from megarlhf.planning.meter import Cost, Link

TERMS = ("compute", "memory", "inside nodes", "between nodes", "host link", "kernel starts", "bubble")
RING = {"allreduce": 2.0, "allgather_base": 1.0, "allgather": 1.0, "reduce_scatter_base": 1.0, "reduce_scatter": 1.0}
"""Operation -> how often a ring sends (n - 1) / n of its bytes (Patarasuk and Yuan 2009); others send all of theirs once."""


def seconds_of(cost: Cost, cluster: Cluster) -> Counter:
    """Term -> seconds; nothing overlaps, as nothing is made to."""
    gpu = cluster.gpu
    bandwidth = MEMORY_SHARE * gpu.memory_bandwidth
    arithmetic, operands = cost.flops / (gpu.matmul_share * gpu.flops), cost.matmul_bytes / bandwidth
    seconds = Counter({"memory": cost.other_bytes / bandwidth})
    seconds["compute" if arithmetic >= operands else "memory"] += max(arithmetic, operands)
    seconds["kernel starts"] = max(0.0, KERNEL_SECONDS * cost.kernels - sum(seconds.values()))
    seconds["host link"] = cost.host_bytes / (LINK_SHARE * gpu.host)
    for link, sent in cost.sent.items():
        seconds["inside nodes" if link.inside else "between nodes"] += _link_seconds(link, sent, cost.calls[link], cluster)
    return seconds


def _link_seconds(link: Link, sent: float, calls: float, cluster: Cluster) -> float:
    if link.size == 1 or link.operation.startswith("recv"):  # what one receives another sends
        return 0.0
    share = RING[link.operation] * (link.size - 1) / link.size if link.operation in RING else 1.0
    return share * sent / (LINK_SHARE * (cluster.inside if link.inside else cluster.between)) + calls * CALL_SECONDS


def part_seconds(parts: Sequence[tuple[Part, int]], cluster: Cluster, *, stages: int, virtual_stages: int = 1) -> Counter:
    """Term -> seconds of one part of a step.

    Args:
        parts: the part as each class of ranks has it, and how many stages of the model are of that class.
    """
    first = parts[0][0]
    slowest = max((seconds_of(part.cost, cluster) for part, _ in parts), key=lambda seconds: sum(seconds.values()))
    total = Counter(slowest)
    if first.micro_batches:
        total["bubble"] += sum(slowest.values()) * (stages - 1) / virtual_stages / first.micro_batches
    return total
