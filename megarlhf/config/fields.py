"""The fields of configuration classes: their types, rules, defaults and places, and how values are shown."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

SHOWN_ITEMS, SHOWN_DEPTH, SHOWN_CHARACTERS = 20, 4, 80


def annotations_of(cls: type) -> dict[str, Any]:
    """The annotation of each field, rules included."""
    return get_type_hints(cls, include_extras=True)


def without_none(annotation: Any) -> tuple[Any, bool]:
    """The annotation without None, and whether it had one."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation, False
    members = [member for member in get_args(annotation) if member is not type(None)]
    assert len(members) == 1, f"{annotation}: a field is one type, or one type or None"
    return members[0], True


def without_rules(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """The plain type of an annotation that has no None, and its rules."""
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[0], annotation.__metadata__
    return annotation, ()


def type_name(annotation: Any) -> str:
    """The type as a user knows it, without its rules."""
    inner, optional = without_none(annotation)
    inner = without_rules(inner)[0]
    if get_origin(inner) is Literal:
        name = " | ".join(show(choice) for choice in get_args(inner))
    elif get_origin(inner) is tuple:
        kinds = get_args(inner)
        name = f"list of {_item_name(kinds[0])}" if kinds[-1] is Ellipsis else f"list [{', '.join(map(type_name, kinds))}]"
    else:
        name = "section" if is_dataclass(inner) else inner.__name__.lower()
    return f"{name} or null" if optional else name


def _item_name(annotation: Any) -> str:
    """What an item of a list is: of a section its keys, as no line of a file names it."""
    inner = without_rules(without_none(annotation)[0])[0]
    return f"{{{', '.join(field.name for field in fields(inner))}}}" if is_dataclass(inner) else type_name(annotation)


def default_of(field: Field, section: Any) -> Any:
    """A field's default: from the section's default instance where there is one; MISSING when required."""
    if section is not MISSING and section is not None:
        return getattr(section, field.name)
    return field.default_factory() if field.default_factory is not MISSING else field.default


def join(path: str, name: str) -> str:
    """The dotted path of a key of a section."""
    return f"{path}.{name}" if path else name


def sections_of(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, instance) of a configuration's sections, inner ones first, itself last."""
    if isinstance(config, tuple):
        for index, item in enumerate(config):
            yield from sections_of(item, f"{path}[{index}]")
    elif is_dataclass(config):
        for field in fields(config):
            yield from sections_of(getattr(config, field.name), join(path, field.name))
        yield path, config


def values_of(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, plain value) of everything in a configuration that is not a section."""
    for field in fields(config):
        value, at = getattr(config, field.name), join(path, field.name)
        if is_dataclass(value):
            yield from values_of(value, at)
        else:
            yield at, plain(value)


def plain(value: Any) -> Any:
    """A value as YAML's own: sections as dicts, tuples as lists, paths as strings."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def show(value: Any) -> str:
    """A value the way YAML spells it, cut where it is long or deep, or holds itself."""
    text = json.dumps(_cut(value, SHOWN_DEPTH), default=str)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def _cut(value: Any, depth: int) -> Any:
    if isinstance(value, dict | list | tuple) and depth == 0:
        return "..."
    if isinstance(value, dict):
        return {str(key): _cut(item, depth - 1) for key, item in list(value.items())[:SHOWN_ITEMS]}
    if isinstance(value, list | tuple):
        return [_cut(item, depth - 1) for item in value[:SHOWN_ITEMS]]
    if isinstance(value, str):
        return value[:SHOWN_CHARACTERS]
    return f"a number of {value.bit_length()} bits" if isinstance(value, int) and value.bit_length() > 1024 else plain(value)
