"""Process groups: the only place that creates them."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megarlhf.parallel import platform
from megarlhf.parallel.alarm import Alarm
from megarlhf.parallel.launch import Place, place_in_run
from megarlhf.parallel.layout import Coordinates, ParallelLayout
from megarlhf.parallel.rendezvous import connect_store, meet, tell_all
from megarlhf.parallel.side_stream import SideStream

ProcessGroup = dist.ProcessGroup


@dataclass(frozen=True)
class ModelGroups:
    """The process groups of one layout, seen from this rank; None where the rank is not in the layout, but for `world` and `alone`."""

    layout: ParallelLayout
    rank: int
    device: torch.device
    tp: dist.ProcessGroup
    """Tensor-parallel peers."""
    dp: dist.ProcessGroup
    """Data-parallel peers: the same shard of the model in every copy."""
    pp: dist.ProcessGroup
    """Pipeline stages of one copy with the same tp; activations travel here."""
    pp_back: dist.ProcessGroup
    """The same stages, for gradients, and for ids that are sampled: a group of its own where they would meet activations."""
    copy: dist.ProcessGroup
    """All ranks of one copy of the model (tp x pp)."""
    outputs: dist.ProcessGroup
    """Ranks with the same tp (dp x pp): one of each carries a given row's output."""
    members: dist.ProcessGroup
    """All ranks of the layout."""
    world: dist.ProcessGroup
    """All ranks of the run."""
    embeddings: dist.ProcessGroup | None
    """First and last stage, which share a tied embedding; None on a stage between them, or with one stage."""
    alone: dist.ProcessGroup
    """This rank only: the axes that are not used (context and expert parallelism)."""
    side_stream: SideStream
    """Where this rank's copies between host and device queue, those of all models."""

    @property
    def is_member(self) -> bool:
        """Whether this rank is in the layout."""
        return self.rank in self.layout.ranks

    @property
    def coordinates(self) -> Coordinates:
        """This rank's place in the layout, of which it has to be a member."""
        return self.layout.coordinates(self.rank)

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.coordinates.pp == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the model's output."""
        return self.coordinates.pp == self.layout.pp - 1

    def collection(self, *, tied_embeddings: bool):
        """These groups as megatron-core's ProcessGroupCollection, without its global state."""
        from megatron.core.process_groups_config import ProcessGroupCollection

        groups = ProcessGroupCollection()
        groups.tp = groups.expt_tp = groups.tp_cp = groups.tp_ep = self.tp
        groups.dp = groups.dp_cp = groups.intra_dp_cp = groups.expt_dp = groups.intra_expt_dp = self.dp
        groups.pp = self.pp
        groups.mp = groups.tp_ep_pp = self.copy
        groups.cp = groups.ep = self.alone
        groups.intra_dist_opt = self.members  # megatron takes the gradient norm over this group
        groups.inter_dist_opt = None
        groups.embd = self.embeddings if tied_embeddings else None
        groups.pos_embd = None
        return groups


@dataclass
class World:
    """All processes of a run, and the process groups that were made over them so far.

    Every rank asks for the same layouts in the same order: making a group is a collective of the whole world.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    timeout: datetime.timedelta
    """Of every exchange in every group."""
    alarm: Alarm
    """How ranks hear that another has failed."""
    store: dist.Store
    """What all ranks share beside the process groups."""
    side_stream: SideStream = field(default_factory=SideStream)
    """Copies between host and device."""
    _excepthook: Callable = sys.excepthook
    """The process's own; torch's, which names the rank, comes around it with every default group."""
    _number: int = 0
    """How many worlds the same ranks were in before."""
    _groups: dict[tuple[bool, tuple[tuple[int, ...], ...]], dist.ProcessGroup | None] = field(default_factory=dict, repr=False)
    """This rank's group among disjoint ones that were made together: axes and layouts with the same peers share them."""

    @staticmethod
    def connect(place: Place | None = None, *, timeout_minutes: float = 30.0) -> World:
        """Join the run that torchrun or srun started, or a run of one process where neither did.

        Uses an already initialised default group as it is. No rank waits for another longer than `timeout_minutes`, now or in any
        exchange. ValueError where the environment is half set, or two ranks would use one GPU; RanksMissing where some do not come.
        """
        platform.prepare_megatron()
        platform.keep_freed_memory()
        timeout = datetime.timedelta(minutes=timeout_minutes)
        place = place or place_in_run()
        device, excepthook = _choose_device(place.local_rank), sys.excepthook
        reconnect = None
        if dist.is_initialized():
            store = dist.PrefixStore("megarlhf", dist.distributed_c10d._get_default_store())
        elif place.size == 1:
            store = dist.HashStore()
            dist.init_process_group(platform.backend(), store=store, rank=0, world_size=1, timeout=timeout)
        else:
            store, devices = meet(place, timeout=timeout, about=device)
            if found := shared_devices(devices):
                raise ValueError("; ".join(found))
            reconnect = functools.partial(connect_store, place, is_host=False, timeout=timeout)
            group_store = dist.PrefixStore("default_group", store)
            dist.init_process_group(platform.backend(), store=group_store, rank=place.rank, world_size=place.size, timeout=timeout)
        prepare_megatron_globals()
        rank = dist.get_rank()
        return World(
            rank=rank,
            size=dist.get_world_size(),
            local_rank=place.local_rank,
            device=platform.device(),
            timeout=timeout,
            alarm=Alarm(store, rank, reconnect),
            store=store,
            _excepthook=excepthook,
        )

    @staticmethod
    def is_joined() -> bool:
        """Whether this process is in a world: has a default process group."""
        return dist.is_initialized()

    def layout(self, **axes: int) -> ParallelLayout:
        """The layout with these axes (tp, pp, virtual_pp, sequence_parallel, tp_stride) over all ranks of this world."""
        return ParallelLayout.over(self.size, **axes)

    def groups(self, layout: ParallelLayout) -> ModelGroups:
        """The process groups of `layout`; those that were made before are used again."""
        assert layout.ranks.stop <= self.size
        ends = [[ranks[0], ranks[-1]] for ranks in layout.peers("pp")] if layout.pp > 1 else []
        return ModelGroups(
            layout=layout,
            rank=self.rank,
            device=self.device,
            tp=self._group_of_peers(layout.peers("tp")),
            dp=self._group_of_peers(layout.peers("dp")),
            pp=self._group_of_peers(layout.peers("pp")),
            pp_back=self._group_of_peers(layout.peers("pp"), apart=layout.messages_meet),
            copy=self._group_of_peers(layout.peers("tp,pp")),
            outputs=self._group_of_peers(layout.peers("dp,pp")),
            members=self._group_of_peers([list(layout.ranks)]),
            world=dist.group.WORLD,
            embeddings=self._group_of_peers(ends),
            alone=self._group_of_this_rank(),
            side_stream=self.side_stream,
        )

    def _group_of_peers(self, peers: list[list[int]], *, apart: bool = False) -> dist.ProcessGroup | None:
        """This rank's group among disjoint ones, `apart` from the usual one of these peers; None where it is in none of them."""
        if peers and len(peers[0]) == self.size and not apart:
            return dist.group.WORLD
        if peers and len(peers[0]) == 1:
            return self._group_of_this_rank()
        key = (apart, tuple(map(tuple, peers)))
        if key not in self._groups:
            made = {ranks: dist.new_group(list(ranks), timeout=self.timeout) for ranks in key[1]}
            self._groups[key] = next((group for ranks, group in made.items() if self.rank in ranks), None)
        return self._groups[key]

    def _group_of_this_rank(self) -> dist.ProcessGroup:
        """A group of one; made by its only member, where any other way each rank would make one for every rank of the world."""
        if self.size == 1:
            return dist.group.WORLD
        key = (False, ((self.rank,),))
        if key not in self._groups:
            self._groups[key] = dist.new_group([self.rank], timeout=self.timeout, use_local_synchronization=True)
        return self._groups[key]

    def tell_all(self, name: str, about: str) -> list[str]:
        """What each rank tells under `name`, which serves once, in rank order; RanksMissing names the ranks that do not come to it."""
        return tell_all(self.store, name, about, Place(rank=self.rank, size=self.size), timeout=self.timeout)

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()

    def renewed(self, *, timeout_minutes: float) -> World:
        """A new world of the same ranks, as a process has it that starts now; a collective, of ranks that have let go of all models.

        This one's groups end; alarm and store go on.
        """
        timeout, number = datetime.timedelta(minutes=timeout_minutes), self._number + 1
        dist.barrier()
        self._leave_groups()
        platform.give_back_freed_memory()
        self.store.set_timeout(timeout)
        store = dist.PrefixStore(f"world_{number}", self.store)
        dist.init_process_group(platform.backend(), store=store, rank=self.rank, world_size=self.size, timeout=timeout)
        prepare_megatron_globals()
        return dataclasses.replace(self, timeout=timeout, side_stream=SideStream(), _number=number, _groups={})

    def close(self) -> None:
        """Leave the run."""
        self.alarm.close()
        self._leave_groups()

    def _leave_groups(self) -> None:
        self._groups.clear()
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.excepthook = self._excepthook


def device_of_rank(local_rank: int, num_devices: int) -> int:
    """The CUDA device of a rank: its own number; where a launcher shows each rank only its own devices, the one it sees.

    Two ranks on one device are found by the device's own number, not by this one: see `shared_devices`.
    """
    return local_rank % num_devices


def shared_devices(places: list[str]) -> list[str]:
    """A sentence for every device that several ranks would use; `places` are "host device" in rank order, "host" on the CPU."""
    ranks: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        ranks.setdefault(place, []).append(rank)
    return [
        f"ranks {', '.join(map(str, sharing))} would share the GPU {place.split()[1]} of {place.split()[0]}: "
        "start no more ranks on a machine than it has GPUs"
        for place, sharing in ranks.items()
        if len(sharing) > 1 and " " in place
    ]


def _choose_device(local_rank: int) -> str:
    """Make this rank's CUDA device the current one, as this program wants it; returns what tells it from all others: "host uuid", or
    "host" on the CPU."""
    host = socket.gethostname()
    if not torch.cuda.is_available():
        return host
    index = device_of_rank(local_rank, torch.cuda.device_count())
    torch.cuda.set_device(index)
    platform.multiply_float32_in_full()
    return f"{host} {torch.cuda.get_device_properties(index).uuid}"


def prepare_megatron_globals() -> None:
    """What megatron-core keeps per process whatever the layout: its scratch buffer and its generator of dropout noise."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
    model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0)
