"""A step that was not finite, taken again and looked into: the weights, the batch, each row, then the gradients."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from megarlhf.engine.bad_steps import KeptStep, names_of, read_kept
from megarlhf.engine.checkpoint import load_weights, missing_from
from megarlhf.engine.optimizer import AdamSettings
from megarlhf.engine.trainable import TrainEngine
from megarlhf.models.transformer import initialize
from megarlhf.parallel.alarm import is_broken_connection
from megarlhf.parallel.groups import World
from megarlhf.parallel.launch import place_in_run
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.rendezvous import RanksMissing
from megarlhf.runs.agreement import RunError, on_rank_0, refuse_together
from megarlhf.runs.checkpoints import find_source, own_checkpoints
from megarlhf.runs.examination import examine
from megarlhf.runs.models import chosen_model
from megarlhf.storage.checkpoints import Saved


def replay_alone_or_with_others(options: argparse.Namespace) -> int:
    """Replay as the options of `megarlhf replay` say, in the world that the process was started in; returns the exit status."""
    try:
        place = place_in_run()
        world = World.connect(place, timeout_minutes=options.timeout_minutes)
    except RanksMissing as error:
        return _failed(str(error), 1, speaks=error.speaks)
    except ValueError as error:
        return _failed(str(error), 2)
    status = 0
    try:
        for line in replay(options.batch, options.checkpoint, world):
            if world.rank == 0:
                print(line, flush=True)
        world.barrier()
    except (ValueError, RunError) as error:  # raised alike on every rank
        status = _failed(str(error), 1 if isinstance(error, RunError) else 2, speaks=world.rank == 0)
    except RuntimeError as error:
        if not is_broken_connection(error):
            raise
        return _failed(f"rank {world.rank}: the exchange between the ranks broke: {error}", 1)
    world.close()
    return status


def _failed(problem: str, status: int, *, speaks: bool = True) -> int:
    if speaks:
        print(f"megarlhf replay: {problem}", file=sys.stderr, flush=True)
    return status


def replay(batch: Path, checkpoint: str | None, world: World) -> Iterator[str]:
    """Lines of what is found; a collective of the world. ValueError, on every rank, where a file is not there or damaged."""
    kept, saved = on_rank_0(world, _read, batch, checkpoint)
    refuse_together(saved.damages(world.rank, world.size), world)
    yield f"{batch}: step {kept.step} of a run of {kept.run['stage']}, {kept.model}: {names_of(kept.bad.terms)}"
    name = chosen_model(saved, None, kept.model, kept.spec.head)
    yield from _about_weights(kept, saved, name)
    layout = layout_here(kept.layout, world)
    if layout != kept.layout:
        yield f"layout: {layout}, the run's was {kept.layout}: sums come in another order, with dropout its noise is another"
    yield from examine(build(kept, saved, name, layout, world), kept)


def _read(batch: Path, checkpoint: str | None) -> tuple[KeptStep, Saved]:
    if not batch.is_file():
        there = ", ".join(sorted(path.name for path in batch.parent.glob("*.safetensors"))) if batch.parent.is_dir() else ""
        raise ValueError(f"there is no file {batch}; {batch.parent} has: {there or 'none'}")
    kept = read_kept(batch)
    return kept, find_source(checkpoint) if checkpoint is not None else nearest(batch.parent.parent, kept)


def nearest(run: Path, kept: KeptStep) -> Saved:
    """The run's checkpoint the fewest updates away from the weights that the step saw. ValueError where it has none.

    A step that is skipped changes no weight: a checkpoint after it can have them still.
    """
    found = own_checkpoints(run / "checkpoints", run=kept.run["id"], skip_damaged=True)[0]
    if not found:
        raise ValueError(f"{run} has no checkpoint: give --checkpoint, such as the run or checkpoint that it began with")
    return min(found, key=lambda saved: abs(saved.model(kept.model)["adam_steps"] - kept.bad.updates))


def _about_weights(kept: KeptStep, saved: Saved, name: str) -> Iterator[str]:
    since = kept.bad.updates - saved.models[name]["adam_steps"]
    if saved.state.get("run") != kept.run["id"]:
        how = "of another run: the step can come out otherwise"
    elif since:
        how = f"{abs(since)} updates {'before' if since > 0 else 'after'} those that the step saw: it can come out otherwise"
    else:
        how = "the very ones that the step saw"
    yield f"weights: {saved.path} ({name}), {how}"


def layout_here(wanted: ParallelLayout, world: World) -> ParallelLayout:
    """The run's layout, with other copies where there are more or fewer ranks; plain copies where its tp and pp do not fit them."""
    if world.size % (wanted.tp * wanted.pp):
        return world.layout()
    axes = {"virtual_pp": wanted.virtual_pp, "sequence_parallel": wanted.sequence_parallel}
    return world.layout(tp=wanted.tp, pp=wanted.pp, **axes)


def build(kept: KeptStep, saved: Saved, name: str, layout: ParallelLayout, world: World) -> TrainEngine:
    """The model that took the step, with the weights of a checkpoint; a collective of the world."""
    how = {"micro_batch_size": kept.micro_batch_size, "micro_batch_tokens": kept.micro_batch_tokens, "seed": kept.seed}
    engine = TrainEngine(kept.spec, world.groups(layout), adam=AdamSettings(clip_grad=None), **how)
    initialize(engine.transformers, engine.spec, engine.groups, seed=kept.seed, names=missing_from(saved, name, engine))
    engine.optimizer.adopt_parameters()
    load_weights(saved, name, engine)
    return engine
