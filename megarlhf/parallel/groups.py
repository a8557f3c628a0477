"""Process groups: the only place that creates them."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megarlhf.parallel import platform
from megarlhf.parallel.layout import Coordinates, ParallelLayout

ProcessGroup = dist.ProcessGroup


@dataclass(frozen=True)
class ModelGroups:
    """The process groups of one layout, seen from this rank."""

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
    """The same stages, for gradients: a group of its own where they would meet activations between the same two ranks."""
    copy: dist.ProcessGroup
    """All ranks of one copy of the model (tp x pp)."""
    outputs: dist.ProcessGroup
    """Ranks with the same tp (dp x pp): one of each carries a given row's output."""
    world: dist.ProcessGroup
    """All ranks of the layout."""
    embeddings: dist.ProcessGroup | None
    """First and last stage, which share a tied embedding; None on a stage between them, or with one stage."""
    alone: dist.ProcessGroup
    """This rank only: the axes that are not used (context and expert parallelism)."""

    @property
    def coordinates(self) -> Coordinates:
        """This rank's place in the layout."""
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
        groups.intra_dist_opt = self.world  # megatron takes the gradient norm over this group
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
    _groups: dict[tuple[bool, tuple[tuple[int, ...], ...]], dist.ProcessGroup | None] = field(default_factory=dict, repr=False)
    """This rank's group among disjoint ones that were made together: axes and layouts with the same peers share them."""

    @staticmethod
    def connect(*, timeout_minutes: float = 30.0) -> World:
        """Join the run that torchrun or srun started, or a run of one process where neither did.

        Uses an already initialised default group as it is. ValueError where srun started several tasks without a
        rendezvous address.
        """
        platform.prepare_megatron()
        platform.keep_freed_memory()
        rank, size, local_rank = _place_in_run()
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank)
        if not dist.is_initialized():
            timeout = datetime.timedelta(minutes=timeout_minutes)
            if size == 1:
                dist.init_process_group(platform.backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
            else:
                dist.init_process_group(platform.backend(), rank=rank, world_size=size, timeout=timeout)
        _prepare_megatron_globals()
        return World(rank=dist.get_rank(), size=dist.get_world_size(), local_rank=local_rank, device=platform.device())

    def layout(self, *, tp: int = 1, pp: int = 1, virtual_pp: int = 1, sequence_parallel: bool = False) -> ParallelLayout:
        """The layout with these axes over all ranks of this world."""
        return ParallelLayout.over(self.size, tp=tp, pp=pp, virtual_pp=virtual_pp, sequence_parallel=sequence_parallel)

    def groups(self, layout: ParallelLayout) -> ModelGroups:
        """The process groups of `layout`; those that were made before are used again."""
        assert layout.num_ranks == self.size
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
            world=dist.group.WORLD,
            embeddings=self._group_of_peers(ends),
            alone=self._group_of_peers([[rank] for rank in range(self.size)]),
        )

    def _group_of_peers(self, peers: list[list[int]], *, apart: bool = False) -> dist.ProcessGroup | None:
        """This rank's group among disjoint ones, `apart` from the usual one of these peers; None where it is in none of them."""
        if peers and len(peers[0]) == self.size and not apart:
            return dist.group.WORLD
        key = (apart, tuple(map(tuple, peers)))
        if key not in self._groups:
            made = {ranks: dist.new_group(list(ranks)) for ranks in key[1]}
            self._groups[key] = next((group for ranks, group in made.items() if self.rank in ranks), None)
        return self._groups[key]

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()

    def close(self) -> None:
        """Leave the run."""
        self._groups.clear()
        if dist.is_initialized():
            dist.destroy_process_group()


def _place_in_run() -> tuple[int, int, int]:
    """(rank, world size, local rank) from torchrun's environment, else from srun's, else a run of one."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    if int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env:
        if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
            raise ValueError(
                "srun started several tasks, but MASTER_ADDR and MASTER_PORT are not set: export them before srun, "
                "for example MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1) MASTER_PORT=29500"
            )
        return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_LOCALID", 0))
    return 0, 1, 0


def _prepare_megatron_globals() -> None:
    """What megatron-core keeps per process whatever the layout: its scratch buffer and its generator of dropout noise."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
    model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0)
