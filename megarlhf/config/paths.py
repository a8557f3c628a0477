"""What the paths of a configuration must name on disk: looked up before anything heavy is imported."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from megarlhf.config.fields import annotations_of, join, sections_of, without_none, without_rules
from megarlhf.config.rules import PathTo

FETCHED_ELSEWHERE = ("run or checkpoint", "tokenizer")
"""What other programs take by the name that it has on a hub, OWNER/MODEL."""


def path_problems(config: Any, *, to_come: Collection[str] = ()) -> list[str]:
    """A sentence for every path that names nothing, or not what it must: with what is there instead.

    Args: to_come: folders that will have been written by then; what is to be read from them is not looked up.
    """
    found, to_come = [], [os.path.abspath(folder) for folder in to_come]
    for at, section in sections_of(config):
        annotations = annotations_of(type(section))
        for field in fields(section):
            for key, annotation, value in _values(join(at, field.name), annotations[field.name], getattr(section, field.name)):
                for rule in without_rules(annotation)[1]:
                    if not isinstance(rule, PathTo) or (rule.what != "output" and _is_in(value, to_come)):
                        continue
                    if problem := _checked(rule, value):
                        found.append(f"{key}: {problem}")
    return found


def _values(key: str, annotation: Any, value: Any) -> Iterator[tuple[str, Any, Any]]:
    """(key, annotation, value) of a field, or of each item of a list; none where there is none."""
    inner = without_none(annotation)[0]
    if isinstance(value, tuple):
        kinds = get_args(inner)
        yield from ((f"{key}[{i}]", kinds[0 if kinds[-1] is Ellipsis else i], item) for i, item in enumerate(value))
    elif value is not None:
        yield key, inner, value


def _is_in(path: str, folders: Collection[str]) -> bool:
    return any(Path(os.path.abspath(path)).is_relative_to(folder) for folder in folders)


def _checked(rule: PathTo, path: str) -> str | None:
    try:
        return _CHECKS[rule.what](Path(path))
    except (OSError, ValueError) as error:  # a name too long, a link to itself, a folder that may not be looked into
        return f"{_cut(path)} cannot be looked up: {getattr(error, 'strerror', None) or error}"


def _file(path: Path) -> str | None:
    if not _exists(path):
        return _missing(path, "file")
    if path.is_dir():
        return f"{path} is a folder, and a file is needed"
    return None if os.access(path, os.R_OK) else f"{path} may not be read by this user"


def _function(path: Path) -> str | None:
    return _file(Path(str(path).rpartition(":")[0]))


def _corpus(prefix: Path) -> str | None:
    for ending in (".bin", ".idx"):
        path = prefix.with_name(prefix.name + ending)
        if not path.is_file():
            hint = "; give the path without .bin or .idx" if prefix.suffix in (".bin", ".idx") and prefix.is_file() else ""
            return _missing(path, "file") + hint
        if not os.access(path, os.R_OK):
            return f"{path} may not be read by this user"
    return None


def _tokenizer(path: Path) -> str | None:
    return None if _exists(path) else _missing(path, "tokenizer")


def _run(path: Path) -> str | None:
    if not _exists(path):
        return _missing(path, "run or checkpoint")
    return None if path.is_dir() else f"{path} is a file; a run's folder or a checkpoint's is needed"


def _output(path: Path) -> str | None:
    there = path
    while not _exists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        return f"{there} is a file, and a folder is needed there"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} may not be written to by this user"


_CHECKS: dict[str, Callable[[Path], str | None]] = {
    "file": _file,
    "function": _function,
    "corpus": _corpus,
    "tokenizer": _tokenizer,
    "run": _run,
    "output": _output,
}


def _exists(path: Path) -> bool:
    """Whether the path is there. OSError where no file system could hold its name."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _missing(path: Path, what: str) -> str:
    """That nothing is there, and what is: the likeliest names first."""
    folder = path.parent
    if not folder.is_dir():
        hub = what in FETCHED_ELSEWHERE and len(path.parts) == 2 and not path.is_absolute()
        hint = "; nothing is fetched from a model hub: download the folder, and `megarlhf convert` makes a checkpoint of it" if hub else ""
        return f"there is no {what} {_cut(str(path))}, and no folder {_cut(str(folder))} (started in {Path.cwd()}){hint}"
    there = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    close = difflib.get_close_matches(path.name, there, n=3)
    listed = [*close, *(name for name in there if name not in close)]
    beside = f"{', '.join(listed[:6])}{', ...' if len(listed) > 6 else ''}" if listed else "nothing"
    return f"there is no {what} {path}; {'this folder' if str(folder) == '.' else folder} holds {beside}"


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:80]}... ({len(text)} characters)"
