"""One process at a time in a run's folder."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

LOCK_FILE = "lock"


def not_fresh(folder: Path) -> str | None:
    """What speaks against `--fresh`: that the folder holds anything. OSError where it may not be looked into."""
    if not folder.is_dir() or all(path.name == LOCK_FILE for path in folder.iterdir()):
        return None
    return f"--fresh: {folder} is not empty; remove it, choose another run.dir, or leave --fresh out to go on with it"


class FolderLock:
    """Held until `release`, or until the process ends, however it does: the system lets go of it then.

    ValueError where another process holds it, naming its host and number. The file itself stays; an old one means nothing.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._descriptor, 300).decode(errors="replace").strip() or "another process"
            os.close(self._descriptor)
            raise ValueError(f"run.dir: {folder} is in use by {holder}; wait for it, stop it, or choose another folder") from None
        except OSError:  # a file system without locks: nothing can be known of others there
            pass
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Let go of the folder."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
