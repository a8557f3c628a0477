"""From a Hugging Face folder to a checkpoint of ours, tensor by tensor: no model is built, and any layout reads the result."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

from megarlhf.conversion.hf_config import config_of, finished
from megarlhf.conversion.hf_folder import CONFIG, SCORE_BIAS, HuggingFaceModel, read_hf_folder
from megarlhf.conversion.new_folder import new_folder
from megarlhf.conversion.tokenizer_files import copy_tokenizer, has_tokenizer, load_travelling
from megarlhf.models.architecture import architecture_to_dict
from megarlhf.models.parameters import ParameterSpec
from megarlhf.storage.checkpoints import Part, finish, write_part
from megarlhf.storage.files import write_atomically
from megarlhf.storage.pieces import Piece
from megarlhf.storage.tensors import LazyTensor

MODEL = "model"
"""Name of the only model of a converted checkpoint."""
PART_BYTES = 4 * 2**30


def from_hf(
    source: Path, target: Path, *, eos_token: str | None = None, part_bytes: int = PART_BYTES, layers: int | None = None
) -> list[str]:
    """Convert the folder `source` to a checkpoint at `target`, in the precision of its files; returns what is to be said of it.

    With `layers` the model is cut: its first so many layers, and what stands before and after the layers as it is. One parameter is held
    at a time: the tensors that it is made of, and itself. `target` gets the tokenizer's files too, and is what `load` and
    `tokenizer.path` can name. ValueError where something is not as it should be, OSError where writing fails.
    """
    whole = read_hf_folder(source)
    model = whole if layers is None else _cut(whole, layers)
    fingerprints, notes = _tokenizer(model, eos_token)
    sizes = {spec.name: _lazy(model, spec).bytes for spec in model.specs()}
    with new_folder(target, sum(sizes.values())) as partial:
        write_atomically(partial / CONFIG, (source / CONFIG).read_bytes() if model is whole else _config_of_cut(model))
        copy_tokenizer(source, partial)
        parts = [_write(target, number, model, specs) for number, specs in enumerate(_in_parts(model, sizes, part_bytes))]
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
    kind = {"lm": "language model", "scalar": "reward or value model"}[model.head]
    parameters = sum(math.prod(spec.shape) for spec in model.specs())
    cut = f", its first {layers} of {whole.architecture.num_layers} layers" if layers is not None else ""
    said = f"{target}: a {kind} of {parameters:,} parameters (vocabulary padded) from {source} ({model.family.model_type}){cut}"
    return [said, *notes]


def _cut(model: HuggingFaceModel, layers: int) -> HuggingFaceModel:
    """The model with its first layers only. ValueError where it has not more than that."""
    there = model.architecture.num_layers
    if not 1 <= layers < there:
        raise ValueError(f"--layers must be from 1 to {there - 1}, as {model.folder} has {there} layers, got {layers}; without it all stay")
    return dataclasses.replace(model, architecture=dataclasses.replace(model.architecture, num_layers=layers))


def _config_of_cut(model: HuggingFaceModel) -> str:
    """A config.json that describes what is left of it."""
    dtype, bias = model.dtype(model.specs()[0]), model.config.get(SCORE_BIAS, 0.0)
    trunk = config_of(model.architecture, model.config, None, None)
    return json.dumps(finished(trunk, model.head, dtype, score_bias=bias, tokenizer=None), indent=2, sort_keys=True) + "\n"


def _tokenizer(model: HuggingFaceModel, eos_token: str | None) -> tuple[dict[str, str], list[str]]:
    """(fingerprints for the state, what is to be said) of the folder's tokenizer. ValueError where it does not fit the model."""
    if not has_tokenizer(model.folder):
        return {}, [f"{model.folder} holds no tokenizer: bring the one that the model was trained with as tokenizer.path"]
    tokenizer = load_travelling(model.folder, eos_token)
    ids, rows = tokenizer.vocab_size, model.architecture.vocab_size
    if ids > rows:
        raise ValueError(f"{model.folder}: its tokenizer has {ids} ids, and the model's vocabulary {rows}: they do not belong together")
    more = [f"the vocabulary has {rows - ids} ids that the tokenizer has no text for; they stay"] if ids < rows else []
    return {"tokenizer": tokenizer.fingerprint}, more


def _lazy(model: HuggingFaceModel, spec: ParameterSpec) -> LazyTensor:
    return LazyTensor((math.prod(spec.shape),), model.dtype(spec), lambda: model.read(spec).reshape(-1))


def _in_parts(model: HuggingFaceModel, sizes: dict[str, int], part_bytes: int) -> Iterator[list[ParameterSpec]]:
    """Parameters of about `part_bytes` together, in order; a larger one alone."""
    part: list[ParameterSpec] = []
    for spec in model.specs():
        if part and sum(sizes[other.name] for other in part) + sizes[spec.name] > part_bytes:
            yield part
            part = []
        part.append(spec)
    yield part


def _write(target: Path, number: int, model: HuggingFaceModel, specs: list[ParameterSpec]) -> Part:
    tensors = {MODEL: {"weights": {spec.name: _lazy(model, spec) for spec in specs}}}
    return write_part(target, number, tensors, {MODEL: {spec.name: Piece.whole(spec.shape) for spec in specs}})


def _described(model: HuggingFaceModel) -> dict:
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
