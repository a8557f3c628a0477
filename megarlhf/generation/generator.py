"""Responses sampled by the trainer itself: no second framework whose numbers could differ."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megarlhf.batch import Prompts, Rollouts
from megarlhf.generation.cache import KeyValueCache
from megarlhf.generation.sampling import Sampling, sample_tokens
from megarlhf.models.architecture import Architecture
from megarlhf.models.parameters import kv_heads_per_rank
from megarlhf.models.transformer import Transformer, sequence_parallel_off
from megarlhf.parallel.collectives import gather_rows
from megarlhf.parallel.groups import ModelGroups
from megarlhf.parallel.pipeline import broadcast_from_last_stage, pass_between_stages
from megarlhf.parallel.vocab import vocab_parallel_logprobs

LEAVE_SHARE = 0.125
"""Finished rows leave the batch when they are this share of it: sooner copies the cache too often, later computes for nobody."""


class RolloutSource(Protocol):
    """Whatever answers prompts; nothing assumes that rows start and end together."""

    def generate(
        self,
        prompts: Prompts,
        *,
        max_new_tokens: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        seed: int,
        iteration: int,
        max_batch_size: int | None,
    ) -> Rollouts:
        """One response to each prompt, the same on every rank."""
        ...


@dataclass(frozen=True)
class _Responses:
    """What one batch of rows was answered: [n, max_new] tokens and log-probabilities, [n] lengths and ends."""

    tokens: Tensor
    logprobs: Tensor
    lengths: Tensor
    finished: Tensor


class Generator:
    """Samples from a model in its own layout, with a key-value cache, under tensor and pipeline parallelism."""

    def __init__(
        self,
        chunks: Sequence[Transformer],
        groups: ModelGroups,
        *,
        architecture: Architecture,
        eos_id: int,
        pad_id: int,
        stop_ids: Sequence[int] = (),
        check_weights: Callable[[], None] | None = None,
    ) -> None:
        """Responses end after EOS, which finishes them, or after any of `stop_ids`.

        `check_weights` is called before anything is generated; it raises where the weights are not those to sample from.
        """
        self.chunks = list(chunks)
        self.groups = groups
        self.architecture = architecture
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.check_weights = check_weights
        self.last_ids = torch.tensor([eos_id, *stop_ids], device=groups.device)

    @torch.no_grad()
    def generate(
        self,
        prompts: Prompts,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int,
        iteration: int,
        max_batch_size: int | None = None,
    ) -> Rollouts:
        """One response to each prompt: up to EOS or a stop id (included), max_new_tokens, or the model's context.

        Every rank passes the same prompts and gets the same rollouts; each data-parallel copy answers its share, at
        most max_batch_size rows at a time. Log-probabilities are those of softmax(logits / temperature) over the whole
        vocabulary, whatever top_k and top_p leave out; at temperature 0 those at temperature 1.

        ValueError when a prompt leaves no room in the context.
        """
        if self.check_weights is not None:
            self.check_weights()
        longest = int(prompts.lengths.max())
        if longest >= self.architecture.max_seq_len:
            raise ValueError(f"a prompt of {longest} tokens leaves no room in a context of {self.architecture.max_seq_len}")
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        by_length = prompts.lengths.argsort(descending=True, stable=True)
        mine = by_length[self.groups.coordinates.dp :: self.groups.layout.dp]
        batches = mine.split(max_batch_size or max(1, len(mine)))
        with self._generating():
            answered = [
                self._answer(prompts.rows(index), sampling, max_new_tokens, seed=seed, iteration=iteration)
                for index in batches
                if len(index)
            ]
        return self._rollouts(prompts, batches, answered, max_new_tokens)

    @contextlib.contextmanager
    def _generating(self) -> Iterator[None]:
        """Dropout and sequence parallelism off, and as before after."""
        modes = [chunk.training for chunk in self.chunks]
        for chunk in self.chunks:
            chunk.eval()
        try:
            with sequence_parallel_off(self.chunks):
                yield
        finally:
            for chunk, mode in zip(self.chunks, modes, strict=True):
                chunk.train(mode)

    def _answer(self, prompts: Prompts, sampling: Sampling, max_new: int, *, seed: int, iteration: int) -> _Responses:
        """Prefill, then one token per row and step; finished rows leave the batch now and then."""
        device, (n, width) = self.groups.device, prompts.tokens.shape
        lengths, samples = (x.to(device) for x in (prompts.lengths, prompts.ids))
        limits = (self.architecture.max_seq_len - lengths).clamp(max=max_new)
        out = _Responses(
            tokens=torch.zeros(n, max_new, dtype=torch.int64, device=device),
            logprobs=torch.zeros(n, max_new, device=device),
            lengths=torch.zeros(n, dtype=torch.int64, device=device),
            finished=torch.zeros(n, dtype=torch.bool, device=device),
        )
        max_len = min(width + max_new, self.architecture.max_seq_len)
        prefilled, same_as = (x.to(device) for x in _without_copies(prompts.tokens))  # samples of one prompt share its prefill
        cache = self._cache(len(prefilled), max_len)
        cache.prefill(width)
        hidden = self._forward(prefilled, cache)
        last = None if hidden is None else hidden[lengths - 1, same_as]  # [rows, h]
        if len(prefilled) < n:
            cache.keep(same_as)
        rows = torch.arange(n, device=device)  # which rows are still in the batch
        open_rows = torch.ones(n, dtype=torch.bool, device=device)
        for step in range(max_new):
            positions = lengths[rows] + step
            chosen, logprobs = self._choose(last, sampling, seed=seed, iteration=iteration, samples=samples[rows], positions=positions)
            out.tokens[rows, step] = torch.where(open_rows, chosen, self.pad_id)
            out.logprobs[rows, step] = torch.where(open_rows, logprobs, 0.0)
            out.lengths[rows] += open_rows
            out.finished[rows] |= open_rows & (chosen == self.eos_id)
            open_rows = open_rows & ~torch.isin(chosen, self.last_ids) & (step + 1 < limits[rows])
            num_open = int(open_rows.sum())
            if num_open == 0:
                break
            if num_open <= (1 - LEAVE_SHARE) * len(rows):
                stay = open_rows.nonzero().squeeze(1)
                cache.keep(stay)
                rows, positions, chosen, open_rows = rows[stay], positions[stay], chosen[stay], open_rows[stay]
                width = int(lengths[rows].max())
            # rows that are done but have not left go on, at most on the last position
            cache.decode(positions.clamp(max=max_len - 1), min(width + step + 1, max_len))
            hidden = self._forward(chosen[:, None], cache)
            last = None if hidden is None else hidden[0]
        return out

    def _cache(self, batch: int, max_len: int) -> KeyValueCache:
        a, layout = self.architecture, self.groups.layout
        parameter = next(self.chunks[0].parameters())
        return KeyValueCache(
            [layer.layer_number for chunk in self.chunks for layer in chunk.decoder.layers],
            batch=batch,
            kv_heads=kv_heads_per_rank(a, layout.tp),
            max_len=max_len,
            head_size=a.head_size,
            dtype=parameter.dtype,
            device=self.groups.device,
        )

    def _forward(self, tokens: Tensor, cache: KeyValueCache) -> Tensor | None:
        """tokens [batch, new] through all chunks of all stages: the last hidden states [new, batch, h] on the last stage."""
        layout, place = self.groups.layout, self.groups.coordinates
        shape = (tokens.shape[1], tokens.shape[0], self.architecture.hidden_size)
        dtype = next(self.chunks[0].parameters()).dtype
        hidden: Tensor | None = None
        for number in range(layout.pp * layout.virtual_pp):
            stage = number % layout.pp
            if number > 0:
                hidden = pass_between_stages(hidden, (number - 1) % layout.pp, stage, shape, dtype, self.groups)
            if place.pp == stage:
                chunk = self.chunks[number // layout.pp]
                chunk.set_input_tensor(hidden)
                hidden = chunk(tokens, cache.positions, cache)
        return hidden if self.groups.is_last_stage else None

    def _choose(
        self, last: Tensor | None, sampling: Sampling, *, seed: int, iteration: int, samples: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The next token [rows] and its log-probability [rows], from the last stage's hidden states [rows, h], on every stage."""
        chosen = torch.zeros_like(samples)
        logprobs = torch.zeros(len(samples), device=samples.device)
        if last is not None:
            tp, vocab_size = self.groups.tp, self.architecture.vocab_size
            logits = self.chunks[-1].logits(last)
            chosen = sample_tokens(
                logits, sampling, vocab_size=vocab_size, tp=tp, seed=seed, iteration=iteration, samples=samples, positions=positions
            )
            logprobs = vocab_parallel_logprobs(
                logits, chosen, vocab_size=vocab_size, tp=tp, temperature=sampling.logprob_temperature
            )
        return broadcast_from_last_stage(chosen, self.groups), logprobs

    def _rollouts(self, prompts: Prompts, batches: Sequence[Tensor], answered: Sequence[_Responses], max_new: int) -> Rollouts:
        """Every copy's answers together on the host, appended to the prompts."""
        device = self.groups.device
        here = answered if self.groups.is_last_stage else []
        index = torch.cat(list(batches)).to(device) if here else torch.zeros(0, dtype=torch.int64, device=device)

        def everywhere(name: str, like: Tensor) -> Tensor:
            rows = torch.cat([getattr(batch, name).to(like.dtype) for batch in here]) if here else like[:0]
            return gather_rows(rows, index, prompts.num_rows, self.groups).cpu()

        responses = everywhere("tokens", torch.zeros(0, max_new, dtype=torch.int64, device=device))
        logprobs = everywhere("logprobs", torch.zeros(0, max_new, device=device))
        new = everywhere("lengths", torch.zeros(0, dtype=torch.int64, device=device))
        finished = everywhere("finished", torch.zeros(0, dtype=torch.int64, device=device)).bool()

        width = int((prompts.lengths + new).max())
        tokens = torch.full((prompts.num_rows, width), self.pad_id, dtype=torch.int64)
        shared = min(width, prompts.tokens.shape[1])
        tokens[:, :shared] = prompts.tokens[:, :shared]
        response_mask = torch.zeros(prompts.num_rows, width - 1, dtype=torch.bool)
        placed = torch.zeros(prompts.num_rows, width - 1)
        at = torch.arange(max_new)
        real = at[None] < new[:, None]  # [batch, max_new]
        row, column = real.nonzero(as_tuple=True)
        position = prompts.lengths[row] + column
        tokens[row, position] = responses[row, column]
        response_mask[row, position - 1] = True
        placed[row, position - 1] = logprobs[row, column]
        return Rollouts(
            tokens=tokens,
            lengths=prompts.lengths + new,
            prompt_lengths=prompts.lengths,
            response_mask=response_mask,
            logprobs=placed,
            finished=finished,
        )


def _without_copies(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(the distinct rows of [n, width], for each row which of them it is [n]); the rows as they are where all are distinct."""
    distinct, number = rows.unique(dim=0, return_inverse=True)
    return (distinct, number) if len(distinct) < len(rows) else (rows, torch.arange(len(rows), device=rows.device))
