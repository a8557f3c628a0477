"""Pickles of other programs, read without running any of their code.

A pickle names functions and classes, and what it names is called as it is read. Here a name stands for what a short list says: a
type of torch that is a plain value, or `Record`, which keeps what it is given and does nothing. Nothing else is looked up, and no
module is imported: any other name is refused, and said.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from typing import IO, Any

import torch


class Record:
    """Stands for an object of a class that is not to be had: its attributes, or what it was made of in `parts`."""

    parts: tuple[Any, ...] = ()

    def __init__(self, *parts: Any, **_: Any) -> None:
        self.parts = parts

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping) and all(isinstance(name, str) for name in state):
            self.__dict__.update(state)
        else:
            self.parts = state if isinstance(state, tuple) else (state,)


VALUES = {("torch", "Size"): tuple, ("collections", "OrderedDict"): OrderedDict, ("builtins", "set"): set}
"""Names that stand for themselves, or for what is as good."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], records: frozenset[str], packages: tuple[str, ...]) -> None:
        super().__init__(file)
        self._records, self._packages = records, packages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in VALUES:
            return VALUES[module, name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if f"{module}.{name}" in self._records or f"{module}.".startswith(self._packages):
            return Record
        raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in such a file and is not run")

    def persistent_load(self, pid: Any) -> Any:
        return Record(pid)  # a tensor's values, which lie beside the pickle


def load_inert(file: IO[bytes], path: object, *, records: frozenset[str], packages: tuple[str, ...] = ()) -> Any:
    """What a pickle holds. ValueError, with the name `path`, where it names anything that is not allowed, or is damaged.

    Args:
        records: whole names of classes and functions for which a `Record` stands.
        packages: beginnings of modules, such as "megatron.", of which every name stands for a `Record`.
    """
    try:
        return _Unpickler(file, records, packages).load()
    except (pickle.UnpicklingError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, OverflowError) as error:
        raise ValueError(f"{path} cannot be read: {error or type(error).__name__}") from error
    except (MemoryError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it asks for more than there is ({type(error).__name__})") from error
