"""The program under torchrun, and with ranks that do not come or do not go: every line that a user then reads."""

import datetime
import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

from megarlhf.parallel.alarm import Alarm, Rung
from megarlhf.parallel.groups import World
from megarlhf.parallel.launch import Place
from megarlhf.parallel.rendezvous import RanksMissing, meet
from tests.distributed.recipe import check_stages, curves, make_recipe


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """The recipe's data and files, without its runs."""
    return make_recipe(tmp_path_factory.mktemp("untrained"))


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def under_torchrun(*words, restarts=0, **environment):
    """(exit status, stderr) of two ranks."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), **environment}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", f"--max-restarts={restarts}", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=170)
    return done.returncode, done.stderr


def in_a_box(text):
    """The lines between the two lines of = that this program draws."""
    return re.findall(r"^(={20,})\n(megarlhf \w+[^\n]*: .*?)\n\1$", text, re.MULTILINE | re.DOTALL)


def test_a_wrong_configuration_is_said_once_and_torchrun_reports_one_process(untrained, tmp_path):
    status, said = under_torchrun("-m", "megarlhf", "pretrain", "--config", f"{untrained}/base.yaml", f"run.dir={tmp_path}/x", "run.sed=3")
    assert status == 1
    [(_, box)] = in_a_box(said)
    assert box.startswith("megarlhf pretrain: the configuration is not valid:\ncommand line: run.sed: unknown key (given 3)")
    assert said.count("run.sed:") == 1
    assert said.index("megarlhf pretrain:") < said.index("ChildFailedError"), "before torchrun's own words"
    assert "<NO_OTHER_FAILURES>" in said and "exitcode  : 2" in said
    assert "traceback : rank 0 of 2 has said why, in the box above" in said and "To enable traceback" not in said


FAILS = """
import os, sys
from megarlhf import cli
from megarlhf.data.pretraining import PretrainingStream

take, taken = PretrainingStream.take, []

def take_or_fail(self, n):
    taken.append(n)
    if os.environ["RANK"] == "1" and len(taken) == 3:
        raise {error}
    return take(self, n)

if __name__ == "__main__":
    PretrainingStream.take = take_or_fail
    cli.start()
"""


@pytest.mark.parametrize(
    ("error", "box", "num_tracebacks"),
    [
        ("OSError(28, 'No space left on device', 'x')", "megarlhf pretrain (rank 1 of 2): x: No space left on device; make room", 0),
        ("KeyError('a bug')", "megarlhf pretrain (rank 1 of 2): this should not have happened:\nTraceback", 1),
    ],
)
def test_a_rank_that_fails_says_why_and_the_others_leave_in_silence(untrained, tmp_path, error, box, num_tracebacks):
    script = tmp_path / "fails.py"
    script.write_text(FAILS.format(error=error))
    status, said = under_torchrun(str(script), "pretrain", "--config", f"{untrained}/base.yaml", f"run.dir={tmp_path}/run")
    assert status == 1
    [(_, found)] = in_a_box(said)
    assert found.startswith(box)
    before = said[: said.index("failed (exitcode: 1)")]
    assert before.count("Traceback") == num_tracebacks and "terminate called" not in said and "gloo" not in said
    assert "<NO_OTHER_FAILURES>" in said and "local_rank: 1" in said


@pytest.mark.parametrize(("present", "missing"), [(0, "rank 1 of 2"), (1, "rank 0 of 2")])
def test_who_does_not_come_is_named_and_then_it_ends(present, missing, capsys):
    place = Place(rank=present, size=2, local_rank=present, address="127.0.0.1", port=free_port())
    with pytest.raises(RanksMissing, match=f"{missing} did not come within 6 seconds: .*MASTER_ADDR") as end:
        meet(place, timeout=datetime.timedelta(seconds=6), about="here")
    assert end.value.speaks
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and re.fullmatch(rf"megarlhf: rank {present}: waiting for {missing}.*; for \d seconds? more", lines[0])


def test_ranks_that_come_late_are_met(capsys):
    places = [Place(rank=rank, size=3, address="127.0.0.1", port=free_port()) for rank in range(3)]
    places = [Place(rank=place.rank, size=3, address="127.0.0.1", port=places[0].port) for place in places]
    met = {}

    def come(place):
        time.sleep(0.3 * (2 - place.rank))  # rank 0, which serves the store, last
        met[place.rank] = meet(place, timeout=datetime.timedelta(seconds=60), about=f"device {place.rank}")

    threads = [threading.Thread(target=come, args=(place,)) for place in places]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert [met[rank][1] for rank in range(3)] == [["device 0", "device 1", "device 2"]] * 3
    assert capsys.readouterr().err == ""


def test_a_port_that_is_taken_is_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = Place(rank=0, size=2, address="127.0.0.1", port=taken.getsockname()[1])
        with pytest.raises(ValueError, match="rank 0 cannot open 127.0.0.1:.*is MASTER_PORT taken by another process"):
            meet(place, timeout=datetime.timedelta(seconds=5), about="here")


def test_one_rank_has_the_word_and_the_others_hear_it():
    store = dist.HashStore()
    first, second = Alarm(store, 0), Alarm(store, 1)
    assert first.wait(0.05) is None
    assert first.claim(patience=0.0) and not second.claim(patience=0.0)
    first.ring(2)
    heard = []
    third = Alarm(store, 2, lambda: store)
    third.watch(heard.append)
    assert second.wait(5.0) == Rung(2, socket.gethostname())
    assert not second.claim(patience=5.0), "what is said is said"
    end = time.monotonic() + 30
    while not heard and time.monotonic() < end:
        time.sleep(0.05)
    assert heard[0] == Rung(2, socket.gethostname())
    third.close()


def check_timeouts():
    """The time-out in seconds of every group of a layout that uses all axes."""
    world = World.connect(timeout_minutes=7)
    groups = world.groups(world.layout(tp=2, pp=2))
    named = {name: getattr(groups, name) for name in ("tp", "pp", "outputs", "embeddings", "alone")}
    return {name: group._get_backend(world.device).options._timeout.total_seconds() for name, group in named.items()}


def test_every_group_has_the_runs_timeout(ranks4):
    for timeouts in ranks4.run(check_timeouts):
        assert timeouts == dict.fromkeys(timeouts, 420.0), timeouts


DIES_ONCE = """
import os, signal, sys
from megarlhf import cli
from megarlhf.trainers.pretrain import Pretraining

step = Pretraining.step

def dying(self, number):
    if os.environ["RANK"] == "1":
        with open(__file__ + os.environ["TORCHELASTIC_RESTART_COUNT"], "a") as taken:
            print(number, file=taken)
        if number == 5 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
    return step(self, number)

Pretraining.step = dying
sys.argv[0] = "megarlhf"
cli.start()
"""


def test_torchrun_starts_a_run_again_and_it_goes_on_where_it_was(untrained, ranks2, tmp_path):
    (tmp_path / "dies_once.py").write_text(DIES_ONCE)
    words = ["steps=8", "run.save_every=1", "run.threads=1"]
    start = ["pretrain", "--config", f"{untrained}/base.yaml", f"run.dir={tmp_path}/torn", *words]
    status, said = under_torchrun(str(tmp_path / "dies_once.py"), *start, restarts=1)
    assert status == 0, said
    ranks2.run(check_stages, untrained, tmp_path / "runs", ["base"], words)
    torn = curves(tmp_path / "torn")
    assert len(torn) == 8 and torn == curves(tmp_path / "runs" / "base")
    first, second = ([int(number) for number in (tmp_path / f"dies_once.py{start}").read_text().split()] for start in (0, 1))
    assert first == list(range(6)) and second in ([*range(4, 8)], [*range(5, 8)]), "a checkpoint that was being written is not whole"
