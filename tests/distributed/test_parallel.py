"""Process groups, collectives and vocabulary-parallel log-probabilities on gloo ranks."""

import itertools
import pickle
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megarlhf.models import vocab_head
from megarlhf.models.vocab_head import head_logprobs
from megarlhf.parallel import platform
from megarlhf.parallel.collectives import broadcast_object, gather_objects, gather_rows, largest, largest_of_world, sum_over_copies
from megarlhf.parallel.groups import World
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.pipeline import StageCommunicator
from megarlhf.parallel.seed import derive_seed

LAYOUTS = [{"tp": tp, "pp": pp} for tp, pp in itertools.product((1, 2, 4), (1, 2, 4)) if tp * pp <= 4]
AXES = {"tp": "tp", "dp": "dp", "pp": "pp", "copy": "tp,pp", "outputs": "dp,pp", "world": "tp,dp,pp"}


def check_groups():
    world = World.connect()
    for axes in [*LAYOUTS, *reversed(LAYOUTS)]:
        layout = world.layout(**axes)
        groups = world.groups(layout)
        assert groups.coordinates == layout.coordinates(world.rank)
        for field, peers in AXES.items():
            (mine,) = (ranks for ranks in layout.peers(peers) if world.rank in ranks)
            group = getattr(groups, field)
            assert dist.get_process_group_ranks(group) == mine
            total = torch.tensor(world.rank)
            dist.all_reduce(total, group=group)
            assert total == sum(mine)
        assert groups.alone.size() == 1
        ends = [ranks[::3] if layout.pp == 4 else ranks for ranks in layout.peers("pp") if layout.pp > 1]
        mine = [ranks for ranks in ends if world.rank in ranks]
        assert groups.embeddings is None if not mine else dist.get_process_group_ranks(groups.embeddings) == mine[0]
        assert groups.is_first_stage == (groups.coordinates.pp == 0) and groups.is_last_stage == (groups.coordinates.pp == layout.pp - 1)
        collection = groups.collection(tied_embeddings=False)
        assert collection.embd is None and collection.tp is groups.tp and collection.intra_dist_opt.size() == world.size
    groups, other = world.groups(world.layout(tp=2, pp=2)), world.groups(world.layout(tp=2))
    assert groups.tp is other.tp is other.copy and groups.copy is other.world  # the same peers, the same group


def test_groups_are_those_of_the_layout(ranks4):
    ranks4.run(check_groups)


def check_collectives():
    world = World.connect()
    for axes in LAYOUTS:
        groups = world.groups(world.layout(**axes))
        place, dp = groups.coordinates, groups.layout.dp
        # rows 0 .. 4 are dealt to the copies in turn; only a copy's last stage has computed anything
        index = torch.arange(5)[place.dp :: dp] if groups.is_last_stage else torch.zeros(0, dtype=torch.int64)
        rows = torch.stack([index.float(), index.float() * 10], dim=1)
        whole = gather_rows(rows, index, 5, groups)
        assert whole.tolist() == [[row, row * 10] for row in range(5)]
        own = rows.sum(0) if groups.is_last_stage else torch.zeros(2)
        assert sum_over_copies(own, groups).tolist() == [10, 100]
    assert largest(world.rank, dist.group.WORLD, platform.CPU) == 3
    assert largest_of_world([world.rank, -world.rank], world) == [3, 0]
    assert broadcast_object({"rank": world.rank}) == {"rank": 0}


def check_objects():
    """What ranks have is gathered; a large value that all have is not sent."""
    rank, sizes = World.connect().rank, []
    gather = dist.all_gather_object

    def counted(gathered, value):
        sizes.append(len(pickle.dumps(value)))
        gather(gathered, value)

    same, other = {"key": "x" * 10_000}, {"key": rank // 2}
    with mock.patch.object(dist, "all_gather_object", counted):
        assert gather_objects(same) == [same] * 4 and max(sizes) < 100
        assert gather_objects(other) == [{"key": 0}, {"key": 0}, {"key": 1}, {"key": 1}]


def test_objects_are_gathered(ranks4):
    ranks4.run(check_objects)


def test_collectives_do_what_they_mean(ranks4):
    ranks4.run(check_collectives)


def check_messages(virtual_pp):
    """Each stage sends the other an activation and a gradient at once; they are received one by one, the gradient first."""
    world = World.connect()
    groups = world.groups(world.layout(pp=2, virtual_pp=virtual_pp))
    config = SimpleNamespace(pipeline_dtype=torch.float32, virtual_pipeline_model_parallel_size=virtual_pp)
    shape = (2, 3, 4)
    communicator = StageCommunicator(groups, config, activations=[shape], gradients=[shape])
    activation, gradient = torch.full(shape, 1.0 + world.rank), torch.full(shape, -1.0 - world.rank)
    nothing = {"tensor_send_next": None, "tensor_send_prev": None, "recv_prev": False, "recv_next": False}
    if world.rank == 0:
        communicator._communicate(**nothing | {"tensor_send_next": activation, "tensor_send_prev": gradient})
        assert not communicator.is_done
        return
    _, back, _ = communicator._communicate(**nothing | {"recv_next": True})
    forward, _, _ = communicator._communicate(**nothing | {"recv_prev": True})
    assert (back == -1).all() and (forward == 1).all() and communicator.is_done
    assert forward.requires_grad


@pytest.mark.parametrize("virtual_pp", [2, 3])
def test_stages_tell_activations_from_gradients_in_whatever_order_they_come(ranks2, virtual_pp):
    ranks2.run(check_messages, virtual_pp)


ROWS, HIDDEN = 21, 16


def check_vocab(vocab_size, padded, dtype, temperature):
    """In one chunk, whose probabilities are kept, and in chunks of 4 rows, the last of one row."""
    world = World.connect()
    return [
        vocab_of(world, tp, vocab_size, padded, dtype, temperature, chunk_rows)
        for tp, chunk_rows in ((1, ROWS), (1, 4), (2, ROWS), (2, 4), (4, 4))
    ]


def vocab_of(world, tp, vocab_size, padded, dtype, temperature, chunk_rows):
    groups = world.groups(world.layout(tp=tp))
    generator = torch.Generator().manual_seed(vocab_size)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator).to(dtype)
    weight = (torch.randn(padded, HIDDEN, generator=generator) * 3).to(dtype)
    hidden[0] = 0.0  # all equal
    if dtype == torch.float32:
        hidden[1], weight[:, 0] = 0.0, 300.0
        hidden[1, 0] = 100.0  # all equal and large
    weight[vocab_size:] = 50.0  # padding that would win, if it counted
    targets = torch.randint(0, vocab_size, (ROWS,), generator=generator)
    targets[2], targets[3] = 0, vocab_size - 1
    weights = torch.randn(ROWS, generator=generator)

    dense = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    dense_logprobs = ((dense[0] @ dense[1][:vocab_size].T) / temperature).log_softmax(-1)
    expected = dense_logprobs.gather(1, targets[:, None])[:, 0]
    (expected * weights).sum().backward()

    shard = padded // tp
    first = groups.coordinates.tp * shard
    ours = [x.clone().requires_grad_() for x in (hidden, weight[first : first + shard])]
    how = {"vocab_size": vocab_size, "tp": groups.tp, "temperature": temperature}
    with mock.patch.object(vocab_head, "CHUNK_ELEMENTS", chunk_rows * shard):
        found, nothing = head_logprobs(*ours, targets, **how)
        (found * weights).sum().backward()
        grads = [x.grad for x in ours]
        again, entropy = head_logprobs(*ours, targets, entropy_too=True, **how)
        assert torch.equal(again, found) and not entropy.requires_grad and not nothing.numel()
        for grad, same in zip(torch.autograd.grad((again * weights).sum(), ours), grads, strict=True):
            assert torch.equal(grad, same)
        with torch.no_grad():
            assert torch.equal(head_logprobs(*ours, targets, **how)[0], found)
    assert found.dtype == torch.float32 and all(grad.dtype == dtype for grad in grads)
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(entropy.double(), -(dense_logprobs.exp() * dense_logprobs).sum(-1).detach(), rtol=1e-5, atol=1e-4)
    low = {} if dtype == torch.float32 else {"rtol": 1e-2}
    grad_hidden = grads[0].float()
    dist.all_reduce(grad_hidden, group=groups.tp)  # each rank has its part
    torch.testing.assert_close(grad_hidden.double(), dense[0].grad, **{"rtol": 1e-4, "atol": 1e-3 if not low else 0.05, **low})
    torch.testing.assert_close(grads[1].double(), dense[1].grad[first : first + shard], **{"rtol": 1e-4, "atol": 1e-4, **low})
    assert (grads[1][max(0, vocab_size - first) :] == 0).all()
    return found.detach(), entropy


@pytest.mark.parametrize(
    ("vocab_size", "padded", "dtype", "temperature"),
    [
        (128, 128, torch.float32, 1.0),
        (90, 128, torch.float32, 0.7),  # the last of four ranks holds padding only
        (65, 128, torch.float32, 1.0),  # the last of two ranks holds one id
        (100, 128, torch.bfloat16, 1.0),
    ],
)
def test_the_vocabulary_in_parts_is_dense_forward_and_backward(ranks4, vocab_size, padded, dtype, temperature):
    by_rank = ranks4.run(check_vocab, vocab_size, padded, dtype, temperature)
    for of_case in zip(*by_rank, strict=True):
        assert all(torch.equal(a, b) for rank in of_case for a, b in zip(rank, of_case[0], strict=True))


def check_a_world_of_one():
    world = World.connect()
    groups = world.groups(world.layout())
    assert world.size == 1 and groups.layout == ParallelLayout() and groups.embeddings is None
    world.barrier()


def test_a_world_of_one(ranks1):
    ranks1.run(check_a_world_of_one)


def test_seeds_depend_on_every_key():
    keys = [(1,), (2,), (1, 2), (12,), ("1", 2), (1, "policy"), (1, "value")]
    seeds = [derive_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys) - 1 and seeds[2] == seeds[4]  # 1 and "1" are one key
    assert all(0 <= seed < 2**63 for seed in seeds)
