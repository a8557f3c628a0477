"""A recipe's file: on each line a command as on the command line, without `megarlhf`. Needs no torch."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from megarlhf.config import ConfigError
from megarlhf.storage.files import system_error


@dataclass(frozen=True)
class Line:
    """One command of a recipe."""

    number: int
    """Of the line in the file where it begins, from 1."""
    words: tuple[str, ...]


def read_recipe(path: str) -> list[Line]:
    """The commands of a recipe, in the order of the file.

    Quotes and backslashes are a shell's. Blank lines and those that begin with # are passed over; a line that ends with a backslash goes on
    with the next. ConfigError, with all that is wrong, where it cannot be read, a quote is not closed, or there is no command.
    """
    try:
        rows = Path(path).read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no UTF-8 text: {error.reason} at byte {error.start}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(system_error(error) if isinstance(error, OSError) else f"{path}: {error}") from error
    lines, problems, number = [], [], 0
    while number < len(rows):
        first, text = number + 1, rows[number]
        number += 1
        while text.endswith("\\") and not text.lstrip().startswith("#") and number < len(rows):
            text, number = text[:-1] + rows[number], number + 1
        if text.lstrip().startswith("#"):
            continue
        try:
            words = shlex.split(text)
        except ValueError as error:
            problems.append(f"{path}:{first}: {str(error).lower()}")
            continue
        if words:
            lines.append(Line(first, tuple(words)))
    if not lines and not problems:
        problems.append(f"{path}: holds no command; each line is one, such as: sft --config sft.yaml run.dir=runs/sft")
    if problems:
        raise ConfigError("\n".join(problems))
    return lines
