"""`megarlhf convert --from ... --to ...`: Hugging Face folders and Megatron-LM checkpoints in, Hugging Face folders out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from megarlhf.conversion.from_hf import from_hf
from megarlhf.conversion.from_megatron import from_megatron
from megarlhf.conversion.hf_folder import CONFIG
from megarlhf.conversion.incoming import MODEL
from megarlhf.conversion.new_folder import GIB
from megarlhf.conversion.to_hf import Exported, to_hf
from megarlhf.conversion.torch_dist import checkpoint_folder
from megarlhf.conversion.verification import check_verifiable, verify
from megarlhf.endings import ended
from megarlhf.runs.checkpoints import find_source
from megarlhf.storage.checkpoints import STATE_FILE, Saved, read_saved

SUMMARY = "Convert a Hugging Face folder or a Megatron-LM checkpoint to one of ours, or a model of a run to a Hugging Face folder."
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OUTWARD = ("model", "weights", "dtype", "family", "tokenizer")
"""Options that mean something on the way out only."""
INWARD = ("eos_token", "layers")
"""On the way in only."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert as the command line says; returns the exit status (see `ended`)."""
    options = _parser().parse_args(arguments)
    return ended("megarlhf convert", lambda: print(*_convert(options), sep="\n", flush=True), after_ctrl_c="nothing is left of it")


def _convert(options: argparse.Namespace) -> list[str]:
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megarlhf convert", description=SUMMARY, allow_abbrev=False)
    source = "a Hugging Face folder, a Megatron-LM checkpoint (torch_dist), or a checkpoint or run of ours"
    parser.add_argument("--from", dest="source", type=Path, required=True, help=source)
    parser.add_argument("--to", dest="target", type=Path, required=True, help="the folder to make")
    parser.add_argument("--verify", action="store_true", help="build both models and compare them, where transformers is installed")
    parser.add_argument("--shard-gb", type=float, default=4.0, help="GiB of a file, about (default: 4)")
    parser.add_argument("--eos-token", help="the token that ends a text, where the files do not say it")
    parser.add_argument("--layers", type=int, help="keep so many of the Hugging Face model's first layers, for a smaller reward model")
    parser.add_argument("--model", help="which model of a checkpoint: policy, value, ...")
    parser.add_argument("--weights", choices=("average", "newest"), help="by default the moving average where there is one")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="by default what the checkpoint holds: float32 after training")
    parser.add_argument("--family", help="model_type of the config.json, where several can describe the model")
    tokenizer = "the tokenizer of a Megatron-LM checkpoint; of ours, where it is not where the run had it"
    parser.add_argument("--tokenizer", type=Path, help=tokenizer)
    return parser
