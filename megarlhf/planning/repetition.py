"""Operations on the meta device that were seen before: what they give and cost depends on shapes alone, so it is known.

Torch works out most shapes in Python, some 0.3 ms for each operation, and a model repeats few operations of few shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class Work(NamedTuple):
    """What one operation is counted as: see `meter.Cost`."""

    kernels: int = 0
    flops: float = 0
    matmul_bytes: int = 0
    other_bytes: int = 0


@dataclass(frozen=True)
class _New:
    """A tensor that the operation makes."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def made(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Repetition:
    """An operation that gives the same again."""

    outputs: Sequence[_New | int | None]
    """New tensors, and by their place those of the arguments that are returned."""
    is_tuple: bool
    work: Work

    def again(self, args: Sequence) -> tuple[object, list[Tensor]]:
        """(what the operation returns, the tensors that are new)."""
        values, new = [], []
        for output in self.outputs:
            if isinstance(output, _New):
                values.append(output.made())
                new.append(values[-1])
            else:
                values.append(None if output is None else args[output])
        return (tuple(values) if self.is_tuple else values[0]), new


def signature(func, args: Sequence, kwargs: dict) -> tuple | None:
    """What decides an operation's result on the meta device; None where values or storages do."""
    if torch.Tag.inplace_view in func.tags:
        return None
    try:
        key = (func, *map(_described, args), *((name, _described(value)) for name, value in kwargs.items()))
        hash(key)
    except TypeError:  # a host tensor, whose values may decide, or what no dictionary can look up
        return None
    return key


def _described(value: object) -> object:
    if isinstance(value, Tensor):
        if value.device.type != "meta" and value.dim():
            raise TypeError
        return value.shape, value.stride(), value.dtype, value.device.type
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    return type(value), value


def repetition(args: Sequence, out: object, work: Work) -> Repetition | None:
    """How to give `out` again; None where it is more than new tensors and arguments."""
    is_tuple = isinstance(out, tuple)
    outputs: list[_New | int | None] = []
    inputs = {tensor.untyped_storage()._cdata for tensor in tree_leaves(args) if isinstance(tensor, Tensor)}
    for value in out if is_tuple else (out,):
        place = next((place for place, arg in enumerate(args) if arg is value), None)
        if value is None or place is not None:
            outputs.append(None if value is None else place)
            continue
        if not isinstance(value, Tensor) or value.device.type != "meta":
            return None
        if value.storage_offset() or value.untyped_storage()._cdata in inputs:
            return None
        new = _New(value.shape, value.stride(), value.dtype, value.device)
        if new.made().untyped_storage().nbytes() != value.untyped_storage().nbytes():
            return None
        outputs.append(new)
    return Repetition(outputs, is_tuple, work)
