"""A model under its layout: log-probabilities, values and scores of a whole batch, the same on every rank."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from megarlhf.batch import Rows
from megarlhf.engine.batching import micro_batch_rows
from megarlhf.engine.offload import Kind, Offload
from megarlhf.engine.schedule import run_schedule
from megarlhf.engine.terms import Output
from megarlhf.models.transformer import ModelSpec, Transformer, build_model, named_parameters
from megarlhf.parallel.collectives import gather_rows
from megarlhf.parallel.groups import ModelGroups
from megarlhf.parallel.upload import upload


class NotFiniteError(ValueError):
    """A model that is not being trained gives numbers that are not finite."""


def require_finite(found: Tensor, what: str, *, precision: str) -> None:
    """NotFiniteError where any of `found` [rows, ...] is not finite."""
    finite = found.isfinite().flatten(1).all(dim=1) if found.dim() > 1 else found.isfinite()
    if not finite.all():
        way_out = "fp16 holds no number above 65504: take bf16 or fp32" if precision == "fp16" else "is its checkpoint sound?"
        raise NotFiniteError(f"a model's {what} are not finite for {int((~finite).sum())} of {len(finite)} rows in {precision}; {way_out}")


class Engine:
    """Forward passes of one model, frozen or trained.

    The global batch is replicated: each data-parallel copy computes its share and the results are gathered, so that
    models of different layouts meet without any dispatch, and results do not depend on the layout.
    """

    weights_change = False
    """Whether anything but building it changes its weights; where nothing does they have no gradients."""

    def __init__(
        self,
        spec: ModelSpec,
        groups: ModelGroups,
        *,
        micro_batch_size: int,
        micro_batch_tokens: int | None = None,
        offload: Collection[Kind] = (),
    ) -> None:
        """Args: micro_batch_size, micro_batch_tokens: see `micro_batch_rows`; offload: what may rest on the host while nothing uses it."""
        self.spec = spec
        self.groups = groups
        self.micro_batch_size = micro_batch_size
        self.micro_batch_tokens = micro_batch_tokens
        self.transformers: list[Transformer] = build_model(spec, groups)
        if not self.weights_change:
            for transformer in self.transformers:
                transformer.requires_grad_(False)
        self.chunks: list = list(self.transformers)
        """What the schedule runs: the transformers, or their data-parallel wrappers."""
        self.offload = Offload(self.held, groups.side_stream, offload, frozen=not self.weights_change)

    def held(self) -> dict[str, list[Tensor]]:
        """What is kept between steps, by HELD_KINDS."""
        return {"weights": [*self.parameters().values()]}

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Canonical name -> this rank's shard."""
        return named_parameters(self.transformers, self.groups)

    def turn(self, *, training: bool) -> None:
        """Have dropout or not; to tell every module takes time, and is done where it changes something."""
        for transformer in self.transformers:
            if transformer.training != training:
                transformer.train(training)

    def shares(self, batch: Rows, *, minibatches: Sequence[Tensor] | None = None) -> list[list[Tensor]]:
        """For each copy the micro-batches in which it computes `batch`, as row numbers: see `micro_batch_rows`."""
        how = {"micro_batch_size": self.micro_batch_size, "micro_batch_tokens": self.micro_batch_tokens}
        return micro_batch_rows(batch, dp=self.groups.layout.dp, minibatches=minibatches, **how)

    def logprobs(
        self, batch: Rows, positions: Tensor, *, temperature: float = 1.0, minibatches: Sequence[Tensor] | None = None
    ) -> Tensor:
        """log pi(tokens[:, t + 1] | tokens[:, : t + 1]) where `positions` [batch, seq - 1] is True, 0 elsewhere.

        pi is softmax(logits / temperature). With `minibatches` (row numbers, each row in one) the micro-batches are those
        of steps on these minibatches one after the other, and the numbers those that a step would see, bit for bit.
        Returns: [batch, seq - 1] float32 on the host.
        """
        return self._forward(batch, "logprobs", positions, temperature, minibatches)

    def values(self, batch: Rows, positions: Tensor, *, minibatches: Sequence[Tensor] | None = None) -> Tensor:
        """The scalar head at position t, where `positions` [batch, seq - 1] is True, 0 elsewhere; [batch, seq - 1] float32.

        minibatches: see `logprobs`.
        """
        return self._forward(batch, "values", positions, minibatches=minibatches)

    def scores(self, batch: Rows) -> Tensor:
        """The scalar head at the last token of each row: [batch] float32 on the host."""
        return self._forward(batch, "scores", None)

    @torch.no_grad()
    def _forward(
        self,
        batch: Rows,
        output: Output,
        positions: Tensor | None,
        temperature: float = 1.0,
        minibatches: Sequence[Tensor] | None = None,
    ) -> Tensor:
        self.offload.need("weights")
        self.turn(training=False)
        shares = self.shares(batch, minibatches=minibatches)
        mine = padded_share(shares[self.groups.coordinates.dp], self.groups)
        pieces = [batch.rows(index) for index in mine]
        places = [None if positions is None else positions[i][:, : p.tokens.shape[1] - 1] for i, p in zip(mine, pieces, strict=True)]
        wanted = [wanted_tokens(*of_piece) for of_piece in zip(pieces, places, strict=True)]

        def compute(model: Transformer, hidden: Tensor, wanted: Tensor, number: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
            loss = torch.zeros((), device=hidden.device)
            if number >= len(shares[self.groups.coordinates.dp]):
                return loss, None
            return loss, (mine[number], self.output(model, hidden, wanted, pieces[number], output, places[number], temperature))

        results = run_schedule(self.transformers, self.groups, pieces, wanted, compute, backward=False)
        return self._gathered([result for result in results if result is not None], batch, output)

    def _gathered(self, results: list[tuple[Tensor, Tensor]], batch: Rows, output: str) -> Tensor:
        tail = () if output == "scores" else (batch.tokens.shape[1] - 1,)
        index = torch.cat([rows for rows, _ in results]) if results else torch.zeros(0, dtype=torch.int64)
        computed = torch.zeros(len(index), *tail, device=self.groups.device)
        start = 0
        for rows, values in results:
            if output == "scores":
                computed[start : start + len(rows)] = values
            else:
                computed[start : start + len(rows), : values.shape[1]] = values
            start += len(rows)
        return gather_rows(computed, index.to(computed.device), batch.num_rows, self.groups).cpu()

    def output(
        self,
        model: Transformer,
        hidden: Tensor,
        wanted: Tensor,
        piece: Rows,
        output: Output,
        positions: Tensor | None,
        temperature: float,
    ) -> Tensor:
        """One micro-batch's output from what `Compute` is given: see `Loss.output` for the shapes.

        `piece` and `positions` are on the host, where counting what is wanted waits for no device; `wanted` are their `wanted_tokens`.
        """
        if output == "scores":
            return model.scalars(hidden, wanted)
        rows, width = positions.shape
        row, column = positions.nonzero(as_tuple=True)
        if output == "values":
            (target,) = upload([row * width + column], hidden.device)
            found = model.scalars(hidden, wanted).unsqueeze(0)
        else:
            target, ids = upload([row * width + column, piece.tokens[row, column + 1]], hidden.device)
            entropy_too = output == "logprobs and entropy"
            how = {"vocab_size": self.spec.architecture.vocab_size, "temperature": temperature, "entropy_too": entropy_too}
            logprobs, entropy = model.predictions(hidden, wanted, ids, **how)
            found = torch.stack([logprobs, entropy]) if entropy_too else logprobs.unsqueeze(0)
        whole = torch.zeros(len(found), rows * width, device=hidden.device).index_copy(1, target, found).view(-1, rows, width)
        return whole if output == "logprobs and entropy" else whole[0]


def wanted_tokens(piece: Rows, positions: Tensor | None) -> Tensor:
    """[n] int64: the packed tokens of `piece` at `positions` [rows, seq - 1], in their order; with None the last of each row."""
    starts = piece.lengths.cumsum(0) - piece.lengths
    if positions is None:
        return starts + piece.lengths - 1
    row, column = positions.nonzero(as_tuple=True)
    return starts[row] + column


def padded_share(micro_batches: Sequence[Tensor], groups: ModelGroups) -> list[Tensor]:
    """A copy's micro-batches, and idle ones (row 0, whose result is dropped) where the schedule needs more.

    Every copy runs at least one; interleaved stages run a multiple of pp.
    """
    needed = max(1, len(micro_batches))
    if groups.layout.virtual_pp > 1:
        needed += -needed % groups.layout.pp
    idle = torch.zeros(1, dtype=torch.int64)
    return [*micro_batches, *([idle] * (needed - len(micro_batches)))]
