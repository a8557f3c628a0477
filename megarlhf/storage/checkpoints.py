"""The form of a checkpoint on disk, which any layout can read: no model and no process group is needed to understand it.

    step_00000010/
      part_00000.safetensors   what rank 0 owned: flat float32 pieces of parameters, and where each lies in the whole
      part_00001.safetensors   ...
      state.json               everything plain: the stage's state, the models, which part holds what, and every file's checksum

A tensor of a part is named <model>.<kind>.<entry>; an entry is a parameter, or parameter#n where a part holds several of its pieces;
kinds are "weights" (master weights), "exp_avg" and "exp_avg_sq" (Adam's
moments) and "ema" (moving average). state.json carries its own checksum. Nothing in a checkpoint can run code when it is read.
A folder is written under another name and renamed when complete, so a folder with a checkpoint's name is a whole one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarlhf.storage.files import read_json, sync_folder, write_atomically
from megarlhf.storage.pieces import Piece, overlaps
from megarlhf.storage.tensors import LazyTensor, Seal, TensorFile, damage, write_tensors

STATE_FILE = "state.json"
FORMAT = 3
PIECES = "pieces"


@dataclass(frozen=True)
class Part:
    """One file of a checkpoint, as its writer describes it."""

    file: str
    seal: Seal
    entries: dict[str, list[str]]
    """Model -> the pieces of parameters that the file holds."""


@dataclass(frozen=True)
class Saved:
    """What state.json says of a checkpoint."""

    path: Path
    state: dict[str, Any]
    """The stage's own state, as it was given to `finish`."""
    models: dict[str, dict[str, Any]]
    """Model name -> {"architecture", "head", "steps", "adam_steps", "has_ema", "grad_scaler"}."""
    files: dict[str, Seal]
    """Every other file of the checkpoint."""
    holders: dict[str, dict[str, list[tuple[str, str]]]] = field(repr=False)
    """Model -> parameter -> (file, entry) of every piece of it."""
    identity: str
    """The checksum of all that: equal for equal checkpoints, wherever they lie."""

    def model(self, name: str) -> dict[str, Any]:
        """The entry of a model. ValueError names what there is instead."""
        if name not in self.models:
            raise ValueError(f"{self.path} holds no model named {name!r}; it holds: {', '.join(self.models)}")
        return self.models[name]

    def damages(self, share: int = 0, of: int = 1) -> list[str]:
        """What is wrong with each damaged or missing file, reading every `of`-th from number `share` on."""
        checked = sorted(self.files)[share::of]
        return [wrong for name in checked if (wrong := damage(self.path / name, self.files[name])) is not None]


def entry_name(parameter: str, number: int) -> str:
    """The name of a part's piece `number` of a parameter."""
    return f"{parameter}#{number}" if number else parameter


def partial_folder(path: Path) -> Path:
    """Where a checkpoint is written before it has its name."""
    return path.with_name(path.name + ".partial")


def write_part(
    path: Path, number: int, tensors: Mapping[str, Mapping[str, Mapping[str, Tensor | LazyTensor]]], pieces: Mapping[str, Mapping]
) -> Part:
    """Write one owner's tensors into the unfinished checkpoint of `path`. OSError where that fails.

    Args:
        tensors: model -> kind -> entry -> [n], float32 as a rule; a reader casts.
        pieces: model -> entry -> the `Piece` that the tensors of each kind are.
    """
    file = f"part_{number:05d}.safetensors"
    flat = {f"{m}.{kind}.{p}": tensor for m, kinds in tensors.items() for kind, values in kinds.items() for p, tensor in values.items()}
    described = {model: {name: piece.to_json() for name, piece in of_model.items()} for model, of_model in pieces.items()}
    seal = write_tensors(partial_folder(path) / file, flat, {PIECES: json.dumps(described, separators=(",", ":"))})
    return Part(file, seal, {model: list(of_model) for model, of_model in pieces.items()})


def finish(path: Path, parts: Iterable[Part], state: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]) -> None:
    """Write state.json beside all parts and give the checkpoint its name; one that had the name before goes. OSError where that fails."""
    partial = partial_folder(path)
    parts = sorted(parts, key=lambda part: part.file)
    holders: dict[str, dict[str, list[tuple[str, str]]]] = {model: {} for model in models}
    for part in parts:
        for model, entries in part.entries.items():
            for entry in entries:
                holders[model].setdefault(entry.partition("#")[0], []).append((part.file, entry))
    content = {
        "format": FORMAT,
        "state": state,
        "models": models,
        "files": {part.file: asdict(part.seal) for part in parts},
        "holders": holders,
    }
    write_atomically(partial / STATE_FILE, json.dumps({"sha256": _digest(content), **content}, indent=1))
    replaced = path.with_name(path.name + ".replaced.partial")
    if path.exists():
        os.replace(path, replaced)
    os.replace(partial, path)
    sync_folder(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def read_saved(path: Path) -> Saved:
    """What a checkpoint holds. ValueError when `path` is none, or its state.json is damaged or of another format."""
    if not (path / STATE_FILE).is_file():
        raise ValueError(f"{path} is not a checkpoint: it has no {STATE_FILE}")
    content = read_json(path / STATE_FILE)
    if content.get("format") != FORMAT:
        raise ValueError(f"{path} has checkpoint format {content.get('format')}; this version reads format {FORMAT}")
    identity = content.pop("sha256", None)
    if identity != _digest(content):
        raise ValueError(f"{path / STATE_FILE} is damaged: its content is not what was written (checksum)")
    try:
        files = {name: Seal(**seal) for name, seal in content["files"].items()}
        return Saved(path, content["state"], content["models"], files, content["holders"], identity)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / STATE_FILE} is damaged: it lacks what every checkpoint has ({error})") from error


class CheckpointReader:
    """Reads parts of the tensors of one checkpoint, opening only the files that hold them."""

    def __init__(self, saved: Saved) -> None:
        self.saved = saved
        self._files: dict[str, TensorFile] = {}
        self._pieces: dict[str, dict[str, dict[str, list]]] = {}

    def parameters(self, model: str) -> set[str]:
        """Names of the parameters that a saved model has."""
        return set(self.saved.holders[model])

    def dtype(self, model: str, kind: str, parameter: str) -> torch.dtype:
        """What a parameter is saved in. ValueError where the checkpoint does not hold it."""
        for name, entry in self.saved.holders[model].get(parameter, []):
            saved = self._opened(name, model, entry)[0].entries.get(f"{model}.{kind}.{entry}")
            if saved is not None and saved.dtype is not None:
                return saved.dtype
        raise ValueError(f"{self.saved.path} does not hold {model}.{kind}.{parameter}")

    @torch.no_grad()
    def fill(self, out: Tensor, model: str, kind: str, parameter: str, target: Piece) -> None:
        """Set `out` [n] to the elements of a parameter that `target` describes, cast to its dtype.

        What lies in one piece of a file as it does in `out` is read where it belongs; else one piece at a time is held besides.
        ValueError where the checkpoint does not have them all, or has another shape.
        """
        missing = target.num_elements
        for name, entry in self.saved.holders[model].get(parameter, []):
            file, source = self._opened(name, model, entry)
            if source.shape != target.shape:
                shapes = f"{list(source.shape)}, but this one's is {list(target.shape)}"
                raise ValueError(f"{self.saved.path}: {model}'s {parameter} is {shapes}")
            shared, tensor = overlaps(source, target), f"{model}.{kind}.{entry}"
            if not shared:
                continue
            first, last = min(part.source_span[0] for part in shared), max(part.source_span[1] for part in shared)
            if source == target and _can_be_read_into(out, file, tensor):
                file.read_into(out, tensor)
            else:
                values = file.read(tensor, first, last)
                for part in shared:
                    part.target(out).copy_(part.source(values, first))
            missing -= sum(part.rows * part.columns for part in shared)  # no element is in two pieces
        if missing:
            where = f"{missing} of the {target.num_elements} elements wanted of"
            raise ValueError(f"{self.saved.path} does not hold {where} {model}.{kind}.{parameter}")

    def _opened(self, name: str, model: str, entry: str) -> tuple[TensorFile, Piece]:
        if name not in self._files:
            self._files[name] = TensorFile(self.saved.path / name)
            self._pieces[name] = json.loads(self._files[name].metadata[PIECES])
        return self._files[name], Piece.from_json(self._pieces[name][model][entry])


def _can_be_read_into(out: Tensor, file: TensorFile, tensor: str) -> bool:
    """Whether `out` can take the bytes of a saved tensor as they are."""
    entry = file.entries.get(tensor)
    return entry is not None and entry.dtype == out.dtype and out.device.type == "cpu" and out.is_contiguous()


def _digest(content: Mapping[str, Any]) -> str:
    """Of the values, however they are written down."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
