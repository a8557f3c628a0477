"""`megarlhf chat MODEL`: reads a line, writes the answer as it is sampled, and goes on; in a terminal or through a pipe."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from megarlhf.config.sections import Precision
from megarlhf.endings import ended

SUMMARY = "Talk to a model in a terminal: a run, one of its checkpoints, or a converted model."


def main(arguments: Sequence[str] | None = None) -> int:
    """Talk as the command line says; returns the exit status (see `ended`)."""
    options = _parser().parse_args(arguments)
    return ended("megarlhf chat", lambda: _talk(options), after_ctrl_c="nothing was said yet")


def _talk(options: argparse.Namespace) -> None:
    from megarlhf.parallel.platform import prepare_megatron

    prepare_megatron()  # before the import below does it, more slowly
    from megarlhf.chat.talk import talk

    talk(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megarlhf chat", description=SUMMARY, allow_abbrev=False)
    parser.add_argument("path", metavar="MODEL", type=Path, help="a run's folder, a checkpoint, or what `megarlhf convert` made")
    parser.add_argument("--model", help="which model of a checkpoint; by default the policy, or the only one")
    parser.add_argument("--weights", choices=("average", "newest"), default="average", help="the moving average where there is one, or not")
    parser.add_argument("--tokenizer", type=Path, help="where it is, if neither beside the model nor where the run had it")
    parser.add_argument("--system", help="a system message, for models with a chat template")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the most likely token (default: 0.7)")
    parser.add_argument("--top-k", type=int, help="sample among the k most likely tokens")
    parser.add_argument("--top-p", type=float, help="sample among the smallest set with this probability")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="of an answer (default: 512)")
    parser.add_argument("--seed", type=int, default=1, help="the same seed and lines give the same answers")
    parser.add_argument("--precision", choices=get_args(Precision), default="fp32", help="of weights and arithmetic (default: fp32)")
    return parser
