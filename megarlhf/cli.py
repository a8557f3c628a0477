"""`megarlhf <command> --config run.yaml key=value ...`, or `megarlhf recipe` and a file of such lines, alone or under torchrun or srun.

What a user wrote wrong is found before torch is imported wherever that can be: `main` refuses at once in a run of one process;
several ranks meet first, so that one of them says it.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from megarlhf import __version__
from megarlhf.api.stages import load, problems_of
from megarlhf.config import COMMANDS, ConfigError
from megarlhf.config.documentation import describe
from megarlhf.config.stage import StageConfig
from megarlhf.parallel.launch import Place, place_in_run
from megarlhf.recipes.file import Line, read_recipe
from megarlhf.recipes.series import Command, Series
from megarlhf.runs.lock import not_fresh

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
RECIPE = "recipe"
RECIPE_SUMMARY = "several commands, each a line of a file, one after another in one program"
ASK_FOR_HELP = {"-h", "--help", "--help-config", "--version"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for what the user wrote wrong, 1 for what went wrong, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in TOOLS:
        module, _ = TOOLS[words[0]]
        return importlib.import_module(module).main(words[1:])
    options = _parsed(words)
    if options.command != RECIPE and options.help_config:
        print(describe(COMMANDS[options.command]), flush=True)
        return 0
    try:
        place = place_in_run()
    except ValueError as error:
        return _refuse(options.command, str(error))
    if options.command == RECIPE:
        commands, problem = _commands_of(options.file, place)
    else:
        config, problem = _checked(options)
        problem = problem or _not_there(problems_of(config, place))
        commands = [Command(config, options.fresh)] if config is not None else []
    if problem is not None and place.size == 1:
        return _refuse(options.command, problem)
    return _run(Series(options.command, commands, place, is_recipe=options.command == RECIPE), problem)


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


def _checked(options: argparse.Namespace) -> tuple[StageConfig | None, str | None]:
    """The configuration of a command, or what is wrong with it."""
    if not options.config:
        named = [word for word in options.overrides if word.endswith((".yaml", ".yml")) and "=" not in word]
        meant = f"write --config {named[0]}" if named else "give it the run's YAML file, such as examples/quickstart/sft.yaml"
        return None, f"--config is missing: {meant}"
    if len(options.config) > 1:
        return None, f"--config is given {len(options.config)} times: {', '.join(options.config)}"
    try:
        return load(options.command, options.config[0], options.overrides), None
    except ConfigError as error:
        return None, f"the configuration is not valid:\n{error}"


def _not_there(problems: Sequence[str]) -> str | None:
    """What a valid configuration names and this process cannot find, as one text."""
    return "\n".join(problems if len(problems) < 2 else ["several things are not there:", *problems]) or None


def _commands_of(file: str, place: Place) -> tuple[list[Command], str | None]:
    """The commands of a recipe, and all that is wrong with it as far as this process alone can see it before the first has run."""
    try:
        lines = read_recipe(file)
    except ConfigError as error:
        return [], str(error)
    wrong: dict[int, str] = {}
    commands, folders = {}, {}
    for line in lines:
        config, fresh, problem = _checked_line(line)
        folder = config.run.dir if config is not None else next((word[8:] for word in line.words if word.startswith("run.dir=")), None)
        if folder is not None and (maker := _line_of(folder, folders)) is not None:
            problem = problem or f"run.dir {folder} is that of {file}:{maker} too; give each run its own"
        if config is not None:
            commands[line.number] = Command(config, fresh, f"{file}:{line.number}")
        folders[line.number] = folder
        if problem is not None:
            wrong[line.number] = problem
    for number, command in commands.items():
        above = [folder for at, folder in folders.items() if folder and at < number]
        below = [folder for at, folder in folders.items() if folder and at > number]
        problems = problems_of(command.config, place, to_come=above)
        if problems and below:
            in_any_order = problems_of(command.config, place, to_come=[*above, *below])
            problems = [text if text in in_any_order else f"{text}; a line below makes it: let that come first" for text in problems]
        if command.fresh and place.rank == 0:
            with contextlib.suppress(OSError):  # which the run itself says
                problems += filter(None, [not_fresh(Path(command.config.run.dir))])
        if problems:
            wrong.setdefault(number, _not_there(problems))
    said = [f"{file}:{number}: {wrong[number]}" for number in sorted(wrong)]
    return list(commands.values()), "\n".join(["nothing was started:", *said]) if said else None


def _line_of(folder: str, folders: Mapping[int, str | None]) -> int | None:
    """The line whose run has this folder."""
    return next((number for number, other in folders.items() if other and os.path.abspath(other) == os.path.abspath(folder)), None)


def _checked_line(line: Line) -> tuple[StageConfig | None, bool, str | None]:
    """(configuration, --fresh, what is wrong) of a recipe's line."""
    name = line.words[0]
    if name in TOOLS:
        return None, False, f"{name} is no stage that ranks run together; do it before or after the recipe, by `megarlhf {name}`"
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"a line begins with one of {', '.join(COMMANDS)}"
        return None, False, f"there is no command {name!r}; {hint}"
    if asks := next((word for word in line.words if word in ASK_FOR_HELP), None):
        return None, False, f"{name}: {asks} runs nothing"
    try:
        options = _parsed(line.words, _LineParser)
    except ConfigError as error:
        return None, False, f"{name}: {error}"
    config, problem = _checked(options)
    return config, options.fresh, problem and f"{name}: {problem}"


def _refuse(command: str, problem: str) -> int:
    print(f"megarlhf {command}: {problem}", file=sys.stderr, flush=True)
    return 2


class _LineParser(argparse.ArgumentParser):
    """Of a recipe's line: what is wrong with it is said with its number, and does not end the program."""

    def error(self, message: str) -> NoReturn:
        """ConfigError."""
        raise ConfigError(message)


def _parsed(words: Sequence[str], cls: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.Namespace:
    parser = _parser(cls)
    options, rest = parser.parse_known_args(words)
    if unknown := [word for word in rest if word.startswith("-")]:
        parser.error("\n".join(_about_option(word, words) for word in unknown))
    if options.command == RECIPE:
        if rest:
            parser.error(f"{rest[0]}: keys are given in the lines of {options.file}")
        return options
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


def _parser(cls: type[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = cls(prog="megarlhf", description=DESCRIPTION, allow_abbrev=False)
    version = f"megarlhf {__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (_, summary) in TOOLS.items():
        commands.add_parser(name, help=summary, add_help=False)
    recipe = commands.add_parser(RECIPE, help=RECIPE_SUMMARY, description=f"Run {RECIPE_SUMMARY} (docs/runs.md).", allow_abbrev=False)
    recipe.add_argument("file", help="each line a command without `megarlhf`, such as: sft --config sft.yaml run.dir=runs/sft")
    for name, config in COMMANDS.items():
        summary = (config.__doc__ or "").splitlines()[0].split(": ", 1)[-1]
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        command.add_argument("--config", action="append", help="the run's YAML file")
        command.add_argument("--fresh", action="store_true", help="refuse to go on with what run.dir already holds")
        command.add_argument("--help-config", action="store_true", help="list every key with its type, default and meaning")
        command.add_argument("--version", action="version", version=version)
        command.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the file, such as run.seed=2")
    return parser


def _run(series: Series, problem: str | None) -> int:
    from megarlhf.failures import leave, say, speak, status_of_other
    from megarlhf.parallel.groups import World
    from megarlhf.parallel.rendezvous import RanksMissing

    place, first = series.place, series.commands[0] if series.commands else None
    if first is not None:
        series.set_threads(first)
    try:
        world = World.connect(place, timeout_minutes=first.config.run.timeout_minutes if first else DEFAULT_TIMEOUT_MINUTES)
    except RanksMissing as error:
        if error.speaks:
            say(series.name, "\n".join([str(error), *([problem] if problem else [])]), place)
        return 1
    except ValueError as error:
        if place.rank == 0:
            say(series.name, str(error), place)
        return 2
    world.alarm.watch(lambda rung: leave(status_of_other(rung, place)))
    try:
        series.run(world, problem)
    except (Exception, KeyboardInterrupt) as error:
        status = speak(series.name, error, world.alarm, place)
        if world.size > 1:  # the others may hang, and leaving a group can wait for them
            return status
    else:
        status = 0
    series.world.close()
    return status
