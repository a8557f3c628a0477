"""YAML text, and overrides on a command line, as a tree of plain values.

Scalars are read by YAML 1.2's core rules, not YAML 1.1's: ``1e-5`` is a number, and ``off``, ``12:30:00``, ``2022-03-04``
and ``010`` are strings. A key given twice is an error. Files are UTF-8 whatever the locale.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megarlhf.config.errors import ConfigError
from megarlhf.config.fields import show

COMMAND_LINE = "command line"


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values in the file; an empty file has none. ConfigError where it cannot be read or is something else."""
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such file: give --config the run's YAML file{_neighbours(path)}") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: is a folder: give --config the run's YAML file{_neighbours(path / 'run.yaml')}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    tree = _parse(text.removeprefix(b"\xef\xbb\xbf"), str(path))
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path}: expected keys and values, got {show(tree)}")
    return tree or {}


def with_overrides(tree: dict[str, Any], overrides: Sequence[str], problems: list[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The tree after overrides of the form ``section.key=value``, and the dotted keys that were replaced; what is wrong is noted."""
    overridden: dict[str, str] = {}
    for override in overrides:
        try:
            names, value = _parse_override(override)
        except ConfigError as error:
            problems.append(str(error))
            continue
        key = ".".join(names)
        if lost := [other for other in overridden if other == key or other.startswith(f"{key}.")]:
            problems.append(f"{COMMAND_LINE}: {override!r} would undo {overridden[lost[0]]!r}: give a key once")
            continue
        tree = _with_value(tree, names, value)
        overridden[key] = override
    return tree, tuple(overridden)


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2 scalars, refusing a key given twice."""

    yaml_implicit_resolvers = {}

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """A mapping whose keys differ."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.composer.ComposerError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return node


class Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, quoting also the strings that only YAML 1.2 takes for numbers."""


_FLOAT = re.compile(
    r"""^(?: [-+]? (?: (?: [0-9][0-9_]*\.[0-9_]* | \.[0-9]+ ) (?: [eE][-+]?[0-9]+ )?   # 1.5  1.  .5  1.5e3
                   | [0-9]+ [eE][-+]?[0-9]+                                          # 1e-5
                   | \.inf )
           | \.nan )$""",
    re.VERBOSE,
)
for _tag, _pattern, _first in (
    ("null", re.compile(r"^(?:~|null|)$"), ["~", "n", ""]),
    ("bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF")),
    ("int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789")),
    ("float", _FLOAT, list("-+0123456789.")),
    ("merge", re.compile(r"^<<$"), ["<"]),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _parse(text: bytes | str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark or error.context_mark, error.problem or error.context
        raise ConfigError(f"{source}, line {mark.line + 1}, column {mark.column + 1}: broken YAML: {problem}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: broken YAML: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise ConfigError(f"{source}: broken YAML: {str(error).splitlines()[0]}") from error


def _parse_override(override: str) -> tuple[list[str], Any]:
    path, equals, text = override.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"{COMMAND_LINE}: {override!r} is not of the form section.key=value")
    return names, _parse(text, f"{COMMAND_LINE}: {override!r}")


def _with_value(tree: Any, names: list[str], value: Any) -> Any:
    """`tree` with the value at `names` replaced; a copy along the way, since YAML aliases may share sections."""
    if not names:
        return value
    section = tree if isinstance(tree, dict) else {}
    return {**section, names[0]: _with_value(section.get(names[0]), names[1:], value)}


def _neighbours(path: Path) -> str:
    """The YAML files beside a path that is none, the likeliest first."""
    try:
        there = sorted(file.name for file in path.parent.iterdir() if file.suffix in (".yaml", ".yml"))
    except OSError:
        return f" (there is no folder {path.parent} either)"
    close = difflib.get_close_matches(path.name, there, n=3)
    listed = [*close, *(name for name in there if name not in close)]
    folder = "this folder" if str(path.parent) == "." else str(path.parent)
    return f"; {folder} has {', '.join(listed[:6])}{', ...' if len(listed) > 6 else ''}" if listed else f"; {folder} has no YAML file"
