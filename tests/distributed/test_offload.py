"""Phase offload: what is configured has no memory while it rests, and training, saves and resumes are the same bit for bit."""

from unittest import mock

import pytest
import torch

from megarlhf.engine.frozen import FrozenEngine
from megarlhf.engine.offload import distinct
from megarlhf.parallel import side_stream
from megarlhf.parallel.groups import World
from megarlhf.trainers.ppo_models import PpoModels
from tests.distributed.recipe import curves, lines_of, run_stage_of
from tests.distributed.training import LEARNING_RATE, SPECS, build, experience, fill, outputs, terms_of, whole_state

EVERYTHING = ("weights", "gradients", "optimizer", "average")


def memory(engine):
    """Kind -> bytes of the storages that have memory, those of a single number left out."""
    found = {}
    for kind, tensors in distinct(engine.held()).items():
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors if tensor.numel() > 1}
        found[kind] = sum(storages.values())
    return found


@mock.patch.object(side_stream, "LEAST_PIECE", 256)
def check_engine(precision):
    """Everything that an engine does from rest, beside one that never rests."""
    world = World.connect()
    groups = world.groups(world.layout(pp=2))
    name = "gpt2"
    plain, resting = (build(name, groups, precision=precision, offload=kinds) for kinds in ((), EVERYTHING))

    def rest():
        resting.offload.rest()
        assert not any(memory(resting).values()) and all(memory(plain)[kind] for kind in ("weights", "gradients"))

    rest()
    for engine in (plain, resting):
        engine.start_ema(0.9)
    rest()
    for _ in range(3):
        results = []
        for engine in (plain, resting):
            engine.offload.rest()
            results.append(vars(engine.step(terms_of(name), learning_rate=LEARNING_RATE)))
        assert results[0] == results[1]
        for engine in (plain, resting):
            engine.offload.rest(but=("weights",))
            engine.ema.update()
    assert memory(resting) != memory(plain), "gradients were not needed and are still away"
    rest()
    with plain.ema.swapped_in(), resting.ema.swapped_in():
        resting.offload.rest()
        torch.testing.assert_close(outputs(resting), outputs(plain), rtol=0, atol=0)
        rest()
    assert plain.weights_are_finite() and resting.weights_are_finite()
    resting.offload.need(*EVERYTHING)
    assert memory(resting) == memory(plain)
    torch.testing.assert_close(whole_state(resting), whole_state(plain), rtol=0, atol=0)
    assert resting.offload.host_bytes == sum(size for kind, size in memory(plain).items() if kind != "gradients")


def check_frozen():
    world = World.connect()
    engine = FrozenEngine(SPECS["reward"], world.groups(world.layout(tp=2)), micro_batch_size=4, offload=("weights",))
    fill(engine)
    before, batch = engine.fingerprint(), experience()
    scores = engine.scores(batch)
    for _ in range(2):
        engine.offload.rest()
        assert not any(memory(engine).values())
        assert torch.equal(engine.scores(batch), scores)
    engine.offload.rest()
    engine.offload.send_for("weights")
    engine.offload.rest()
    assert engine.fingerprint() == before


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_engine_that_rests_does_the_same(ranks2, precision):
    ranks2.run(check_engine, precision)


def test_frozen_weights_come_back(ranks2):
    ranks2.run(check_frozen)


OFFLOAD = ["policy.offload=[gradients, optimizer, average]", "value.offload=[weights, gradients, optimizer]", "reward.offload=[weights]",
           "reference.offload=[weights]"]  # fmt: skip
LAYOUTS = ["policy.parallel.tp=2", "value.parallel.pp=2", "generation.parallel.tp=1", "run.eval_every=1", "run.save_every=1"]


def check_ppo(folder, runs):
    """PPO with everything at rest, interrupted and gone on with, beside PPO without; what rests in a phase is looked at in each."""
    yaml, seen = folder / "ppo.yaml", {}
    plain = run_stage_of(yaml, [f"run.dir={runs / 'plain'}", *LAYOUTS])
    turn_to = PpoModels.turn_to

    def watched(models, phase):
        turn_to(models, phase)
        seen[phase] = {(role, kind) for role, engine in models.engines.items() for kind, size in memory(engine).items() if size}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PpoModels, "turn_to", watched)
        run_stage_of(yaml, [f"run.dir={runs / 'resting'}", *LAYOUTS, *OFFLOAD], stop_before=1)
        resting = run_stage_of(yaml, [f"run.dir={runs / 'resting'}", *LAYOUTS, *OFFLOAD])
    for name, engine in resting.models.items():
        engine.offload.need(*EVERYTHING)
        torch.testing.assert_close(whole_state(engine), whole_state(plain.models[name]), rtol=0, atol=0)
    return seen


def test_ppo_that_rests_between_phases_is_the_same(recipe, ranks2, tmp_path):
    policy, value = {("policy", "weights")}, {("value", "weights")}  # float32's masters are the weights
    scored = {("reward", "weights"), ("reference", "weights")}
    trained = {(role, kind) for role in ("policy", "value") for kind in ("gradients", "moments")}
    for seen in ranks2.run(check_ppo, recipe, tmp_path):
        assert seen["generate"] == seen["reshard"] == policy
        assert seen["score"] == policy | value | scored
        assert seen["update"] == policy | value | trained
        assert seen["average"] == policy | {("policy", "moments"), ("policy", "average")}
    assert curves(tmp_path / "resting") == curves(tmp_path / "plain")
    assert lines_of(tmp_path / "resting" / "samples.jsonl") == lines_of(tmp_path / "plain" / "samples.jsonl")
    lines = lines_of(tmp_path / "resting" / "metrics.jsonl")
    assert all(line["time/offload_seconds"] > 0 for line in lines)
    assert not any("time/offload_seconds" in line for line in lines_of(tmp_path / "plain" / "metrics.jsonl"))
