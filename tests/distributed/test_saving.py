"""Checkpoints that are written beside the training: the same bytes, whole or not there, and what goes wrong is heard by all ranks."""

import errno
import filecmp
import shutil
import subprocess
import threading
from unittest import mock

import pytest

from megarlhf.engine.checkpoint import OwnPart
from megarlhf.parallel.groups import World
from megarlhf.runs import saving
from megarlhf.storage.checkpoints import read_saved
from tests.distributed.recipe import curves, lines_of
from tests.distributed.test_resume import started

EACH = ["run.save_every=1", "run.keep_checkpoints=9", "steps=5"]


def check_beside(folder, tmp):
    """Hold every background part back until training has gone on for a step; returns the steps then done and who wrote."""
    from megarlhf.trainers.pretrain import Pretraining

    go_on, done, writers = threading.Event(), [], []
    step, write = Pretraining.step, OwnPart.write

    def counted(self, number):
        done.append(number)
        if number == 4:
            go_on.set()
        return step(self, number)

    def held(part, path, rank):
        if threading.current_thread() is not threading.main_thread():
            assert go_on.wait(60)
            writers.append(len(done))
        return write(part, path, rank)

    with mock.patch.object(Pretraining, "step", counted), mock.patch.object(OwnPart, "write", held):
        refused = started(folder / "base.yaml", f"run.dir={tmp / 'beside'}", "run.save_every=3", "steps=5")[1]
    return refused, writers


def check_plain(folder, tmp):
    at = {name: [f"run.dir={tmp / name}", f"run.save_in_background={name}"] for name in ("true", "false")}
    return [started(folder / "base.yaml", *where, *EACH)[1] for where in at.values()]


def test_training_goes_on_beside_a_save_which_holds_the_state_before(recipe, ranks2, tmp_path):
    for refused, writers in ranks2.run(check_beside, recipe, tmp_path):
        assert refused is None and writers == [5], "step 5 had begun when the checkpoint of step 3 was written"
    assert ranks2.run(check_plain, recipe, tmp_path) == [[None, None]] * 2
    for step, folder in ((3, "beside"), *((step, "true") for step in range(1, 6))):
        one, other = (tmp_path / name / "checkpoints" / f"step_{step:08d}" for name in (folder, "false"))
        files = sorted(read_saved(other).files)
        assert len(files) == 2 and filecmp.cmpfiles(one, other, files, shallow=False) == (files, [], [])
    lost = [line.get("time/save_seconds", 0) for line in lines_of(tmp_path / "true" / "metrics.jsonl")]
    assert lost[0] == 0 and all(seconds > 0 for seconds in lost[1:])


def check_fails(folder, tmp, error):
    """A part that rank 1 cannot write, at the second of four saves."""
    write, world = OwnPart.write, World.connect()

    def failing(part, path, rank):
        if rank == 1 and path.name.endswith("2"):
            raise error
        return write(part, path, rank)

    at = [f"run.dir={tmp / 'base'}", "run.save_every=1", "run.keep_checkpoints=9"]
    with mock.patch.object(OwnPart, "write", failing):
        refused = started(folder / "base.yaml", *at)[1]
    world.barrier()
    names = sorted(path.name for path in (tmp / "base" / "checkpoints").iterdir())
    world.barrier()
    printed, again, _ = started(folder / "base.yaml", *at)
    return refused, names, printed if world.rank == 0 else "going on from step_00000001\n", again


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "part_00001"), "part_00001: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "part_00001"), "part_00001: Permission denied"),
        (RuntimeError("a broken buffer"), "RuntimeError('a broken buffer')"),
    ],
)
def test_what_the_thread_cannot_write_ends_the_run_on_every_rank(recipe, ranks2, tmp_path, error, said):
    for refused, names, printed, again in ranks2.run(check_fails, recipe, tmp_path, error):
        assert refused is not None and f"rank 1 of 2: the checkpoint of step 2 cannot be written: {said}" in refused
        assert names == ["step_00000001", "step_00000002.partial"]
        assert "step_00000001\n" in printed and again is None
    assert sorted(path.name for path in (tmp_path / "base" / "checkpoints").iterdir()) == [f"step_{n:08d}" for n in range(1, 5)]
    assert [line["step"] for line in curves(tmp_path / "base")] == [1, 2, 3, 4]


def check_little_memory(folder, tmp, free):
    """Who writes where one of two machines has `free` bytes left."""
    writers, write = [], OwnPart.write

    def watched(part, path, rank):
        writers.append(threading.current_thread() is threading.main_thread())
        return write(part, path, rank)

    of_rank = free if World.connect().rank == 1 else 2**40
    with mock.patch.object(OwnPart, "write", watched), mock.patch.object(saving, "free_host_memory", lambda: of_rank):
        assert started(folder / "base.yaml", f"run.dir={tmp / str(free)}", *EACH)[1] is None
    return writers


def test_where_memory_is_short_the_training_waits(recipe, ranks2, tmp_path):
    assert ranks2.run(check_little_memory, recipe, tmp_path, 1000) == [[True] * 5] * 2
    assert ranks2.run(check_little_memory, recipe, tmp_path, 2**40) == [[False] * 4 + [True]] * 2


# Real disks that are full or read-only: a small one in memory, where this user may mount one


def mount(path, options):
    """Mount a disk in memory at `path`; the test is left out where that is refused."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(path)], capture_output=True, check=False).returncode:
        pytest.skip("mounting is refused here")


@pytest.fixture
def disk(tmp_path):
    """A folder whose disk holds one checkpoint of the run, and half of another."""
    path = tmp_path / "disk"
    path.mkdir()
    mount(path, "size=1300k")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def saved_steps(disk):
    return sorted(path.name for path in (disk / "base" / "checkpoints").iterdir())


def check_full(folder, disk, seen):
    """A run that saves after every step. Where the fullness is not `seen` beforehand it comes while the file is written."""
    usage = shutil.disk_usage if seen else lambda path: mock.Mock(free=2**40)
    with mock.patch.object(saving.shutil, "disk_usage", usage):
        return started(folder / "base.yaml", f"run.dir={disk / 'base'}", "run.save_every=1")[:2]


@pytest.mark.parametrize("seen", [True, False])
def test_on_a_full_disk_the_checkpoint_before_stays_and_is_gone_on_from(recipe, ranks2, disk, seen):
    (printed, refused), (_, other) = ranks2.run(check_full, recipe, disk, seen)
    assert refused == other
    if seen:
        assert printed.count("it is not written, and training goes on") == 2 and "step_00000004 needs" in refused
        assert "make room and start the same command again: the newest checkpoint is" in refused and refused.endswith("step_00000001")
        assert saved_steps(disk) == ["step_00000001"]
    else:
        assert "the checkpoint of step 2 cannot be written: " in refused and "No space left on device" in refused
        assert saved_steps(disk) == ["step_00000001", "step_00000002.partial"]
    subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
    (printed, refused), _ = ranks2.run(check_full, recipe, disk, True)
    assert refused is None and "going on from" in printed and "step_00000001\n" in printed
    assert [line["step"] for line in curves(disk / "base")] == [1, 2, 3, 4]


def check_read_only(folder, tmp):
    """The folder of checkpoints becomes read-only in the second step."""
    from megarlhf.trainers.pretrain import Pretraining

    step, world, checkpoints = Pretraining.step, World.connect(), tmp / "base" / "checkpoints"

    def locked(self, number):
        if number == 1 and world.rank == 0:
            mount(checkpoints, "ro")
        return step(self, number)

    with mock.patch.object(Pretraining, "step", locked):
        refused = started(folder / "base.yaml", f"run.dir={tmp / 'base'}", "run.save_every=1", "run.save_in_background=false")[1]
    world.barrier()
    if world.rank == 0:
        subprocess.run(["umount", str(checkpoints)], check=True)
    world.barrier()
    return refused, started(folder / "base.yaml", f"run.dir={tmp / 'base'}")[1]


def check_start(folder, where):
    return started(folder / "base.yaml", f"run.dir={where}")[1]


def test_a_folder_that_is_or_becomes_read_only_is_named(recipe, ranks2, disk, tmp_path):
    for refused, again in ranks2.run(check_read_only, recipe, tmp_path):
        assert "step_00000002.partial: Read-only file system" in refused and again is None
    assert [line["step"] for line in curves(tmp_path / "base")] == [1, 2, 3, 4]
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for refused in ranks2.run(check_start, recipe, disk / "run"):
        assert refused.startswith(f"ConfigError: run.dir: {disk / 'run'}: Read-only file system")
