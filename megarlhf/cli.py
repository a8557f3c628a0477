"""`megarlhf <command> --config run.yaml key=value ...`, alone or under torchrun or srun."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from megarlhf.config import COMMANDS, ConfigError, load_stage_config
from megarlhf.config.loader import describe
from megarlhf.config.stages import StageConfig

DESCRIPTION = "Train language models to follow instructions with human feedback (Ouyang et al. 2022)."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the process's exit status: 0, or 2 for what the user can mend."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["convert"]:
        from megarlhf.conversion.command import main as convert

        return convert(words[1:])
    options = _parsed(words)
    if options.help_config:
        print(describe(COMMANDS[options.command]))
        return 0
    if options.config is None:
        return _refuse(options.command, "--config is missing")
    config, problem = None, None
    try:
        config = load_stage_config(options.config, options.overrides, command=options.command)
    except ConfigError as error:
        problem = f"the configuration is not valid:\n{error}"
        if int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", 1))) == 1:
            return _refuse(options.command, problem)  # at once; several ranks meet first, so that one of them says it
    return _run(options.command, config, problem, fresh=options.fresh)


def _refuse(command: str, problem: str) -> int:
    print(f"megarlhf {command}: {problem}", file=sys.stderr, flush=True)
    return 2


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if unknown := [word for word in rest if word.startswith("-")]:
        parser.error(f"unknown options: {' '.join(unknown)}")
    options.overrides += rest  # argparse gives up on overrides that stand after a second option
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megarlhf", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("convert", help="between a Hugging Face folder and a checkpoint; no --config", add_help=False)
    for name, cls in COMMANDS.items():
        summary = (cls.__doc__ or "").splitlines()[0].split(": ", 1)[-1]
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("--config", help="the run's YAML file")
        command.add_argument("--fresh", action="store_true", help="refuse to go on with what run.dir already holds")
        command.add_argument("--help-config", action="store_true", help="list every key with its type, default and meaning")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the file, such as run.seed=2")
    return parser


def _run(command: str, config: StageConfig | None, problem: str | None, *, fresh: bool) -> int:
    import torch

    from megarlhf.parallel.groups import World
    from megarlhf.runs.agreement import refuse_together, require_same_config

    if config is not None and config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    try:
        world = World.connect()
    except ValueError as error:
        return _refuse(command, str(error))
    try:
        refuse_together([problem] if problem else [], world)
        require_same_config(config, world)
        _stage(command)(config, world, fresh=fresh)
    except ConfigError as error:  # all ranks raise it together
        if world.rank == 0:
            _refuse(command, str(error))
        world.barrier()  # a launcher ends the others when the first has ended
        world.close()
        return 2
    except ValueError as error:  # perhaps on this rank only, and the others wait for it: they end when this process does
        return _refuse(command, f"rank {world.rank} of {world.size}: {error}")
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
