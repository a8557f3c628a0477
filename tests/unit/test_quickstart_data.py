"""The quickstart's data and its labelling rule (examples/quickstart)."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

import pytest

from megarlhf.data.records import read_demonstrations, read_prompts, read_rankings

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "quickstart"))
import labelling  # noqa: E402
import make_data  # noqa: E402
import stdlib_text  # noqa: E402

PROMPT = "Explain folder.copy_file.\n"
PAIRS = frozenset({"copy the", "the file", "file to", "to another", "another folder", "return the", "the value", "value of", "of it"})
GOOD = "Copy the file to another folder."


@pytest.fixture(scope="module")
def made() -> tuple[dict[str, list[dict]], list[str], list[str]]:
    return make_data.make_all(seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("quickstart")
    make_data.main(["--output", str(path)])
    return path


def score(response: str, prompt: str = PROMPT) -> float:
    return labelling.score(prompt, response, PAIRS)


def test_each_flaw_costs_something_and_nothing_is_out_of_range():
    assert score(GOOD) == labelling.MAX_SCORE
    worse = {
        "no period": "Copy the file to another folder",
        "no capital": "copy the file to another folder.",
        "two sentences": "Copy the file. To another folder.",
        "too short": "Copy the file.",
        "off topic": "Return the value of it to another.",
        "word order": "Folder file to copy another the.",
        "misspelled": "Copy the fiel to anotehr fodler.",
        "repeated": "Copy the file copy the file copy the file.",
        "rambling": "Copy the file to another folder, and return the value of it to the file, and to the folder, and to the value.",
    }
    for flaw, response in worse.items():
        assert 0 < score(response) < score(GOOD) - labelling.TIE_MARGIN, flaw
    for nothing in ("", " ", "?!", "7", "file " * 200):
        assert 0 <= score(nothing) <= 1, nothing


def test_a_list_of_the_asked_words_is_not_a_good_answer():
    assert max(score("Copy file."), score("Copy."), score("Copy file copy file copy file.")) < score("Return the value of it to another.")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("os.path.join", ["path", "join"]),
        ("ast.NodeVisitor.generic_visit", ["node", "visitor", "generic", "visit"]),
        ("xml.sax.SAXParseException", ["sax", "parse", "exception"]),
        ("abs", ["abs"]),
        ("os.pipe2", ["os", "pipe"]),
    ],
)
def test_name_parts_of_every_prompt_form(name, parts):
    for form in make_data.PROMPT_FORMS:
        assert labelling.name_parts(form.format(name)) == parts
    with pytest.raises(ValueError, match="asks about no name"):
        labelling.name_parts(f"Tell me about {name}.")


def test_preference_is_antisymmetric_and_win_rate_is_wilsons():
    responses = [GOOD, "Copy the file.", "Copy.", "copy the file to another folder"]
    for a, b in itertools.product(responses, repeat=2):
        assert labelling.preference(PROMPT, a, b, PAIRS) + labelling.preference(PROMPT, b, a, PAIRS) == 1
    assert labelling.preference(PROMPT, GOOD, "Copy.", PAIRS) == 1
    rate, low, high = labelling.win_rate([1.0] * 60 + [0.5] * 20 + [0.0] * 20)
    assert rate == 0.7
    for bound in (low, high):  # Wilson: the proportions from which the observed rate is 1.96 standard errors away
        assert abs(rate - bound) / math.sqrt(bound * (1 - bound) / 100) == pytest.approx(1.959964)
    assert labelling.win_rate([1.0] * 10)[2] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="at least one"):
        labelling.win_rate([])


def test_two_labellers_agree_as_often_as_asked_for(made):
    assert labelling.ranks([5, 7, 5, 1]) == [2, 1, 2, 4]
    assert labelling.agreement([[1, 2, 3]], [[1, 3, 2]]) == pytest.approx(2 / 3)
    assert labelling.agreement([[1, 2, 2]], [[1, 3, 2]]) == 1.0  # the tied pair does not count
    report = "\n".join(made[2])
    assert f"{'agreement of two labellers':28} {0.73:10.3f}" in report


def test_the_same_seed_gives_the_same_files(made, folder):
    for name, records in made[0].items():
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == records


def test_another_seed_moves_names_and_another_name_moves_none():
    names = [f"module.name{i}" for i in range(2000)]
    splits = [make_data.split_of(0, name) for name in names]
    assert splits != [make_data.split_of(1, name) for name in names]
    for split, share in make_data.SPLITS.items():
        assert splits.count(split) / len(names) == pytest.approx(share, abs=0.03)


def test_the_files_are_what_the_readers_take(folder, made):
    records, pairs, _ = made
    for split in ("", "_valid"):
        demonstrations, _ = read_demonstrations(folder / f"demonstrations{split}.jsonl")
        rankings, _ = read_rankings(folder / f"rankings{split}.jsonl")
        prompts, _ = read_prompts(folder / f"prompts{split}.jsonl")
        assert [len(demonstrations), len(rankings), len(prompts)] == [
            len(records[f"{name}{split}"]) for name in ("demonstrations", "rankings", "prompts")
        ]
        assert all(4 <= len(ranking.responses) <= 9 for ranking in rankings)
        assert all(d.response.endswith(".") and d.response[0].isupper() and len(d.response) <= 100 for d in demonstrations)
    assert labelling.read_pairs(folder / "pairs.txt") == frozenset(pairs)
    assert all(line.isascii() for path in folder.iterdir() for line in path.read_text(encoding="utf-8").splitlines())


def test_no_name_and_no_answer_is_in_two_data_sets(made):
    records = made[0]
    names = {split: {record["prompt"].split(" ", 2)[-1] for record in records[split]} for split in make_data.SPLITS}
    for one, two in itertools.combinations(names, 2):
        assert not names[one] & names[two], (one, two)
    assert not {r["text"] for r in records["corpus"]} & {r["text"] for r in records["corpus_heldout"]}
    heldout = [r["response"] for r in records["demonstrations_valid"]]
    assert not any(answer in record["text"] for record in records["corpus"] for answer in heldout)
    assert not set(heldout) & {r["response"] for r in records["demonstrations"]}


def test_the_true_sentence_is_usually_the_better_of_two(made):
    _, pairs, _ = made
    known = frozenset(pairs)
    demonstrations = made[0]["demonstrations"] + made[0]["demonstrations_valid"]
    others = demonstrations[1:] + demonstrations[:1]
    wins = [labelling.preference(d["prompt"], d["response"], o["response"], known) for d, o in zip(demonstrations, others, strict=True)]
    rate, low, high = labelling.win_rate(wins)
    assert 0.75 < low and high < 0.95, rate


@pytest.mark.parametrize(
    ("name", "doc", "sentence"),
    [
        ("os.dup", "Return a duplicate of a file descriptor.", "Return a duplicate of a file descriptor."),
        ("array.tell", "tell(file) -> int\n\nFind the position,\ne.g. 0.  And more.", "Find the position, e.g. 0."),
        ("dict.clear", "D.clear() -> None.  Remove all items from D.", "Remove all items from D."),
        ("re.A", "does a match; see ``search`` for\nmore", "Does a match."),
        ("re.B", "Use :class:`~re.Pattern` objects instead", "Use re.Pattern objects instead."),
        ("ast.Add", "Add(expr left, expr right)", None),
        ("re.C", "Same as a <<= b.", None),
        ("re.D", "Broken (off here.", None),
        ("re.E", "Stub.", None),
    ],
)
def test_first_sentence(name, doc, sentence):
    assert stdlib_text.first_sentence(name, doc) == sentence


def test_labelling_compares_two_files_of_samples(folder, tmp_path, capsys):
    rows = [json.loads(line) for line in (folder / "demonstrations_valid.jsonl").read_text(encoding="utf-8").splitlines()]
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    bad.write_text("".join(json.dumps({**row, "response": "?"}) + "\n" for row in rows), encoding="utf-8")
    labelling.main(["--pairs", str(folder / "pairs.txt"), str(good), str(bad)])
    assert "win rate 1.000" in capsys.readouterr().out
    bad.write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="different prompts"):
        labelling.main(["--pairs", str(folder / "pairs.txt"), str(good), str(bad)])
