"""The example's labeller: a written rule in place of people. It ranks candidates and judges which of two answers is the better one.

It stands for labelling instructions (Ouyang et al. 2022, section 3.4 and Appendix B): a good answer to an everyday question is one short,
whole sentence that names what was asked about, is made of words that everybody knows, and does not say the same thing twice.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence

MAX_SCORE = 6.0
TIE_MARGIN = 0.06
"""Answers whose scores differ by less are equally good: 1 % of the scale."""
SHORTEST, LONGEST = 6, 20
"""Words of a good answer."""


def score(names: Collection[str], response: str, finished: bool, known_words: Collection[str]) -> float:
    """How good an answer is, from 0 to 6: 2 each for topic, known words and one sentence, as far as it is short and repeats nothing.

    An answer that its limit cut off, or that does not end as a sentence does, gets 0.

    Args:
        names: what was asked about, in lower case: "bicycle", "bicycles".
        finished: whether the answer ended by itself, before the limit of its tokens.
        known_words: words in lower case that everybody knows.
    """
    said = re.findall(r"[a-z]+(?:'[a-z]+)?", response.lower())
    if not finished or not said or not response.rstrip().endswith((".", "!")):
        return 0.0
    content = 2 * on_topic(names, said) + 2 * plain(names, said, known_words) + 2 * one_sentence(response)
    return right_length(said) * without_repetition(said) * content


def on_topic(names: Collection[str], said: Sequence[str]) -> float:
    """1 where the answer names what was asked about, else 0."""
    return float(any(word in names for word in said))


def plain(names: Collection[str], said: Sequence[str], known_words: Collection[str]) -> float:
    """1 where all words are known, 0 where a quarter of them or more are not."""
    unknown = sum(word.partition("'")[0] not in known_words and word not in names for word in said)
    return max(0.0, 1 - 4 * unknown / len(said))


def one_sentence(response: str) -> float:
    """1 where nothing follows the first sentence, else 0."""
    return float(re.search(r"[.!?:]\s", response.strip()) is None)


def right_length(said: Sequence[str]) -> float:
    """1 from 6 to 20 words, down to 0 at no word and at 40."""
    return max(0.0, min(1.0, len(said) / SHORTEST, 2 - len(said) / LONGEST))


def without_repetition(said: Sequence[str]) -> float:
    """1 where no pair of words is said twice, 0 where a third of them are."""
    pairs = list(itertools.pairwise(said))
    return 1 - min(1.0, 3 * (len(pairs) - len(set(pairs))) / max(1, len(pairs)))


def preference(a: float, b: float) -> float:
    """1 when the answer with score `a` is the better one, 0 when the one with `b` is, 1/2 for a tie."""
    return 0.5 if abs(a - b) < TIE_MARGIN else float(a > b)


def ranks(scores: Sequence[float]) -> list[int]:
    """Ranks from 1, the best; scores within a twelfth of the scale are ties, as labellers were encouraged to use."""
    grades = [round(12 * value / MAX_SCORE) for value in scores]
    return [1 + sum(other > grade for other in grades) for grade in grades]
