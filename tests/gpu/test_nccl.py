"""Several GPUs over NCCL: run where there are as many, skipped elsewhere. tests/gpu/ranks.py holds what the ranks do."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_ranks_agree_in_every_layout(num_ranks):
    if torch.cuda.device_count() < num_ranks:
        pytest.skip(f"fewer than {num_ranks} CUDA devices")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks), "-m", "tests.gpu.ranks"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0 and "all found right" in done.stdout, f"{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
