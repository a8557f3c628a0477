"""Messages between stages, under the strictest rules that a backend may have: on each communicator of two ranks or of a group one after the
other, and none ends before its counterpart has begun. So NCCL is documented; gloo keeps what is sent until it is asked for.
"""

import contextlib
from collections import defaultdict
from dataclasses import dataclass, field
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megarlhf.batch import Prompts
from megarlhf.engine.frozen import FrozenEngine
from megarlhf.engine.terms import LanguageModelLoss, Term
from megarlhf.engine.trainable import TrainEngine
from megarlhf.generation.generator import Generator
from megarlhf.planning.dry_run import Recorder
from megarlhf.planning.fake_world import DEVICE, fake_world
from tests.distributed.training import ADAM, SPECS, texts
from tests.unit.apart import ApartFromHost


@dataclass
class Posted:
    """What a rank posts at once on one communicator."""

    communicator: tuple
    operations: list[tuple[str, int]]
    """("send" or "receive", the other rank)."""
    program: list = field(default_factory=list, repr=False)
    ended: set[int] = field(default_factory=set)

    @property
    def is_over(self):
        return len(self.ended) == len(self.operations)

    def wait(self):
        """What the rank posts later begins after this."""
        self.program.append(Waited(self))


@dataclass
class Waited:
    """That a rank goes on when something has ended."""

    item: Posted

    @property
    def is_over(self):
        return self.item.is_over


@contextlib.contextmanager
def posted(groups):
    """What the rank posts and waits for in this context, in order; nothing is sent."""
    program: list[Posted | Waited] = []

    def post(operations, group, *, pair=None):
        ranks = tuple(dist.get_process_group_ranks(group))
        program.append(Posted((ranks, group is groups.pp, pair), operations, program))
        return program[-1]

    def alone(kind, peer, group):
        return post([(kind, peer)], group, pair=frozenset((groups.rank, peer)))

    def batch(operations):
        return [post([(kind, peer) for kind, peer, _ in operations], operations[0][2])]

    instead = {
        "isend": lambda values, dst, group: alone("send", dst, group),
        "recv": lambda values, src, group: alone("receive", src, group).wait(),
        "P2POp": lambda op, values, peer, group: ("receive" if op is dist.irecv else "send", peer, group),
        "batch_isend_irecv": batch,
    }
    with mock.patch.multiple(dist, **instead):
        yield program


def stuck(programs: list[list[Posted | Waited]]) -> list[str]:
    """What each rank that cannot go on has before it when nothing moves any more; empty where all went through."""
    while True:
        open_ends = defaultdict(list)  # (communicator, source, target, kind) -> what may go now
        for rank, program in enumerate(programs):
            busy = set()
            for item in program:
                if isinstance(item, Waited) and not item.is_over:
                    break
                if isinstance(item, Posted) and not item.is_over and item.communicator not in busy:
                    busy.add(item.communicator)
                    for number in set(range(len(item.operations))) - item.ended:
                        kind, peer = item.operations[number]
                        ends = (rank, peer) if kind == "send" else (peer, rank)
                        open_ends[item.communicator, *ends, kind].append((item, number))
        moved = False
        for (communicator, source, target, kind), mine in open_ends.items():
            theirs = open_ends.get((communicator, source, target, "receive"), []) if kind == "send" else []
            for (item, number), (other, of_other) in zip(mine, theirs, strict=False):
                item.ended.add(number)
                other.ended.add(of_other)
                moved = True
        if not moved:
            left = [[item for item in program if not item.is_over] for program in programs]
            return [f"rank {rank}: {program[:2]}" for rank, program in enumerate(left) if program]


def trained(world, layout, meter):
    """A step of six micro-batches."""
    groups = world.groups(layout)
    Recorder(world, meter, gpus_per_node=8).use(groups)
    engine = TrainEngine(SPECS["gpt2"], groups, micro_batch_size=1, adam=ADAM, seed=1)
    with posted(groups) as seen:
        engine.step([Term("text", LanguageModelLoss(), texts(6))], learning_rate=1e-3)
    return seen


def generated(world, layout, meter):
    """Rows that enter as others end, more than there are slots."""
    groups = world.groups(layout)
    Recorder(world, meter, gpus_per_node=8).use(groups)
    engine = FrozenEngine(SPECS["gpt2"], groups, micro_batch_size=1)
    prompts = Prompts(tokens=torch.ones(7, 5, dtype=torch.int64), lengths=torch.tensor([5, 2, 4, 3, 5, 1, 2]), ids=torch.arange(7))
    with posted(groups) as seen:
        generator = Generator(engine.transformers, groups, architecture=engine.spec.architecture, eos_id=3, pad_id=0)
        generator.generate(prompts, max_new_tokens=[3, 6, 1, 7, 5, 2, 4], seed=1, iteration=0, max_batch_size=4)
    return seen


@pytest.mark.parametrize("run", [trained, generated])
@pytest.mark.parametrize(("pp", "virtual_pp"), [(2, 1), (2, 2), (3, 1)])
def test_no_stage_waits_for_one_that_waits_for_it(run, pp, virtual_pp):
    programs = []
    for rank in range(pp):
        with fake_world(rank, pp) as world, ApartFromHost(DEVICE) as meter:
            programs.append(run(world, world.layout(pp=pp, virtual_pp=virtual_pp), meter))
    assert min(len(program) for program in programs) > 3
    assert not stuck(programs)


def test_what_waits_crosswise_is_found():
    def program(rank, kinds):
        posts: list = []
        for kind in kinds:
            posts.append(Posted(("pair",), [(kind, 1 - rank)], posts))
        return posts

    assert len(stuck([program(0, ["send", "receive"]), program(1, ["send", "receive"])])) == 2
    assert not stuck([program(0, ["send", "receive"]), program(1, ["receive", "send"])])
