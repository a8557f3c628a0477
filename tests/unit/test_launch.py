"""A process's place among those that were started with it, and the device it takes."""

import pytest

from megarlhf.parallel.groups import device_of_rank, shared_devices
from megarlhf.parallel.launch import Place, place_in_run

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def test_places():
    assert place_in_run({}) == Place(rank=0, size=1, local_rank=0)
    assert place_in_run(TORCHRUN) == Place(rank=3, size=8, local_rank=1, address="node0", port=29500)
    assert place_in_run(SRUN) == Place(rank=5, size=8, local_rank=1, address="node0", port=29500)
    assert place_in_run({**SRUN, **TORCHRUN}).rank == 3, "torchrun under srun numbers its own processes"
    assert place_in_run({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}).size == 1
    assert place_in_run({"RANK": "0", "WORLD_SIZE": "1"}).size == 1, "a run of one needs no address"
    assert place_in_run({"PMI_SIZE": "1"}).size == 1


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_half_an_environment_is_refused_by_name(missing):
    with pytest.raises(ValueError, match=f"{missing}.* is not: start with torchrun"):
        place_in_run({name: value for name, value in TORCHRUN.items() if name != missing})


def test_devices():
    assert [device_of_rank(rank, 8) for rank in range(8)] == list(range(8))
    assert [device_of_rank(rank, 1) for rank in range(4)] == [0] * 4, "srun --gpus-per-task=1 shows each rank its own device as number 0"


def test_two_ranks_on_one_device_are_refused():
    assert shared_devices(["a GPU-1", "a GPU-2", "b GPU-1"]) == []
    assert shared_devices(["a", "a", "a"]) == [], "any number of ranks share a CPU"
    assert shared_devices(["a GPU-1", "a GPU-2", "a GPU-1"]) == [
        "ranks 0, 2 would share the GPU GPU-1 of a: start no more ranks on a machine than it has GPUs"
    ]
