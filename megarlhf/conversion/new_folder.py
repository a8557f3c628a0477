"""A folder that has its name when it is complete, and is not there before."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megarlhf.storage.checkpoints import partial_folder
from megarlhf.storage.files import no_room, sync_folder


@contextlib.contextmanager
def new_folder(target: Path, num_bytes: int) -> Iterator[Path]:
    """A folder to write into, which gets the name `target` at the end unless it has it by then; it goes where the body fails.

    ValueError where `target` holds anything, an earlier attempt was cut short, or the disk has no room for `num_bytes`. OSError where
    the folder cannot be made.
    """
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise ValueError(f"{target} is there already: choose another folder, or remove it")
    partial = partial_folder(target)
    if partial.exists():
        raise ValueError(f"{partial} is there: a conversion to {target} goes on now, or was cut short; remove it where none is running")
    target.parent.mkdir(parents=True, exist_ok=True)
    if num_bytes > (free := shutil.disk_usage(target.parent).free):
        raise ValueError(no_room(target, num_bytes, free))
    partial.mkdir()
    try:
        yield partial
        if partial.exists():
            sync_folder(partial)
            os.replace(partial, target)
            sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
