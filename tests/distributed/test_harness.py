"""The harness itself: order, failures, hangs."""

import os
import threading
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import RankProcesses, RanksFailed, await_all, run_ranks


@pytest.fixture(scope="module")
def processes():
    with RankProcesses() as own:  # the failures here would cost the other tests their processes
        yield own


def summed(value):
    total = torch.tensor([value, dist.get_rank()])
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), int(os.environ["RANK"]), total, os.getpid()


def drawn():
    return torch.rand(3)


def leaves_its_world():
    dist.destroy_process_group()


def raises_on(rank):
    if dist.get_rank() == rank:
        raise ArithmeticError(f"seven is not eight on rank {rank}")
    dist.barrier()


def exits_on(rank):
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def sleeps_on(rank):
    if dist.get_rank() == rank:
        time.sleep(1000)
    dist.barrier()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_results_come_in_rank_order_from_the_same_processes(processes):
    pids = {}
    for world_size in (2, 1, 4, 2):
        results = processes.run(summed, 5, world_size=world_size)
        assert [(rank, size, env) for rank, size, env, *_ in results] == [(rank, world_size, rank) for rank in range(world_size)]
        for rank, _, _, total, pid in results:
            assert total.tolist() == [5 * world_size, sum(range(world_size))]
            assert pids.setdefault(rank, pid) == pid


def test_every_check_starts_from_the_same_random_state(processes):
    first, second = processes.run(drawn, world_size=2), processes.run(drawn, world_size=2)
    assert all(torch.equal(first[0], other) for other in [*first, *second])


def test_a_check_may_leave_its_world(processes):
    processes.run(leaves_its_world, world_size=2)
    assert len(processes.run(summed, 1, world_size=2)) == 2


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        (raises_on, ["rank 1 failed", "in raises_on", "ArithmeticError: seven is not eight on rank 1"]),
        (exits_on, ["rank 1 failed", "exit code 7"]),
    ],
)
def test_a_failing_rank_is_reported_and_the_processes_survive_it(processes, check, expected):
    before = processes.run(summed, 1, world_size=2)
    with pytest.raises(RanksFailed) as failure:
        processes.run(check, 1, world_size=2)
    for text in expected:
        assert text in str(failure.value)
    assert not any(alive(pid) for *_, pid in before)
    assert [rank for rank, *_ in processes.run(summed, 1, world_size=2)] == [0, 1]


def test_a_hang_is_reported_with_the_stack_of_each_rank(processes):
    """Where the stacks are of is for the machine to say: on a busy one the check may not have begun."""
    with pytest.raises(RanksFailed) as failure:
        processes.run(sleeps_on, 1, world_size=2, timeout=1.0)
    _, *reports = str(failure.value).split("-- rank ")
    for rank, report in enumerate(reports):
        assert report.startswith(f"{rank} did not return within 1 s") and "in _run\n" in report and report.endswith("in <module>\n")
    assert len(reports) == 2


def test_no_check_begins_before_every_rank_is_connected(tmp_path):
    began = []

    def joins(rank):
        await_all(dist.FileStore(str(tmp_path / "store"), 3), rank, 3)
        began.append(rank)

    first = [threading.Thread(target=joins, args=(rank,)) for rank in (0, 1)]
    for thread in first:
        thread.start()
    store = dist.FileStore(str(tmp_path / "store"), 3)
    store.wait(["joined/0", "joined/1"])
    assert began == []
    await_all(store, 2, 3)
    for thread in first:
        thread.join()
    assert sorted(began) == [0, 1]


def test_new_processes_end_with_their_check():
    results = run_ranks(summed, 1, 3)
    assert not any(alive(pid) for *_, pid in results)
