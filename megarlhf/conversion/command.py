"""`megarlhf convert --from ... --to ...`: Hugging Face folders and Megatron-LM checkpoints in, Hugging Face folders out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from megarlhf.config.sections import Precision
from megarlhf.endings import ended

SUMMARY = "Convert a Hugging Face folder or a Megatron-LM checkpoint to one of ours, or a model of a run to a Hugging Face folder."


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert as the command line says; returns the exit status (see `ended`)."""
    options = _parser().parse_args(arguments)
    return ended("megarlhf convert", lambda: print(*_convert(options), sep="\n", flush=True), after_ctrl_c="nothing is left of it")


def _convert(options: argparse.Namespace) -> list[str]:
    from megarlhf.parallel.platform import prepare_megatron

    prepare_megatron()  # before the import below does it, more slowly
    from megarlhf.conversion.directions import convert

    return convert(options)


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
    parser.add_argument("--dtype", choices=get_args(Precision), help="by default what the checkpoint holds: float32 after training")
    parser.add_argument("--family", help="model_type of the config.json, where several can describe the model")
    tokenizer = "the tokenizer of a Megatron-LM checkpoint; of ours, where it is not where the run had it"
    parser.add_argument("--tokenizer", type=Path, help=tokenizer)
    return parser
