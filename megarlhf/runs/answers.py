"""Answers in a run's folder stand there with the input that they belong to, and are not written over by those to another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from megarlhf.config.inference import EvaluateConfig, GenerateConfig
from megarlhf.config.loader import to_dict
from megarlhf.data.tokenized import PromptRow
from megarlhf.runs.folder import Run
from megarlhf.storage.files import read_json

ANSWERS_FILE = "responses.jsonl"
INPUTS_FILE = "inputs.json"
PARTS_FOLDER = "answers"
"""What the ranks have answered so far, until all is answered: see runs/partial_answers.py."""
HOW_THEY_ARE_MADE = ("max_batch_size", "kv_cache_bytes", "cuda_graphs")
"""Keys of `sampling` that decide nothing about the answers."""


def inputs_of(
    config: GenerateConfig | EvaluateConfig, fingerprints: Mapping[str, str], prompts: Sequence[PromptRow], *, weights: str | None = None
) -> dict[str, Any]:
    """What decides which answers a run gives to which questions, and in what form: plain values by name.

    `weights`: the identity of the model's checkpoint, where some of the answers may be there already: all are to be of one model.
    """
    fields = json.dumps([dict(row.fields) for row in prompts]).encode()
    model = {name: getattr(config.model, name) for name in ("load", "load_model", "load_average")}
    model |= {"identity": weights} if weights is not None else {}
    sampling = {name: value for name, value in to_dict(config)["sampling"].items() if name not in HOW_THEY_ARE_MADE}
    several = {"samples_per_prompt": config.samples_per_prompt} if isinstance(config, GenerateConfig) else {}
    return several | {
        "model": model,
        "tokenizer": fingerprints["tokenizer"],
        "prompts": fingerprints.get("prompts"),
        "fields of prompts": hashlib.sha256(fields).hexdigest(),
        "sampling": sampling,
        "run.seed": config.run.seed,
    }


def answers_to_other_input(run: Run, inputs: Mapping[str, Any]) -> list[str]:
    """What speaks against writing this input's answers into a run's folder, on the rank that writes: those to another one."""
    held = next((run.dir / name for name in (ANSWERS_FILE, PARTS_FOLDER) if (run.dir / name).exists()), None)
    if not run.is_writer or held is None:
        return []
    way_out = "choose another run.dir, or remove it"
    if not (run.dir / INPUTS_FILE).exists():
        return [f"run.dir: {held} holds answers, and nothing says to what; {way_out}"]
    try:
        before = read_json(run.dir / INPUTS_FILE)
    except ValueError as error:
        return [f"run.dir: {error}"]
    differing = [name for name, value in inputs.items() if before.get(name) != value]
    return [f"run.dir: {held} holds answers to other input ({', '.join(differing)}); {way_out}"] if differing else []
