"""Which row of which corpus comes n-th: a pure function of n, so that one number is the cursor of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from megarlhf.data.corpus import Corpus
from megarlhf.data.order import ShuffledOrder


class BlendedOrder:
    """An endless order over the rows of several corpora, shared out by weights; each corpus has a shuffled order of its own.

    The first j + 1 corpora's rows are shared out to the first j and the last of them, from the longest such list down: of every n
    rows in a list, the nearest integer to n * (their share of its weight) go to those before the last (a Beatty sequence, which
    grows by 0 or 1 as n does). So of the first n rows each corpus has its share to within half as many rows as there are corpora,
    exactly so where n is a multiple of the shares' common denominator, and nothing is held but the weights.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], *, seed: int) -> None:
        """Args: sizes: rows of each corpus, at least 1. weights: above 0, in any unit; 0.3 means three tenths, not its binary neighbour."""
        exact = [Fraction(repr(float(weight))) for weight in weights]
        if len(exact) != len(sizes) or not all(weight > 0 for weight in exact):
            raise ValueError(f"weights are {list(weights)} for {len(sizes)} corpora; each needs one above 0")
        self.shares = [weight / sum(exact) for weight in exact]
        """Of each corpus; their sum is 1."""
        # A corpus's permutations differ from those of another of its size; a corpus alone is drawn as the first of several is.
        self._orders = [ShuffledOrder(size, seed=seed ^ number) for number, size in enumerate(sizes)]
        self._kept = [sum(self.shares[:last]) / sum(self.shares[: last + 1]) for last in range(len(exact) - 1, 0, -1)]

    def taken(self, n: int) -> list[int]:
        """How many of the first `n` rows are of each corpus."""
        counts, left = [], n
        for kept in self._kept:
            before = (2 * left * kept.numerator + kept.denominator) // (2 * kept.denominator)
            counts.append(left - before)
            left = before
        return [left, *reversed(counts)]

    def rows(self, start: int, n: int) -> list[tuple[int, int]]:
        """(corpus, its row) of the places start .. start + n - 1."""
        counts = [self.taken(place) for place in range(start, start + n + 1)]
        drawn = [
            iter(order.at(first, last - first)) for order, first, last in zip(self._orders, counts[0], counts[-1], strict=True)
        ]
        corpora = [
            next(i for i, (now, then) in enumerate(zip(before, after, strict=True)) if then > now)
            for before, after in zip(counts, counts[1:], strict=False)
        ]
        return [(corpus, next(drawn[corpus])) for corpus in corpora]

    def epochs(self, n: int) -> list[float]:
        """How often the first `n` rows pass through each corpus."""
        return [count / order.num_items for count, order in zip(self.taken(n), self._orders, strict=True)]


@dataclass(frozen=True)
class BlendedText:
    """The rows themselves. Another process can be sent it, and imports no more than numpy for it."""

    corpora: tuple[Corpus, ...]
    order: BlendedOrder

    def rows(self, start: int, n: int) -> np.ndarray:
        """The rows of the places start .. start + n - 1: [n, seq_len] int64."""
        out = np.empty((n, self.corpora[0].seq_len), dtype=np.int64)
        for into, (corpus, row) in zip(out, self.order.rows(start, n), strict=True):
            into[:] = self.corpora[corpus].row(row)
        return out


@dataclass(frozen=True)
class NumberedBatches:
    """Batches of `n` rows from the place `start` on, by their number: what DALI's workers call."""

    text: BlendedText
    start: int
    n: int

    @property
    def bytes(self) -> int:
        """Of one batch."""
        return 8 * self.n * self.text.corpora[0].seq_len

    def __call__(self, sample: object) -> np.ndarray:
        """The batch that DALI asks for by its SampleInfo: [n, seq_len] int64."""
        return self.text.rows(self.start + sample.iteration * self.n, self.n)
