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
LAST = 2**52 - 1
"""The largest number of 52 bits."""
BLOCK = 2**18
"""Scores that are worked on at a time: rows are so many that what is made of them stays in a CPU's cache, and small on a GPU."""


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
        x = ((x >> shift) & ((1 << (64 - shift)) - 1)).bitwise_xor_(x).mul_(factor)
    return ((x >> 31) & ((1 << 33) - 1)).bitwise_xor_(x)


def noise_bits(seed: int, iteration: int, samples: Tensor, positions: Tensor, vocab_ids: Tensor) -> Tensor:
    """52 random bits, a function of the arguments alone: [batch, shard] int64 in [0, 2**52).

    Args: samples, positions [batch] int64; vocab_ids [shard] int64.
    """
    key = torch.full_like(samples, seed)
    for part in (torch.full_like(samples, iteration), samples, positions):
        key = mixed(key + GOLDEN) ^ part
    bits = mixed(mixed(key + GOLDEN)[:, None] + vocab_ids * GOLDEN)
    return bits.bitwise_right_shift_(12).bitwise_and_(LAST)


def gumbel_noise(seed: int, iteration: int, samples: Tensor, positions: Tensor, vocab_ids: Tensor) -> Tensor:
    """Standard Gumbel noise from `noise_bits`: [batch, shard] float32, never infinite.

    -log(-log(u)) of u = (bits + 1/2) / 2**52, by way of 1 - u: where the noise is large, which is where it decides, 1 - u is small and
    float32 holds it to a part in 2**24, as it would not hold u. So the error of the noise is some 1e-7 of it or of 1: less than
    what the rounding of float32 logits does to a score.
    """
    rest = noise_bits(seed, iteration, samples, positions, vocab_ids).neg_().add_(LAST).float()
    rest = rest.add_(0.5).mul_(2.0**-52).clamp_(max=1 - 2.0**-24)
    return rest.neg_().log1p_().neg_().log_().neg_()


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
) -> tuple[Tensor, Tensor]:
    """One token per row and its log-probability, the same on all tensor-parallel ranks; equal scores go to the smallest id.

    The log-probability is that under softmax(logits / temperature) over the whole vocabulary, at temperature 0 under softmax(logits).
    Scores are float32, as the logits are.

    Args:
        logits: [batch, padded_vocab / tp] float32, this rank's shard.
        samples: [batch] int64, the numbers of the samples within the iteration.
        positions: [batch] int64, the positions that the tokens will stand at.

    Returns: [batch] int64, [batch] float32.
    """
    width = logits.shape[-1]
    first = first_vocab_id(width, tp)
    ids = torch.arange(first, first + width, device=logits.device)
    if first + width > vocab_size:
        logits = torch.where(ids < vocab_size, logits, EXCLUDED)
    found = []
    for start in range(0, len(logits), rows := max(1, BLOCK // width)):
        part = slice(start, start + rows)
        scaled = logits[part] if sampling.logprob_temperature == 1.0 else logits[part] / sampling.logprob_temperature
        scores = scaled
        if sampling.temperature:
            noise = gumbel_noise(seed, iteration, samples[part], positions[part], ids)
            scores = noise.add_(_truncated(scaled, sampling, tp))
        best, local = scores.max(dim=-1)
        own = scaled.gather(1, local[:, None]).squeeze(1)
        found.append(torch.stack([best.double(), ids[local].double(), own.double(), scaled.logsumexp(dim=-1).double()]))
    candidates = gather_over_tensor_parallel(found[0] if len(found) == 1 else torch.cat(found, dim=1), tp)  # [tp, 4, batch]
    if len(candidates) == 1:
        _, token, own, total = candidates[0]
        return token.long(), (own - total).float()
    winner = candidates[:, 0].max(dim=0).indices[None]  # [1, batch]: of equal scores the first rank's, whose ids are smaller
    token, own = (candidates[:, row].gather(0, winner).squeeze(0) for row in (1, 2))
    return token.long(), (own - candidates[:, 3].logsumexp(dim=0)).float()


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
        probabilities = ordered.double().softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        kept = torch.where(before < sampling.top_p, ordered, torch.inf)
        scores = torch.where(scores >= kept.min(dim=-1, keepdim=True).values, scores, EXCLUDED)
    return scores


def _side_by_side(shard: Tensor, tp: ProcessGroup | None) -> Tensor:
    gathered = gather_over_tensor_parallel(shard, tp)  # [tp, batch, n]
    return gathered.permute(1, 0, 2).reshape(shard.shape[0], -1)
