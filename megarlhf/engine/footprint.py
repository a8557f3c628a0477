"""What a model keeps on one rank between steps, by description alone: nothing is built for it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megarlhf.models.architecture import Architecture
from megarlhf.models.parameters import Head, shards_held
from megarlhf.models.transformer import DTYPES, Precision
from megarlhf.parallel.layout import Coordinates, ParallelLayout

GB = 1e9
LEAST_RESERVED = 1e9
"""CUDA's context and NCCL's buffers: no run has less."""


def bytes_kept(
    architecture: Architecture,
    head: Head,
    layout: ParallelLayout,
    place: Coordinates,
    *,
    precision: Precision,
    trained: bool,
    average: bool = False,
) -> dict[str, int]:
    """Kind -> bytes: weights, and of a trained model float32 gradients and this rank's share of masters, moments and average.

    Megatron pads its buffers to multiples of dp and shares them out evenly; the padding, a few kilobytes, is not counted. The scalar
    head is float32 whatever the precision. Masters of float32 weights are the weights themselves.
    """
    held = shards_held(architecture, head, layout, place)
    elements = {name: math.prod(shard.shape) for name, shard in held.items()}
    low = sum(count for name, count in elements.items() if not name.startswith("scalar_head."))
    full = sum(elements.values()) - low
    size = DTYPES[precision].itemsize
    kept = {"weights": size * low + 4 * full}
    if trained:
        share = (low + full) // layout.dp
        kept |= {"gradients": 4 * (low + full), "masters": 4 * (low // layout.dp) if size < 4 else 0, "moments": 8 * share}
        kept |= {"average": 4 * share} if average else {}
    return kept


def does_not_fit(what: str, needed: float, capacity: float, reserved: float, *, device: str, way_out: str) -> str:
    """The sentence that both a plan and the start of a run say. `way_out`: what would need less of each GPU."""
    return (
        f"it does not fit: {what} needs {needed / GB:.1f} GB of tensors and {reserved / GB:.1f} GB for CUDA and NCCL, "
        f"and one {device} has {capacity / GB:.1f} GB: {(needed + reserved - capacity) / GB:.1f} GB are missing; {way_out}"
    )


def start_problems(kept: Sequence[tuple[str, int]], capacity: float | None, *, rank: int) -> list[str]:
    """Why a run cannot start, in the words of a plan: what its models keep between steps is more than the device has.

    Args: kept: (model, bytes); capacity: of the device in bytes, None where that is not known (the CPU).
    """
    needed = sum(size for _, size in kept)
    if capacity is None or needed + LEAST_RESERVED <= capacity:
        return []
    models = ", ".join(f"{role} {size / GB:.1f} GB" for role, size in kept)
    what = f"what rank {rank} keeps between steps ({models})"
    way_out = "larger tp or pp, more ranks, or PPO's offload, need less of each GPU; `megarlhf plan --search` finds what fits"
    return [does_not_fit(what, needed, capacity, LEAST_RESERVED, device="GPU here", way_out=way_out)]
