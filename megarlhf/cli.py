"""`megarlhf <command> --config run.yaml key=value ...`, alone or under torchrun or srun.

What a user wrote wrong is found before torch is imported wherever that can be: `main` refuses at once in a run of one process;
several ranks meet first, so that one of them says it.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from megarlhf import __version__
from megarlhf.api.stages import load, problems_of, run_in
from megarlhf.config import COMMANDS, ConfigError
from megarlhf.config.documentation import describe
from megarlhf.config.stage import StageConfig
from megarlhf.parallel.launch import Place, place_in_run

DESCRIPTION = "Train language models to follow instructions with human feedback (Ouyang et al. 2022)."
DEFAULT_TIMEOUT_MINUTES = 30.0
TOOLS = {
    "init": ("megarlhf.preparation.init", "write a commented YAML file for a command, to fill in"),
    "tokenizer": ("megarlhf.preparation.tokenizer", "train a tokenizer on text, and say how well it fits"),
    "preprocess": ("megarlhf.preparation.preprocess", "text to a pretraining corpus"),
    "convert": ("megarlhf.conversion.command", "between a Hugging Face folder and a checkpoint"),
    "plan": ("megarlhf.planning.command", "what a run needs, how long it takes and whether it fits, before it is started"),
    "chat": ("megarlhf.chat.command", "talk to a model in a terminal"),
    "replay": ("megarlhf.runs.replay_command", "take a step again whose loss or gradients were not finite, and say where that begins"),
    "doctor": ("megarlhf.doctor.command", "what this machine or cluster has for a run, and what it lacks"),
    "report": ("megarlhf.report.command", "one page for people from the folders of runs: curves, samples, warnings"),
}
"""Commands that are no stage: the module whose `main` runs the words after its name, and what it does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for what the user wrote wrong, 1 for what went wrong, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in TOOLS:
        module, _ = TOOLS[words[0]]
        return importlib.import_module(module).main(words[1:])
    options = _parsed(words)
    if options.help_config:
        print(describe(COMMANDS[options.command]), flush=True)
        return 0
    try:
        place = place_in_run()
    except ValueError as error:
        return _refuse(options.command, str(error))
    config, problem = _checked(options, place)
    if problem is not None and place.size == 1:
        return _refuse(options.command, problem)
    return _run(options.command, config, problem, place, fresh=options.fresh)


def start() -> None:
    """The program: `main` with the process's arguments, and the process's end."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a locale that lacks a letter is no reason to stop
    try:
        status = main()
    except BrokenPipeError:  # `megarlhf ppo --help-config | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except KeyboardInterrupt:  # before the run began
        print("megarlhf: stopped by Ctrl-C", file=sys.stderr)
        status = 130
    if "torch" in sys.modules and (status or os.environ.get("TORCHELASTIC_RUN_ID")):
        from megarlhf.failures import leave

        leave(status)
    sys.exit(status)


def _checked(options: argparse.Namespace, place: Place) -> tuple[StageConfig | None, str | None]:
    """The configuration, and what is wrong with it as far as this process alone can see it."""
    if not options.config:
        return None, "--config is missing: give it the run's YAML file, such as examples/quickstart/sft.yaml"
    if len(options.config) > 1:
        return None, f"--config is given {len(options.config)} times: {', '.join(options.config)}"
    try:
        config = load(options.command, options.config[0], options.overrides)
    except ConfigError as error:
        return None, f"the configuration is not valid:\n{error}"
    problems = problems_of(config, place)
    return config, "\n".join(problems if len(problems) < 2 else ["several things are not there:", *problems]) or None


def _refuse(command: str, problem: str) -> int:
    print(f"megarlhf {command}: {problem}", file=sys.stderr, flush=True)
    return 2


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    options, rest = parser.parse_known_args(words)
    if unknown := [word for word in rest if word.startswith("-")]:
        parser.error("\n".join(_about_option(word, words) for word in unknown))
    options.overrides += rest  # argparse gives up on overrides that stand after a second option
    return options


OPTIONS = ("--config", "--fresh", "--help-config", "--help", "--version")


def _about_option(word: str, words: Sequence[str]) -> str:
    """What to write in place of an option that there is none of: another option, or a key."""
    name, equals, value = word.lstrip("-").partition("=")
    if close := difflib.get_close_matches(f"--{name}", OPTIONS, n=1):
        return f"unknown option {word}; did you mean {close[0]}?"
    following = words[words.index(word) + 1 :]
    if not equals and following and not following[0].startswith("-") and "=" not in following[0]:
        value = following[0]
    return f"unknown option {word}: keys are given without dashes, as {name.replace('-', '_')}={value or '...'}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megarlhf", description=DESCRIPTION, allow_abbrev=False)
    version = f"megarlhf {__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (_, summary) in TOOLS.items():
        commands.add_parser(name, help=summary, add_help=False)
    for name, cls in COMMANDS.items():
        summary = (cls.__doc__ or "").splitlines()[0].split(": ", 1)[-1]
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        command.add_argument("--config", action="append", help="the run's YAML file")
        command.add_argument("--fresh", action="store_true", help="refuse to go on with what run.dir already holds")
        command.add_argument("--help-config", action="store_true", help="list every key with its type, default and meaning")
        command.add_argument("--version", action="version", version=version)
        command.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the file, such as run.seed=2")
    return parser


def _run(command: str, config: StageConfig | None, problem: str | None, place: Place, *, fresh: bool) -> int:
    import torch

    from megarlhf.failures import leave, say, speak, status_of_other
    from megarlhf.parallel.groups import World
    from megarlhf.parallel.rendezvous import RanksMissing

    if config is not None and config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    try:
        world = World.connect(place, timeout_minutes=config.run.timeout_minutes if config else DEFAULT_TIMEOUT_MINUTES)
    except RanksMissing as error:
        if error.speaks:
            say(command, "\n".join([str(error), *([problem] if problem else [])]), place)
        return 1
    except ValueError as error:
        if place.rank == 0:
            say(command, str(error), place)
        return 2
    world.alarm.watch(lambda rung: leave(status_of_other(rung, place)))
    try:
        run_in(world, config, problems=[problem] if problem else [], fresh=fresh)
    except (Exception, KeyboardInterrupt) as error:
        status = speak(command, error, world.alarm, place)
        if world.size > 1:  # the others may hang, and leaving a group can wait for them
            return status
    else:
        status = 0
    world.close()
    return status
