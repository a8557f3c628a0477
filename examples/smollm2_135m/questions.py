"""The example's data: questions about everyday things, the model's own answers to them, and Python's manual as pretraining text.

    python questions.py ask --output DATA                                            questions and text, before anything is trained
    python questions.py label --output DATA --tokenizer START --answers RESPONSES    demonstrations and rankings from answers

There are no people in it. The start model answers each question several times, and rule.py ranks the answers: a demonstration is the
best answer to a question, where that is a good one, and the reward model sees all of them with their ranks. So nothing is learned from
a better model. What validation asks about is in no other file.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rule import ranks, score

sys.path.append(str(Path(__file__).parent.parent / "quickstart"))
from stdlib_text import topic_documents  # noqa: E402

THINGS = """
lighthouse bicycle bridge garden violin candle umbrella rainbow teacher doctor farmer river mountain forest island beach kitchen
library museum school hospital market restaurant bakery castle tower train airplane boat car bus truck horse cow chicken duck
rabbit cat dog elephant tiger lion monkey dolphin whale penguin owl eagle parrot butterfly bee spider ant apple banana orange
lemon grape strawberry tomato potato carrot onion pumpkin mushroom flower tree rose star planet cloud storm volcano
desert waterfall lake book newspaper letter song piano guitar drum trumpet camera telephone computer robot clock mirror
window door chair table lamp pillow blanket hat coat shoe sock scarf ring necklace coin bank shop park zoo farm
tent map compass ladder hammer needle basket bottle cup spoon plate oven fridge sandwich pizza cake cookie pancake salad soup
firefighter nurse pilot sailor painter dancer singer writer scientist engineer neighbor friend grandmother puppy kitten
""".split()
QUESTIONS = ("What is {a}?", "What are {many} good for?", "Why do people like {many}?", "Tell me about {many}.")
SYSTEM = "Answer in one short sentence."
CANDIDATES = 4
"""Answers to a question that are ranked."""
ASKED = 1
"""Questions about each thing whose answers are ranked; PPO has all of them."""
GOOD = 4.0
"""Least score of a demonstration."""
VALID_THINGS = 25
"""Things that only the closing evaluation asks about."""
RANKED_VALID = 5
"""Of the others one in so many validates demonstrations and rankings."""
HELD_OUT = 8
"""One document in so many is held out."""


def write(path: Path, records: Iterable[Mapping]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def plural(thing: str) -> str:
    """ "libraries" of "library"."""
    if thing.endswith("y") and thing[-2] not in "aeiou":
        return thing[:-1] + "ies"
    return thing + ("es" if thing.endswith(("ch", "sh", "s", "x", "ato", "cano")) else "s")


def prompt(thing: str, question: str) -> dict:
    """A question about a thing as a chat, with the names by which an answer may call it."""
    many = plural(thing)
    text = question.format(a=f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}", many=many)
    return {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}], "names": [thing, many]}


def questions(seed: int) -> dict[str, list[dict]]:
    """Records by file name: prompts (for PPO), prompts_valid, and to_rank, which has each prompt CANDIDATES times beside each other."""
    things = THINGS[:]
    random.Random(seed).shuffle(things)
    valid, trained = things[:VALID_THINGS], things[VALID_THINGS:]
    asked = [prompt(thing, QUESTIONS[(i + 2 * j) % len(QUESTIONS)]) for i, thing in enumerate(trained) for j in range(ASKED)]
    return {
        "prompts": [prompt(thing, question) for question in QUESTIONS for thing in trained],
        "prompts_valid": [prompt(thing, question) for question in QUESTIONS for thing in valid],
        "to_rank": [record for record in asked for _ in range(CANDIDATES)],
    }


def ask(output: Path, seed: int) -> None:
    """Write the questions and the pretraining text."""
    records = questions(seed)
    documents = [{"text": text} for text in topic_documents()]
    records["text"] = [document for i, document in enumerate(documents) if i % HELD_OUT]
    records["text_heldout"] = documents[::HELD_OUT]
    output.mkdir(parents=True, exist_ok=True)
    for name, rows in records.items():
        write(output / f"{name}.jsonl", rows)
        print(f"{name}.jsonl: {len(rows)} records")


def labelled(answers: Sequence[Mapping], known_words: frozenset[str]) -> dict[str, list[dict]]:
    """Demonstrations and rankings, each for training and for validation, from the answers to to_rank in its order."""
    groups = [answers[start : start + CANDIDATES] for start in range(0, len(answers), CANDIDATES)]
    things = list(dict.fromkeys(group[0]["names"][0] for group in groups))
    apart = set(things[::RANKED_VALID])
    made: dict[str, list[dict]] = defaultdict(list)
    for group in groups:
        messages, names = group[0]["messages"], group[0]["names"]
        suffix = "_valid" if names[0] in apart else ""
        scores = [score(names, row["response"], row["finished"], known_words) for row in group]
        placed = ranks(scores)
        if len(set(placed)) > 1:
            responses = [row["response"].strip() for row in group]
            made["rankings" + suffix].append({"messages": messages, "responses": responses, "ranks": placed})
        best = max(range(len(group)), key=scores.__getitem__)
        if scores[best] >= GOOD:
            answer = {"role": "assistant", "content": group[best]["response"].strip()}
            made["demonstrations" + suffix].append({"messages": [*messages, answer]})
    return made


def label(output: Path, tokenizer: Path, answers: Path) -> None:
    """Write the known words, demonstrations and rankings, and say what they hold."""
    words = known_words(tokenizer)
    (output / "known_words.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    known, rows = frozenset(words), [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    for name, records in sorted(labelled(rows, known).items()):
        write(output / f"{name}.jsonl", records)
        print(f"{name}.jsonl: {len(records)} records")
    scores = [score(row["names"], row["response"], row["finished"], known) for row in rows]
    best = [max(scores[start : start + CANDIDATES]) for start in range(0, len(scores), CANDIDATES)]
    print(f"the rule's score: answers {sum(scores) / len(scores):.2f}, the best of {CANDIDATES} {sum(best) / len(best):.2f}")


def known_words(tokenizer: Path) -> list[str]:
    """Words that everybody knows: those that the tokenizer, learned from English, writes as one piece after a space; sorted."""
    pieces = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    space = "\u0120"  # how byte-level tokenizers write it
    return sorted({piece[1:].lower() for piece in pieces if piece[0] == space and piece[1:].isascii() and piece[1:].isalpha()})


def main() -> None:
    """Write the files of one of the two steps into --output and say what they hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("ask", "label"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer")
    parser.add_argument("--answers", type=Path, help="the responses.jsonl that answers to_rank.jsonl")
    options = parser.parse_args()
    if options.step == "ask":
        ask(options.output, options.seed)
    else:
        label(options.output, options.tokenizer, options.answers)


if __name__ == "__main__":
    main()
