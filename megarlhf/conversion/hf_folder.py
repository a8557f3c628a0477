"""A Hugging Face folder, looked through before anything is read: which tensor lies where, and that all are there and no others."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarlhf.conversion.configuration import architecture_from_hf
from megarlhf.conversion.families import FAMILIES, Family
from megarlhf.conversion.forms import their_shapes, to_ours
from megarlhf.models.architecture import Architecture
from megarlhf.models.parameters import TIED_NAME, Head, ParameterSpec, parameter_specs
from megarlhf.storage.files import read_json
from megarlhf.storage.tensors import TensorFile

CONFIG = "config.json"
ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SCORE_BIAS = "score_bias"
"""Key of config.json under which the bias of a scalar head travels: transformers' classifiers have none, and keep the key."""
BIAS_NAME = "scalar_head.bias"
SHOWN = 5
"""Problems with tensors that a message lists."""
COMPARED = 2**22
"""Elements of two tensors that are compared at a time."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies."""

    file: TensorFile
    name: str
    """In the file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As the file says it."""
        return self.file.entries[self.name].shape

    @property
    def dtype(self) -> torch.dtype | None:
        """As the file says it; None where it is one that is not read."""
        return self.file.entries[self.name].dtype

    def __str__(self) -> str:
        return f"{self.file.path}: {self.name}"


@dataclass(frozen=True)
class HuggingFaceModel:
    """A model in a Hugging Face folder, of which nothing is read yet."""

    folder: Path
    config: Mapping[str, Any]
    family: Family
    architecture: Architecture
    head: Head
    places: Mapping[str, Place]
    """Their tensors, by the names that the family has."""

    def specs(self) -> list[ParameterSpec]:
        """Our parameters."""
        return parameter_specs(self.architecture, self.head)

    def dtype(self, spec: ParameterSpec) -> torch.dtype:
        """What one of our parameters is held in: theirs, or what holds each of theirs exactly."""
        if spec.name == BIAS_NAME:
            return torch.float32
        first, *others = (self.places[name].dtype for name in self.family.source(spec.name).names)
        for other in others:
            first = torch.promote_types(first, other)
        return first

    def read(self, spec: ParameterSpec) -> Tensor:
        """One of our parameters, whole, vocabulary padded."""
        if spec.name == BIAS_NAME:
            return torch.tensor([self.config.get(SCORE_BIAS, 0.0)], dtype=torch.float32)
        source = self.family.source(spec.name)
        theirs = [place.file.read(place.name) for place in (self.places[name] for name in source.names)]
        return to_ours(source.form, theirs, self.architecture)


def read_hf_folder(folder: Path) -> HuggingFaceModel:
    """The model in `folder`. ValueError names what is missing, left over, misshapen or not supported, with its file."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    config = read_json(folder / CONFIG)
    found = _named_tensors(folder)
    try:
        architecture = architecture_from_hf(config)
        family = FAMILIES[config["model_type"]]
        head = _head(config, family)
        if architecture.num_layers > len(found):
            raise ValueError(f"it has {architecture.num_layers} layers, and the files hold {len(found)} tensors")
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    model = HuggingFaceModel(folder, config, family, architecture, head, _by_family(found, family))
    if problems := list(_problems(model)):
        more = f"\nand {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError("\n".join(problems[:SHOWN]) + more)
    return model


def _named_tensors(folder: Path) -> dict[str, Place]:
    """Name -> place of every tensor in a folder."""
    single, index = folder / ONE_FILE, folder / INDEX
    if single.is_file() and index.is_file():
        raise ValueError(f"{folder} holds both {ONE_FILE} and {INDEX}: remove the one that is not the model")
    if single.is_file():
        file = TensorFile(single)
        return {name: Place(file, name) for name in file.entries}
    if index.is_file():
        return _sharded(index)
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if re.fullmatch(r"(pytorch_model.*|.*\.(bin|pt|pth|ckpt|pkl))", name)]
    if pickles:
        raise ValueError(
            f"{folder / pickles[0]} is a pickle, which can run code when it is read, and is not opened; save the model as safetensors "
            "(transformers' save_pretrained does)"
        )
    raise ValueError(f"{folder} holds neither {ONE_FILE} nor {INDEX}; it holds: {', '.join(names[:12]) or 'nothing'}")


def _sharded(index: Path) -> dict[str, Place]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} is damaged: weight_map must be an object that names each tensor's file")
    files: dict[str, TensorFile] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{index}: the file of {name} must be the name of a safetensors file beside it, got {shard!r}")
        if shard not in files:
            if not (index.parent / shard).is_file():
                raise ValueError(f"{index} names {shard}, which is missing")
            files[shard] = TensorFile(index.parent / shard)
        if name not in files[shard].entries:
            raise ValueError(f"{index}: {name} is not in {shard}")
    for shard, file in files.items():
        if unnamed := [name for name in file.entries if weight_map.get(name) != shard]:
            raise ValueError(f"{file.path} holds {unnamed[0]}, which {index.name} does not say of it")
    return {name: Place(files[shard], name) for name, shard in weight_map.items()}


def _head(config: Mapping[str, Any], family: Family) -> Head:
    classes = config.get("architectures")
    heads: dict[str, Head] = {family.language_model: "lm", family.classifier: "scalar"}
    if not isinstance(classes, list) or len(classes) != 1 or not isinstance(classes[0], str) or classes[0] not in heads:
        raise ValueError(f"architectures {classes!r} is not supported, only [{family.language_model}] or [{family.classifier}]")
    bias = config.get(SCORE_BIAS, 0.0)
    if isinstance(bias, bool) or not isinstance(bias, int | float) or not math.isfinite(torch.tensor(float(bias)).item()):
        raise ValueError(f"{SCORE_BIAS} must be a number, got {bias!r}")
    return heads[classes[0]]


def _by_family(found: Mapping[str, Place], family: Family) -> dict[str, Place]:
    """The same tensors by the family's names: aliases resolved, and the trunk's prefix added where the files leave it out."""
    bare = not any(name.startswith(family.prefix) for name in found)
    places: dict[str, Place] = {}
    for name, place in found.items():
        ours = family.aliases.get(name, name)
        if bare and ours not in (family.unembedding, family.score):
            ours = family.prefix + ours
        if ours in places:
            raise ValueError(f"{place} is the same as {places[ours].name}")
        places[ours] = place
    return places


def _problems(model: HuggingFaceModel) -> Iterator[str]:
    """Whatever stands between the files and the architecture that config.json describes."""
    used = set()
    for spec in model.specs():
        if spec.name == BIAS_NAME:
            continue
        source = model.family.source(spec.name)
        for name, shape in zip(source.names, their_shapes(source.form, spec.shape, model.architecture), strict=True):
            used.add(name)
            place = model.places.get(name)
            if place is None:
                yield f"{model.folder}: no file holds {name}, which {CONFIG} needs"
            elif place.shape != shape:
                yield f"{place} has the shape {list(place.shape)}, and {CONFIG} needs {list(shape)}"
            elif place.dtype is None or not place.dtype.is_floating_point:
                yield f"{place} is of a kind that is not supported ({place.dtype}), only F64, F32, F16, BF16"
    unembedding = model.places.get(model.family.unembedding) if model.head == "lm" and model.architecture.tied_embeddings else None
    if unembedding is not None:
        used.add(model.family.unembedding)
        embedding = model.places.get(model.family.source(TIED_NAME).names[0])
        if embedding is not None and not _same(unembedding, embedding):
            yield f"{unembedding} is not the embedding, and {CONFIG} says that they are tied (tie_word_embeddings)"
    for name, place in model.places.items():
        short = name.removeprefix(model.family.prefix)
        if name not in used and not any(re.fullmatch(pattern, short) for pattern in model.family.buffers):
            yield f"{place} is left over: {CONFIG} describes no such tensor"


def _same(one: Place, other: Place) -> bool:
    """Whether two tensors are equal, bit by bit, in what they are held in too; a part of each in memory at a time."""
    if one.shape != other.shape or one.dtype != other.dtype or one.dtype is None:
        return False
    size = math.prod(one.shape)
    spans = [(start, min(start + COMPARED, size)) for start in range(0, size, COMPARED)]
    return all(_bits(one, *span).equal(_bits(other, *span)) for span in spans)


def _bits(place: Place, start: int, stop: int) -> Tensor:
    return place.file.read(place.name, start, stop).view(torch.uint8)
