"""Ragged rows for the benchmarks, the same for every side that is measured. Needs nothing but Python."""

from __future__ import annotations

import random


def prompt_lengths(number: int, *, shortest: int = 8, longest: int) -> list[int]:
    """Evenly drawn lengths of prompts, the same each time."""
    draw = random.Random(1)
    return [draw.randint(shortest, longest) for _ in range(number)]


def ending_ids(vocab_size: int, *, most: int, mean: float) -> list[int]:
    """The highest ids of a vocabulary, so many that rows which end after the first of them have `mean` tokens on average.

    Rows have at most `most` tokens, from a model that draws every id about equally often, as one does at random initialization. Such a
    row goes on with probability 1 - p after each token, and has (1 - (1 - p)^most) / p tokens on average.
    """
    low, high = 1e-9, 1.0
    for _ in range(60):
        p = (low + high) / 2
        low, high = (p, high) if (1 - (1 - p) ** most) / p > mean else (low, p)
    return list(range(vocab_size - max(1, round(p * vocab_size)), vocab_size))
