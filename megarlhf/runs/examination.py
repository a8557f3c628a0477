"""Where a step that is not finite begins to be so: in the weights, the batch, what the model makes of a row, or a gradient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megarlhf.batch import Rows
from megarlhf.data.tokenizers import Tokenizer, load_tokenizer
from megarlhf.engine.bad_steps import KeptStep
from megarlhf.engine.checkpoint import restore_grad_scaler
from megarlhf.engine.terms import Loss, Term
from megarlhf.engine.trainable import StepResult, TrainEngine
from megarlhf.models.parameters import parameter_specs
from megarlhf.parallel.collectives import gather_objects

MOST_SHOWN = 10


class OfWhole:
    """A loss over some rows of a batch, divided by what counts in the whole of it."""

    def __init__(self, loss: Loss, whole: int) -> None:
        self._loss, self._whole = loss, whole
        self.output, self.stats, self.temperature, self.positions = loss.output, loss.stats, loss.temperature, loss.positions

    def count(self, batch: Rows) -> int:
        """Of the whole batch."""
        return self._whole

    def __call__(self, output: Tensor, batch: Rows) -> tuple[Tensor, dict]:
        """The loss's own."""
        return self._loss(output, batch)


def examine(engine: TrainEngine, kept: KeptStep) -> Iterator[str]:
    """Lines of what is found, from the weights on; a collective of the model's ranks. The weights stay as they are."""
    weights = _broken(engine, {name: [parameter] for name, parameter in engine.parameters().items()})
    yield f"weights that are not finite: {_listed(weights)}"
    tokenizer = _tokenizer(kept)
    for term in kept.bad.terms:
        yield from _batch_lines(term)
        yield from _output_lines(engine, term, tokenizer)
    whole = taken(engine, kept, kept.bad.terms)
    yield f"the whole step: {_outcome(engine, whole)}"
    wrong = []
    for term in kept.bad.terms:
        alone = taken(engine, kept, [term])
        yield f"{term.name} alone: {_outcome(engine, alone)}"
        if not _is_finite(alone):
            lines = list(_row_lines(engine, kept, term, tokenizer))
            yield from lines
            wrong.append(f"{term.name}{'' if lines else ' (no row by itself: only their sum)'}")
    if _is_finite(whole):
        yield "found: the step is finite here"
    else:
        yield f"found: not finite because of {', '.join(wrong) or 'no term by itself: only their sum'}"


def taken(engine: TrainEngine, kept: KeptStep, terms: Sequence[Term]) -> StepResult:
    """The step with some terms, at a learning rate of 0: gradients stay with the optimizer, and weights as they are."""
    engine.steps = kept.bad.steps
    scaler = engine.optimizer.megatron.grad_scaler
    if scaler is not None:
        restore_grad_scaler(engine.optimizer, {"scale": kept.bad.loss_scale, "growth_tracker": 0, "hysteresis_tracker": 1})
    return engine.step(terms, learning_rate=0.0)


def _is_finite(result: StepResult) -> bool:
    return not result.skipped and all(map(math.isfinite, result.losses.values()))


def _outcome(engine: TrainEngine, result: StepResult) -> str:
    losses = ", ".join(f"{name} loss {loss:.6g}" for name, loss in result.losses.items())
    if _is_finite(result):
        return f"finite, {losses}, gradient norm {result.grad_norm:.6g}"
    gradients = _listed(_broken_gradients(engine), first="first in the backward pass")
    return f"NOT FINITE, {losses}, gradient norm {result.grad_norm:.6g}; parameters without a finite gradient: {gradients}"


def _row_lines(engine: TrainEngine, kept: KeptStep, term: Term, tokenizer: Tokenizer | None) -> Iterator[str]:
    """Each row, or group of rows that belong together, with which alone the term is not finite."""
    loss, groups, found = OfWhole(term.loss, term.loss.count(term.batch)), term.batch.groups, 0
    units = range(term.batch.num_rows) if groups is None else groups.unique().tolist()
    for unit in units:
        index = torch.tensor([unit]) if groups is None else (groups == unit).nonzero().squeeze(1)
        result = taken(engine, kept, [Term(term.name, loss, term.batch.rows(index), weight=term.weight)])
        if not _is_finite(result):
            found += 1
            if found <= MOST_SHOWN:
                yield f"  row {_numbers(index.tolist())}: {_outcome(engine, result)}"
                yield f"    {_text(term.batch, int(index[0]), tokenizer)}"
    if found > MOST_SHOWN:
        yield f"  and {found - MOST_SHOWN} more of {len(units)}"


def _batch_lines(term: Term) -> Iterator[str]:
    """What was not finite before the model saw it: advantages, returns, log-probabilities of other models."""
    for field in dataclasses.fields(term.batch):
        value = getattr(term.batch, field.name)
        rows = sorted(set((~value.isfinite()).nonzero()[:, 0].tolist()))
        if rows:
            yield f"{term.name}: the batch's own {field.name} is not finite in row {_numbers(rows)}"


def _output_lines(engine: TrainEngine, term: Term, tokenizer: Tokenizer | None) -> Iterator[str]:
    """Rows of which the model makes something that is not finite, without dropout."""
    positions = term.loss.positions(term.batch)
    if term.loss.output == "scores":
        kind, output = "score", engine.scores(term.batch).unsqueeze(1)
    elif term.loss.output == "values":
        kind, output = "value", engine.values(term.batch, positions)
    else:
        kind, output = "log-probability", engine.logprobs(term.batch, positions, temperature=term.loss.temperature)
    broken = ~output.isfinite()
    rows = broken.any(dim=1).nonzero().squeeze(1).tolist()
    if not rows:
        yield f"{term.name}: the model's outputs are finite, the largest {float(output.abs().max()):.6g}"
    for row in rows[:MOST_SHOWN]:
        where = "" if kind == "score" else f" at position {int(broken[row].nonzero()[0])}, the first of {int(broken[row].sum())}"
        yield f"{term.name}: the model's {kind} is not finite in row {row}{where}"
        yield f"    {_text(term.batch, row, tokenizer)}"
    if len(rows) > MOST_SHOWN:
        yield f"{term.name}: and in {len(rows) - MOST_SHOWN} more of {term.batch.num_rows} rows"


def _broken_gradients(engine: TrainEngine) -> list[str]:
    """Parameters whose gradients were not finite in the last step, in the order in which the backward pass comes to them."""
    names, parts = {parameter: name for name, parameter in engine.parameters().items()}, {}
    for shard in engine.optimizer.shards():
        parts.setdefault(names[shard.parameter], []).append(shard.main.grad)
    return _broken(engine, parts)[::-1]


def _broken(engine: TrainEngine, held: dict[str, list[Tensor]]) -> list[str]:
    """Names under which any rank holds what is not finite, in order of depth; a collective of the world."""
    mine = [name for name, parts in held.items() if not all(part.isfinite().all() for part in parts)]
    found = {name for of_rank in gather_objects(mine) for name in of_rank}
    return [spec.name for spec in parameter_specs(engine.spec.architecture, engine.spec.head) if spec.name in found]


def _tokenizer(kept: KeptStep) -> Tokenizer | None:
    """The run's tokenizer where it still is where it was."""
    try:
        return load_tokenizer(**kept.run["tokenizer"])
    except (ValueError, OSError):
        return None


def _text(batch: Rows, row: int, tokenizer: Tokenizer | None) -> str:
    ids = batch.tokens[row, : int(batch.lengths[row])].tolist()
    return ascii(tokenizer.decode(ids))[:200] if tokenizer is not None else f"tokens {ids[:40]}"


def _listed(names: Sequence[str], *, first: str = "first") -> str:
    return f"{len(names)}, {first} {', '.join(names[:3])}" if names else "none"


def _numbers(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:MOST_SHOWN])) + (" ..." if len(rows) > MOST_SHOWN else "")
