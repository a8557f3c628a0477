"""`megarlhf init COMMAND`: a commented YAML file to fill in."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from megarlhf.config import COMMANDS
from megarlhf.config.template import template
from megarlhf.endings import ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file, or print it; returns the exit status (see `ended`)."""
    options = _parser().parse_args(arguments)
    return ended("megarlhf init", lambda: _write(options), after_ctrl_c="nothing is written")


def _write(options: argparse.Namespace) -> None:
    text = template(options.command, every=options.all)
    if options.to is None:
        print(text, end="", flush=True)
        return
    options.to.parent.mkdir(parents=True, exist_ok=True)
    try:
        with options.to.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ValueError(f"{options.to} exists; choose another --to") from error
    print(f"{options.to}: fill in what says so, then megarlhf {options.command} --config {shlex.quote(str(options.to))}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megarlhf init", description="Write a commented YAML file to fill in.", allow_abbrev=False)
    parser.add_argument("command", choices=tuple(COMMANDS), help="what the file is for")
    parser.add_argument("--to", type=Path, help="the file to write, which must not be there (default: stdout)")
    parser.add_argument("--all", action="store_true", help="every key, not only the commonest")
    return parser
