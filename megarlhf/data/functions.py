"""Functions that a user wrote, named as file.py:name: only what a user named is ever imported."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load_function(path_and_name: str) -> Callable[..., Any]:
    """The function of "file.py:name". ValueError where there is none."""
    path, _, name = path_and_name.rpartition(":")
    spec = importlib.util.spec_from_file_location(f"functions_in_{Path(path).stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where its own classes look for it
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's program may raise
        raise ValueError(f"{path} cannot be loaded: {type(error).__name__}: {error}{found_at(error, path)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        there = [known for known, value in vars(module).items() if callable(value) and not known.startswith("_")]
        raise ValueError(f"{path} has no function {name}; it has {', '.join(there[:12]) or 'none'}")
    return function


def found_at(error: BaseException, path: str, *more: str) -> str:
    """Where in the file at `path` an error came up and what `more` is known of it, " (at file.py:7, ...)"; empty where nothing is."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    known = [*([f"at {path}:{lines[-1]}"] if lines else []), *filter(None, more)]
    return f" ({', '.join(known)})" if known else ""
