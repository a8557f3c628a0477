"""`megarlhf <command> --config run.yaml key=value ...`, alone or under torchrun or srun."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from megarlhf.config import COMMANDS, ConfigError, load_stage_config
from megarlhf.config.loader import describe
from megarlhf.config.stages import StageConfig

DESCRIPTION = "Train language models to follow instructions with human feedback (Ouyang et al. 2022)."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the process's exit status: 0, or 2 for what the user can mend."""
    options = _parser().parse_args(arguments)
    if options.help_config:
        print(describe(COMMANDS[options.command]))
        return 0
    if options.config is None:
        print(f"megarlhf {options.command}: --config is missing", file=sys.stderr)
        return 2
    try:
        config = load_stage_config(options.config, options.overrides, command=options.command)
    except ConfigError as error:
        print(f"megarlhf {options.command}: the configuration is not valid:\n{error}", file=sys.stderr)
        return 2
    return _run(config, fresh=options.fresh)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megarlhf", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, cls in COMMANDS.items():
        summary = (cls.__doc__ or "").splitlines()[0].split(": ", 1)[-1]
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("--config", help="the run's YAML file")
        command.add_argument("--fresh", action="store_true", help="refuse to go on with what run.dir already holds")
        command.add_argument("--help-config", action="store_true", help="list every key with its type, default and meaning")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the file, such as run.seed=2")
    return parser


def _run(config: StageConfig, *, fresh: bool) -> int:
    import torch

    from megarlhf.parallel.groups import World

    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    world = World.connect()
    try:
        _stage(config.stage)(config, world, fresh=fresh)
    except ValueError as error:
        if world.rank == 0:
            print(f"megarlhf {config.stage}: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        world.close()
    return 0


def _stage(name: str) -> Callable[..., dict[str, float]]:
    if name == "pretrain":
        from megarlhf.trainers.pretrain import pretrain as stage
    elif name == "sft":
        from megarlhf.trainers.sft import sft as stage
    elif name == "reward":
        from megarlhf.trainers.reward_model import reward_model as stage
    elif name == "ppo":
        from megarlhf.trainers.ppo import ppo as stage
    elif name == "generate":
        from megarlhf.trainers.judge import generate_responses as stage
    else:
        from megarlhf.trainers.judge import evaluate as stage
    return stage
