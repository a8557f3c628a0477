"""A model that is trained: terms in, one optimizer step out."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from megarlhf.batch import Rows
from megarlhf.engine.ema import ExponentialMovingAverage
from megarlhf.engine.engine import Engine, padded_share, wanted_tokens
from megarlhf.engine.offload import Kind
from megarlhf.engine.optimizer import AdamSettings, Optimizer, UpdateResult
from megarlhf.engine.schedule import padding_behind, run_schedule, sum_gradients
from megarlhf.engine.terms import Term
from megarlhf.models.transformer import ModelSpec, Transformer
from megarlhf.parallel import platform
from megarlhf.parallel.collectives import any_rank, sum_over_copies
from megarlhf.parallel.groups import ModelGroups
from megarlhf.parallel.seed import seed_dropout
from megarlhf.parallel.upload import upload


@dataclass(frozen=True, kw_only=True)
class StepResult(UpdateResult):
    """What one optimizer step saw and did, the same on every rank."""

    sums: dict[str, tuple[float, int]]
    """Term name -> (its loss summed over what counts in the whole batch, how much that is), before its weight."""
    stats: dict[str, tuple[float, float]]
    """"term/statistic" -> (sum, count) over the whole batch."""
    tokens: int
    """Real tokens that went through the trunk, over all terms and copies."""
    positions: int
    """The same with what sequence parallelism adds to each micro-batch."""

    @property
    def losses(self) -> dict[str, float]:
        """Term name -> its loss, before its weight."""
        return {name: total / count for name, (total, count) in self.sums.items()}


@dataclass(frozen=True, kw_only=True)
class BadStep:
    """An optimizer step whose loss or gradients were not finite, for no want of a loss scale: what it was given."""

    terms: Sequence[Term]
    steps: int
    """Optimizer steps taken or skipped before it: the key of its dropout."""
    updates: int
    """Updates made before it: what tells whether weights are those that it saw."""
    loss_scale: float


@dataclass(frozen=True)
class _Piece:
    term: Term
    batch: Rows | None
    """One micro-batch of the term; None for an idle one."""
    divisor: int


class TrainEngine(Engine):
    """Forward passes, and optimizer steps over any sum of terms."""

    weights_change = True

    def __init__(
        self,
        spec: ModelSpec,
        groups: ModelGroups,
        *,
        micro_batch_size: int,
        adam: AdamSettings,
        seed: int,
        micro_batch_tokens: int | None = None,
        offload: Collection[Kind] = (),
        overlap: bool = False,
    ) -> None:
        """Args: overlap: see `Optimizer`; the others: see `Engine`."""
        super().__init__(spec, groups, micro_batch_size=micro_batch_size, micro_batch_tokens=micro_batch_tokens, offload=offload)
        self.seed = seed
        self.steps = 0
        """Optimizer steps taken or skipped so far; keys the dropout noise."""
        self.bad_step: BadStep | None = None
        """The first step since the caller last took it whose loss or gradients were not finite."""
        self.optimizer = Optimizer(self.transformers, spec, groups, adam, overlap=overlap)
        self.offload.finish_gather = self.optimizer.finish_gather
        self.chunks = self.optimizer.chunks
        self.ema: ExponentialMovingAverage | None = None
        for transformer in self.transformers:
            transformer.config.finalize_model_grads_func = sum_gradients
            transformer.config.grad_scale_func = self.optimizer.scale_loss

    def held(self) -> dict[str, list[Tensor]]:
        """Weights, gradients, masters, moments (after the first step) and the average."""
        optimizer = self.optimizer
        return {
            **super().held(),
            "gradients": [buffer.grad_data for chunk in self.chunks for buffer in chunk.buffers],
            "masters": [shard.main for shard in optimizer.shards()],
            "moments": [value for state in optimizer.adam.state.values() for value in state.values() if isinstance(value, Tensor)],
            "average": list(self.ema.averages.values()) if self.ema is not None else [],
        }

    def weights_are_finite(self) -> bool:
        """Whether every weight, its float32 master and its average is finite, on all ranks; a collective of the model's ranks."""
        self.offload.need("weights", "optimizer", "average")
        held = [*self.parameters().values(), *(shard.main for shard in self.optimizer.shards())]
        held += self.ema.averages.values() if self.ema is not None else []
        finite = bool(torch.stack([value.detach().isfinite().all() for value in held]).all())
        return not any_rank(not finite, self.groups.world, self.groups.device)

    def start_ema(self, decay: float) -> None:
        """Keep an average of the weights from here on (updated by the trainer)."""
        self.offload.need("weights", "optimizer")
        self.ema = ExponentialMovingAverage(self.optimizer, decay=decay, offload=self.offload)

    @torch.no_grad()
    def shift_scores(self, delta: float) -> None:
        """Add `delta` to every score this model will give: to the bias of its scalar head."""
        self.offload.need("weights", "optimizer")
        names = {parameter: name for name, parameter in self.parameters().items()}
        for shard in self.optimizer.shards():
            if names[shard.parameter] == "scalar_head.bias":
                shard.main.data.add_(delta)
        self.optimizer.publish_masters()

    def step(self, terms: Sequence[Term], *, learning_rate: float) -> StepResult:
        """One optimizer step on sum over terms of weight * (sum of the term's loss / its global count).

        All micro-batches, term after term, go through one schedule call into the same gradient buffers.
        ValueError when a term has nothing that counts.
        """
        if self.spec.dropout:
            seed_dropout(self.groups, self.seed, self.steps)
        self.turn(training=True)
        pieces = [piece for term in terms for piece in self._pieces(term)]
        wanted = [_wanted(piece) for piece in pieces]
        totals = {term.name: torch.zeros(1 + 2 * len(term.loss.stats), device=self.groups.device) for term in terms}

        def compute(model: Transformer, hidden: Tensor, wanted: Tensor, number: int) -> tuple[Tensor, None]:
            piece = pieces[number]
            if piece.batch is None:
                return self._nothing(model, hidden), None
            loss = piece.term.loss
            output = self.output(model, hidden, wanted, piece.batch, loss.output, loss.positions(piece.batch), loss.temperature)
            total, stats = loss(output, _uploaded(piece.batch, hidden.device))
            assert tuple(stats) == loss.stats
            flat = [total.detach(), *(value for pair in stats.values() for value in pair)]
            totals[piece.term.name] += torch.stack([value.float().reshape(()) for value in flat])
            return total * (piece.term.weight / piece.divisor), None

        self.offload.send_for("weights", "gradients", "optimizer")
        self.offload.need("weights", "gradients")
        self.optimizer.zero_grad()
        with platform.named_range("forward and backward"):
            run_schedule(self.chunks, self.groups, [_rows(piece) for piece in pieces], wanted, compute, backward=True)
        self.offload.need("optimizer")
        with platform.named_range("optimizer step"):
            sums = sum_over_copies(torch.cat([totals[term.name] for term in terms]), self.groups)
            update, whole = self.optimizer.step(learning_rate, beside=sums)
        sums, stats = _by_term(terms, whole)
        result = StepResult(
            **vars(update),
            sums=sums,
            stats=stats,
            tokens=sum(int(term.batch.lengths.sum()) for term in terms),
            positions=sum(self._positions(term) for term in terms),
        )
        self._note_bad_step(terms, result.losses, update)
        self.steps += 1
        return result

    def _nothing(self, model: Transformer, hidden: Tensor) -> Tensor:
        """The loss of an idle micro-batch: 0. Where exchanges overlap it touches every parameter: a gradient says that it may be sent."""
        loss = hidden.float().sum() * 0.0
        if self.optimizer.overlap:
            heads = [p for name, p in model.named_parameters() if name.startswith(("output_layer.", "scalar_head."))]
            loss = loss + sum(p.float().sum() * 0.0 for p in heads)
        return loss

    def _note_bad_step(self, terms: Sequence[Term], losses: dict[str, float], update: UpdateResult) -> None:
        bad = not all(map(math.isfinite, losses.values())) or (update.skipped and not update.searching_loss_scale)
        if bad and self.bad_step is None:
            before = self.optimizer.updates - (not update.skipped)
            self.bad_step = BadStep(terms=terms, steps=self.steps, updates=before, loss_scale=update.loss_scale_used)

    def _positions(self, term: Term) -> int:
        tokens = [int(term.batch.lengths[rows].sum()) for share in self.shares(term.batch) for rows in share]
        return sum(number + padding_behind(number, self.groups.layout) for number in tokens)

    def _pieces(self, term: Term) -> list[_Piece]:
        divisor = term.loss.count(term.batch)
        if divisor == 0:
            raise ValueError(f"the {term.name} term has nothing to learn from: none of its {term.batch.num_rows} rows counts in the loss")
        mine = self.shares(term.batch)[self.groups.coordinates.dp]
        real = [_Piece(term, term.batch.rows(index), divisor) for index in mine]
        idle = [_Piece(term, None, divisor)] * (len(padded_share(mine, self.groups)) - len(mine))
        return real + idle


def _by_term(terms: Sequence[Term], sums: Sequence[float]) -> tuple[dict[str, tuple[float, int]], dict[str, tuple[float, float]]]:
    """(term -> (loss, count), "term/statistic" -> (sum, count)) from each term's sums over the whole batch, one term after the other."""
    left = iter(sums)
    losses: dict[str, tuple[float, int]] = {}
    stats: dict[str, tuple[float, float]] = {}
    for term in terms:
        losses[term.name] = next(left), term.loss.count(term.batch)
        stats |= {f"{term.name}/{name}": (next(left), next(left)) for name in term.loss.stats}
    return losses, stats


def _uploaded(batch: Rows, device: torch.device) -> Rows:
    names = [field.name for field in fields(batch) if field.name not in batch.on_host]
    return replace(batch, **dict(zip(names, upload([getattr(batch, name) for name in names], device), strict=True)))


def _wanted(piece: _Piece) -> Tensor:
    """See `wanted_tokens`; of an idle micro-batch one token."""
    return torch.tensor([0]) if piece.batch is None else wanted_tokens(piece.batch, piece.term.loss.positions(piece.batch))


def _rows(piece: _Piece) -> Rows:
    """Of an idle micro-batch: two tokens."""
    if piece.batch is not None:
        return piece.batch
    return Rows(tokens=piece.term.batch.tokens[:1, :2], lengths=torch.tensor([2]))
