"""From a checkpoint of ours to a Hugging Face folder, tensor by tensor, whatever the layout it was written in."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarlhf.conversion.families import FAMILIES, Family
from megarlhf.conversion.forms import their_shapes, to_theirs
from megarlhf.conversion.hf_config import config_of, finished
from megarlhf.conversion.hf_folder import BIAS_NAME, CONFIG, INDEX, ONE_FILE
from megarlhf.conversion.new_folder import new_folder
from megarlhf.conversion.tokenizer_files import copy_tokenizer, has_tokenizer, load_travelling
from megarlhf.data.tokenizers import Tokenizer
from megarlhf.engine.checkpoint import saved_architecture
from megarlhf.models.architecture import Architecture
from megarlhf.models.parameters import TIED_NAME, Head, parameter_specs
from megarlhf.storage.checkpoints import CheckpointReader, Saved
from megarlhf.storage.files import read_json, write_atomically
from megarlhf.storage.pieces import Piece
from megarlhf.storage.tensors import LazyTensor, write_tensors

SHARD_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Exported:
    """Which of a checkpoint's models goes out, and how."""

    saved: Saved
    model: str
    average: bool = False
    """Its moving average instead of its weights."""
    dtype: torch.dtype | None = None
    """None for what it is saved in. A scalar head keeps what it is saved in."""

    @property
    def head(self) -> Head:
        """Of the model."""
        return self.saved.model(self.model)["head"]

    @property
    def architecture(self) -> Architecture:
        """Of the model."""
        return saved_architecture(self.saved, self.model)


def to_hf(
    exported: Exported, target: Path, *, tokenizer_path: Path | None = None, family: str | None = None, shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Write the Hugging Face folder `target`; returns what is to be said of it.

    Args:
        tokenizer_path: instead of the tokenizer in the checkpoint's folder, or the one that its run was configured with.
        family: model_type to write; see `config_of` for what is taken without it.
    Holds one parameter at a time, with the tensors that it becomes. ValueError where something is not as it should be, OSError where
    writing fails.
    """
    source = tokenizer_path or _tokenizer_of(exported.saved)
    tokenizer = _checked_tokenizer(exported, source) if source is not None else None
    template = _own_config(exported.saved, source)
    if damages := exported.saved.damages():
        raise ValueError("\n".join(damages))
    reader = CheckpointReader(exported.saved)
    config = config_of(exported.architecture, template, family, tokenizer)
    read = _reading(exported, reader, FAMILIES[config["model_type"]])
    dtype = exported.dtype or reader.dtype(exported.model, _kind(exported), TIED_NAME)
    bias = float(read(BIAS_NAME)[0]) if exported.head == "scalar" else None
    config = finished(config, exported.head, dtype, score_bias=bias, tokenizer=tokenizer)
    tensors = _their_tensors(exported, reader, FAMILIES[config["model_type"]], read)
    with new_folder(target, sum(tensor.bytes for tensor in tensors.values())) as partial:
        _write_shards(partial, tensors, shard_bytes)
        write_atomically(partial / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
        if source is not None:
            copy_tokenizer(source, partial)
    notes = [f"{target}: {config['architectures'][0]}, {config['model_type']}, {dtype}, from {exported.saved.path} ({_said(exported)})"]
    if source is None:
        notes.append("no tokenizer goes with it: the checkpoint names none")
    if bias is not None:
        notes.append(f"the score's bias is {bias!r}, in {CONFIG} as score_bias: add it to transformers' logits for our scores")
    return notes


def _own_config(saved: Saved, tokenizer: Path | None) -> dict[str, Any] | None:
    """The config.json that the model came with, beside the checkpoint or its tokenizer, if it came with one."""
    folders = [saved.path, *([tokenizer if tokenizer.is_dir() else tokenizer.parent] if tokenizer is not None else [])]
    files = [folder / CONFIG for folder in folders if (folder / CONFIG).is_file()]
    return read_json(files[0]) if files else None


def _said(exported: Exported) -> str:
    return f"{exported.model}, moving average" if exported.average else exported.model


def _kind(exported: Exported) -> str:
    return "ema" if exported.average else "weights"


def _tokenizer_of(saved: Saved) -> Path | None:
    """Where the tokenizer of a checkpoint lies. ValueError where it is not there."""
    if has_tokenizer(saved.path):
        return saved.path
    configured = saved.state.get("config", {}).get("tokenizer", {}).get("path")
    if configured is None or saved.state.get("stage") == "convert":
        return None
    if not Path(configured).exists():
        raise ValueError(f"{saved.path} was trained with the tokenizer {configured}, which is not there: say where with --tokenizer")
    return Path(configured)


def _checked_tokenizer(exported: Exported, path: Path) -> Tokenizer:
    state = exported.saved.state
    tokenizer = load_travelling(path, state.get("config", {}).get("tokenizer", {}).get("eos_token"))
    expected = state.get("fingerprints", {}).get("tokenizer")
    if expected is not None and expected != tokenizer.fingerprint:
        raise ValueError(f"{path} is not the tokenizer that {exported.saved.path} was trained with: say where that is with --tokenizer")
    return tokenizer


def _reading(exported: Exported, reader: CheckpointReader, family: Family) -> Callable[[str], list[Tensor]]:
    """A function that reads one of our parameters as the tensors that it becomes, and remembers the last."""
    shapes = {spec.name: spec.shape for spec in parameter_specs(exported.architecture, exported.head)}

    @functools.lru_cache(maxsize=1)
    def read(name: str) -> list[Tensor]:
        whole = torch.empty(math.prod(shapes[name]), dtype=reader.dtype(exported.model, _kind(exported), name))
        reader.fill(whole, exported.model, _kind(exported), name, Piece.whole(shapes[name]))
        if name == BIAS_NAME:
            return [whole]
        return to_theirs(family.source(name).form, whole.view(shapes[name]), exported.architecture)

    return read


def _their_tensors(
    exported: Exported, reader: CheckpointReader, family: Family, read: Callable[[str], list[Tensor]]
) -> dict[str, LazyTensor]:
    tensors = {}
    for spec in parameter_specs(exported.architecture, exported.head):
        if spec.name == BIAS_NAME:
            continue
        source = family.source(spec.name)
        kept = reader.dtype(exported.model, _kind(exported), spec.name)
        dtype = kept if spec.name.startswith("scalar_head.") else exported.dtype or kept
        for number, shape in enumerate(their_shapes(source.form, spec.shape, exported.architecture)):
            make = functools.partial(_one_of, read, spec.name, number, dtype)
            tensors[source.names[number]] = LazyTensor(shape, dtype, make)
    return tensors


def _one_of(read: Callable[[str], list[Tensor]], name: str, number: int, dtype: torch.dtype) -> Tensor:
    return read(name)[number].to(dtype)


def _write_shards(folder: Path, tensors: Mapping[str, LazyTensor], shard_bytes: int) -> None:
    shards = list(_shards(tensors, shard_bytes))
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [ONE_FILE]
    for name, shard in zip(names, shards, strict=True):
        write_tensors(folder / name, shard, {"format": "pt"})
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index: dict[str, Any] = {"metadata": {"total_size": sum(t.bytes for t in tensors.values())}, "weight_map": weight_map}
        write_atomically(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _shards(tensors: Mapping[str, LazyTensor], shard_bytes: int) -> Iterator[dict[str, LazyTensor]]:
    shard: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if shard and sum(other.bytes for other in shard.values()) + tensor.bytes > shard_bytes:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard
