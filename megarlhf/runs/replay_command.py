"""`megarlhf replay RUN/bad_batches/step_00000012_policy.safetensors`: a step that was not finite is taken again and looked into.

Alone or under torchrun, with the weights of the checkpoint nearest to the step. First the weights and the batch itself are looked at,
then what the model makes of each row, then the gradients: of the whole step, of each term, of each row of a term that is not finite.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

SUMMARY = "Take a step again whose loss or gradients were not finite, and say which term, row and parameter that begins with."


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay as the command line says; returns the exit status: 0 whatever is found, 2 for what the user can mend, 1 otherwise."""
    options = _parser().parse_args(arguments)
    from megarlhf.parallel.platform import prepare_megatron

    prepare_megatron()  # before the import below does it, more slowly
    from megarlhf.runs.replay import replay_alone_or_with_others

    return replay_alone_or_with_others(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megarlhf replay", description=SUMMARY, allow_abbrev=False)
    parser.add_argument("batch", type=Path, help="a file of a run's bad_batches/")
    nearest = "a checkpoint or a run to take the weights from (default: the run's own checkpoint nearest to the step)"
    parser.add_argument("--checkpoint", help=nearest)
    parser.add_argument("--timeout-minutes", type=float, default=30.0, help="how long a rank waits for another (default: 30)")
    return parser
