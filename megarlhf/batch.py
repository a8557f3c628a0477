"""What flows between the stages: frozen batches with their shapes.

Convention: rows are right padded; position ``t`` of a ``[batch, seq - 1]`` tensor is about predicting
``tokens[:, t + 1]``. Every batch can select rows (``rows``), which also trims the padding that the selection
no longer needs, so that a micro-batch is never wider than its longest row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

B = TypeVar("B", bound="Rows")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Token rows and whatever belongs to each of them."""

    on_host: ClassVar[tuple[str, ...]] = ()
    """Fields that stay on the host where the others go to a device: shapes depend on their values, and asking a device for them waits."""
    tokens: Tensor
    """[batch, seq] int64, right padded."""
    lengths: Tensor
    """[batch] int64: real tokens of each row."""

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        return self.tokens.shape[0]

    @property
    def groups(self) -> Tensor | None:
        """[batch] int64 ids of rows that one micro-batch must hold together, or None where each row stands alone."""
        return None

    def rows(self: B, index: Tensor) -> B:
        """The rows at `index` [n] int64, in that order, trimmed to the longest of them (at least 2 wide)."""
        width = max(2, int(self.lengths[index].max())) if index.numel() else 2
        chosen = {}
        for field in fields(self):
            value = getattr(self, field.name)[index]
            if value.dim() == 2:
                value = value[:, : width - (self.tokens.shape[1] - getattr(self, field.name).shape[1])]
            chosen[field.name] = value
        return replace(self, **chosen)

    def packed(self) -> Tensor:
        """The rows one after the other without their padding: [tokens] int64."""
        return self.tokens[torch.arange(self.tokens.shape[1]) < self.lengths[:, None]]


@dataclass(frozen=True, kw_only=True)
class Prompts(Rows):
    """Prompts to answer: tokens [batch, prompt_len], lengths [batch]."""

    ids: Tensor
    """[batch] int64: the sample's number, unique within an iteration; the key of its sampling noise."""


@dataclass(frozen=True, kw_only=True)
class Rollouts(Rows):
    """Prompts with their sampled responses: tokens [batch, seq], lengths [batch] (prompt and response, EOS included)."""

    prompt_lengths: Tensor
    """[batch] int64."""
    response_mask: Tensor
    """[batch, seq - 1] bool: positions that predict a response token, EOS included."""
    logprobs: Tensor
    """[batch, seq - 1] float32: the generator's log-probabilities of the response tokens, 0 elsewhere."""
    finished: Tensor
    """[batch] bool: the response ended with EOS within its limit."""


@dataclass(frozen=True, kw_only=True)
class Experience(Rows):
    """What a policy's update needs to know of each episode."""

    response_mask: Tensor
    """[batch, seq - 1] bool."""
    old_logprobs: Tensor
    """[batch, seq - 1] float32, of the policy that acted, recomputed by the trainer."""
    ref_logprobs: Tensor
    """[batch, seq - 1] float32, of the reference."""
    advantages: Tensor
    """[batch, seq - 1] float32, standardized over the iteration's response tokens where so configured."""


@dataclass(frozen=True, kw_only=True)
class ValueTargets(Rows):
    """What a value function's update needs to know of each episode."""

    response_mask: Tensor
    """[batch, seq - 1] bool."""
    old_values: Tensor
    """[batch, seq - 1] float32, of the value function before the iteration's updates."""
    returns: Tensor
    """[batch, seq - 1] float32, from the advantages before they were standardized."""


@dataclass(frozen=True, kw_only=True)
class TextBatch(Rows):
    """Text for the language-model loss."""

    loss_mask: Tensor
    """[batch, seq - 1] bool: positions whose next token counts in the loss."""


@dataclass(frozen=True, kw_only=True)
class RankingBatch(Rows):
    """Ranked completions: tokens [completions, seq], lengths [completions]; all of a prompt's rows stay together."""

    on_host: ClassVar[tuple[str, ...]] = ("prompt_index",)
    ranks: Tensor
    """[completions] int64: 1 is best, equal ranks are ties."""
    prompt_index: Tensor
    """[completions] int64: which prompt of the batch each completion answers."""

    @property
    def groups(self) -> Tensor:
        """The prompt of each completion: a prompt's comparisons are one batch element (Ouyang et al. 2022, section 3.5)."""
        return self.prompt_index


@dataclass(frozen=True, kw_only=True)
class PreferenceBatch(RankingBatch):
    """Ranked completions for a language model that learns from them directly."""

    response_mask: Tensor
    """[completions, seq - 1] bool: positions that predict a token of the completion, EOS included."""
    ref_logprobs: Tensor
    """[completions] float64: the reference's log-probability of the whole completion."""


def pad_rows(rows: list[list[int]], *, pad_id: int, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Right pad ragged `rows` to [batch, width] int64 (width: the longest row when None); returns (tokens, lengths [batch])."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    width = max(int(lengths.max()) if rows else 0, 2) if width is None else width
    tokens = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return tokens, lengths
