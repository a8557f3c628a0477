"""The quickstart's labeller: a written-down rule in place of people, used to rank candidates and to compare policies.

It stands for the labelling instructions of Ouyang et al. (2022, section 3.4, appendix B). It sees what a labeller sees, the
prompt and the response, and not the docstring the prompt was made from, so it judges any text a model writes.

    python labelling.py --pairs PAIRS.txt A.jsonl B.jsonl     win rate of A over B, lines of {"prompt", "response"}
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from megarlhf.evaluation.intervals import win_rate

MAX_SCORE = 6.0
TIE_MARGIN = 0.05
"""Responses whose scores differ by less are equally good: 1 % of the scale."""

# ---- the rule -------------------------------------------------------------------------------------------------------


def score(prompt: str, response: str, pairs: Collection[str]) -> float:
    """How good `response` is, from 0 to 6: one fluent sentence of the right length, on what was asked, that repeats nothing.

    What is said counts as far as it is of the right length and not repeated, so that neither one good word nor a list of them
    is a good answer. `pairs` are the pairs of words known to follow each other, "return the", in lower case: the labeller's
    sense of grammar.
    """
    said = re.findall(r"[a-z]+", response.lower())
    content = 2.5 * on_topic(prompt, said) + 2.5 * fluent(prompt, said, pairs)
    return right_length(said) * without_repetition(said) * content + one_sentence(response)


def on_topic(prompt: str, said: Sequence[str]) -> float:
    """Share of the asked name's letters that the response says again, "heap_pop" by "Pops from a heap."; 1 from 3/4 of them on."""
    parts = [part for part in name_parts(prompt) if len(part) >= 3]
    told = [[False] * len(part) for part in parts]
    for word in set(said) - {"the", "and", "for", "with", "that", "this", "from"}:
        for part, letters in zip(parts, told, strict=True):
            for length in range(min(len(word), len(part)), max(2, min(len(word), len(part), 4) - 1), -1):  # the longest common stem
                if (start := part.find(word[:length])) >= 0:
                    letters[start : start + length] = [True] * length
                    break
    return min(1.0, sum(map(sum, told)) / max(1, 0.75 * sum(map(len, parts))))


def without_repetition(said: Sequence[str]) -> float:
    """1 without a long word or a pair of words said twice, 0 when a third of them are."""
    items = [word for word in said if len(word) > 3] + list(itertools.pairwise(said))
    return max(0.0, 1 - 3 * (len(items) - len(set(items))) / max(1, len(items)))


def fluent(prompt: str, said: Sequence[str], pairs: Collection[str]) -> float:
    """Share of the neighbouring words that are known to follow each other; a part of the asked name may follow any word."""
    asked = set(name_parts(prompt))
    neighbours = list(itertools.pairwise(said))
    known = sum(f"{left} {right}" in pairs or right in asked for left, right in neighbours)
    return known / max(1, len(neighbours))


def right_length(said: Sequence[str]) -> float:
    """1 from 6 to 16 words, down to 0 at no word and at 32."""
    return max(0.0, min(1.0, len(said) / 6, (32 - len(said)) / 16))


def one_sentence(response: str) -> float:
    """A capital letter at the start (1/4), a period at the end (1/2), and no other period followed by a space (1/4)."""
    text = response.strip()
    return 0.25 * text[:1].isupper() + text.endswith(".") * (0.5 + 0.25 * (re.search(r"[.!?]\s", text) is None))


# ---- what the rule is used for --------------------------------------------------------------------------------------


def name_parts(prompt: str) -> list[str]:
    """The words, in lower case, in the last two components of the name asked about: "os.path.join" has path and join.

    Raises:
        ValueError: the prompt is of none of `make_data.PROMPT_FORMS`.
    """
    asked = re.match(r"(?:Explain|Describe|What is|What does) ([\w.]*\w)", prompt)
    if asked is None:
        raise ValueError(f"the prompt {prompt!r} asks about no name; prompts look like 'Explain os.path.join.'")
    components = asked.group(1).split(".")[-2:]
    parts = [part.lower() for component in components for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", component)]
    return list(dict.fromkeys(parts))


def preference(prompt: str, a: str, b: str, pairs: Collection[str]) -> float:
    """1 when response `a` is the better one, 0 when `b` is, 1/2 for a tie."""
    difference = score(prompt, a, pairs) - score(prompt, b, pairs)
    return 0.5 if abs(difference) < TIE_MARGIN else float(difference > 0)


def grades(scores: Sequence[float], noise: Sequence[float], *, noise_std: float) -> list[int]:
    """The 1 to 7 grade one labeller gives each candidate: the rule's score and the labeller's own noise (unit variance)."""
    return [min(7, max(1, round(1 + 6 * (s + noise_std * z) / MAX_SCORE))) for s, z in zip(scores, noise, strict=True)]


def ranks(graded: Sequence[int]) -> list[int]:
    """Ranks from 1, the best; equal grades are ties, as labellers were encouraged to use."""
    return [1 + sum(other > grade for other in graded) for grade in graded]


def agreement(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]]) -> float:
    """Share of the pairs which two labellers both rank without a tie that they rank alike; one list of grades per prompt."""
    agreed = total = 0
    for a, b in zip(first, second, strict=True):
        for i, j in itertools.combinations(range(len(a)), 2):
            if a[i] != a[j] and b[i] != b[j]:
                total += 1
                agreed += (a[i] > a[j]) == (b[i] > b[j])
    return agreed / total


def calibrated_noise(scores: Sequence[Sequence[float]], noises: Sequence[Sequence[Sequence[float]]], *, target: float) -> float:
    """The standard deviation of noise at which two labellers agree on `target` of their pairs, by bisection.

    `scores` has a list per prompt; `noises` has the same for either labeller, drawn beforehand.
    """
    low, high = 0.0, 2 * MAX_SCORE
    for _ in range(20):
        std = (low + high) / 2
        one, two = ([grades(s, z, noise_std=std) for s, z in zip(scores, noise, strict=True)] for noise in noises)
        low, high = (std, high) if agreement(one, two) > target else (low, std)
    return std


def read_pairs(path: str | Path) -> frozenset[str]:
    """The known pairs of words: one pair per line."""
    return frozenset(Path(path).read_text(encoding="utf-8").splitlines())


def main(argv: Sequence[str] | None = None) -> None:
    """Print mean scores and the win rate between two files of samples with the same prompts."""
    parser = argparse.ArgumentParser(description="Win rate of the samples of one policy over those of another.")
    parser.add_argument("--pairs", type=Path, required=True, help="pairs.txt, written by make_data.py")
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    args = parser.parse_args(argv)
    pairs = read_pairs(args.pairs)
    a, b = ([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in (args.a, args.b))
    if [row["prompt"] for row in a] != [row["prompt"] for row in b]:
        raise ValueError(f"{args.a} and {args.b} answer different prompts; sample both policies on the same file, in its order")
    for path, rows in ((args.a, a), (args.b, b)):
        print(f"{path}: mean score {sum(score(r['prompt'], r['response'], pairs) for r in rows) / len(rows):.3f}")
    rate, low, high = win_rate([preference(x["prompt"], x["response"], y["response"], pairs) for x, y in zip(a, b, strict=True)])
    print(f"win rate {rate:.3f}, 95 % interval {low:.3f} to {high:.3f}, {len(a)} prompts")


if __name__ == "__main__":
    main()
