"""What a run was started on, for people who compare runs later: nothing reads it back but `megarlhf report`."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import socket

import torch

from megarlhf import __version__
from megarlhf.parallel.groups import World

ENVIRONMENT_FILE = "environment.json"
PACKAGES = (
    "torch", "megatron-core", "transformer-engine", "apex", "numpy", "tokenizers", "sentencepiece", "safetensors", "nvidia-dali-cuda130",
)  # fmt: skip
"""Distributions whose version may matter to a run's numbers or speed."""


def environment(world: World) -> dict[str, object]:
    """Versions, machine and ranks as rank 0 sees them; "started" is UTC. Nothing of the process's environment variables."""
    on_gpu = world.device.type == "cuda"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z"), "ranks": world.size}
    found["device"] = torch.cuda.get_device_name(world.device) if on_gpu else f"CPU, {platform.machine()}, {cores} cores"
    found |= {"host": socket.gethostname(), "system": platform.platform(), "python": platform.python_version(), "megarlhf": __version__}
    if on_gpu:
        found |= {"CUDA": torch.version.cuda, "GPUs of the host": torch.cuda.device_count()}
    return found | {name: version for name in PACKAGES if (version := _version(name)) is not None}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
