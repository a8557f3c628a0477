"""Batches whose loss or gradients were not finite: kept by every stage that trains, and looked into by `megarlhf replay`."""

import contextlib
import re
from pathlib import Path
from unittest import mock

import pytest
import torch

from megarlhf import cli
from megarlhf.engine.bad_steps import read_kept
from megarlhf.engine.trainable import BadStep, TrainEngine
from megarlhf.parallel.groups import World
from megarlhf.runs import bad_batches, examination, replay
from megarlhf.runs.checkpoints import own_checkpoints
from tests.distributed.recipe import lines_of
from tests.distributed.test_resume import started

STAGES = ("base", "sft", "reward", "ppo", "dpo")
SAVED = ["run.save_every=1", "run.keep_checkpoints=9", "run.save_in_background=false"]


def rows_with(batch, position):
    """Rows, or groups of rows that belong together, that are long enough to have a token there, by the slow way."""
    rows = {row for row in range(batch.num_rows) if batch.lengths[row] > position}
    if batch.groups is None:
        return {(row,) for row in rows}
    members = [tuple(r for r in range(batch.num_rows) if batch.groups[r] == group) for group in set(batch.groups.tolist())]
    return {group for group in members if rows & set(group)}


@torch.no_grad()
def poison(engine, position):
    """Give a position an embedding that is finite and of which nothing finite can be made."""
    for name, parameter in engine.parameters().items():
        if name == "embedding.position_embeddings.weight":
            parameter[position, 0::2], parameter[position, 1::2] = 3e38, -3e38
    engine.optimizer.adopt_parameters()


def check_poisoned(folder, tmp, stage):
    """A run whose engines are poisoned before their first step; the files that it keeps, and what the replay says of each."""
    step, positions = TrainEngine.step, {}

    def poisoned(engine, terms, *, learning_rate):
        if engine.steps == 0:
            poison(engine, positions.setdefault(terms[0].name, int(terms[0].batch.lengths.max()) - 1))
        return step(engine, terms, learning_rate=learning_rate)

    longer = ["ppo.iterations=2"] if stage == "ppo" else []
    with mock.patch.object(TrainEngine, "step", poisoned), contextlib.suppress(ValueError):  # PPO may fail to sample afterwards
        printed = started(folder / f"{stage}.yaml", f"run.dir={tmp / stage}", *SAVED, *longer)[0]
        assert World.connect().rank > 0 or "to look into it: megarlhf replay" in printed
    World.connect().barrier()
    files = sorted((tmp / stage / "bad_batches").glob("step_00000001_*"))
    return [(path, positions[read_kept(path).bad.terms[0].name], list(replay.replay(path, None, World.connect()))) for path in files]


@pytest.mark.parametrize("stage", STAGES)
def test_what_was_not_finite_is_kept_and_found_again(recipe, ranks2, tmp_path, stage):
    first, second = ranks2.run(check_poisoned, recipe, tmp_path, stage)
    assert first == second and [path.stem.split("_")[-1] for path, *_ in first] == {
        "base": ["model"], "sft": ["model"], "dpo": ["model"], "reward": ["reward"], "ppo": ["policy", "value"],
    }[stage]  # fmt: skip
    for path, position, lines in first:
        text, kept = "\n".join(lines), read_kept(path)
        assert kept.step == 1 and kept.bad.updates == kept.bad.steps == 0 and "weights that are not finite: none" in text
        for term in kept.bad.terms:
            wanted = rows_with(term.batch, position)
            assert wanted or term is not kept.bad.terms[0]
            of_term = re.search(rf"^{term.name} alone: .*\n((  .*\n)*)", text, re.M)
            named = re.findall(r"^  row ([\d, ]+): NOT FINITE", of_term[1], re.M)
            assert {tuple(map(int, row.split(", "))) for row in named} == wanted
            assert bool(wanted) == (f"{term.name} alone: NOT FINITE" in text)
        assert "first in the backward pass " in text and lines[-1].startswith(f"found: not finite because of {kept.bad.terms[0].name}")


def check_again(folder, tmp, stage):
    """Steps that were finite, kept all the same: (what the run logged of each, what the same step gives when it is taken again)."""

    def always(engine, terms, losses, update):
        engine.bad_step = BadStep(terms=terms, steps=engine.steps, updates=engine.optimizer.updates - 1, loss_scale=1.0)

    dropout = ["dropout=0.1"] if stage == "sft" else []
    with mock.patch.object(TrainEngine, "_note_bad_step", always), mock.patch.object(bad_batches, "MOST_KEPT", 2):
        assert started(folder / f"{stage}.yaml", f"run.dir={tmp / stage}", "parallel.tp=2", *SAVED, *dropout)[1] is None
    world, pairs = World.connect(), []
    world.barrier()
    logged = {line["step"]: line for line in lines_of(tmp / stage / "metrics.jsonl")}
    files = sorted((tmp / stage / "bad_batches").iterdir())
    for path in files:
        kept = read_kept(path)
        saved = replay.nearest(tmp / stage, kept)
        engine = replay.build(kept, saved, kept.model, kept.layout, world)
        before = {name: value.clone() for name, value in engine.parameters().items()}
        result = examination.taken(engine, kept, kept.bad.terms)
        assert all(torch.equal(before[name], value) for name, value in engine.parameters().items())
        of_run = {name: logged[kept.step][f"{name}/loss"] for name in result.losses}
        pairs.append((saved.state["step"], of_run, logged[kept.step][f"{kept.model}/grad_norm"], result.losses, result.grad_norm))
    return [path.name for path in files], pairs


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_a_step_that_is_taken_again_is_the_step_bit_for_bit(recipe, ranks2, tmp_path, stage):
    names, pairs = ranks2.run(check_again, recipe, tmp_path, stage)[0]
    newest = max(int(name.split("_")[1]) for name in names)
    assert len(names) == 2 and newest == own_checkpoints(tmp_path / stage / "checkpoints", run=None)[0][0].state["step"]
    for number, (step, losses, norm, losses_again, norm_again) in zip((newest - 1, newest), pairs, strict=True):
        assert step == number - 1 and losses == losses_again and norm == norm_again


def test_the_command_alone_and_what_it_refuses(recipe, ranks2, tmp_path, capfd):
    path = ranks2.run(check_poisoned, recipe, tmp_path, "sft")[0][0][0]
    assert cli.main(["replay", str(path)]) == 0
    said = capfd.readouterr().out
    assert "the very ones that the step saw" in said and "tp1 pp1 dp1" in said and "row" in said
    cut = path.with_name("cut.safetensors")
    cut.write_bytes(path.read_bytes()[:-9])
    part = Path(re.search(r"weights: (\S+) \(model\)", said)[1]) / "part_00000.safetensors"
    alone = tmp_path / "away" / "bad_batches" / path.name
    alone.parent.mkdir(parents=True)
    alone.write_bytes(path.read_bytes())
    for words, sentence in (
        ([str(path.with_name("nothing"))], f"there is no file {path.with_name('nothing')}; {path.parent} has: "),
        ([str(cut)], f"{cut} cannot be read as a file of tensors"),
        ([str(part)], f"{part} is not a batch that a run kept"),
        ([str(alone)], "has no checkpoint: give --checkpoint"),
    ):
        assert cli.main(["replay", *words]) == 2
        assert sentence in capfd.readouterr().err
    assert cli.main(["replay", str(alone), "--checkpoint", str(tmp_path / "sft")]) == 0
    part.write_bytes(part.read_bytes()[:-1])
    assert cli.main(["replay", str(path)]) == 2 and f"{part} is damaged" in capfd.readouterr().err
