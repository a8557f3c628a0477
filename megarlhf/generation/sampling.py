"""Sampling one token per row from vocabulary-parallel logits, with noise that no layout can change.

The noise of a (seed, iteration, sample, position, vocabulary id) is a hash of these numbers. The Gumbel-max trick is taken in two
steps: first a family of FAMILY neighbouring ids is drawn by its whole probability, then an id of the family. That is the same
distribution, since p(id) = p(family) p(id | family), and takes a hash per family instead of one per id. Each tensor-parallel rank
scores the families of its own shard of the vocabulary, and only each shard's best (score, id) is compared: the same token whatever
tp, pp, dp or batching.
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
LEAST = -1e30
"""Stands for the largest of nothing: a number, so that what is excluded lies below it."""
LAST = 2**52 - 1
"""The largest number of 52 bits."""
FAMILY = 16
"""Ids of a family; they follow each other, and the first is a multiple of this."""
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


def noise_keys(seed: int, iteration: int, samples: Tensor, positions: Tensor) -> Tensor:
    """What the noise of rows is drawn from, whatever the id: samples, positions [batch] int64 -> [batch] int64."""
    start = _mixed_number((_mixed_number(seed + GOLDEN) ^ iteration) + GOLDEN)
    return mixed((mixed((samples ^ start).add_(GOLDEN)) ^ positions).add_(GOLDEN))


def _mixed_number(x: int) -> int:
    """`mixed` of a number that the host has."""
    x &= 2**64 - 1
    for shift, factor in MIX:
        x = (x ^ x >> shift) * factor & 2**64 - 1
    x ^= x >> 31
    return x - (x >> 63 << 64)  # as int64 reads it


def noise_bits(keys: Tensor, vocab_ids: Tensor) -> Tensor:
    """52 random bits, a function of the arguments alone: [batch, n] int64 in [0, 2**52).

    Args: keys: see `noise_keys`; vocab_ids [n] or, each row its own, [batch, n] int64.
    """
    return mixed(vocab_ids * GOLDEN + keys[:, None]).bitwise_right_shift_(12).bitwise_and_(LAST)


def gumbel_noise(keys: Tensor, vocab_ids: Tensor) -> Tensor:
    """Standard Gumbel noise from `noise_bits`: [batch, n] float32, never infinite.

    -log(-log(u)) of u = (bits + 1/2) / 2**52, by way of 1 - u: where the noise is large, which is where it decides, 1 - u is small and
    float32 holds it to a part in 2**24, as it would not hold u. So the error of the noise is some 1e-7 of it or of 1: less than
    what the rounding of float32 logits does to a score.
    """
    rest = noise_bits(keys, vocab_ids).bitwise_xor_(LAST).float()
    minus_rest = rest.add_(0.5).mul_(-(2.0**-52)).clamp_(min=2.0**-24 - 1)
    return minus_rest.log1p_().neg_().log_().neg_()


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
        logits: [batch, padded_vocab / tp] float32, this rank's shard; padded_vocab is a multiple of FAMILY.
        samples: [batch] int64, the numbers of the samples within the iteration.
        positions: [batch] int64, the positions that the tokens will stand at.

    Returns: [batch] int64, [batch] float32.
    """
    if logits.shape[-1] % FAMILY:
        logits, tp = _side_by_side(logits, tp), None  # shards so narrow that they cut families
    width = logits.shape[-1]
    first = first_vocab_id(width, tp)
    real = max(0, min(width, vocab_size - first))
    is_whole = tp is None or tp.size() == 1
    keys, found = noise_keys(seed, iteration, samples, positions), []
    for start in range(0, len(logits), rows := max(1, BLOCK // width)):
        part = slice(start, start + rows)
        scaled = _scaled(logits[part], sampling.logprob_temperature, real)
        best, local, total = _best(scaled, sampling, tp, keys[part], first)
        own = scaled.gather(1, local[:, None]).squeeze(1)
        found.append((local, own - total) if is_whole else (best.double(), (local + first).double(), own.double(), total.double()))
    columns = [column[0] if len(column) == 1 else torch.cat(column) for column in zip(*found, strict=True)]
    if is_whole:
        return columns[0], columns[1]
    candidates = gather_over_tensor_parallel(torch.stack(columns), tp)  # [tp, 4, batch]
    winner = candidates[:, 0].max(dim=0).indices[None]  # [1, batch]: of equal scores the first rank's, whose ids are smaller
    token, own = (candidates[:, row].gather(0, winner).squeeze(0) for row in (1, 2))
    return token.long(), (own - candidates[:, 3].logsumexp(dim=0)).float()


def _scaled(logits: Tensor, temperature: float, real: int) -> Tensor:
    """Logits [rows, width] over the temperature, those of padding, from `real` on, excluded; they themselves where that changes nothing."""
    scaled = logits if temperature == 1 else logits / temperature
    if real < logits.shape[-1]:
        scaled = scaled.clone() if scaled is logits else scaled
        scaled[:, real:] = EXCLUDED
    return scaled


def _best(scaled: Tensor, sampling: Sampling, tp: ProcessGroup | None, keys: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of a shard [rows, width] that begins with the id `first`: (score of the best, its place in the shard, logsumexp), each [rows].

    The noise of families is that of ids below zero. A family is weighed by sums of exp(logit - the row's largest). One that is nothing
    in float32 lies more than 87 below another, and two draws of the noise are never more than 41 apart: it could not win.
    """
    top = None if sampling.temperature else scaled.max(dim=-1, keepdim=True)
    peak = (scaled.amax(dim=-1, keepdim=True) if top is None else top.values).clamp(min=LEAST)  # a shard may be all padding
    sums = _family_sums(scaled, peak)
    total = sums.sum(dim=-1).log() + peak.squeeze(1)
    if top is not None:
        return top.values.squeeze(1), top.indices.squeeze(1), total
    kept = _truncated(scaled, sampling, tp)
    weights = sums if kept is scaled else _family_sums(kept, peak)
    families = torch.arange(weights.shape[-1], device=scaled.device)
    score, family = (gumbel_noise(keys, -1 - first // FAMILY - families) + weights.log() + peak).max(dim=-1)
    members = family[:, None] * FAMILY + torch.arange(FAMILY, device=scaled.device)
    member = (gumbel_noise(keys, first + members) + kept.gather(1, members)).argmax(dim=-1)
    return score, family * FAMILY + member, total


def _family_sums(scores: Tensor, peak: Tensor) -> Tensor:
    """[rows, width], [rows, 1] -> [rows, width / FAMILY]: of each family the sum of exp(score - peak)."""
    return (scores - peak).exp_().view(len(scores), -1, FAMILY).sum(dim=-1)


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
