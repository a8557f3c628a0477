"""Sampling one token per row from vocabulary-parallel logits, with noise that no layout can change.

The noise of a (seed, iteration, sample, position, vocabulary id) is a hash of these numbers. With the Gumbel-max trick
each tensor-parallel rank scores its own shard of the vocabulary, and only each shard's best (score, id) is compared: the
same token whatever tp, pp, dp or batching.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megarlhf.parallel.groups import ProcessGroup
from megarlhf.parallel.pipeline import gather_over_tensor_parallel
from megarlhf.parallel.vocab import first_vocab_id

GOLDEN = -7046029254386353131
"""2**64 / golden ratio as a signed number: the increment of splitmix64 (Steele, Lea and Flood 2014)."""
MIX = ((30, -4658895280553007687), (27, -7723592293110705685))
"""splitmix64's shifts and multipliers, signed."""
EXCLUDED = -torch.inf


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 1.0
    """What logits are divided by; 0 takes the most likely token."""
    top_k: int | None = None
    """Only the k most likely tokens of the whole vocabulary, and those as likely as the last of them; None or 0: all."""
    top_p: float | None = None
    """Only the smallest set of most likely tokens (of those that top_k leaves) with this probability; None or 1: all."""

    @property
    def logprob_temperature(self) -> float:
        """The temperature at which log-probabilities are reported: that of the sampling, 1 when it is greedy."""
        return self.temperature or 1.0


def mixed(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, element by element: a bijection whose output bits look random."""
    for shift, factor in MIX:
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def gumbel_noise(seed: int, iteration: int, samples: Tensor, positions: Tensor, vocab_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, a function of its arguments alone.

    Args: samples, positions [batch] int64; vocab_ids [shard] int64.
    Returns: [batch, shard] float64, never infinite.
    """
    key = torch.full_like(samples, seed)
    for part in (torch.full_like(samples, iteration), samples, positions):
        key = mixed(key + GOLDEN) ^ part
    bits = mixed(mixed(key + GOLDEN)[:, None] + vocab_ids * GOLDEN)
    # 52 bits and a half are exact in float64; with 53, the largest would be rounded to 1, whose noise is infinite
    uniform = (((bits >> 12) & ((1 << 52) - 1)).double() + 0.5) * 2.0**-52  # in (0, 1)
    return -(-uniform.log()).log()


def sample_tokens(
    logits: Tensor,
    sampling: Sampling,
    *,
    vocab_size: int,
    tp: ProcessGroup | None,
    seed: int,
    iteration: int,
    samples: Tensor,
    positions: Tensor,
) -> Tensor:
    """One token per row, the same on all tensor-parallel ranks; equal scores go to the smallest id.

    Args:
        logits: [batch, padded_vocab / tp], this rank's shard.
        samples: [batch] int64, the numbers of the samples within the iteration.
        positions: [batch] int64, the positions that the tokens will stand at.

    Returns: [batch] int64.
    """
    first = first_vocab_id(logits.shape[-1], tp)
    ids = torch.arange(first, first + logits.shape[-1], device=logits.device)
    scores = torch.where(ids < vocab_size, logits.double() / sampling.logprob_temperature, EXCLUDED)
    if sampling.temperature:
        scores = _truncated(scores, sampling, tp)
        scores = scores + gumbel_noise(seed, iteration, samples, positions, ids)
    best, local = scores.max(dim=-1)
    candidates = gather_over_tensor_parallel(torch.stack([best, ids[local].double()]), tp)  # [tp, 2, batch]: score, id
    winner = candidates[:, 0].max(dim=0).indices  # [batch]: of equal scores the first rank's, whose ids are smaller
    return candidates[:, 1].gather(0, winner.unsqueeze(0)).squeeze(0).long()


def _truncated(scores: Tensor, sampling: Sampling, tp: ProcessGroup | None) -> Tensor:
    """Scores [batch, shard] with what top_k and top_p leave out excluded.

    Over tp, top_k gathers k scores per rank and row; top_p gathers the scores of the whole vocabulary.
    """
    if sampling.top_k:
        k = min(sampling.top_k, scores.shape[-1])
        candidates = _side_by_side(scores.topk(k, dim=-1).values, tp)
        threshold = candidates.topk(min(sampling.top_k, candidates.shape[-1]), dim=-1).values[:, -1:]
        scores = torch.where(scores >= threshold, scores, EXCLUDED)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered = _side_by_side(scores, tp).sort(dim=-1, descending=True).values
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        kept = torch.where(before < sampling.top_p, ordered, torch.inf)
        scores = torch.where(scores >= kept.min(dim=-1, keepdim=True).values, scores, EXCLUDED)
    return scores


def _side_by_side(shard: Tensor, tp: ProcessGroup | None) -> Tensor:
    gathered = gather_over_tensor_parallel(shard, tp)  # [tp, batch, n]
    return gathered.permute(1, 0, 2).reshape(shard.shape[0], -1)


