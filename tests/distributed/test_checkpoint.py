"""Checkpoints: any layout reads what any other wrote, and the same layout goes on bit for bit."""

import contextlib
import dataclasses
import math
import os
import pickle
import shutil
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megarlhf.engine import checkpoint
from megarlhf.engine.frozen import FrozenEngine
from megarlhf.engine.terms import RankingLoss, Term
from megarlhf.models.parameters import parameter_specs
from megarlhf.parallel.groups import World
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.storage.checkpoints import read_saved
from tests.distributed.training import (
    ADAM,
    LEARNING_RATE,
    SPECS,
    assembled,
    build,
    experience,
    fill,
    local_weights,
    rankings,
    terms_of,
    whole_state,
    write_checkpoint,
)

SOURCE = {"tp": 2}
"""tp2 pp1 dp2 over four ranks."""
MODELS = {"policy": "gpt2", "value": "value", "swiglu": "llama"}


def built(world, axes, **changes):
    groups = world.groups(world.layout(**axes))
    engines = {role: build(name, groups, **changes) for role, name in MODELS.items()}
    engines["policy"].start_ema(0.9)
    return engines


def steps(engines, count):
    """What some steps of every engine gave."""
    results = []
    for _ in range(count):
        results += [engine.step(terms_of(MODELS[role]), learning_rate=LEARNING_RATE) for role, engine in engines.items()]
        engines["policy"].ema.update()
    return results


def everything(engines):
    """Role -> kind -> canonical name -> this rank's values: weights, moments and average are all of a model's state."""
    return {role: whole_state(engine) for role, engine in engines.items()}


def check_save(folder):
    world = World.connect()
    engines = built(world, SOURCE)
    write_checkpoint(folder / "0", engines, {"step": 0}, world)  # before the first update there are no moments
    first = steps(engines, 2)
    write_checkpoint(folder / "2", engines, {"step": 2, "cursors": {"ptx": 7}}, world)
    at_save = everything(engines)
    return first, at_save, steps(engines, 2), everything(engines)


def check_load(folder, axes):
    world = World.connect()
    engines = built(world, axes, seed=5)
    steps(engines, 1)  # what is loaded replaces a state that is not new
    saved = read_saved(folder / "2")
    checkpoint.load(saved, engines)
    assert saved.state == {"step": 2, "cursors": {"ptx": 7}}
    assert [engine.steps for engine in engines.values()] == [2, 2, 2]
    for engine in engines.values():
        engine.seed = 1
    at_load = everything(engines)
    return at_load, steps(engines, 2), everything(engines)


def check_load_before_the_first_update(folder):
    world = World.connect()
    engines = built(world, SOURCE, seed=5)
    steps(engines, 1)
    checkpoint.load(read_saved(folder / "0"), engines)
    return steps(engines, 2), everything(engines)


def whole(by_rank, layout):
    """(role, kind) -> canonical name -> full tensor."""
    return {
        (role, kind): assembled([rank[role][kind] for rank in by_rank], MODELS[role], layout)
        for role, kinds in by_rank[0].items()
        for kind in kinds
    }


@pytest.fixture(scope="module")
def saved(ranks4, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    first, at_save, results, after = zip(*ranks4.run(check_save, folder), strict=True)
    layout = ParallelLayout(tp=2, dp=2)
    return folder, first[0], whole(at_save, layout), results[0], after, whole(after, layout)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        if isinstance(one[key], dict):
            assert_same(one[key], other[key])
        else:
            assert torch.equal(one[key], other[key]), key


def test_the_same_layout_goes_on_bit_for_bit(saved, ranks4):
    folder, _, at_save, results, after, _ = saved
    at_load, then, finally_ = zip(*ranks4.run(check_load, folder, SOURCE), strict=True)
    assert_same(whole(at_load, ParallelLayout(tp=2, dp=2)), at_save)
    assert then[0] == results
    for rank in range(4):
        assert_same(finally_[rank], after[rank])


@pytest.mark.parametrize("axes", [{"pp": 2}, {"tp": 4}, {}], ids=["pp2 dp2", "tp4", "one rank"])
def test_another_layout_reads_the_same_and_goes_on_alike(saved, ranks1, ranks4, axes):
    folder, _, at_save, results, _, after = saved
    ranks = ranks4 if axes else ranks1
    layout = ParallelLayout.over(ranks.world_size, **{"tp": 1, "pp": 1, **axes})
    at_load, then, finally_ = zip(*ranks.run(check_load, folder, axes), strict=True)
    assert_same(whole(at_load, layout), at_save)
    for mine, theirs in zip(then[0], results, strict=True):
        assert mine.losses == pytest.approx(theirs.losses, rel=1e-5)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
    for key, tensors in whole(finally_, layout).items():
        for name, value in tensors.items():
            scale = float(after[key][name].abs().max())
            torch.testing.assert_close(value, after[key][name], rtol=1e-4, atol=1e-5 * scale, msg=lambda m, k=(key, name): f"{k}: {m}")


def test_a_checkpoint_from_before_the_first_update_is_one(saved, ranks4):
    folder, first, at_save, *_ = saved
    then, state = zip(*ranks4.run(check_load_before_the_first_update, folder), strict=True)
    assert then[0] == first
    assert_same(whole(state, ParallelLayout(tp=2, dp=2)), at_save)


def check_load_weights(folder):
    world = World.connect()
    groups = world.groups(world.layout(pp=2))
    saved = read_saved(folder / "2")

    from_lm = build("value", groups, seed=9)
    head = {name: value for name, value in local_weights(from_lm).items() if name.startswith("scalar_head.")}
    assert checkpoint.missing_from(saved, "policy", from_lm) == list(head)
    checkpoint.load_weights(saved, "policy", from_lm)
    assert all(torch.equal(from_lm.parameters()[name], head[name]) for name in head)

    average = FrozenEngine(SPECS["gpt2"], groups, micro_batch_size=4)
    assert checkpoint.missing_from(saved, "policy", average) == []
    checkpoint.load_weights(saved, "policy", average, average=True)
    low = FrozenEngine(dataclasses.replace(SPECS["gpt2"], precision="bf16"), groups, micro_batch_size=4)
    checkpoint.load_weights(saved, "policy", low)
    into_training = build("gpt2", groups, seed=9)
    checkpoint.load_weights(saved, "policy", into_training)
    weights = [local_weights(engine) for engine in (from_lm, average, low, into_training)]
    into_training.step(terms_of("gpt2"), learning_rate=0.0)  # from the masters, which are what was loaded
    assert_same(local_weights(into_training), weights[-1])

    value, reward = build("value", groups, seed=9), FrozenEngine(SPECS["value"], groups, micro_batch_size=3)
    for engine in (value, reward):
        checkpoint.load_weights(saved, "value", engine)
    torch.testing.assert_close(value.scores(experience()), reward.scores(experience()), rtol=1e-6, atol=1e-6)
    low_training = build("gpt2", groups, seed=9, precision="bf16")
    checkpoint.load_weights(saved, "policy", low_training)
    assert_same(local_weights(low_training), weights[2])
    return [*weights, whole_state(low_training)["weights"]]


def test_weights_alone_fill_other_heads_precisions_and_averages(saved, ranks4):
    folder, _, at_save, *_ = saved
    layout = ParallelLayout(pp=2, dp=2)
    from_lm, average, low, trained, masters = (list(shards) for shards in zip(*ranks4.run(check_load_weights, folder), strict=True))
    trunk = assembled(from_lm, "value", layout)
    policy = at_save["policy", "weights"]
    assert_same({name: value for name, value in trunk.items() if name in policy}, policy)
    assert_same(assembled(average, "gpt2", layout), at_save["policy", "ema"])
    assert_same(assembled(low, "gpt2", layout), {name: value.bfloat16() for name, value in policy.items()})
    assert_same(assembled(trained, "gpt2", layout), policy)
    assert_same(assembled(masters, "gpt2", layout), policy)  # float32 whatever the precision of what is trained


def check_low_precision(folder, precision):
    """float32 masters, moments and the loss scale come back; the reward model's head is float32 in a low-precision model."""
    world = World.connect()
    terms = [Term("ranking", RankingLoss(), rankings())]
    adam = dataclasses.replace(ADAM, initial_loss_scale=2.0**24)
    first, second = (build("reward", world.groups(world.layout(tp=2)), precision=precision, adam=adam, seed=seed) for seed in (1, 5))
    for _ in range(10):
        first.step(terms, learning_rate=LEARNING_RATE)
    write_checkpoint(folder / precision, {"reward": first}, {}, world)
    checkpoint.load(read_saved(folder / precision), {"reward": second})
    second.seed = first.seed
    assert_same(local_weights(first), local_weights(second))
    results = [[engine.step(terms, learning_rate=LEARNING_RATE) for _ in range(2)] for engine in (first, second)]
    assert results[0] == results[1] and not results[0][0].skipped
    assert results[0][0].loss_scale == 1.0 or 1.0 < results[0][0].loss_scale < 2.0**24
    assert_same(whole_state(first), whole_state(second))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_goes_on_bit_for_bit(ranks4, tmp_path, precision):
    ranks4.run(check_low_precision, tmp_path, precision)


def check_own_share(folder):
    """What a rank writes, and that nothing else is gathered for it."""
    world = World.connect()
    engines = built(world, SOURCE)
    steps(engines, 1)
    owned = sum(
        shard.main.numel() * (4 if engine.ema is not None else 3) * 4 for engine in engines.values() for shard in engine.optimizer.shards()
    )
    written = checkpoint.own_part(engines).bytes
    alone = {name: mock.DEFAULT for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast")}
    with mock.patch.multiple(dist, **alone) as collectives:
        (folder / "own.partial").mkdir(exist_ok=True)
        part = checkpoint.own_part(engines).write(folder / "own", world.rank)
    assert not any(collective.called for collective in collectives.values())
    return owned, written, part.seal.bytes


def test_each_rank_writes_what_it_owns_and_every_element_is_written_once(ranks4, tmp_path):
    owned, written, files = zip(*ranks4.run(check_own_share, tmp_path), strict=True)
    assert all(mine <= all_of_it for mine, all_of_it in zip(written, owned, strict=True))
    layout = ParallelLayout(tp=2, dp=2)
    kinds = {"policy": 4, "value": 3, "swiglu": 3}
    elements = {role: sum(math.prod(p.shape) for p in parameter_specs(SPECS[n].architecture, SPECS[n].head)) for role, n in MODELS.items()}
    assert sum(written) == 4 * sum(kinds[role] * elements[role] for role in MODELS)
    assert all(0 <= size - mine < 40_000 for size, mine in zip(files, written, strict=True)), "a header, and nothing besides"
    assert max(written) < 0.3 * sum(written), layout


class Code:
    """What a pickle runs when it is read."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def check_damaged(folder, names):
    """What is said of a checkpoint whose file was changed, and of loading its weights nevertheless."""
    world = World.connect()
    engine = FrozenEngine(SPECS["gpt2"], world.groups(world.layout()), micro_batch_size=4)
    said = []
    for name in names:
        saved = None
        try:
            saved = read_saved(folder / name)
            damages = saved.damages()
        except ValueError as error:
            damages = [str(error)]
        with contextlib.suppress(ValueError):
            checkpoint.load_weights(saved or read_saved(folder / name), "policy", engine)
        said.append(damages)
    return said


def test_damage_to_any_file_is_found_and_named_and_nothing_in_it_runs(saved, ranks1, tmp_path):
    whole = saved[0] / "2"
    files = sorted(path.name for path in whole.iterdir())
    assert files == [*(f"part_{rank:05d}.safetensors" for rank in range(4)), "state.json"]

    def flipped(content):
        place = len(content) * 2 // 3
        return content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :]

    changes = {
        "flipped": flipped,
        "cut": lambda content: content[:-1],
        "empty": lambda content: b"",
        "random": lambda content: os.urandom(len(content)),
        "code": lambda content: pickle.dumps(Code()),
        "missing": None,
    }
    cases = [(file, name) for file in files for name in changes]
    for file, name in cases:
        shutil.copytree(whole, tmp_path / f"{file}-{name}")
        path = tmp_path / f"{file}-{name}" / file
        if changes[name] is None:
            path.unlink()
        else:
            path.write_bytes(changes[name](path.read_bytes()))
    said = ranks1.run(check_damaged, tmp_path, [f"{file}-{name}" for file, name in cases])[0]
    for (file, name), damages in zip(cases, said, strict=True):
        assert len(damages) == 1 and f"{file}-{name}" in damages[0], (file, name, damages)
        assert "missing" in damages[0] or "damaged" in damages[0] or "it has no state.json" in damages[0]
    assert not (tmp_path / "ran").exists() and not os.path.exists("ran")


def check_refusals(folder):
    world = World.connect()
    groups = world.groups(world.layout())
    with pytest.raises(ValueError, match=r"nowhere is not a checkpoint: it has no state.json"):
        read_saved(folder / "nowhere")
    saved = read_saved(folder / "2")
    engine = FrozenEngine(SPECS["gpt2"], groups, micro_batch_size=4)
    fill(engine)
    with pytest.raises(ValueError, match="2 holds no model named 'polcy'; it holds: policy, value, swiglu"):
        checkpoint.load_weights(saved, "polcy", engine)
    with pytest.raises(ValueError, match="2 holds no moving average of 'value': it was trained without one"):
        checkpoint.load_weights(saved, "value", build("value", groups), average=True)
    with pytest.raises(ValueError, match="2 holds a model whose num_heads is 8, but this one's is 4"):
        checkpoint.load_weights(saved, "swiglu", engine)
    with pytest.raises(ValueError, match="2 holds no model named 'critic'; it holds: policy, value, swiglu"):
        checkpoint.load(saved, {"critic": build("value", groups)})
    with pytest.raises(ValueError, match="2: 'policy' has the head lm, but this one's is scalar"):
        checkpoint.load(saved, {"policy": build("value", groups)})
    with pytest.raises(ValueError, match="2 holds no moving average of 'value': it was trained without one"):
        averaged = build("value", groups)
        averaged.start_ema(0.9)
        checkpoint.load(saved, {"value": averaged})


def test_what_a_checkpoint_refuses(saved, ranks1):
    ranks1.run(check_refusals, saved[0])
