"""The file system at the run's folder: whether it can be written, how fast, how much room, and whether all machines see the same."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megarlhf.doctor.findings import DOUBT, OK, WRONG, Finding
from megarlhf.storage.files import system_error

MIB, GIB = 2**20, 2**30
PROBE_BYTES = 64 * MIB
LEAST_FREE = 10 * GIB
SLOWEST = 50 * MIB
SEEN_WITHIN_SECONDS = 10.0
"""Network file systems keep what they know of a folder for some seconds."""


@dataclass(frozen=True)
class Probed:
    """What one machine found at a folder."""

    folder: str
    free: int
    """Bytes."""
    writes: float | None = None
    """Bytes per second, until the disk has them; None where it was not measured."""
    reads: float | None = None
    """Bytes per second after the system was asked to forget what it wrote."""
    problem: str = ""
    """What the system said against writing."""


def nearest_folder(path: Path) -> Path:
    """The folder, or the nearest above it that is there: a run makes the others."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def probe(folder: Path, *, num_bytes: int = PROBE_BYTES) -> Probed:
    """Write a file into `folder`, have it reach the disk, read it and remove it. With 0 bytes no speed is measured."""
    file, block = folder / f".doctor-{os.uname().nodename}-{os.getpid()}", os.urandom(MIB)
    try:
        start = time.perf_counter()
        with file.open("wb") as out:
            for _ in range(num_bytes // MIB):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
            written = time.perf_counter()
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = time.perf_counter()
        with file.open("rb") as back:
            while back.read(MIB):
                pass
        reads = num_bytes / (time.perf_counter() - before)
        free = shutil.disk_usage(folder).free
        return Probed(str(folder), free, num_bytes / (written - start), reads) if num_bytes else Probed(str(folder), free)
    except OSError as error:
        return Probed(str(folder), shutil.disk_usage(folder).free, problem=system_error(error))
    finally:
        file.unlink(missing_ok=True)


def judge_folder(probed: Probed) -> list[Finding]:
    """Whether a run can write there."""
    if probed.problem:
        return [Finding("run folder", WRONG, f"it cannot be written: {probed.problem}", "another run.dir, its permissions, or room")]
    room = f"{probed.free / GIB:.0f} GiB are free at {probed.folder}"
    if probed.free < LEAST_FREE:
        need = "make room: a checkpoint takes 12 bytes for each parameter of a trained model, 16 with an average"
        findings = [Finding("run folder", DOUBT, room, need)]
    else:
        findings = [Finding("run folder", OK, room)]
    if probed.writes is not None:
        speed = f"it takes {probed.writes / MIB:.0f} MiB/s with fsync and gives {probed.reads / MIB:.0f} MiB/s"
        slow = probed.writes < SLOWEST
        way_out = "a faster file system, or save less often (run.save_every)" if slow else ""
        findings.append(Finding("run folder", DOUBT if slow else OK, speed, way_out))
    return findings


def wait_for(file: Path, *, seconds: float = SEEN_WITHIN_SECONDS) -> bool:
    """Whether a file that another rank wrote is seen here within so many seconds."""
    end = time.monotonic() + seconds
    while not file.is_file():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def judge_sharing(folder: str, sees: Sequence[bool], hosts: Sequence[str]) -> Finding:
    """Whether the folder is the same on all machines; `sees` and `hosts` in rank order."""
    if all(sees):
        return Finding("run folder", OK, f"all {len(sees)} ranks see what rank 0 writes to {folder}")
    blind = [rank for rank, seen in enumerate(sees) if not seen]
    named = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in blind[:4]) + (f" and {len(blind) - 4} more" if len(blind) > 4 else "")
    return Finding(
        "run folder", WRONG, f"{folder} is not shared: {named} did not see what rank 0 on {hosts[0]} wrote",
        "a run.dir on a file system that all machines mount at the same place",
    )
