"""This process's place in the run that torchrun or srun started, read from the environment; needs no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OF_OTHER_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""How many processes mpirun started, in its several forms."""
MAX_PORT = 65535


@dataclass(frozen=True)
class Place:
    """One process among those that were started together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = "localhost"
    """Of rank 0's machine."""
    port: int = 0

    @property
    def under_torchrun(self) -> bool:
        """Whether torchrun watches this process and keeps the store through which ranks meet."""
        return "TORCHELASTIC_RUN_ID" in os.environ


def place_in_run(environment: Mapping[str, str] | None = None) -> Place:
    """The place that torchrun's variables give, else srun's, else that of a run of one process.

    ValueError names what is missing or makes no sense: half of the variables, a rank beyond the world, a port that is none.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env or "WORLD_SIZE" in env:
        return _place(env, "RANK", "WORLD_SIZE", "LOCAL_RANK")
    if _number(env, "SLURM_NTASKS", 1) > 1 and "SLURM_PROCID" in env:
        if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
            raise ValueError(
                "srun started several tasks, but MASTER_ADDR and MASTER_PORT are not set: export them before srun, "
                "for example MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1) MASTER_PORT=29500"
            )
        return _place(env, "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    if "LOCAL_RANK" in env:
        raise ValueError(f"LOCAL_RANK is set and RANK, WORLD_SIZE are not: {_UNSET_OR_LAUNCH}")
    for name in OF_OTHER_LAUNCHERS:
        if _number(env, name, 1) > 1:
            raise ValueError(f"{name} is {env[name]}: mpirun's processes would each be a run of their own; start with torchrun or srun")
    return Place()


def _place(env: Mapping[str, str], rank_name: str, size_name: str, local_name: str) -> Place:
    present = [name for name in (rank_name, size_name) if name in env]
    if missing := [name for name in (rank_name, size_name) if name not in env]:
        raise ValueError(f"{', '.join(present)} is set and {', '.join(missing)} is not: {_UNSET_OR_LAUNCH}")
    rank, size = _number(env, rank_name), _number(env, size_name)
    if not 0 <= rank < size:
        raise ValueError(f"{rank_name} is {rank} and {size_name} is {size}: ranks count from 0 to {size_name} - 1")
    local_rank = _number(env, local_name, 0)
    if not 0 <= local_rank < size:
        raise ValueError(f"{local_name} is {local_rank} and {size_name} is {size}: it must be in 0 .. {size_name} - 1")
    if size == 1:
        return Place(local_rank=local_rank)
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]:
        raise ValueError(f"{rank_name} and {size_name} are set and {', '.join(missing)} is not: {_UNSET_OR_LAUNCH}")
    port = _number(env, "MASTER_PORT")
    if not 1 <= port <= MAX_PORT:
        raise ValueError(f"MASTER_PORT is {port}; a port is in 1 .. {MAX_PORT}")
    return Place(rank=rank, size=size, local_rank=local_rank, address=env["MASTER_ADDR"], port=port)


_UNSET_OR_LAUNCH = f"start with torchrun, which sets {', '.join(TORCHRUN)} and LOCAL_RANK; for a run of one process, unset them"


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"{name} is {text!r}; it must be a whole number: {_UNSET_OR_LAUNCH}") from error
