"""Strict YAML into frozen dataclasses: every key is known, every value has its declared type, every rule holds.

A configuration class is a frozen, keyword-only dataclass. Its fields are ``int``, ``float``, ``bool``, ``str``, ``Path``,
``Literal[...]``, ``tuple[X, ...]``, ``tuple[X, Y]``, another such class (a section), any of these with rules
(``Annotated[int, Range(1, 8)]``, see `rules`), or any of these ``| None``. A float is always finite. A section may define

- ``violations(self) -> list[str]``: rules between its values that do not hold, each message starting with one of its own
  names ("minibatch_size 3 must divide batch_size"); the loader puts the section's path in front. The outermost class's
  ``violations`` holds the rules across sections.
- ``doubts(self) -> list[str]``: what is allowed and hardly meant, in the same form; see `doubts`.

All that is wrong is reported at once. Keys that a section leaves out keep the field's default, where the default is itself a
section.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from megarlhf.config.documentation import describe, keys_of
from megarlhf.config.errors import ConfigError
from megarlhf.config.fields import annotations_of, default_of, join, plain, sections_of, show, type_name, without_none, without_rules
from megarlhf.config.rules import PathTo
from megarlhf.config.yaml_tree import COMMAND_LINE, Dumper, read_yaml, with_overrides

__all__ = ["ConfigError", "build_config", "check_config", "describe", "doubts", "dump_yaml", "load_config", "to_dict"]

C = TypeVar("C")

REFUSED = object()
"""Stands for a value that could not be built; the reason is in the list of problems."""


def load_config(cls: type[C], path: Path | None, overrides: Sequence[str] = ()) -> C:
    """The `cls` that the YAML file at `path` (or no file) describes, after overrides of the form ``section.key=value``.

    An override's value is YAML: ``a.b=null``, ``a.b=[1, 2]``; setting into an optional section that is null creates it.
    Raises ConfigError with every unknown key, missing key, ill-typed value and broken rule.
    """
    if path is None:
        return build_config(cls, {}, overrides, name="configuration")
    return build_config(cls, read_yaml(path), overrides, name=str(path), here=str(Path(path).parent))


def build_config(cls: type[C], tree: dict[str, Any], overrides: Sequence[str] = (), *, name: str, here: str | None = None) -> C:
    """`load_config` of a file's keys and values; `name` stands before what is wrong with them, `here` is the file's folder."""
    problems: list[str] = []
    tree, overridden = with_overrides(tree, overrides, problems)
    return _Builder(cls, name, overridden, problems, here).build(tree)


def check_config(config: C) -> C:
    """A configuration built in code, held to the types and rules of one read from YAML, and with its values as that would have them.

    Raises ConfigError with all violations.
    """
    return _Builder(type(config), "configuration", (), []).build(to_dict(config))


def doubts(config: Any) -> list[str]:
    """What a configuration allows itself and hardly means: a sentence each, for the user to read before the run."""
    found = [(path, section.doubts()) for path, section in sections_of(config) if hasattr(section, "doubts")]
    return [join(path, sentence) for path, sentences in found for sentence in sentences]


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain YAML values: sections as dicts, tuples as lists, paths as strings."""
    return plain(config)


def dump_yaml(config: Any) -> str:
    """The configuration as YAML that `load_config` reads back to an equal value."""
    return yaml.dump(plain(config), Dumper=Dumper, sort_keys=False)


class _Builder:
    """Builds dataclasses out of plain values and collects everything that is wrong with them."""

    def __init__(self, root: type, name: str, overridden: tuple[str, ...], problems: list[str], here: str | None = None):
        self.root = root
        self.here = here
        self.name = name
        self.overridden = overridden
        self.problems = problems

    def build(self, tree: dict[str, Any]) -> Any:
        """The root class's instance; ConfigError when anything was refused."""
        built = self.section(self.root, tree, "", MISSING)
        self.rules(built, "")
        if self.problems:
            raise ConfigError("\n".join(self.problems))
        return built

    def refuse(self, path: str, problem: str) -> object:
        """Note a problem, a sentence that starts with the key at `path`, under the place where the user wrote the key."""
        names = re.split(r"[.\[]", path)
        overridden = any(all(a == b for a, b in zip(names, other.split("."), strict=False)) for other in self.overridden)
        self.problems.append(f"{COMMAND_LINE if overridden else self.name}: {problem}")
        return REFUSED

    def rules(self, value: Any, path: str) -> None:
        """Note the broken rules of every section in `value`, inner sections first."""
        source = f"{self.name} with overrides" if self.overridden else self.name
        for at, section in sections_of(value, path):
            if hasattr(section, "violations"):
                self.problems += [f"{source}: {join(at, message)}" for message in section.violations()]

    def section(self, cls: type, tree: Any, path: str, default: Any) -> Any:
        """A section; keys that `tree` leaves out come from `default`, an instance of `cls`, or from the class."""
        if not isinstance(tree, dict):
            return self.refuse(path, f"{path}: expected {type_name(cls)}, got {show(tree)}")
        annotations = annotations_of(cls)
        known = {field.name: field for field in fields(cls)}
        for key in tree:
            if key not in known:
                at = join(path, str(key))
                self.refuse(at, f"{at}: unknown key (given {show(tree[key])}); {self.nearest(str(key), known, path)}")
        values = {}
        for name, field in known.items():
            at, absent = join(path, name), default_of(field, default)
            if name in tree:
                values[name] = self.value(annotations[name], tree[name], at, absent)
            elif absent is MISSING:
                values[name] = self.refuse(at, f"{at}: missing, expected {type_name(annotations[name])}")
            else:
                values[name] = absent
        if not any(value is REFUSED for value in values.values()):
            return cls(**values)
        for name, value in values.items():
            self.rules(value, join(path, name))
        return REFUSED

    def value(self, annotation: Any, value: Any, path: str, default: Any = MISSING) -> Any:
        """`value` as the annotated type, or REFUSED."""
        inner, optional = without_none(annotation)
        if value is None and optional:
            return None
        inner, rules = without_rules(inner)
        if is_dataclass(inner):
            return self.section(inner, value, path, default)
        if get_origin(inner) is tuple:
            return self.items(inner, value, path)
        if _is_scalar(inner, value):
            return self.scalar(inner, value, rules, path)
        hint = ""
        if get_origin(inner) is Literal and isinstance(value, str):
            close = difflib.get_close_matches(value, [choice for choice in get_args(inner) if isinstance(choice, str)], n=1)
            hint = f"; did you mean {show(close[0])}?" if close else ""
        if inner is str and isinstance(value, bool | int | float):
            hint = "; put it in quotes to make it a string"
        if value is None:
            hint = "; fill it in" if default is MISSING else f"; fill it in, or leave the key out, which gives {show(default)}"
        return self.refuse(path, f"{path}: expected {type_name(annotation)}, got {show(value)}{hint}")

    def scalar(self, kind: Any, value: Any, rules: tuple[Any, ...], path: str) -> Any:
        """A value of its type as its rules accept it, or REFUSED."""
        try:
            if kind is float and not math.isfinite(value):
                raise ValueError(f"must be a finite number, got {value}")
            value = kind(value) if kind in (float, Path) else value
            for rule in rules:
                if isinstance(rule, PathTo) and self.here is not None:
                    value = value.replace("${HERE}", self.here)
                value = rule.accept(value)
        except OverflowError:  # an integer that no float holds
            return self.refuse(path, f"{path} must be a finite number, got {show(value)}")
        except ValueError as error:
            return self.refuse(path, f"{path} {error}")
        return value

    def items(self, annotation: Any, value: Any, path: str) -> Any:
        """A list as a tuple; each refused item is named by its index."""
        kinds = get_args(annotation)
        variadic = kinds[-1] is Ellipsis
        if not isinstance(value, list) or not (variadic or len(value) == len(kinds)):
            return self.refuse(path, f"{path}: expected {type_name(annotation)}, got {show(value)}")
        built = tuple(self.value(kinds[0 if variadic else i], item, f"{path}[{i}]") for i, item in enumerate(value))
        if any(item is REFUSED for item in built):
            self.rules(built, path)
            return REFUSED
        return built

    def nearest(self, key: str, known: dict[str, Any], path: str) -> str:
        """The likeliest meaning of an unknown key: a similar name here, else the same name elsewhere, else all names here."""
        close = difflib.get_close_matches(key, known, n=1)
        if close:
            return f"did you mean {join(path, close[0])}?"
        elsewhere = [at for at, *_ in keys_of(self.root) if at.rpartition(".")[2] == key]
        if elsewhere:
            return f"did you mean {elsewhere[0]}?"
        return f"known here: {', '.join(known)}"


def _is_scalar(kind: Any, value: Any) -> bool:
    """Whether a plain value is of a scalar type; bool is not an int, an int is a float."""
    if get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    if kind is float:
        return type(value) in (int, float)
    assert kind in (int, bool, str, Path), f"{kind} is not a type for a configuration field"
    return type(value) is (str if kind is Path else kind)
