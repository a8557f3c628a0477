"""From engines to checkpoints and back, at any layout: each rank writes what its optimizer owns, and reads what it needs.

The form on disk is storage/checkpoints.py's. A rank owns a flat range of its part of each parameter, and the moments and the
average of that range (ZeRO-1), so that a save gathers nothing and no element is written twice. Which elements of the whole
parameter such a range is follows from models/parameters.py, and goes into the file with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from megarlhf.engine.engine import Engine
from megarlhf.engine.optimizer import MasterShard, Optimizer
from megarlhf.engine.trainable import TrainEngine
from megarlhf.models.architecture import Architecture, architecture_to_dict
from megarlhf.models.parameters import Shard, flat_ranges_counted, shards_held
from megarlhf.storage.checkpoints import CheckpointReader, Part, Saved, entry_name, write_part
from megarlhf.storage.pieces import Piece


def saved_architecture(saved: Saved, model: str) -> Architecture:
    """The architecture of a saved model. ValueError where this version does not know it."""
    values = saved.model(model)["architecture"]
    if unknown := set(values) - {field.name for field in fields(Architecture)}:
        raise ValueError(f"{saved.path}: {model} has an architecture with {', '.join(sorted(unknown))}, which this version does not know")
    return Architecture(**values)


@dataclass(frozen=True)
class OwnPart:
    """What a rank owns of some models: model -> kind -> entry -> flat values, and model -> entry -> where they lie in the whole."""

    tensors: Mapping[str, Mapping[str, Mapping[str, Tensor]]]
    pieces: Mapping[str, Mapping[str, Piece]]

    @property
    def bytes(self) -> int:
        """Of the values."""
        return sum(values.nbytes for kinds in self.tensors.values() for of_kind in kinds.values() for values in of_kind.values())

    def on_host(self) -> OwnPart:
        """A copy that later steps do not change: on the host, in pinned memory where the values are on a GPU."""
        copies = {
            model: {kind: {entry: _host_copy(values) for entry, values in of_kind.items()} for kind, of_kind in kinds.items()}
            for model, kinds in self.tensors.items()
        }
        return OwnPart(copies, self.pieces)

    def write(self, path: Path, rank: int) -> Part:
        """Write it into the unfinished checkpoint of `path`, through one buffer. OSError where that fails."""
        return write_part(path, rank, self.tensors, self.pieces)


def own_part(models: Mapping[str, TrainEngine]) -> OwnPart:
    """What this rank owns of `models`: views of what the optimizer holds (and zeros for the moments before the first update)."""
    tensors: dict[str, dict[str, dict[str, Tensor]]] = {}
    pieces: dict[str, dict[str, Piece]] = {}
    for name, engine in models.items():
        engine.offload.need("weights", "optimizer", "average")
        moments = engine.optimizer.moments()
        kinds = {
            "weights": lambda shard: shard.main,
            "exp_avg": lambda shard, of=moments: of[shard.parameter][0],
            "exp_avg_sq": lambda shard, of=moments: of[shard.parameter][1],
        }
        if engine.ema is not None:
            kinds["ema"] = lambda shard, of=engine.ema.averages: of[shard.parameter]
        owned = list(_owned(engine))
        pieces[name] = {entry: piece for entry, _, piece, _ in owned}
        tensors[name] = {kind: {entry: values(shard).view(-1)[span] for entry, shard, _, span in owned} for kind, values in kinds.items()}
    return OwnPart(tensors, pieces)


def _host_copy(values: Tensor) -> Tensor:
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda).copy_(values.detach())


def describe(engine: TrainEngine) -> dict:
    """What state.json says of a model."""
    scaler = engine.optimizer.megatron.grad_scaler
    return {
        "architecture": architecture_to_dict(engine.spec.architecture),
        "head": engine.spec.head,
        "steps": engine.steps,
        "adam_steps": engine.optimizer.updates,
        "has_ema": engine.ema is not None,
        "grad_scaler": {k: float(v) for k, v in scaler.state_dict().items()} if scaler is not None else None,
    }


@torch.no_grad()
def load(saved: Saved, models: Mapping[str, TrainEngine]) -> None:
    """Restore weights, optimizers and averages of `models` from a checkpoint of any layout; a collective of the world.

    Each rank reads the elements that its optimizer owns, and one saved piece at a time beside them. ValueError when the
    checkpoint does not hold such models, naming the first difference.
    """
    reader = CheckpointReader(saved)
    for name, engine in models.items():
        _check_holds(saved, name, engine, average=engine.ema is not None)
        if (head := saved.models[name]["head"]) != engine.spec.head:
            raise ValueError(f"{saved.path}: {name!r} has the head {head}, but this one's is {engine.spec.head}")
        if not saved.models[name].get("has_moments", True):
            raise ValueError(f"{saved.path}: {name!r} was converted and has no optimizer state: a run begins with it (load), none goes on")
        engine.offload.need("weights", "optimizer", "average")
        described = saved.models[name]
        engine.steps = described["steps"]
        moments = engine.optimizer.restore(updates=described["adam_steps"])
        for parameter, shard, piece in _held_by_optimizer(engine):
            first, second = moments[shard.parameter]
            kinds = {"weights": shard.main, "exp_avg": first, "exp_avg_sq": second}
            if engine.ema is not None:
                kinds["ema"] = engine.ema.averages[shard.parameter]
            for kind, values in kinds.items():
                reader.fill(values.data.view(-1), name, kind, parameter, piece)
        engine.optimizer.publish_masters()
        if described["grad_scaler"] is not None and engine.optimizer.megatron.grad_scaler is not None:
            restore_grad_scaler(engine.optimizer, described["grad_scaler"])
        engine.offload.rest()


@torch.no_grad()
def load_weights(saved: Saved, model: str, engine: Engine, *, average: bool = False) -> None:
    """Fill an engine's weights from a saved model of the same trunk, whatever its layout, precision or head.

    A trained engine's float32 master weights are what was saved, unrounded; that is a collective of its ranks. Parameters in
    `missing_from` keep their values.

    Args:
        average: read the exponential moving average instead of the weights (ValueError when there is none).

    ValueError when the checkpoint does not hold the model, or another trunk, naming the first difference.
    """
    _check_holds(saved, model, engine, average=average)
    engine.offload.need("weights", "optimizer")
    kind, reader, missing = "ema" if average else "weights", CheckpointReader(saved), missing_from(saved, model, engine)
    if isinstance(engine, TrainEngine):
        for parameter, shard, piece in _held_by_optimizer(engine):
            if parameter not in missing:
                reader.fill(shard.main.data.view(-1), model, kind, parameter, piece)
        engine.optimizer.publish_masters()
        return
    held = shards_held(engine.spec.architecture, engine.spec.head, engine.groups.layout, engine.groups.coordinates)
    for name, parameter in engine.parameters().items():
        if name not in missing:
            values = torch.empty(parameter.numel(), dtype=torch.float32)
            reader.fill(values, model, kind, name, _piece(held[name], 0, parameter.numel()))
            parameter.copy_(values.view(parameter.shape))


def missing_from(saved: Saved, model: str, engine: Engine) -> list[str]:
    """Parameters of this rank that a saved model with another head does not have: a scalar head over a language model."""
    if saved.models[model]["head"] == engine.spec.head:
        return []
    return [name for name in engine.parameters() if name.startswith(("scalar_head.", "output_layer."))]


def _held_by_optimizer(engine: TrainEngine) -> Iterator[tuple[str, MasterShard, Piece]]:
    """(canonical name, shard, its place in the whole parameter) of everything that this rank's optimizer updates."""
    held = shards_held(engine.spec.architecture, engine.spec.head, engine.groups.layout, engine.groups.coordinates)
    names = {parameter: name for name, parameter in engine.parameters().items()}
    for shard in engine.optimizer.shards():
        name = names[shard.parameter]
        yield name, shard, _piece(held[name], shard.start, shard.start + shard.main.numel())


def _owned(engine: TrainEngine) -> Iterator[tuple[str, MasterShard, Piece, slice]]:
    """(entry, shard, piece, its place in the shard) of what this rank speaks for: over all ranks every element once.

    A parameter of which it speaks for several ranges, as key-value heads are shared, has an entry for each.
    """
    a, head, layout, place = engine.spec.architecture, engine.spec.head, engine.groups.layout, engine.groups.coordinates
    held = shards_held(a, head, layout, place)
    for name, shard, whole in _held_by_optimizer(engine):
        ranges = flat_ranges_counted(held[name], a, head, layout, place)
        for number, (start, stop) in enumerate(ranges):
            first, last = max(start, whole.start), min(stop, whole.stop)
            if first < last:
                entry = entry_name(name, number)
                yield entry, shard, _piece(held[name], first, last), slice(first - whole.start, last - whole.start)


def _piece(shard: Shard, start: int, stop: int) -> Piece:
    return Piece(shard.spec.shape, shard.dim, tuple((part.start, part.size) for part in shard.slices), start, stop)


def restore_grad_scaler(optimizer: Optimizer, values: dict[str, float]) -> None:
    """Set fp16's loss scale, and its counts of good and bad steps."""
    scaler = optimizer.megatron.grad_scaler  # its own load_state_dict insists on a CUDA device
    scaler._scale.fill_(values["scale"])
    scaler._growth_tracker = int(values["growth_tracker"])
    scaler._hysteresis_tracker = int(values["hysteresis_tracker"])


def _check_holds(saved: Saved, model: str, engine: Engine, *, average: bool) -> None:
    """ValueError when the checkpoint holds no such model, no average of it, or one of another trunk."""
    if average and not saved.model(model)["has_ema"]:
        raise ValueError(f"{saved.path} holds no moving average of {model!r}: it was trained without one")
    wanted = architecture_to_dict(engine.spec.architecture)
    for field, value in architecture_to_dict(saved_architecture(saved, model)).items():
        if value != wanted[field]:
            raise ValueError(f"{saved.path} holds a model whose {field} is {value}, but this one's is {wanted[field]}")
