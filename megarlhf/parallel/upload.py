"""Host tensors on their way to the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The same tensors on `device`: one copy for each dtype, from pinned memory, which the host does not wait for.

    Where the device is the CPU they are what they were.
    """
    if device.type == "cpu":
        return list(tensors)
    moved: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        numbers = [number for number, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = torch.cat([tensors[number].reshape(-1) for number in numbers])
        flat = flat.pin_memory() if device.type == "cuda" else flat
        parts = flat.to(device, non_blocking=True).split([tensors[number].numel() for number in numbers])
        moved |= {number: part.view(tensors[number].shape) for number, part in zip(numbers, parts, strict=True)}
    return [moved[number] for number in range(len(tensors))]
