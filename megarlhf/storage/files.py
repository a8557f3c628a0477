"""Small files that are whole or not there: written under another name, synchronised, renamed; and read with their name in every error."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: str | bytes) -> None:
    """Put `content` (text as UTF-8) at `path`: a reader, and a machine that lost power, find the old file or the new one, whole."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Have the names in a folder outlive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path, *, expected: type = dict) -> Any:
    """The JSON value in a UTF-8 file. ValueError, with the file's name, where it cannot be read, is torn or is of another type."""
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not whole JSON ({error})") from error
    if not isinstance(value, expected):
        raise ValueError(f"{path} is damaged: it holds {type(value).__name__}, not {expected.__name__}")
    return value


def system_error(error: OSError) -> str:
    """An error of the system as its user reads it: the file, or both of a renaming, and what is wrong."""
    what = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    return f"{what}: {error.strerror or error}" if what else str(error.strerror or error)


def no_room(path: Path, num_bytes: int, free: int) -> str:
    """That the disk of `path` has fewer bytes free than are needed."""
    return f"{path} needs {_size(num_bytes)}, and its disk has {_size(free)} free"


def _size(num_bytes: int) -> str:
    """Bytes in the largest unit of which there is one at least."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes >= 2**power:
            return f"{num_bytes / 2**power:.2f} {unit}"
    return f"{num_bytes} bytes"
