"""Process groups, collectives and vocabulary-parallel log-probabilities on gloo ranks."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megarlhf.parallel import platform
from megarlhf.parallel.collectives import broadcast_object, gather_rows, largest, largest_of_world, sum_over_copies
from megarlhf.parallel.groups import World
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.pipeline import StageCommunicator
from megarlhf.parallel.seed import derive_seed
from megarlhf.parallel.vocab import vocab_parallel_logprobs, vocab_parallel_logprobs_and_entropy

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


def check_vocab(vocab_size, padded, dtype, temperature):
    world = World.connect()
    return [vocab_of(world, tp, vocab_size, padded, dtype, temperature) for tp in (1, 2, 4)]


def vocab_of(world, tp, vocab_size, padded, dtype, temperature):
    groups = world.groups(world.layout(tp=tp))
    generator = torch.Generator().manual_seed(vocab_size)
    full = (torch.randn(3, 7, padded, generator=generator) * 5).to(dtype)
    full[..., vocab_size:] = 100.0  # padding that would win, if it counted
    full[0, 0, :vocab_size] = 30000.0  # equal and large
    targets = torch.randint(0, vocab_size, (3, 7), generator=generator)
    targets[1, 1], targets[1, 2] = 0, vocab_size - 1
    weights = torch.randn(3, 7, generator=generator)

    dense = full.detach().float().requires_grad_()
    logprobs = (dense[..., :vocab_size] / temperature).log_softmax(-1)
    expected = logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    (expected * weights).sum().backward()

    shard = padded // tp
    first = groups.coordinates.tp * shard
    local = full[..., first : first + shard].clone().requires_grad_()
    before = local.detach().clone()
    how = {"vocab_size": vocab_size, "tp": groups.tp if tp > 1 else None, "temperature": temperature}
    found = vocab_parallel_logprobs(local, targets, **how)
    (found * weights).sum().backward()
    assert found.dtype == torch.float32 and torch.equal(local.detach(), before)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    grad = dense.grad[..., first : first + shard]
    torch.testing.assert_close(local.grad.float(), grad.to(dtype).float(), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)
    assert (local.grad[..., max(0, vocab_size - first) :] == 0).all()

    again, entropy = vocab_parallel_logprobs_and_entropy(local, targets, **how)
    assert torch.equal(again, found) and not entropy.requires_grad
    before_entropy, local.grad = local.grad, None
    (again * weights).sum().backward()
    assert torch.equal(local.grad, before_entropy)
    torch.testing.assert_close(entropy, -(logprobs.exp() * logprobs).sum(-1).detach(), rtol=1e-5, atol=1e-5)
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
def test_vocabulary_parallel_is_dense_forward_and_backward(ranks4, vocab_size, padded, dtype, temperature):
    by_rank = ranks4.run(check_vocab, vocab_size, padded, dtype, temperature)
    for of_tp in zip(*by_rank, strict=True):
        assert all(torch.equal(a, b) for rank in of_tp for a, b in zip(rank, of_tp[0], strict=True))


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
