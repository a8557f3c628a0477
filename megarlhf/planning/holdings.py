"""What an engine holds between steps, by kind: the same answer for a model that runs and for one on the meta device."""

from __future__ import annotations

from torch import Tensor

from megarlhf.engine.engine import Engine
from megarlhf.engine.trainable import TrainEngine

KINDS = ("weights", "gradients", "masters", "moments", "average")


def holdings(engine: Engine) -> dict[str, list[Tensor]]:
    """Kind -> the tensors of it; views of what an earlier kind keeps are left out, as float32's master weights are.

    Moments are there after the first step.
    """
    held: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    held["weights"] = [*engine.parameters().values()]
    if isinstance(engine, TrainEngine):
        held["gradients"] = [buffer.grad_data for chunk in engine.chunks for buffer in chunk.buffers]
        held["masters"] = [shard.main for shard in engine.optimizer.shards()]
        held["moments"] = [value for state in engine.optimizer.adam.state.values() for value in state.values() if isinstance(value, Tensor)]
        held["average"] = list(engine.ema.averages.values()) if engine.ema is not None else []
    seen: set[int] = set()
    for kind, tensors in held.items():
        held[kind] = [tensor for tensor in tensors if tensor.untyped_storage()._cdata not in seen]
        seen |= {tensor.untyped_storage()._cdata for tensor in tensors}
    return held


def bytes_held(engine: Engine) -> dict[str, int]:
    """Kind -> bytes of its storages."""
    sizes = {}
    for kind, tensors in holdings(engine).items():
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
        sizes[kind] = sum(storages.values())
    return sizes
