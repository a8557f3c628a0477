"""What a model holds, moved to the host while nothing uses it and back before it is used.

Storages are moved, not tensors: a storage gives up its memory and later gets as much again, with the same bytes, and every view of it,
megarlhf's, megatron's and autograd's, stays what it was. So training is the same bit for bit. Gradients are not copied: a step begins
by clearing them. Nor are weights that never change, after the first time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from megarlhf.parallel import side_stream
from megarlhf.parallel.side_stream import SideStream

Kind = Literal["weights", "gradients", "optimizer", "average"]
"""optimizer: master weights and moments."""
HELD_KINDS = ("weights", "gradients", "masters", "moments", "average")
OF_OPTIMIZER = ("masters", "moments")


@dataclass
class _Moved:
    """A storage whose bytes are, or were, on the host."""

    storage: torch.UntypedStorage
    num_bytes: int
    device: torch.device
    copied: bool
    """Whether its bytes matter."""
    host: list[Tensor] | None = None
    """[n] uint8, `num_bytes` together, kept for the next time."""
    is_away: bool = False

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(its bytes here, where they are on the host), piece by piece."""
        here = torch.empty(0, dtype=torch.uint8, device=self.device).set_(self.storage)
        return list(zip(here.split([len(piece) for piece in self.host]), self.host, strict=True))


@dataclass
class _Group:
    """The storages of one kind."""

    moved: dict[int, _Moved] = field(default_factory=dict)
    is_away: bool = False
    coming: list = field(default_factory=list)
    """What to wait for before the storages are used."""


class Offload:
    """Moves some kinds of what an engine holds; with no kinds nothing ever moves, and `need` costs nothing.

    What is used must be needed first: a storage that is away has no memory at all.
    """

    def __init__(self, held: Callable[[], Mapping[str, Sequence[Tensor]]], side: SideStream, kinds: Collection[Kind] = (), *, frozen: bool):
        """Args: held: what the engine holds now, by HELD_KINDS; frozen: whether its weights never change."""
        self.finish_gather: Callable[[], None] | None = None
        """What makes the weights whole after a step; called before they are used or moved."""
        self.kinds = tuple(kinds)
        self._held, self._side, self._frozen = held, side, frozen
        self._groups: dict[Kind, _Group] = {kind: _Group() for kind in kinds}

    @property
    def host_bytes(self) -> int:
        """Host memory that is taken."""
        return sum(m.num_bytes for group in self._groups.values() for m in group.moved.values() if m.host is not None)

    def size_of(self, storage: torch.UntypedStorage) -> int:
        """Bytes of a storage when it is here."""
        known = [group.moved[storage._cdata] for group in self._groups.values() if storage._cdata in group.moved]
        return known[0].num_bytes if known else storage.nbytes()

    @torch.no_grad()
    def rest(self, *, but: Collection[Kind] = ()) -> None:
        """Move everything that is configured, `but` these kinds, to the host: behind what the device is doing, beside what follows."""
        if self._groups and self.finish_gather is not None:
            self.finish_gather()
        for kind, group in self._groups.items():
            if kind in but:
                continue
            self._settle(group)
            group.moved = self._storages(kind, group)
            going = [moved for moved in group.moved.values() if not moved.is_away]
            self._copy_out([moved for moved in going if moved.copied])
            for moved in going:
                moved.storage.resize_(0)
                moved.is_away = True
            group.is_away = True

    @torch.no_grad()
    def send_for(self, *kinds: Kind) -> None:
        """Begin to bring these kinds back; `need` waits for them."""
        for kind in kinds:
            group = self._groups.get(kind)
            if group is None or not group.is_away:
                continue
            coming = list(group.moved.values())
            for moved in coming:
                moved.storage.resize_(moved.num_bytes)
                moved.is_away = False
            group.is_away = False
            copied = [pair for moved in coming if moved.copied for pair in moved.pairs]
            if copied:
                group.coming.append(self._side.run(lambda pairs=copied: [here.copy_(host, non_blocking=True) for here, host in pairs]))
                for here, _ in copied:
                    self._side.uses(here)

    def need(self, *kinds: Kind) -> None:
        """Have these kinds here for what comes next."""
        self.send_for(*kinds)
        if "weights" in kinds and self.finish_gather is not None:
            self.finish_gather()
        for kind in kinds:
            if kind in self._groups:
                self._settle(self._groups[kind])

    def _settle(self, group: _Group) -> None:
        for done in group.coming:
            self._side.wait(done)
        group.coming.clear()

    def _copy_out(self, going: Sequence[_Moved]) -> None:
        """Frozen weights are copied out once."""
        new = [moved for moved in going if moved.host is None or not self._frozen]
        for moved in new:
            moved.host = side_stream.host_buffers(moved.num_bytes) if moved.host is None else moved.host
        pairs = [pair for moved in new for pair in moved.pairs]
        if pairs:
            self._side.run(lambda: [host.copy_(here, non_blocking=True) for here, host in pairs])
            for here, _ in pairs:
                self._side.uses(here)

    def _storages(self, kind: Kind, before: _Group) -> dict[int, _Moved]:
        """The storages of a kind now; those that were moved before keep their buffers.

        What keeps weights as well (float32's masters are views of them) is weights; numbers that stand alone are not worth a copy.
        """
        found: dict[int, _Moved] = {}
        held = distinct(self._held())
        for tensor in [tensor for name in (OF_OPTIMIZER if kind == "optimizer" else (kind,)) for tensor in held[name]]:
            storage = tensor.untyped_storage()
            if storage._cdata in before.moved:
                found[storage._cdata] = before.moved[storage._cdata]
            elif storage.nbytes() > 8:
                found[storage._cdata] = _Moved(storage, storage.nbytes(), tensor.device, copied=kind != "gradients")
        return found


def distinct(held: Mapping[str, Sequence[Tensor]]) -> dict[str, list[Tensor]]:
    """HELD_KINDS -> tensors, without those whose storage an earlier kind keeps, as float32's weights keep their masters."""
    found: dict[str, list[Tensor]] = {}
    seen: set[int] = set()
    for kind in HELD_KINDS:
        tensors = held.get(kind, ())
        found[kind] = [tensor for tensor in tensors if tensor.untyped_storage()._cdata not in seen]
        seen |= {tensor.untyped_storage()._cdata for tensor in tensors}
    return found
