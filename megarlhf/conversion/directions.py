"""What `megarlhf convert` does: the way that is meant, from what its options say and its source holds."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from megarlhf.conversion.from_hf import from_hf
from megarlhf.conversion.from_megatron import from_megatron
from megarlhf.conversion.hf_folder import CONFIG
from megarlhf.conversion.incoming import MODEL
from megarlhf.conversion.to_hf import Exported, to_hf
from megarlhf.conversion.torch_dist import checkpoint_folder
from megarlhf.conversion.verification import check_verifiable, verify
from megarlhf.models.transformer import DTYPES
from megarlhf.runs.checkpoints import find_source
from megarlhf.storage.checkpoints import STATE_FILE, Saved, read_saved

GIB = 2**30
OUTWARD = ("model", "weights", "dtype", "family", "tokenizer")
"""Options that mean something on the way out only."""
INWARD = ("eos_token", "layers")
"""On the way in only."""


def convert(options: argparse.Namespace) -> list[str]:
    """As the options say; lines of what was done. ValueError for what the user can mend."""
    source, target = options.source, options.target
    if options.verify:
        check_verifiable()
    if (megatron := checkpoint_folder(source)) is not None:
        return _from_megatron(megatron, options)
    if not _is_ours(source):
        if given := [f"--{name}" for name in OUTWARD if getattr(options, name) is not None]:
            raise ValueError(f"{', '.join(given)}: of use only from one of our checkpoints, and {source} holds none")
        if options.verify and options.layers is not None:
            raise ValueError("--verify compares with the whole model: of no use with --layers")
        said = from_hf(source, target, eos_token=options.eos_token, part_bytes=_bytes(options.shard_gb), layers=options.layers)
        return [*said, verify(source, Exported(read_saved(target), MODEL))] if options.verify else said
    if given := [f"--{name.replace('_', '-')}" for name in INWARD if getattr(options, name) is not None]:
        raise ValueError(f"{', '.join(given)}: of use only from a Hugging Face folder, and {source} is a checkpoint of ours")
    exported = chosen(find_source(str(source)), options.model, options.weights, DTYPES.get(options.dtype))
    said = to_hf(exported, target, tokenizer_path=options.tokenizer, family=options.family, shard_bytes=_bytes(options.shard_gb))
    return [*said, verify(target, exported)] if options.verify else said


def _from_megatron(folder: Path, options: argparse.Namespace) -> list[str]:
    if given := [f"--{name}" for name in (*OUTWARD, "verify") if name != "tokenizer" and getattr(options, name)]:
        raise ValueError(f"{', '.join(given)}: of no use from a Megatron-LM checkpoint, which {folder} is")
    if options.tokenizer is not None and not options.tokenizer.exists():
        raise ValueError(f"--tokenizer: there is no {options.tokenizer}")
    size = _bytes(options.shard_gb)
    return from_megatron(folder, options.target, tokenizer=options.tokenizer, eos_token=options.eos_token, part_bytes=size)


def chosen(saved: Saved, model: str | None, weights: str | None, dtype: torch.dtype | None) -> Exported:
    """The model that is meant: the one named, else the only one; its average where there is one and the newest are not asked for."""
    if model is None and len(saved.models) > 1:
        raise ValueError(f"--model must name one of {', '.join(saved.models)} in {saved.path}")
    name = model or next(iter(saved.models))
    has_average = saved.model(name)["has_ema"]
    if weights == "average" and not has_average:
        raise ValueError(f"--weights average: {saved.path} holds no moving average of {name}")
    return Exported(saved, name, average=has_average and weights != "newest", dtype=dtype)


def _is_ours(path: Path) -> bool:
    """Whether a folder holds a checkpoint of ours, itself or as a run; a converted one has a config.json too."""
    return (path / STATE_FILE).is_file() or ((path / "checkpoints").is_dir() and not (path / CONFIG).is_file())


def _bytes(gib: float) -> int:
    if not gib > 0:
        raise ValueError(f"--shard-gb must be above 0, got {gib}")
    return int(gib * GIB)
