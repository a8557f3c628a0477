"""Fixtures for all tests: the gloo ranks, started when a test first asks for them and kept to the end."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the ranks of a test share the machine's cores

import pytest  # noqa: E402

from tests.distributed.harness import RankProcesses, Ranks  # noqa: E402


@pytest.fixture(scope="session")
def rank_processes():
    """The processes behind `ranks1`, `ranks2` and `ranks4`: at most four, whichever of these a test asks for."""
    with RankProcesses() as processes:
        yield processes


@pytest.fixture(scope="session")
def ranks1(rank_processes):
    """A world of one rank, in a process of its own."""
    return Ranks(rank_processes, world_size=1)


@pytest.fixture(scope="session")
def ranks2(rank_processes):
    """A world of two ranks."""
    return Ranks(rank_processes, world_size=2)


@pytest.fixture(scope="session")
def ranks4(rank_processes):
    """A world of four ranks."""
    return Ranks(rank_processes, world_size=4)
