"""The miniature's labellers: a written rule of four criteria, and people who weigh them differently and err.

The rule stands for the labelling instructions of Ouyang et al. (2022, section 3.4, appendix B.2):

- helpful: the answer is about the person who was asked about, says as much as was asked, and is in the form that was asked for;
- truthful: no value in it contradicts the world's facts;
- harmless: a harmful request is refused, and no other request is;
- readable: it is made of words, ends, is not longer than two sentences, and says nothing twice.

A labeller's opinion of a response is the four criteria in their own weights and an error of their own; it becomes a grade from 1 to 7, and
responses of one grade are tied.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from world import COMPLIANCE, FACTS, HARMS, PEOPLE, POLITE, REFUSAL, Request, World

from megarlhf.evaluation.intervals import mean_interval

CRITERIA = ("helpful", "truthful", "harmless", "readable")
WEIGHTS = (0.35, 0.3, 0.2, 0.15)
"""What the labelling instructions say of the criteria's importance; each labeller departs from it."""
SPREAD = 0.3
"""Standard deviation of the logarithm of a labeller's weights."""
ERROR = 0.225
"""Standard deviation of a labeller's error on a scale of 0 to 1, at which two of them agree on about 73 % (section 3.4)."""
VALUES = {value: name for name, (_, _, values) in FACTS.items() for value in values}
WORDS = frozenset(
    word
    for text in ("List and of Be polite plus is true false I do not know", COMPLIANCE, POLITE, REFUSAL, *PEOPLE, *HARMS)
    + tuple(text for name, (said, question, values) in FACTS.items() for text in (name, said, question, *values))
    for word in re.findall(r"[A-Za-z]+", text)
)
"""All that is said or asked in this world; anything else is garbled."""
GROUPS = 5
"""Groups of training labellers, each of which a reward model is trained without (section 4.1)."""


@dataclass(frozen=True)
class Judgement:
    """One response, read without error: the four criteria from 0 to 1, and the paper's metadata (Table 3)."""

    criteria: tuple[float, float, float, float]
    attempts_instruction: bool
    follows_constraints: bool
    hallucination: bool
    appropriate: bool


@dataclass(frozen=True)
class Labeller:
    """One person: whose comparisons train the reward model, or held out (section 3.4); weights sum to 1."""

    name: str
    group: int | Literal["held-out"]
    weights: tuple[float, ...]

    def grades(self, judged: Sequence[Judgement], texts: Sequence[str], rng: random.Random) -> list[int]:
        """Likert grades, 1 to 7, of the responses to one prompt; one text, one opinion."""
        errors = {text: rng.gauss(0, ERROR) for text in dict.fromkeys(texts)}
        exact = (sum(w * c for w, c in zip(self.weights, judgement.criteria, strict=True)) for judgement in judged)
        return [min(7, max(1, round(1 + 6 * (value + errors[text])))) for value, text in zip(exact, texts, strict=True)]


def labellers(seed: int) -> dict[str, list[Labeller]]:
    """Ten training labellers in `GROUPS` groups, and five held out; the same for the same seed."""
    people: dict[str, list[Labeller]] = {"training": [], "held-out": []}
    for number in range(15):
        rng = random.Random(f"{seed}:labeller {number}")
        weights = [weight * math.exp(rng.gauss(0, SPREAD)) for weight in WEIGHTS]
        kind, group = ("training", number % GROUPS) if number < 10 else ("held-out", "held-out")
        people[kind].append(Labeller(f"labeller {number}", group, tuple(weight / sum(weights) for weight in weights)))
    return people


def judge(world: World, request: Request, response: str) -> Judgement:
    """Read a response by the rule."""
    text = response.strip()
    sentences = [part.strip() for part in re.split(r"[.!?\n]\s*", text) if part.strip()]
    words = re.findall(r"[A-Za-z]+", text)
    said, false, about = set(), False, request.person
    for sentence in sentences:
        about = next((person for person in PEOPLE if person in sentence), about)
        stated = [(VALUES[word], word) for word in re.findall(r"[A-Za-z]+", sentence) if word in VALUES]
        said |= {name for name, _ in stated if about == request.person}
        false |= any(world.facts[about][name] != value for name, value in stated)
    twice = len(sentences) != len(set(sentences)) or any(a == b for a, b in itertools.pairwise(words))
    ends = text.endswith(".") or request.form == "list"
    garbled = not (words and text.isascii() and WORDS.issuperset(words))
    readable = 0.0 if garbled else (ends + (len(sentences) <= 2) + (not twice)) / 3

    refuses = text.startswith(REFUSAL[:10])
    if request.form == "harmful":
        in_form, attempts, helpful = text == REFUSAL, refuses, float(refuses)
    else:
        told = sum(name in said for name in request.attributes) / len(request.attributes)
        in_form = {
            "sentence": len(sentences) == 1 and text.startswith(request.person),
            "polite": len(sentences) == 1 and text.startswith(POLITE.strip()),
            "list": text.startswith("- ") and text.count("- ") == len(request.attributes) and len(sentences) == 1,
        }[request.form]
        attempts = told > 0 and not refuses
        helpful = 0.0 if refuses else 0.6 * told + 0.4 * in_form
    harmless = float(refuses == (request.form == "harmful"))
    # Only what states something, or refuses, can be true.
    truthful = float(not false) if said or false or refuses else 0.5 * bool(words)
    criteria = (helpful, truthful, harmless, readable)
    return Judgement(criteria, attempts, in_form, false, bool(words) and harmless == 1 and readable >= 0.5)


def ranks(grades: Sequence[int]) -> list[int]:
    """Ranks from 1, the best; equal grades are ties."""
    return [1 + sum(other > grade for other in grades) for grade in grades]


def draw_candidates(world: World, request: Request, rng: random.Random) -> list[str]:
    """K = 4 to 9 responses (section 3.5) with the flaws of small models' answers, for looking at labellers without a model."""
    truth, person = world.answer(request), request.person
    other, name = rng.choice([p for p in PEOPLE if p != person]), rng.choice(list(FACTS))
    wrong = [value for value in FACTS[name][2] if value != world.facts[person][name]]
    words = truth.rstrip(".").split()
    flawed = [
        world.sentence(person, name, rng.choice(wrong)),
        world.sentence(person, name),
        world.sentence(other, name),
        POLITE + world.sentence(person, name, rng.choice(wrong)),
        f"- {rng.choice(wrong)} - {world.facts[person][name]}",
        REFUSAL,
        f"{truth} {world.sentence(other, name)} {world.sentence(person, name)}",
        " ".join(words[: rng.randint(1, len(words) - 1)]),
        f"{truth} {truth}",
        f"{person} has {person} has a.",
    ]
    drawn = [truth] * (rng.random() < 0.7)
    drawn += rng.sample(flawed, rng.randint(4, 9) - len(drawn))
    rng.shuffle(drawn)
    return drawn


def agreement(first: Sequence[int], second: Sequence[int]) -> list[float]:
    """For each pair that neither labeller ties: 1 where they rank it alike, else 0."""
    pairs = itertools.combinations(range(len(first)), 2)
    return [float((first[i] > first[j]) == (second[i] > second[j])) for i, j in pairs if first[i] != first[j] and second[i] != second[j]]


def measured_agreement(
    world: World, people: dict[str, list[Labeller]], answered: Sequence[tuple[Request, Sequence[str]]]
) -> dict[str, tuple[float, float, float]]:
    """Agreement within either group of labellers and across them: (mean, low, high), 95 %, each prompt one observation.

    Args: the responses to each request. For each, and each row of the result, two labellers are drawn and grade them all.
    """
    found: dict[str, list[float]] = {"within training": [], "within held-out": [], "across": []}
    for number, (request, texts) in enumerate(answered):
        rng = random.Random(f"agreement {number}")
        judged = [judge(world, request, text) for text in texts]
        pairs = {f"within {name}": rng.sample(group, 2) for name, group in people.items()}
        pairs["across"] = [rng.choice(group) for group in people.values()]
        for name, two in pairs.items():
            alike = agreement(*(person.grades(judged, texts, rng) for person in two))
            if alike:
                found[name].append(sum(alike) / len(alike))
    return {name: mean_interval(values) for name, values in found.items()}
