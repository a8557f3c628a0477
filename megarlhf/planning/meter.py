"""What a program does, counted while it runs: live bytes and their peak, operations, and what every collective carries."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork, ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from megarlhf.parallel import side_stream
from megarlhf.planning.repetition import Repetition, Work, repetition, signature

NUMBERS = ("flops", "matmul_bytes", "other_bytes", "kernels", "host_bytes")
aten = torch.ops.aten
SPARSE = {
    *(aten.embedding, aten.gather, aten.index, aten.index_copy, aten.index_put_, aten._index_put_impl_, aten.index_select),
    aten.scatter_add_,
}
"""Kernels that touch only what is picked out: as much as the smaller of the two tensors."""
READ = 2**30
"""What the host reads from a device that holds no values: large, so that no row has ended, and finite."""


class Axis(NamedTuple):
    """A process group, as costs name it."""

    name: str
    ranks: tuple[int, ...]
    inside: bool
    """Whether all of its ranks are on one node."""


class Link(NamedTuple):
    """One kind of message."""

    operation: str
    axis: str
    size: int
    """Ranks of the group."""
    inside: bool
    """Whether it stays on one node."""


@dataclass
class Cost:
    """What one rank did in a phase."""

    flops: float = 0.0
    """Of matrix products and attention, both backward passes and what is computed again included."""
    matmul_bytes: float = 0.0
    """That these read and wrote."""
    other_bytes: float = 0.0
    """That all other kernels read and wrote."""
    kernels: float = 0.0
    """Operations that a device would be given."""
    host_bytes: float = 0.0
    """Copied from the device to the host or back, in buffers of their own there."""
    sent: Counter = field(default_factory=Counter)
    """Link -> bytes: of an all-reduce its tensor, of a gather or scatter the larger side, of a message itself."""
    calls: Counter = field(default_factory=Counter)
    """Link -> how many there were."""

    def copy(self) -> Cost:
        """The same numbers, that stay as they are."""
        return self._scaled(1)

    def __add__(self, other: Cost) -> Cost:
        return self._scaled(1, other, 1)

    def __sub__(self, other: Cost) -> Cost:
        return self._scaled(1, other, -1)

    def __mul__(self, factor: float) -> Cost:
        return self._scaled(factor)

    def _scaled(self, factor: float, other: Cost | None = None, by: float = 1.0) -> Cost:
        """factor * self + by * other."""
        other = other or Cost()
        numbers = {name: factor * getattr(self, name) + by * getattr(other, name) for name in NUMBERS}
        counters = {}
        for name in ("sent", "calls"):
            a, b = getattr(self, name), getattr(other, name)
            values = {key: factor * a[key] + by * b[key] for key in a.keys() | b.keys()}
            counters[name] = Counter({key: value for key, value in values.items() if value})
        return Cost(**numbers, **counters)


class Meter(TorchDispatchMode):
    """Counts what happens on `device` while it is entered; on the meta device it also answers for the other ranks and for values.

    Bytes are those of live storages: views count once, and what autograd keeps counts for as long as it does.
    """

    def __init__(
        self, device: torch.device, same_node: Callable[[int], bool] = lambda rank: True, known: dict[tuple, Repetition] | None = None
    ) -> None:
        """`same_node`: whether a rank is on this one's node; `known`: operations of earlier meters, to which this one's are added."""
        super().__init__()
        self.device = device
        self.same_node = same_node
        self.cost = Cost()
        self.live: Counter = Counter()
        """Tag -> live bytes."""
        self.peak: Counter = Counter()
        """`live` when its sum was largest since `new_phase`."""
        self.axes: dict[str, Axis] = {}
        """Name of a process group -> what it is."""
        self.logits_width = 0
        """Vocabulary ids of one rank: what is so wide is logits."""
        self._tag = "other"
        self._total = self._peak_total = 0
        self._storages: dict[int, tuple[int, str]] = {}
        self._known = {} if known is None else known

    @contextlib.contextmanager
    def tagged(self, tag: str) -> Iterator[None]:
        """What is made in this context is called `tag`."""
        before, self._tag = self._tag, tag
        try:
            yield
        finally:
            self._tag = before

    def retag(self, tensors: list[Tensor], tag: str) -> int:
        """Call what these tensors keep `tag`; returns its bytes."""
        total = 0
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._storages and self._storages[key][1] != tag:
                size, old = self._storages[key]
                self._storages[key] = (size, tag)
                self.live[old] -= size
                self.live[tag] += size
                total += size
        return total

    def new_phase(self) -> None:
        """Forget costs and peak."""
        self.cost = Cost()
        self.peak, self._peak_total = Counter(self.live), self._total

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were live at once since `new_phase`."""
        return self._peak_total

    @property
    def live_bytes(self) -> int:
        """What is live now."""
        return self._total

    def __enter__(self):
        self._patches = contextlib.ExitStack()
        resize, host_buffer = torch.UntypedStorage.resize_, side_stream.host_buffer

        def resize_and_count(storage: torch.UntypedStorage, num_bytes: int) -> object:
            done = resize(storage, num_bytes)
            self._resized(storage)
            return done

        def uncounted_buffer(num_bytes: int) -> Tensor:
            with torch.utils._python_dispatch._disable_current_modes():
                buffer = host_buffer(num_bytes)
            self._storages[buffer.untyped_storage()._cdata] = (0, "host")
            weakref.finalize(buffer.untyped_storage(), self._free, buffer.untyped_storage()._cdata)
            return buffer

        self._patches.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", resize_and_count))
        self._patches.enter_context(mock.patch.object(side_stream, "host_buffer", uncounted_buffer))
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._patches.close()

    def _resized(self, storage: torch.UntypedStorage) -> None:
        """A storage has given its memory back, or has it again."""
        if storage._cdata not in self._storages:
            return
        before, tag = self._storages[storage._cdata]
        self._storages[storage._cdata] = (storage.nbytes(), tag)
        self._grow(storage.nbytes() - before, tag)

    def _grow(self, num_bytes: int, tag: str) -> None:
        self.live[tag] += num_bytes
        self._total += num_bytes
        if self._total > self._peak_total:
            self._peak_total, self.peak = self._total, Counter(self.live)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.device.type == "meta":
            if func.namespace == "c10d":
                return self._collective(func, args, kwargs)
            if func is aten._local_scalar_dense.default and args[0].device == self.device:
                return self._read(args[0])
            if func is aten._to_copy.default and args[0].device == self.device and _goes_to_host(kwargs):
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if func is aten.copy_.default and args[0].device != args[1].device:
                self.cost.host_bytes += _bytes(args[0])
                return args[0]
            return self._counted(func, args, kwargs)
        out = func(*args, **kwargs)
        self._add(self._work(func, args, kwargs, out))
        return out

    def _counted(self, func, args, kwargs):
        """An operation on the meta device, run or known from before."""
        if func.is_view:
            out = func(*args, **kwargs)
            for tensor in out if isinstance(out, list | tuple) else (out,):
                if tensor.device == self.device:
                    self._track(tensor)
            return out
        key = signature(func, args, kwargs)
        if key is not None and key in self._known:
            known = self._known[key]
            out, new = known.again(args)
            for tensor in new:
                self._track(tensor)
            self._add(known.work)
            return out
        out = func(*args, **kwargs)
        work = self._work(func, args, kwargs, out)
        self._add(work)
        if key is not None and (known := repetition(args, out, work)) is not None:
            self._known[key] = known
        return out

    def _read(self, tensor: Tensor) -> bool | int | float:
        value = READ
        return bool(value) if tensor.dtype == torch.bool else float(value) if tensor.is_floating_point() else value

    def _collective(self, func, args, kwargs):
        group = next(ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject) and _is_group(arg))
        axis = self.axes[group.group_name]
        name = func._schema.name.removeprefix("c10d::").strip("_")
        inside = axis.inside
        if name in ("send", "recv_any_source", "recv"):
            peer = next(arg for arg in args if isinstance(arg, int))
            inside = self.same_node(axis.ranks[peer])
        link = Link(name, axis.name, len(axis.ranks), inside)
        self.cost.sent[link] += max(sum(_bytes(leaf) for leaf in tree_leaves(arg) if isinstance(leaf, Tensor)) for arg in args)
        self.cost.calls[link] += 1
        work = FakeWork().boxed()
        return work if len(func._schema.returns) == 1 else (args[0], work)

    def _work(self, func, args, kwargs, out) -> Work:
        """What an operation counts as; its outputs are tracked."""
        outputs = [leaf for leaf in (out if isinstance(out, tuple | list) else (out,)) if isinstance(leaf, Tensor)]
        if isinstance(out, tuple | list):
            outputs += [leaf for part in out if isinstance(part, tuple | list) for leaf in part if isinstance(leaf, Tensor)]
        outputs = [tensor for tensor in outputs if tensor.device == self.device]
        for tensor in outputs:
            self._track(tensor)
        if not outputs and not func._schema.is_mutable:
            return Work()
        if func.is_view or func._overloadpacket is aten.set_:
            return Work()
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.device == self.device]
        inputs = [leaf for leaf in leaves if leaf.is_floating_point()] or leaves
        sizes = [_bytes(tensor) for tensor in (*inputs, *outputs)]
        moved = 2 * min(sizes, default=0) if func._overloadpacket in SPARSE else sum(sizes)
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:
            return Work(kernels=1, other_bytes=moved)
        return Work(kernels=1, flops=formula(*args, **_without_dtype(kwargs), out_val=out), matmul_bytes=moved)

    def _add(self, work: Work) -> None:
        cost = self.cost
        cost.kernels += work.kernels
        cost.flops += work.flops
        cost.matmul_bytes += work.matmul_bytes
        cost.other_bytes += work.other_bytes

    def _track(self, tensor: Tensor) -> None:
        if tensor.layout != torch.strided:
            return  # it has no memory but that of its parts, which are tensors themselves
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        tag = "logits" if self.logits_width and tensor.dim() and tensor.shape[-1] == self.logits_width else self._tag
        size = storage.nbytes()
        self._storages[key] = (size, tag)
        self._grow(size, tag)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        size, tag = self._storages.pop(key, (0, ""))
        self.live[tag] -= size
        self._total -= size


def _goes_to_host(kwargs: dict) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "cpu"


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _without_dtype(kwargs: dict) -> dict:
    return {name: value for name, value in kwargs.items() if name != "out_dtype"}


def _is_group(leaf: torch.ScriptObject) -> bool:
    return "ProcessGroup" in leaf._type().qualified_name()
