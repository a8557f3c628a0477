"""Rewards of one's own: what a function may give for a batch, and what is refused by its name."""

import collections
from pathlib import Path

import numpy as np
import pytest
import torch

from megarlhf.data.functions import load_function
from megarlhf.data.tokenized import PromptRow
from megarlhf.runs.rewards import called

ROOT = Path(__file__).parents[2]
ROWS = [PromptRow([1, 2], f"prompts.jsonl:{n}", {"tests": ["a", "b"], "id": n}) for n in (1, 2, 3)]


def asked(function):
    return called(function, "mine.py:score", ["p"] * 3, ["x", "y", "z"], ROWS)


@pytest.mark.parametrize(
    "given", [[1, 2.5, True], (1, 2.5, 1), np.array([1, 2.5, 1]), torch.tensor([[1.0], [2.5], [1.0]]), collections.deque([1, 2.5, 1])]
)
def test_any_row_of_numbers_is_taken(given):
    assert asked(lambda *_: given) == [1.0, 2.5, 1.0]
    assert asked(lambda *_: iter(given)) == [1.0, 2.5, 1.0]


@pytest.mark.parametrize("given", [{0: 0.5, 1: 0.7, 2: 0.9}, {0.5, 0.7, 0.9}, "012", b"012", {"x": 1, "y": 2, "z": 3}.keys(), None, 3.0])
def test_what_is_no_list_is_refused_even_where_three_numbers_could_be_made_of_it(given):
    with pytest.raises(ValueError, match=r"mine\.py:score returned .*it must return a list with a number for each of the 3 responses"):
        asked(lambda *_: given)


@pytest.mark.parametrize(
    ("given", "limit"), [(float("nan"), ""), (float("inf"), ""), (1e39, ", at most 3.4"), (-(10**39), ", at most 3.4"), ("good", "")]
)
def test_a_number_that_float32_does_not_hold_is_refused_with_its_record(given, limit):
    with pytest.raises(ValueError, match=rf"gave .* for prompts\.jsonl:2, response 'y'; a reward is a finite number{limit}"):
        asked(lambda *_: [0.0, given, 1.0])
    assert torch.tensor(asked(lambda *_: [3.4e38, -3.4e38, 0])).isfinite().all()


def test_what_a_function_does_to_its_arguments_stays_its_own():
    def greedy(prompts, responses, records):
        prompts.clear()
        responses.sort(reverse=True)
        return [len(record["tests"]) * len(record.pop("tests").pop()) for record in records]

    assert asked(greedy) == asked(greedy) == [2.0, 2.0, 2.0]


def test_the_verifier_of_the_8b_example_takes_the_last_number():
    is_right = load_function(str(ROOT / "examples/llama3_8b/last_number.py:is_right"))
    texts = {"so 1,234.": "1234", "It is 7, then 8": 7, "none": "5", "x = -3": "-3", "$72.50 each": "72.5", "18 eggs, 18.": "1,8"}
    assert is_right([""] * 6, list(texts), [{"answer": answer} for answer in texts.values()]) == [1.0, 0.0, 0.0, 1.0, 1.0, 1.0]


def test_a_function_that_fails_is_named_with_its_line(tmp_path):
    file = tmp_path / "mine.py"
    lines = ["def score(prompts, responses, records):", "    return [divided(r) for r in responses]", "", "", "def divided(r):"]
    file.write_text("\n".join([*lines, "    return 1 / (r != 'y')\n"]))
    with pytest.raises(ValueError, match=r"score: ZeroDivisionError: .* \(at .*mine\.py:6, for the response to prompts\.jsonl:2\)"):
        called(load_function(f"{file}:score"), f"{file}:score", ["p"] * 3, ["x", "y", "z"], ROWS)
    file.write_text("import os\nscore = nothing\n")
    with pytest.raises(ValueError, match=r"cannot be loaded: NameError: .* \(at .*mine\.py:2\)"):
        load_function(f"{file}:score")
