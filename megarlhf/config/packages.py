"""Packages that a configuration asks for and that are not installed: known before anything heavy is imported."""

from __future__ import annotations

import importlib.util
from typing import Any

from megarlhf.config.fields import join, sections_of
from megarlhf.config.sections import PretrainingDataConfig

DALI = "nvidia.dali"
INSTALL_DALI = "pip install nvidia-dali-cuda130 (nvidia-dali-cuda120 beside a PyTorch for CUDA 12; both run without a GPU too)"


def missing_packages(config: Any) -> list[str]:
    """A sentence for every key that needs such a package, with the line that installs it."""
    return [
        f"{join(at, 'loader')}: dali needs NVIDIA DALI, which is not installed: {INSTALL_DALI}; the default's batches are the same"
        for at, section in sections_of(config)
        if isinstance(section, PretrainingDataConfig) and section.loader == "dali" and not has_dali()
    ]


def has_dali() -> bool:
    """Whether DALI can be imported, as far as can be told without importing it."""
    try:
        return importlib.util.find_spec(DALI) is not None
    except ModuleNotFoundError:  # not even its parent
        return False
