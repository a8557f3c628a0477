"""Ragged rows for the benchmarks, the same for every side that is measured. Needs nothing but Python."""

from __future__ import annotations

import json
import random
from pathlib import Path

QUANTILES = {
    "sft prompts": (408, (1, 37, 283, 632, 2048)),
    "sft responses": (38, (1, 9, 18, 41, 2048)),
    "reward prompts": (199, (1, 20, 64, 203, 2032)),
    "reward responses": (88, (1, 15, 39, 88, 2048)),
    "ppo prompts": (166, (2, 19, 62, 179, 2044)),
    "ppo responses": (88, (1, 15, 39, 88, 2048)),
}
"""Ouyang et al. 2022, Tables 9 and 11: (mean, (shortest, quartiles, longest)) in tokens. Completions that are ranked or sampled are in no
table: they are taken to be like the demonstrations for customers' prompts."""
LONGEST = 1024
"""Of a prompt and of a response (Appendix C)."""


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


def paper_lengths(kind: str, number: int, *, scale: float, at_least: int = 1) -> list[int]:
    """Lengths with the quantiles and the mean of QUANTILES[kind], cut at LONGEST, all times `scale`; the same each time.

    Between two quantiles the logarithm is drawn evenly; above the third it is skewed so that the mean is the table's.
    """
    mean, quantiles = QUANTILES[kind]
    draw = random.Random(kind)
    places = [draw.random() for _ in range(max(number, 4096))]

    def length(place: float, skew: float) -> float:
        at, part = min(3, int(4 * place)), 4 * place % 1
        low, high = quantiles[at], quantiles[at + 1]
        return low * (high / low) ** (part**skew if at == 3 else part)

    low, high = 0.01, 100.0
    for _ in range(50):
        skew = (low * high) ** 0.5
        low, high = (skew, high) if sum(length(place, skew) for place in places) / len(places) > mean else (low, skew)
    return [max(at_least, round(scale * min(LONGEST, length(place, skew)))) for place in places[:number]]


def paper_rows(step: str, number: int, *, scale: float) -> list[list[int]]:
    """[prompt, response] lengths of a batch's rows, of "sft" or "ppo"; of "reward" [prompt, one completion, another]."""
    prompts = paper_lengths(f"{step} prompts", number, scale=scale)
    responses = paper_lengths(f"{step} responses", 2 * number, scale=scale, at_least=2)
    if step == "reward":
        return [list(row) for row in zip(prompts, responses[::2], responses[1::2], strict=True)]
    return [list(row) for row in zip(prompts, responses[:number], strict=True)]


def write_rows(path: Path, rows: list[list[int]]) -> None:
    """For another program."""
    path.write_text(json.dumps(rows), encoding="utf-8")


def read_rows(path: Path) -> list[list[int]]:
    """What `write_rows` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
