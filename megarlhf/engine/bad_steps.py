"""An optimizer step whose loss or gradients were not finite, as a file: all that it was given, so that it can be taken again.

One safetensors file: the batches of the terms as tensors, everything else as JSON in the file's metadata. Weights are not in it: those
are a checkpoint's. Nothing in the file can run code; losses and batches are looked up by name among those that there are.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarlhf.batch import Experience, PreferenceBatch, RankingBatch, Rows, TextBatch, ValueTargets
from megarlhf.engine.terms import DpoLoss, LanguageModelLoss, Loss, PolicyLoss, RankingLoss, Term, ValueLoss
from megarlhf.engine.trainable import BadStep, TrainEngine
from megarlhf.models.architecture import Architecture
from megarlhf.models.transformer import ModelSpec
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.storage.tensors import TensorFile, write_tensors

LOSSES: dict[str, type[Loss]] = {cls.__name__: cls for cls in (PolicyLoss, ValueLoss, LanguageModelLoss, RankingLoss, DpoLoss)}
BATCHES: dict[str, type[Rows]] = {cls.__name__: cls for cls in (Experience, ValueTargets, TextBatch, RankingBatch, PreferenceBatch)}
ENTRY = "bad_step"
"""Of the file's metadata."""


@dataclass(frozen=True, kw_only=True)
class KeptStep:
    """A step that was kept, and the model that it was a step of."""

    model: str
    """Its name in checkpoints."""
    step: int
    """The run's step (PPO: iteration) in which it was taken, from 1."""
    run: dict[str, Any]
    """The run's id, stage and tokenizer."""
    spec: ModelSpec
    layout: ParallelLayout
    micro_batch_size: int
    micro_batch_tokens: int | None
    seed: int
    """Of the model's dropout."""
    bad: BadStep


def write_kept(path: Path, bad: BadStep, engine: TrainEngine, *, model: str, step: int, run: dict[str, Any]) -> None:
    """Write a step of `engine` to `path`. OSError where that fails."""
    tensors = {
        f"{number}.{field.name}": getattr(term.batch, field.name)
        for number, term in enumerate(bad.terms)
        for field in dataclasses.fields(term.batch)
    }
    content = {
        "model": model,
        "step": step,
        "run": run,
        "spec": dataclasses.asdict(engine.spec),
        "layout": dataclasses.asdict(engine.groups.layout),
        "micro_batch_size": engine.micro_batch_size,
        "micro_batch_tokens": engine.micro_batch_tokens,
        "seed": engine.seed,
        "bad": {key: value for key, value in vars(bad).items() if key != "terms"},
        "terms": [_described(term) for term in bad.terms],
    }
    write_tensors(path, tensors, {ENTRY: json.dumps(content)})


def read_kept(path: Path) -> KeptStep:
    """A step from its file. ValueError, with the file's name, where it is not such a file or was cut short."""
    file = TensorFile(path)
    try:
        content = json.loads(file.metadata[ENTRY])
        spec, terms = content.pop("spec"), content.pop("terms")
        return KeptStep(
            spec=ModelSpec(**{**spec, "architecture": Architecture(**spec["architecture"])}),
            layout=ParallelLayout(**content.pop("layout")),
            bad=BadStep(terms=[_term(file, number, described) for number, described in enumerate(terms)], **content.pop("bad")),
            **content,
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a batch that a run kept, or one of another version ({error!r})") from error


def _described(term: Term) -> dict[str, Any]:
    loss = {"type": type(term.loss).__name__, "fields": dataclasses.asdict(term.loss)}
    return {"name": term.name, "weight": term.weight, "loss": loss, "batch": type(term.batch).__name__}


def _term(file: TensorFile, number: int, described: dict[str, Any]) -> Term:
    loss, batch = described["loss"], BATCHES[described["batch"]]
    rows = batch(**{field.name: file.read(f"{number}.{field.name}") for field in dataclasses.fields(batch)})
    return Term(described["name"], LOSSES[loss["type"]](**loss["fields"]), rows, weight=described["weight"])


def names_of(terms: Sequence[Term]) -> str:
    """The terms of a step, in words."""
    return " + ".join(f"{term.name} ({term.batch.num_rows} rows)" for term in terms)
