"""What an engine holds between steps, by kind: the same answer for a model that runs and for one on the meta device."""

from __future__ import annotations

from torch import Tensor

from megarlhf.engine.engine import Engine
from megarlhf.engine.offload import HELD_KINDS, distinct

KINDS = HELD_KINDS


def holdings(engine: Engine) -> dict[str, list[Tensor]]:
    """Kind -> the tensors of it; views of what an earlier kind keeps are left out, as float32's master weights are.

    Moments are there after the first step.
    """
    return distinct(engine.held())


def bytes_held(engine: Engine) -> dict[str, int]:
    """Kind -> bytes of its storages, on the device or, while they rest, on the host."""
    sizes = {}
    for kind, tensors in holdings(engine).items():
        storages = {tensor.untyped_storage()._cdata: engine.offload.size_of(tensor.untyped_storage()) for tensor in tensors}
        sizes[kind] = sum(storages.values())
    return sizes
