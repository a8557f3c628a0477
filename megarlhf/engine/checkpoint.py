"""Checkpoints that any layout can read: one folder for all that a stage needs to go on.

Every tensor is saved under its canonical parameter name with its place in the full parameter (models/parameters.py),
through megatron-core's dist_checkpointing:

    <model>.weights.<parameter>     float32 master weights
    <model>.exp_avg.<parameter>     Adam's first moment     (trained models)
    <model>.exp_avg_sq.<parameter>  Adam's second moment    (trained models)
    <model>.ema.<parameter>         float32 average         (where one is kept)

Beside the tensors, state.json holds what is plain: counters, cursors, architectures. A folder is written under a
temporary name and renamed when complete, so a folder with a checkpoint's name is a whole checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megarlhf.engine.engine import Engine
from megarlhf.engine.optimizer import Optimizer
from megarlhf.engine.trainable import TrainEngine
from megarlhf.models.architecture import Architecture, architecture_to_dict
from megarlhf.models.parameters import Shard, flat_ranges_counted, shard_of, shards_held
from megarlhf.models.transformer import ModelSpec
from megarlhf.parallel.collectives import broadcast_object, sum_over_data_parallel
from megarlhf.parallel.groups import ModelGroups, World

STATE_FILE = "state.json"
FORMAT = 1


@dataclass(frozen=True)
class Saved:
    """What state.json says of a checkpoint."""

    path: Path
    state: dict
    """The stage's own state, as it was given to `save`."""
    models: dict[str, dict]
    """Model name -> {"architecture", "head", "steps", "adam_steps", "has_ema", "grad_scaler"}."""

    def architecture(self, model: str) -> Architecture:
        """The saved model's architecture."""
        return Architecture(**self.models[model]["architecture"])


def save(path: Path, models: Mapping[str, TrainEngine], state: dict, world: World) -> None:
    """Write a checkpoint of `models` and the JSON-able `state` at `path`; a collective of the whole world."""
    partial = path.with_name(path.name + ".partial")
    if world.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    world.barrier()
    tensors: dict[str, ShardedTensor] = {}
    for name, engine in models.items():
        for kind, values in _full_local_tensors(engine).items():
            tensors.update(_sharded(f"{name}.{kind}", values, engine.spec, engine.groups, saving=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist_checkpointing.save(tensors, str(partial), validate_access_integrity=True)
    world.barrier()
    if world.rank == 0:
        described = {name: _describe(engine) for name, engine in models.items()}
        with open(partial / STATE_FILE, "w") as file:
            json.dump({"format": FORMAT, "state": state, "models": described}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    world.barrier()


def read_state(path: Path) -> Saved:
    """What a checkpoint holds. ValueError when `path` is none."""
    file = path / STATE_FILE
    if not file.is_file():
        raise ValueError(f"{path} is not a checkpoint: it has no {STATE_FILE}")
    content = json.loads(file.read_text())
    if content["format"] != FORMAT:
        raise ValueError(f"{path} has checkpoint format {content['format']}; this version reads format {FORMAT}")
    return Saved(path, content["state"], content["models"])


def load(path: Path, models: Mapping[str, TrainEngine]) -> Saved:
    """Restore weights, optimizers and averages of `models` from a checkpoint of any layout; a collective of the world.

    ValueError when the checkpoint does not hold such models, naming the first difference.
    """
    saved = read_state(path)
    wanted: dict[str, ShardedTensor] = {}
    for name, engine in models.items():
        _check_holds(saved, name, engine, average=engine.ema is not None)
        if (head := saved.models[name]["head"]) != engine.spec.head:
            raise ValueError(f"{path}: {name!r} has the head {head}, but this one's is {engine.spec.head}")
        kinds = ["weights", "exp_avg", "exp_avg_sq"] + (["ema"] if engine.ema is not None else [])
        for kind in kinds:
            empty = {parameter: torch.empty(p.shape, dtype=torch.float32) for parameter, p in engine.parameters().items()}
            wanted.update(_sharded(f"{name}.{kind}", empty, engine.spec, engine.groups, saving=False))
    loaded = _load_tensors(path, wanted)
    for name, engine in models.items():
        _restore(engine, saved.models[name], lambda kind, n=name: {p: loaded[f"{n}.{kind}.{p}"] for p in models[n].parameters()})
    return saved


def load_weights(path: Path, model: str, engine: Engine, *, average: bool = False) -> list[str]:
    """Fill an engine's weights from a saved model of the same trunk, whatever its layout, precision or head.

    Args:
        average: read the exponential moving average instead of the weights (ValueError when there is none).

    Returns: parameters that the checkpoint does not have (a scalar head over a saved language model); they keep their
    values. ValueError when the checkpoint does not hold the model, or another trunk, naming the first difference.
    """
    saved = read_state(path)
    _check_holds(saved, model, engine, average=average)
    kind = "ema" if average else "weights"
    same_head = saved.models[model]["head"] == engine.spec.head
    parameters = engine.parameters()
    missing = [] if same_head else [name for name in parameters if name.startswith(("scalar_head.", "output_layer."))]
    empty = {name: torch.empty(p.shape, dtype=torch.float32) for name, p in parameters.items() if name not in missing}
    loaded = _load_tensors(path, _sharded(f"{model}.{kind}", empty, engine.spec, engine.groups, saving=False))
    with torch.no_grad():
        for name in empty:
            parameters[name].copy_(loaded[f"{model}.{kind}.{name}"])
    if isinstance(engine, TrainEngine):
        engine.optimizer.adopt_parameters()
    return missing


def _describe(engine: TrainEngine) -> dict:
    scaler = engine.optimizer.megatron.grad_scaler
    return {
        "architecture": architecture_to_dict(engine.spec.architecture),
        "head": engine.spec.head,
        "steps": engine.steps,
        "adam_steps": engine.optimizer.updates,
        "has_ema": engine.ema is not None,
        "grad_scaler": {k: float(v) for k, v in scaler.state_dict().items()} if scaler is not None else None,
    }


def _full_local_tensors(engine: TrainEngine) -> dict[str, dict[str, Tensor]]:
    """Kind -> canonical name -> float32 tensor shaped as this rank's parameter, whole over data-parallel ranks."""
    shards = {shard.parameter: shard for shard in engine.optimizer.shards()}
    moments = engine.optimizer.moments()
    kinds = {
        "weights": {p: shard.main for p, shard in shards.items()},
        "exp_avg": {p: moments[p][0] for p in shards},
        "exp_avg_sq": {p: moments[p][1] for p in shards},
    }
    if engine.ema is not None:
        kinds["ema"] = engine.ema.averages
    names = engine.parameters()
    return {
        kind: {name: _joined(p, values.get(p), shards[p].start if p in shards else 0, engine.groups) for name, p in names.items()}
        for kind, values in kinds.items()
    }


def _joined(parameter: Tensor, piece: Tensor | None, start: int, groups: ModelGroups) -> Tensor:
    whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    if piece is not None:
        whole[start : start + piece.numel()] = piece.detach().view(-1)
    return sum_over_data_parallel(whole, groups).view(parameter.shape).cpu()


def _sharded(prefix: str, values: Mapping[str, Tensor], spec: ModelSpec, groups: ModelGroups, *, saving: bool) -> dict[str, ShardedTensor]:
    """Describe this rank's tensors by their place in the full parameters.

    Saving, only one rank describes each element: the first data-parallel copy, the first tensor-parallel rank of a
    replicated parameter, the first stage of a tied embedding. Loading, every rank reads what it holds.
    """
    place = groups.coordinates
    held = shards_held(spec.architecture, spec.head, groups.layout, place)
    described: dict[str, ShardedTensor] = {}
    for name, value in values.items():
        shard = held[name]
        counted = flat_ranges_counted(shard, spec.architecture, spec.head, groups.layout, place)
        if saving and not (place.dp == 0 and counted):
            continue
        for number, (mine, offset, piece) in enumerate(_pieces(shard, value, groups.layout.tp)):
            if saving and not mine:
                continue
            key = f"{prefix}.{name}"
            made = ShardedTensor.from_rank_offsets(key, piece, *offset, replica_id=0 if saving else groups.rank)
            described[f"{key}#{number}"] = made
    return described


def _pieces(shard: Shard, value: Tensor, tp: int) -> list[tuple[bool, list[tuple[int, int, int]], Tensor]]:
    """(whether this rank speaks for it, rank offsets, part of the tensor) of equal pieces of a parameter's slices."""
    dim = shard.spec.split_dim
    if dim is None:
        return [(shard.slices[0].copy == 0, [], value)]
    slices = [part for rank in range(tp) for part in shard_of(shard.spec, rank, tp).slices]
    unit = math.gcd(*(part.start for part in slices), *(part.size for part in slices))
    pieces = []
    for start, part in shard.placed():
        for offset in range(0, part.size, unit):
            place = (dim, (part.start + offset) // unit, shard.spec.shape[dim] // unit)
            pieces.append((part.copy == 0, [place], value.narrow(dim, start + offset, unit).contiguous()))
    return pieces


def _load_tensors(path: Path, wanted: dict[str, ShardedTensor]) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = dist_checkpointing.load(wanted, str(path), validate_access_integrity=False)
    joined: dict[str, list[Tensor]] = {}
    for key, tensor in loaded.items():
        joined.setdefault(key.split("#")[0], []).append(tensor)
    dims = {key.split("#")[0]: tensor.axis_fragmentations.index(max(tensor.axis_fragmentations)) for key, tensor in wanted.items()}
    return {name: torch.cat(parts, dim=dims[name]) if len(parts) > 1 else parts[0] for name, parts in joined.items()}


@torch.no_grad()
def _restore(engine: TrainEngine, described: dict, tensors) -> None:
    names = {parameter: name for name, parameter in engine.parameters().items()}
    weights, exp_avg, exp_avg_sq = tensors("weights"), tensors("exp_avg"), tensors("exp_avg_sq")
    averages = tensors("ema") if engine.ema is not None else {}
    for parameter, name in names.items():
        parameter.copy_(weights[name])
    moments = {}
    for shard in engine.optimizer.shards():
        name, span = names[shard.parameter], slice(shard.start, shard.start + shard.main.numel())
        shard.main.data.copy_(weights[name].view(-1)[span].view(shard.main.shape))
        moments[shard.parameter] = (exp_avg[name].view(-1)[span], exp_avg_sq[name].view(-1)[span])
        if engine.ema is not None:
            engine.ema.averages[shard.parameter].copy_(averages[name].view(-1)[span])
    engine.steps = described["steps"]
    engine.optimizer.restore(moments, updates=described["adam_steps"])
    if described["grad_scaler"] is not None and engine.optimizer.megatron.grad_scaler is not None:
        _restore_grad_scaler(engine.optimizer, described["grad_scaler"])


def _restore_grad_scaler(optimizer: Optimizer, values: dict[str, float]) -> None:
    scaler = optimizer.megatron.grad_scaler  # its own load_state_dict insists on a CUDA device
    scaler._scale.fill_(values["scale"])
    scaler._growth_tracker = int(values["growth_tracker"])
    scaler._hysteresis_tracker = int(values["hysteresis_tracker"])


def _check_holds(saved: Saved, model: str, engine: Engine, *, average: bool) -> None:
    """ValueError when the checkpoint holds no such model, no average of it, or one of another trunk."""
    if model not in saved.models:
        raise ValueError(f"{saved.path} holds no model named {model!r}; it holds: {', '.join(saved.models)}")
    if average and not saved.models[model]["has_ema"]:
        raise ValueError(f"{saved.path} holds no moving average of {model!r}: it was trained without one")
    wanted = architecture_to_dict(engine.spec.architecture)
    for field, value in architecture_to_dict(saved.architecture(model)).items():
        if value != wanted[field]:
            raise ValueError(f"{saved.path} holds a model whose {field} is {value}, but this one's is {wanted[field]}")


def newest(folder: Path, world: World) -> Path | None:
    """The newest whole checkpoint in a run's checkpoint folder, the same on every rank."""
    found = None
    if world.rank == 0 and folder.is_dir():
        whole = [path for path in folder.iterdir() if path.suffix != ".partial" and (path / STATE_FILE).is_file()]
        found = max(whole, key=lambda path: path.name, default=None)
    return broadcast_object(found)
