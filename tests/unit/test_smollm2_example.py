"""The written rule of examples/smollm2_135m, and the data that it labels."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megarlhf.data.records import read_demonstrations, read_prompts, read_rankings

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "smollm2_135m"))
import questions  # noqa: E402
import rule  # noqa: E402

NAMES = ["candle", "candles"]
KNOWN = frozenset("a is gives light and warm to read by the that it in they are good for room evening dark".split())
GOOD = "A candle gives a warm light to read by."


def score(response: str, *, finished: bool = True) -> float:
    return rule.score(NAMES, response, finished, KNOWN)


def test_each_flaw_costs_something():
    assert score(GOOD) == rule.MAX_SCORE == score("Candles are good for a dark room!")
    worse = {
        "off topic": "It gives a warm light to read by.",
        "made-up words": "A candle gives a warm lightlitude to read by.",
        "two sentences": "A candle is warm. It gives a light to read by.",
        "too short": "A candle is warm.",
        "repeated": "A candle gives a warm light and gives a warm light.",
        "rambling": "A candle gives light to read by in the dark evening, and it is warm in a room and good for them that they are by.",
    }
    for flaw, response in worse.items():
        assert 0 < score(response) < score(GOOD) - rule.TIE_MARGIN, flaw


@pytest.mark.parametrize("response", ["", " ", "...", "7.", "A candle gives a warm light to", "candle " * 50 + "."])
def test_what_is_no_whole_sentence_gets_nothing(response):
    assert score(response) == 0
    assert score(GOOD, finished=False) == 0


def test_near_scores_are_ties():
    assert [rule.preference(a, b) for a, b in ((6, 5), (5, 6), (5, 5.05))] == [1, 0, 0.5]
    assert rule.ranks([6.0, 0.0, 5.9, 3.0]) == [1, 4, 1, 3]


def test_questions_are_the_same_each_time_and_validation_asks_about_other_things():
    made = questions.questions(0)
    assert made == questions.questions(0) != questions.questions(1)
    things = {name: {record["names"][0] for record in records} for name, records in made.items()}
    assert not things["prompts_valid"] & things["prompts"] and things["to_rank"] == things["prompts"]
    assert things["prompts_valid"] | things["prompts"] == set(questions.THINGS)
    assert questions.prompt("ant", questions.QUESTIONS[0])["messages"][-1]["content"] == "What is an ant?"
    assert list(map(questions.plural, ("library", "toy", "bus", "potato", "piano"))) == ["libraries", "toys", "buses", "potatoes", "pianos"]


def test_the_best_of_the_answers_is_a_demonstration_and_all_are_ranked(tmp_path):
    things = ("lamp", "candle", "oven")
    asked = [questions.prompt(thing, "What is {a}?") for thing in things for _ in range(questions.CANDIDATES)]
    texts = ["It is a light.", GOOD, "Candle candle candle.", "A cand"]
    answers = [{**record, "response": texts[i % questions.CANDIDATES], "finished": i % 4 < 3} for i, record in enumerate(asked)]
    made = questions.labelled(answers, KNOWN)
    assert made["demonstrations"] == [{"messages": [*asked[4]["messages"], {"role": "assistant", "content": GOOD}]}]  # no lamp, no oven
    assert "demonstrations_valid" not in made
    assert [record["ranks"] for record in made["rankings"]] == [[2, 1, 3, 3]] * 2
    assert len(made["rankings_valid"]) == 1
    for name, read in (("demonstrations", read_demonstrations), ("rankings", read_rankings)):
        questions.write(tmp_path / name, made[name])
        assert len(read(tmp_path / name)[0]) == len(made[name])
    questions.write(tmp_path / "prompts", asked[:1])
    assert json.loads((tmp_path / "prompts").read_text())["names"] == ["lamp", "lamps"] and read_prompts(tmp_path / "prompts")
