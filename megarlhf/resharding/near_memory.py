"""Reading what other processes of the same host hold: one copy, where a message through a socket takes two and the work of the system.

Linux's process_vm_readv(2), as MPI libraries use it within a host ("cross memory attach"). Where the system forbids it
(kernel.yama.ptrace_scope above 0, some containers), or ranks are on several hosts, `NearMemory.reachable` is False.
"""

from __future__ import annotations

import ctypes
import os
import secrets
from collections.abc import Collection, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

MOST_RANGES = 1024
"""Ranges of one call: Linux's IOV_MAX."""
MOST_BYTES = 2**30
"""Of one range, and of one call: the system's limit is just under 2 GiB."""


class NearMemory:
    """The memory of the other ranks of a group, for tensors on the CPU."""

    def __init__(self, group: dist.ProcessGroup, peers: Collection[int]) -> None:
        """All ranks of the group make one together, each with the `peers` from which it means to read."""
        self._group = group
        self._call = getattr(ctypes.CDLL(None, use_errno=True), "process_vm_readv", None)
        mine = torch.tensor([secrets.randbits(62), secrets.randbits(62)])
        told = self._tell(torch.tensor([os.getpid(), mine.data_ptr(), *mine.tolist()]))
        self._processes = told[:, 0].tolist()
        found = self._call is not None and all(self._sees(peer, told[peer]) for peer in peers)
        everyone = torch.tensor(int(found))
        dist.all_reduce(everyone, op=dist.ReduceOp.MIN, group=group)
        self.reachable = bool(everyone)
        """Whether every rank can read from all of its peers; the same on all ranks."""

    def addresses(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """[ranks, n] int64: where each rank's tensors lie, 0 for None; once it returns, all ranks are ready to be read.

        They have to stay as they are until `done`.
        """
        assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
        return self._tell(torch.tensor([0 if tensor is None else tensor.data_ptr() for tensor in tensors]))

    def read(self, rank: int, remote: Tensor, local: Tensor, sizes: Tensor) -> None:
        """Copy ranges of a rank's memory to this one's; OSError where the system does not do it.

        Args: [n] int64: addresses there, addresses here, bytes of each, none above `MOST_BYTES`.
        """
        start = 0
        while start < len(sizes):
            count = min(MOST_RANGES, len(sizes) - start)
            while (wanted := int(sizes[start : start + count].sum())) > MOST_BYTES and count > 1:
                count //= 2
            here, there = (_joined(side[start : start + count], sizes[start : start + count]) for side in (local, remote))
            ranges = (word for side in (here, there) for word in (ctypes.c_void_p(side.data_ptr()), ctypes.c_ulong(len(side))))
            self._call.restype = ctypes.c_ssize_t
            done = self._call(self._processes[rank], *ranges, ctypes.c_ulong(0))
            if done != wanted:
                number = ctypes.get_errno() if done < 0 else 0
                raise OSError(number, f"{max(done, 0)} of {wanted} bytes were read from the memory of rank {rank}: {os.strerror(number)}")
            start += count

    def done(self) -> None:
        """Wait until every rank has read what it wanted."""
        dist.barrier(group=self._group)

    def _tell(self, values: Tensor) -> Tensor:
        """[ranks, n]: each rank's [n]."""
        told = [torch.empty_like(values) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(told, values, group=self._group)
        return torch.stack(told)

    def _sees(self, rank: int, told: Tensor) -> bool:
        """Whether the memory of the process of that number is the rank's: on another host it would be another's, or nobody's."""
        seen = torch.zeros(2, dtype=torch.int64)
        try:
            self.read(rank, told[1:2], torch.tensor([seen.data_ptr()]), torch.tensor([seen.nbytes]))
        except OSError:
            return False
        return torch.equal(seen, told[2:])


def _joined(addresses: Tensor, sizes: Tensor) -> Tensor:
    """[m, 2], an array of C's struct iovec: the ranges, those that follow one another in memory as one, since each costs a microsecond."""
    ends = addresses + sizes
    first = torch.cat((torch.ones(1, dtype=torch.bool), addresses[1:] != ends[:-1])).nonzero()[:, 0]
    last = torch.cat((first[1:] - 1, torch.tensor([len(sizes) - 1])))
    return torch.stack((addresses[first], ends[last] - addresses[first]), dim=1)
