"""`megarlhf doctor` by two ranks: what they measure together, and a rank that stalls."""

import re

import pytest

from megarlhf.parallel.groups import World
from megarlhf.parallel.rendezvous import RanksMissing
from tests.distributed.test_launchers import under_torchrun


def test_two_ranks_under_torchrun(tmp_path):
    report = tmp_path / "report"
    words = "-m", "megarlhf", "doctor", "--run-dir", str(tmp_path / "run")
    status, said = under_torchrun("--redirects", "1", "--log-dir", str(report), *words)
    assert status == 0, said
    [page] = [text for file in report.rglob("stdout.log") if (text := file.read_text())]
    assert page.startswith("megarlhf doctor: 2 ranks on 1 machine (")
    unfolded = "".join(page.split())  # lines are folded, also within a long path
    assert "".join(f"all 2 ranks see what rank 0 writes to {tmp_path}".split()) in unfolded
    assert re.search(r"sumover2ranks:4KiBin\S+ms\(\S+GB/s\)", unfolded) and "clocks stand at most" in page
    assert page.splitlines()[-1].startswith("usable")
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def check_stalled_rank():
    """Rank 1 does not come to an exchange: rank 0 says so, and it can be said by it alone."""
    world = World.connect(timeout_minutes=1 / 60)
    assert world.tell_all("first", f"from {world.rank}") == ["from 0", "from 1"]
    if world.rank == 1:
        return None
    with pytest.raises(RanksMissing, match="rank 1 of 2 did not come within 1 seconds: .*they hang, or have ended") as end:
        world.tell_all("second", "")
    return end.value.speaks


def test_a_rank_that_stalls_is_named(ranks2):
    assert ranks2.run(check_stalled_rank) == [True, None]
