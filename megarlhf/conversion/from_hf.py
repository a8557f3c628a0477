"""From a Hugging Face folder to a checkpoint of ours."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megarlhf.conversion.hf_config import config_of, finished
from megarlhf.conversion.hf_folder import CONFIG, SCORE_BIAS, HuggingFaceModel, read_hf_folder
from megarlhf.conversion.incoming import PART_BYTES, tokenizer_beside, write_incoming
from megarlhf.storage.files import read_json

GENERATION = "generation_config.json"


def from_hf(
    source: Path, target: Path, *, eos_token: str | None = None, part_bytes: int = PART_BYTES, layers: int | None = None
) -> list[str]:
    """Convert the folder `source` to a checkpoint at `target`; returns what is to be said of it. See `write_incoming`.

    With `layers` the model is cut: its first so many layers, and what stands before and after the layers as it is.
    """
    whole = read_hf_folder(source)
    model = whole if layers is None else _cut(whole, layers)
    kind = whole.family.model_type
    if layers is not None:
        kind += f", its first {layers} of {whole.architecture.num_layers} layers"
    return write_incoming(
        model,
        target,
        kind=kind,
        tokenizer=tokenizer_beside(source),
        eos_token=eos_token,
        ends=_ends(source, whole.config),
        files={CONFIG: (source / CONFIG).read_bytes() if layers is None else _config_of_cut(model)},
        part_bytes=part_bytes,
    )


def _ends(folder: Path, config: Mapping[str, Any]) -> set[int]:
    """The ids that end what transformers generates: those of generation_config.json, else of config.json; none where neither says any."""
    file = folder / GENERATION
    said = (read_json(file) if file.is_file() else {}).get("eos_token_id", config.get("eos_token_id"))
    return {i for i in (said if isinstance(said, list) else [said]) if isinstance(i, int)}


def _cut(model: HuggingFaceModel, layers: int) -> HuggingFaceModel:
    """The model with its first layers only. ValueError where it has not more than that."""
    there = model.architecture.num_layers
    if not 1 <= layers < there:
        raise ValueError(f"--layers must be from 1 to {there - 1}, as {model.folder} has {there} layers, got {layers}; without it all stay")
    return dataclasses.replace(model, architecture=dataclasses.replace(model.architecture, num_layers=layers))


def _config_of_cut(model: HuggingFaceModel) -> bytes:
    """A config.json that describes what is left of it."""
    dtype, bias = model.dtype(model.specs()[0]), model.config.get(SCORE_BIAS, 0.0)
    trunk = config_of(model.architecture, model.config, None, None)
    text = json.dumps(finished(trunk, model.head, dtype, score_bias=bias, tokenizer=None), indent=2, sort_keys=True)
    return f"{text}\n".encode()
