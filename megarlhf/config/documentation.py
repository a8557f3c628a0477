"""Every key of a configuration class with its type, default, range and meaning, for ``--help-config``."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args, get_origin

from megarlhf.config.fields import annotations_of, default_of, join, show, type_name, without_none, without_rules


def describe(cls: type) -> str:
    """Every key of `cls`: dotted path, type, default, range, and the docstring under the field."""
    lines = []
    for path, annotation, default, doc in keys_of(cls):
        given = "required" if default is MISSING else f"default {show(default)}"
        if is_dataclass(default):
            given = "defaults below"
        rules = "".join(f", {rule}" for rule in without_rules(without_none(annotation)[0])[1])
        lines.append(f"{path}: {type_name(annotation)}, {given}{rules}")
        lines += textwrap.wrap(doc, 116, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines) + "\n"


def keys_of(cls: type, path: str = "", default: Any = MISSING) -> Iterator[tuple[str, Any, Any, str]]:
    """(path, annotation, default, docstring) of each field of `cls` and of the sections below it, in order."""
    annotations, docs = annotations_of(cls), _field_docs(cls)
    for field in fields(cls):
        annotation, at, value = annotations[field.name], join(path, field.name), default_of(field, default)
        inner = without_rules(without_none(annotation)[0])[0]
        section, below = (get_args(inner)[0], f"{at}[]") if get_origin(inner) is tuple else (inner, at)
        doc = docs.get(field.name) or (is_dataclass(section) and _class_doc(section)) or ""
        yield at, annotation, value, " ".join(doc.split())
        if is_dataclass(section):
            yield from keys_of(section, below, value if is_dataclass(value) else MISSING)


def _class_doc(cls: type) -> str:
    """The docstring that the author wrote; dataclass puts the signature where there is none."""
    doc = inspect.getdoc(cls) or ""
    return "" if doc.startswith(f"{cls.__name__}(") else doc


@functools.cache
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
