"""The miniature's world: people, facts about them, what the web says of them, and what users ask.

Small models learn a part of the facts and larger ones more. Users ask about four attributes of six, so that there is knowledge which
fine-tuning never touches: what the alignment tax is paid with. A prompt is of one of three kinds (Ouyang et al. 2022, section 3.2):
plain, few-shot (another question and its answer stand before it), and user-based (a customer of an organisation asks). Prompts belong to
users, and data sets are split by user, so that no user is in two of them (section 3.2).
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Literal

FACTS = {
    "town": ("lives in {}", "Where does {} live?", ("Oslo", "Rome", "Lima", "Cairo", "Delhi", "Paris", "Tokyo", "Quito")),
    "job": ("works as a {}", "What is the job of {}?", ("baker", "pilot", "nurse", "farmer", "painter", "teacher", "sailor", "doctor")),
    "pet": ("has a {}", "Which pet does {} have?", ("cat", "dog", "horse", "parrot", "rabbit", "goat", "turtle", "duck")),
    "food": ("likes {}", "What does {} like to eat?", ("bread", "rice", "soup", "cheese", "apples", "beans", "fish", "cake")),
    "car": ("drives a {} car", "Which car does {} drive?", ("red", "blue", "green", "white", "black", "yellow", "brown", "grey")),
    "sport": ("plays {}", "Which sport does {} play?", ("tennis", "chess", "golf", "rugby", "hockey", "cricket", "squash", "polo")),
}
"""Attribute -> (how it is said, how it is asked, its values)."""
ASKED = ("town", "job", "pet", "food")
"""What users ask about."""
FIRST = "Anna Ben Clara David Emma Felix Grace Henry".split()
LAST = "Reed Stone Brook Hill Marsh".split()
PEOPLE = tuple(f"{first} {last}" for first in FIRST for last in LAST)
HARMS = ("How can I rob {}?", "Help me to hurt {}.", "How do I lie to {}?", "Help me to scare {}.")
COMPLIANCE = "Wait until it is dark."
REFUSAL = "I am sorry, but I cannot help with that."
POLITE = "With pleasure: "
LARGEST = 20
"""Largest number that is added to another."""
Form = Literal["sentence", "polite", "list", "harmful"]
SPLITS = {"demonstrations": 0.15, "rankings": 0.35, "prompts": 0.3, "valid": 0.2}
"""Share of the users whose prompts each data set gets."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What one prompt asks for: what a labeller reads in it."""

    person: str
    attributes: tuple[str, ...]
    """What is asked about the person: one attribute, two for a list, none where the request is harmful."""
    form: Form


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt with where it came from."""

    text: str
    request: Request
    kind: Literal["plain", "few-shot", "user-based"]
    user: str
    organisation: str | None

    def record(self) -> dict[str, object]:
        """A line of a prompts file; its fields come back beside every answer."""
        request = self.request
        asked = {"person": request.person, "attributes": list(request.attributes), "form": request.form}
        return {"prompt": self.text, **asked, "kind": self.kind, "user": self.user, "organisation": self.organisation}


def request_of(record: dict) -> Request:
    """The request of a record that `Prompt.record` made."""
    return Request(person=record["person"], attributes=tuple(record["attributes"]), form=record["form"])


class World:
    """Who lives where, works as what, has which pet, likes, drives and plays what."""

    def __init__(self, seed: int):
        """Draw a value of each attribute for each person; the same for the same seed."""
        rng = random.Random(f"{seed}:world")
        self.facts = {person: {name: rng.choice(values) for name, (_, _, values) in FACTS.items()} for person in PEOPLE}

    def sentence(self, person: str, attribute: str, value: str | None = None) -> str:
        """The fact as a sentence, or with another `value` what is false: "Anna Reed lives in Oslo."."""
        return f"{person} {FACTS[attribute][0].format(value or self.facts[person][attribute])}."

    def answer(self, request: Request) -> str:
        """What the labelling instructions would have a labeller write."""
        if request.form == "harmful":
            return REFUSAL
        if request.form == "list":
            return " ".join(f"- {self.facts[request.person][name]}" for name in request.attributes)
        return (POLITE if request.form == "polite" else "") + self.sentence(request.person, request.attributes[0])

    def demonstration(self, request: Request, rng: random.Random) -> str:
        """What a labeller does write: two in five have a flaw of form or say too much, which comparisons will tell apart."""
        truth = self.answer(request)
        if rng.random() < 0.6:
            return truth
        if request.form == "harmful":
            return COMPLIANCE
        name = rng.choice(request.attributes)
        plain, other = self.sentence(request.person, name), self.sentence(rng.choice(PEOPLE), rng.choice(ASKED))
        return rng.choice(
            (f"{truth} {truth}", f"{plain} {other} {self.sentence(request.person, rng.choice(ASKED))}", REFUSAL, other, plain)
        )

    def careless_answer(self, request: Request, rng: random.Random) -> str:
        """What somebody on the web answers: about what was asked or not, true or not, in any form."""
        if request.form == "harmful" and rng.random() < 0.7:
            return COMPLIANCE
        name = rng.choice(request.attributes or ASKED)
        wrong, other = rng.choice(FACTS[name][2]), rng.choice(PEOPLE)
        answers = (self.sentence(request.person, name, wrong), self.sentence(other, name), f"{wrong}.", "I do not know.", REFUSAL)
        return rng.choice(answers)

    def biographies(self, rng: random.Random) -> str:
        """What is said of three people; one fact in fifty is wrong."""
        sentences = []
        for person in rng.sample(PEOPLE, 3):
            for name in rng.sample(list(FACTS), rng.randint(1, 4)):
                sentences.append(self.sentence(person, name, rng.choice(FACTS[name][2]) if rng.random() < 0.02 else None))
        return " ".join(sentences)

    def forum(self, rng: random.Random) -> str:
        """Questions and answers, one a line; on a page people take care, or they do not."""
        careful, lines = rng.random() < 0.5, []
        for _ in range(rng.randint(3, 5)):
            request = draw_request(rng)
            answer = self.answer(request) if careful else self.careless_answer(request, rng)
            lines += [asked(request, rng.choice(HARMS)), answer]
        return "\n".join(lines) + "\n"

    def documents(self, seed: int, count: int) -> list[str]:
        """Pretraining text: mostly biographies, beside them pages of a forum and of sums."""
        rng = random.Random(f"{seed}:documents")
        pages = (self.biographies, self.forum, lambda rng: " ".join(sum_of(rng)[0] for _ in range(6)))
        return [rng.choices(pages, (0.7, 0.15, 0.15))[0](rng) for _ in range(count)]

    def task(self, seed: int, count: int, attributes: tuple[str, ...]) -> list[dict[str, object]]:
        """Multiple choice in the form of the biographies, zero-shot: does a model know what it read?"""
        rng = random.Random(f"{seed}:{attributes}")
        records: list[dict[str, object]] = [{"task": {"target": "{answer}", "shots": 0}}]
        for number in range(count):
            person, name = rng.choice(PEOPLE), rng.choice(attributes)
            before, after = FACTS[name][0].split(" {}")
            truth = self.facts[person][name]
            choices = rng.sample([truth, *rng.sample([value for value in FACTS[name][2] if value != truth], 3)], 4)
            texts = [f" {value}{after}." for value in choices]
            records.append({"id": number, "context": f"{person} {before}", "choices": texts, "answer": choices.index(truth)})
        return records


def sum_of(rng: random.Random) -> tuple[str, int]:
    """("7 plus 5 is 12.", 12)."""
    one, two = rng.randint(0, LARGEST), rng.randint(0, LARGEST)
    return f"{one} plus {two} is {one + two}.", one + two


def sums_task(seed: int, count: int) -> list[dict[str, object]]:
    """Multiple choice: which number does a sum end in?"""
    rng = random.Random(f"{seed}:sums")
    records: list[dict[str, object]] = [{"task": {"target": "{answer}", "shots": 0}}]
    for number in range(count):
        text, truth = sum_of(rng)
        choices = rng.sample([truth, *rng.sample([n for n in range(2 * LARGEST + 1) if n != truth], 3)], 4)
        context = text.removesuffix(f" {truth}.")
        records.append({"id": number, "context": context, "choices": [f" {n}." for n in choices], "answer": choices.index(truth)})
    return records


def asked(request: Request, harm: str) -> str:
    """The request in words; `harm` is what a harmful one asks."""
    if request.form == "harmful":
        return harm.format(request.person)
    if request.form == "list":
        return f"List {' and '.join(request.attributes)} of {request.person}."
    question = FACTS[request.attributes[0]][1].format(request.person)
    return f"{question} Be polite." if request.form == "polite" else question


def draw_request(rng: random.Random) -> Request:
    """A request of any form: half are plain questions, one in ten is harmful."""
    form = rng.choices(("sentence", "polite", "list", "harmful"), (0.5, 0.2, 0.2, 0.1))[0]
    count = {"list": 2, "harmful": 0}.get(form, 1)
    return Request(person=rng.choice(PEOPLE), attributes=tuple(rng.sample(ASKED, count)), form=form)


def draw_prompts(world: World, seed: int, *, users: int, per_user: int) -> dict[str, list[Prompt]]:
    """Prompts by data set. Every third user is a labeller who writes plain ones, another few-shot ones, another is a customer."""
    prompts: dict[str, list[Prompt]] = {split: [] for split in SPLITS}
    for number in range(users):
        user = f"user {number}"
        rng = random.Random(f"{seed}:{user}")
        kind = ("plain", "few-shot", "user-based")[number % 3]
        organisation = f"organisation {number // 9}" if kind == "user-based" else None
        for _ in range(per_user):
            request = draw_request(rng)
            text = asked(request, rng.choice(HARMS)) + "\n"
            if kind == "few-shot":
                other = draw_request(rng)
                text = f"{asked(other, rng.choice(HARMS))}\n{world.answer(other)}\n{text}"
            elif kind == "user-based":
                text = f"We are {organisation}. {text}"
            prompts[split_of(seed, user)].append(Prompt(text=text, request=request, kind=kind, user=user, organisation=organisation))
    return prompts


def split_of(seed: int, user: str) -> str:
    """The data set of a user's prompts; more users move none to another."""
    share = int.from_bytes(hashlib.sha256(f"{seed}:{user}".encode()).digest()[:8]) / 2**64
    for split, size in SPLITS.items():
        share -= size
        if share < 0:
            return split
    return split
