"""A model from elsewhere becomes a checkpoint of ours, tensor by tensor: no model is built, and any layout reads the result."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from megarlhf.conversion.new_folder import new_folder
from megarlhf.conversion.tokenizer_files import copy_tokenizer, has_tokenizer, load_travelling
from megarlhf.data.tokenizers import said_of_opening
from megarlhf.models.architecture import Architecture, architecture_to_dict
from megarlhf.models.parameters import Head, ParameterSpec, parameter_specs
from megarlhf.storage.checkpoints import Part, finish, write_part
from megarlhf.storage.files import write_atomically
from megarlhf.storage.pieces import Piece
from megarlhf.storage.tensors import LazyTensor

MODEL = "model"
"""Name of the only model of a converted checkpoint."""
PART_BYTES = 4 * 2**30


class Incoming(Protocol):
    """A model whose files have been looked through, and of which nothing is read yet."""

    folder: Path
    architecture: Architecture
    head: Head

    def dtype(self, spec: ParameterSpec) -> torch.dtype:
        """What one of our parameters is held in."""

    def read(self, spec: ParameterSpec) -> Tensor:
        """One of our parameters, whole, vocabulary padded."""


def write_incoming(
    model: Incoming,
    target: Path,
    *,
    kind: str,
    tokenizer: Path | None,
    eos_token: str | None = None,
    ends: Collection[int] = (),
    files: Mapping[str, bytes] = MappingProxyType({}),
    part_bytes: int = PART_BYTES,
) -> list[str]:
    """Write a model as a checkpoint at `target`, in the precision of its files; returns what is to be said of it.

    Holds one parameter at a time: the tensors that it is made of, and itself. `target` gets the tokenizer's files too, and is what
    `load` and `tokenizer.path` can name. ValueError where something is not as it should be, OSError where writing fails.

    Args: kind: what the model is called. tokenizer: a file or a folder. ends: the ids that the model's files say texts end with, if they
    say any. files: name -> content of what goes beside it.
    """
    specs = parameter_specs(model.architecture, model.head)
    fingerprints, notes = _tokenizer(model, tokenizer, eos_token, ends)
    sizes = {spec.name: _lazy(model, spec).bytes for spec in specs}
    with new_folder(target, sum(sizes.values())) as partial:
        for name, content in files.items():
            write_atomically(partial / name, content)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, partial)
        parts = [_write(target, number, model, part) for number, part in enumerate(_in_parts(specs, sizes, part_bytes))]
        state = {
            "stage": "convert",
            "step": 0,
            "run": None,
            "config": {"tokenizer": {"path": str(target), "eos_token": eos_token}},
            "sources": {},
            "fingerprints": fingerprints,
            "cursors": {},
        }
        finish(target, parts, state, {MODEL: _described(model)})
    what = {"lm": "language model", "scalar": "reward or value model"}[model.head]
    parameters = sum(math.prod(spec.shape) for spec in specs)
    return [f"{target}: a {what} of {parameters:,} parameters (vocabulary padded) from {model.folder} ({kind})", *notes]


def tokenizer_beside(folder: Path) -> Path | None:
    """A folder that holds a tokenizer, or None."""
    return folder if has_tokenizer(folder) else None


def _tokenizer(model: Incoming, path: Path | None, eos_token: str | None, ends: Collection[int]) -> tuple[dict[str, str], list[str]]:
    """(fingerprints for the state, what is to be said) of the model's tokenizer. ValueError where it does not fit the model."""
    if path is None:
        return {}, [f"{model.folder} holds no tokenizer: bring the one that the model was trained with as tokenizer.path"]
    tokenizer = load_travelling(path, eos_token)
    ids, rows = tokenizer.vocab_size, model.architecture.vocab_size
    if ids > rows:
        raise ValueError(f"{path}: its tokenizer has {ids} ids, and the model's vocabulary {rows}: they do not belong together")
    more = [f"the vocabulary has {rows - ids} ids that the tokenizer has no text for; they stay"] if ids < rows else []
    if ends and tokenizer.eos_id not in ends:
        said = ", ".join(map(str, sorted(ends)))
        more.append(
            f"its files say that texts end with token {said}, and its tokenizer that they do with {tokenizer.eos_id}: answers will not end "
            "where they did; is this meant? --eos-token names another"
        )
    return {"tokenizer": tokenizer.fingerprint}, [*more, *filter(None, [said_of_opening(tokenizer)])]


def _lazy(model: Incoming, spec: ParameterSpec) -> LazyTensor:
    return LazyTensor((math.prod(spec.shape),), model.dtype(spec), lambda: model.read(spec).reshape(-1))


def _in_parts(specs: list[ParameterSpec], sizes: dict[str, int], part_bytes: int) -> Iterator[list[ParameterSpec]]:
    """Parameters of about `part_bytes` together, in order; a larger one alone."""
    part: list[ParameterSpec] = []
    for spec in specs:
        if part and sum(sizes[other.name] for other in part) + sizes[spec.name] > part_bytes:
            yield part
            part = []
        part.append(spec)
    yield part


def _write(target: Path, number: int, model: Incoming, specs: list[ParameterSpec]) -> Part:
    tensors = {MODEL: {"weights": {spec.name: _lazy(model, spec) for spec in specs}}}
    return write_part(target, number, tensors, {MODEL: {spec.name: Piece.whole(spec.shape) for spec in specs}})


def _described(model: Incoming) -> dict:
    """What state.json says of it: as a trained one, but that there are no moments to go on with."""
    return {
        "architecture": architecture_to_dict(model.architecture),
        "head": model.head,
        "steps": 0,
        "adam_steps": 0,
        "has_moments": False,
        "has_ema": False,
        "grad_scaler": None,
    }
