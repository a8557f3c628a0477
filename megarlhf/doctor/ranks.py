"""What the ranks of a run find out together: messages, clocks, and the folder that they share."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from megarlhf.doctor.findings import DOUBT, OK, Finding
from megarlhf.doctor.run_folder import judge_sharing, nearest_folder, wait_for
from megarlhf.parallel.groups import World
from megarlhf.parallel.measure import all_reduce_seconds, clock_offset

MESSAGES = (4 * 2**10, 2**20, 2**24)
"""Bytes of the messages that are timed; on CUDA the largest is also taken 16 times."""
LARGEST_ON_CUDA = 2**28
MOST_SKEW_SECONDS = 1.0


def messages_finding(seconds: Mapping[int, float], num_ranks: int) -> Finding:
    """Sums over all ranks by size: time, and what each rank sends and receives in it (bus bandwidth, 2 (n - 1) / n of the bytes)."""
    share = 2 * (num_ranks - 1) / num_ranks
    parts = [f"{_size(size)} in {1e3 * s:.3g} ms ({share * size / s / 1e9:.2g} GB/s)" for size, s in seconds.items()]
    return Finding("ranks", OK, f"sum over {num_ranks} ranks: {', '.join(parts)}")


def judge_clocks(offsets: Sequence[float], hosts: Sequence[str]) -> Finding:
    """Whether clocks agree; `offsets` in seconds against rank 0's, in rank order."""
    worst = max(range(len(offsets)), key=lambda rank: abs(offsets[rank]))
    if abs(offsets[worst]) <= MOST_SKEW_SECONDS:
        return Finding("ranks", OK, f"clocks stand at most {1e3 * abs(offsets[worst]):.0f} ms apart")
    ahead = "ahead of" if offsets[worst] > 0 else "behind"
    text = f"the clock of {hosts[worst]} (rank {worst}) is {abs(offsets[worst]):.1f} s {ahead} that of {hosts[0]} (rank 0)"
    return Finding("ranks", DOUBT, text, "let chrony or ntpd set it: times in logs and of files are compared across machines")


def rank_findings(world: World, run_dir: Path, hosts: Sequence[str], *, quick: bool) -> list[Finding]:
    """What all ranks find together, on every rank; RanksMissing names those that stall."""
    folder = world.tell_all("doctor/folder", str(nearest_folder(run_dir)))[0]
    findings = [_shared(world, Path(folder), hosts)]
    if quick:
        return findings
    sizes = [*MESSAGES, *([LARGEST_ON_CUDA] if world.device.type == "cuda" else [])]
    findings.append(messages_finding({size: all_reduce_seconds(size, world) for size in sizes}, world.size))
    offsets = world.tell_all("doctor/clock", repr(clock_offset(world)))
    return [*findings, judge_clocks([float(offset) for offset in offsets], hosts)]


def _shared(world: World, folder: Path, hosts: Sequence[str]) -> Finding:
    """Whether every rank sees a file that rank 0 writes."""
    name = world.tell_all("doctor/name", f".doctor-{uuid.uuid4().hex}")[0]
    file = folder / name
    if world.rank == 0:
        _touch(file)
    try:
        world.tell_all("doctor/written", "")
        sees = world.tell_all("doctor/sees", "yes" if wait_for(file) else "no")
    finally:
        if world.rank == 0:
            file.unlink(missing_ok=True)
    return judge_sharing(str(folder), [seen == "yes" for seen in sees], hosts)


def _touch(file: Path) -> None:
    try:
        file.touch()
    except OSError:
        return  # that the folder cannot be written is said where it is probed; nobody sees the file then


def _size(num_bytes: int) -> str:
    return f"{num_bytes // 2**20} MiB" if num_bytes >= 2**20 else f"{num_bytes // 2**10} KiB"
