"""Strict YAML into frozen dataclasses: every key is known, every value has its declared type, every rule holds.

A configuration class is a frozen, keyword-only dataclass. Its fields are ``int``, ``float``, ``bool``, ``str``, ``Path``,
``Literal[...]``, ``tuple[X, ...]``, ``tuple[X, Y]``, another such class (a section), or any of these ``| None``. A section
may define ``violations(self) -> list[str]``: its rules that do not hold, each message starting with one of its own names
("tp must be at least 1, got 0"); the loader puts the section's path in front. The outermost class's ``violations`` holds
the rules across sections. All that is wrong is reported at once.

Scalars are read by YAML 1.2's core rules, not YAML 1.1's: ``1e-5`` is a number, and ``off``, ``12:30:00``, ``2022-03-04``
and ``010`` are strings. A key given twice is an error. Keys that a section leaves out keep the field's default, where the
default is itself a section.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import math
import re
import textwrap
import types
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

C = TypeVar("C")

COMMAND_LINE = "command line"
REFUSED = object()
"""Stands for a value that could not be built; the reason is in the list of problems."""


class ConfigError(ValueError):
    """What a user wrote in a configuration is not valid; one violation per line, each with the file it came from."""


def load_config(cls: type[C], path: Path | None, overrides: Sequence[str] = ()) -> C:
    """The `cls` that the YAML file at `path` (or no file) describes, after overrides of the form ``section.key=value``.

    An override's value is YAML: ``a.b=null``, ``a.b=[1, 2]``; setting into an optional section that is null creates it.
    Raises ConfigError with every unknown key, missing key, ill-typed value and broken rule.
    """
    name = str(path) if path else "configuration"
    tree = _read(path) if path else {}
    problems: list[str] = []
    overridden = []
    for override in overrides:
        try:
            names, value = _parse_override(override)
        except ConfigError as error:
            problems.append(str(error))
            continue
        tree = _with_value(tree, names, value)
        overridden.append(".".join(names))
    return _Builder(cls, name, tuple(overridden), problems).build(tree)


def check_config(config: Any) -> None:
    """Hold a configuration built in code to the same types and rules as one read from YAML. Raises ConfigError with all violations."""
    _Builder(type(config), "configuration", (), []).build(to_dict(config))


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain YAML values: sections as dicts, tuples as lists, paths as strings."""
    return _plain(config)


def dump_yaml(config: Any) -> str:
    """The configuration as YAML that `load_config` reads back to an equal value."""
    return yaml.dump(_plain(config), Dumper=_Dumper, sort_keys=False)


def describe(cls: type) -> str:
    """Every key of `cls`, for ``--help-config``: dotted path, type, default, and the docstring under the field."""
    lines = []
    for path, annotation, default, doc in _described(cls, "", MISSING):
        given = "required" if default is MISSING else f"default {_show(default)}"
        if is_dataclass(default):
            given = "defaults below"
        lines.append(f"{path}: {_type_name(annotation)}, {given}")
        lines += textwrap.wrap(doc, 116, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines) + "\n"


# YAML text to a tree of plain values


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2 scalars, refusing a key given twice."""

    yaml_implicit_resolvers = {}

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.composer.ComposerError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
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
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _read(path: Path) -> dict[str, Any]:
    """The keys and values in the file; an empty file has none."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path}: expected keys and values, got {_show(tree)}")
    return tree or {}


def _parse_yaml(text: bytes | str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark or error.context_mark, error.problem or error.context
        raise ConfigError(f"{source}, line {mark.line + 1}, column {mark.column + 1}: broken YAML: {problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: broken YAML: {error}") from error


def _parse_override(override: str) -> tuple[list[str], Any]:
    path, equals, text = override.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"{COMMAND_LINE}: {override!r} is not of the form section.key=value")
    return names, _parse_yaml(text, f"{COMMAND_LINE}: {override!r}")


def _with_value(tree: Any, names: list[str], value: Any) -> Any:
    """`tree` with the value at `names` replaced; a copy along the way, since YAML aliases may share sections."""
    if not names:
        return value
    section = tree if isinstance(tree, dict) else {}
    return {**section, names[0]: _with_value(section.get(names[0]), names[1:], value)}


# A tree of plain values to dataclasses


class _Builder:
    """Builds dataclasses out of plain values and collects everything that is wrong with them."""

    def __init__(self, root: type, name: str, overridden: tuple[str, ...], problems: list[str]):
        self.root = root
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
        """Note a problem at `path`, under the place where the user wrote it."""
        names = re.split(r"[.\[]", path)
        overridden = any(all(a == b for a, b in zip(names, other.split("."), strict=False)) for other in self.overridden)
        self.problems.append(f"{COMMAND_LINE if overridden else self.name}: {path}: {problem}")
        return REFUSED

    def rules(self, value: Any, path: str) -> None:
        """Note the broken rules of every section in `value`, inner sections first."""
        if isinstance(value, tuple):
            for index, item in enumerate(value):
                self.rules(item, f"{path}[{index}]")
        elif is_dataclass(value):
            for field in fields(value):
                self.rules(getattr(value, field.name), _join(path, field.name))
            if hasattr(value, "violations"):
                source = f"{self.name} with overrides" if self.overridden else self.name
                self.problems += [f"{source}: {_join(path, message)}" for message in value.violations()]

    def section(self, cls: type, tree: Any, path: str, default: Any) -> Any:
        """A section; keys that `tree` leaves out come from `default`, an instance of `cls`, or from the class."""
        if not isinstance(tree, dict):
            return self.refuse(path, f"expected {_type_name(cls)}, got {_show(tree)}")
        annotations = get_type_hints(cls)
        known = {field.name: field for field in fields(cls)}
        for key in tree:
            if key not in known:
                self.refuse(_join(path, str(key)), f"unknown key (given {_show(tree[key])}); {self.nearest(str(key), known, path)}")
        values = {}
        for name, field in known.items():
            at, absent = _join(path, name), _default(field, default)
            if name in tree:
                values[name] = self.value(annotations[name], tree[name], at, absent)
            else:
                values[name] = absent if absent is not MISSING else self.refuse(at, f"missing, expected {_type_name(annotations[name])}")
        if not any(value is REFUSED for value in values.values()):
            return cls(**values)
        for name, value in values.items():
            self.rules(value, _join(path, name))
        return REFUSED

    def value(self, annotation: Any, value: Any, path: str, default: Any = MISSING) -> Any:
        """`value` as the annotated type, or REFUSED."""
        inner, optional = _without_none(annotation)
        if value is None and optional:
            return None
        if is_dataclass(inner):
            return self.section(inner, value, path, default)
        if get_origin(inner) is tuple:
            return self.items(inner, value, path)
        if _is_scalar(inner, value):
            return inner(value) if inner in (float, Path) else value
        hint = ""
        if get_origin(inner) is Literal and isinstance(value, str):
            close = difflib.get_close_matches(value, [choice for choice in get_args(inner) if isinstance(choice, str)], n=1)
            hint = f"; did you mean {_show(close[0])}?" if close else ""
        if inner is str and isinstance(value, bool | int | float):
            hint = "; put it in quotes to make it a string"
        return self.refuse(path, f"expected {_type_name(annotation)}, got {_show(value)}{hint}")

    def items(self, annotation: Any, value: Any, path: str) -> Any:
        """A list as a tuple; each refused item is named by its index."""
        kinds = get_args(annotation)
        variadic = kinds[-1] is Ellipsis
        if not isinstance(value, list) or not (variadic or len(value) == len(kinds)):
            return self.refuse(path, f"expected {_type_name(annotation)}, got {_show(value)}")
        built = tuple(self.value(kinds[0 if variadic else i], item, f"{path}[{i}]") for i, item in enumerate(value))
        if any(item is REFUSED for item in built):
            self.rules(built, path)
            return REFUSED
        return built

    def nearest(self, key: str, known: dict[str, Any], path: str) -> str:
        """The likeliest meaning of an unknown key: a similar name here, else the same name elsewhere, else all names here."""
        close = difflib.get_close_matches(key, known, n=1)
        if close:
            return f"did you mean {_join(path, close[0])}?"
        elsewhere = [at for at, *_ in _described(self.root, "", MISSING) if at.rpartition(".")[2] == key]
        if elsewhere:
            return f"did you mean {elsewhere[0]}?"
        return f"known here: {', '.join(known)}"


# Types


def _without_none(annotation: Any) -> tuple[Any, bool]:
    """The annotation without None, and whether it had one."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation, False
    members = [member for member in get_args(annotation) if member is not type(None)]
    assert len(members) == 1, f"{annotation}: a field is one type, or one type or None"
    return members[0], True


def _is_scalar(kind: Any, value: Any) -> bool:
    """Whether a plain value is of a scalar type; bool is not an int, an int is a float, NaN is nothing."""
    if get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    if kind is float:
        return type(value) in (int, float) and not math.isnan(value)
    assert kind in (int, bool, str, Path), f"{kind} is not a type for a configuration field"
    return type(value) is (str if kind is Path else kind)


def _type_name(annotation: Any) -> str:
    inner, optional = _without_none(annotation)
    if get_origin(inner) is Literal:
        name = " | ".join(_show(choice) for choice in get_args(inner))
    elif get_origin(inner) is tuple:
        kinds = get_args(inner)
        name = f"list of {_type_name(kinds[0])}" if kinds[-1] is Ellipsis else f"list [{', '.join(map(_type_name, kinds))}]"
    else:
        name = "section" if is_dataclass(inner) else inner.__name__.lower()
    return f"{name} or null" if optional else name


def _default(field: Field, section: Any) -> Any:
    """A field's default: from the section's default instance where there is one; MISSING when required."""
    if section is not MISSING and section is not None:
        return getattr(section, field.name)
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _show(value: Any) -> str:
    """A value the way YAML spells it, cut where it is long."""
    text = json.dumps(_plain(value), default=str)
    return text if len(text) <= 80 else text[:77] + "..."


# Documentation


def _described(cls: type, path: str, default: Any) -> Iterator[tuple[str, Any, Any, str]]:
    """(path, annotation, default, docstring) of each field of `cls` and of the sections below it, in order."""
    annotations, docs = get_type_hints(cls), _field_docs(cls)
    for field in fields(cls):
        annotation, at, value = annotations[field.name], _join(path, field.name), _default(field, default)
        inner = _without_none(annotation)[0]
        section, below = (get_args(inner)[0], f"{at}[]") if get_origin(inner) is tuple else (inner, at)
        doc = docs.get(field.name) or (is_dataclass(section) and _class_doc(section)) or ""
        yield at, annotation, value, " ".join(doc.split())
        if is_dataclass(section):
            yield from _described(section, below, value if is_dataclass(value) else MISSING)


def _class_doc(cls: type) -> str:
    """The docstring that the author wrote; dataclass puts the signature where there is none."""
    doc = inspect.getdoc(cls) or ""
    return "" if doc.startswith(f"{cls.__name__}(") else doc


def _field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of `cls` and its bases, read from the source."""
    docs = {}
    for base in reversed([base for base in cls.__mro__ if is_dataclass(base)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for statement, following in zip(body, body[1:], strict=False):
            text = following.value.value if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant) else None
            if isinstance(statement, ast.AnnAssign) and isinstance(text, str):
                docs[statement.target.id] = text
    return docs
