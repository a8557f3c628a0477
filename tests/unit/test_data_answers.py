"""Two models' answers to the same prompts, and labels: what is read, what belongs together, what is refused."""

import pytest

from megarlhf.config.sections import LimitsConfig
from megarlhf.data.answers import Answer, answer_rows, answers_fingerprint, paired, read_answers, read_labels
from megarlhf.data.files import BadRecord
from megarlhf.runs.records import Records
from tests.unit.test_data_tasks import Letters, write


def answer(prompt="p", response="r", finished=True, number=None, source="f:1"):
    return Answer(prompt, response, finished, number, source)


def test_answers_of_a_run_and_from_elsewhere(tmp_path):
    lines = [
        {"id": 3, "prompt": "p", "response": "r", "finished": False, "reward": 1.5},
        {"prompt": "q", "response": ""},
        {"prompt": "q", "response": "\n", "id": "x"},
    ]
    answers, report = read_answers(write(tmp_path / "a.jsonl", *lines))
    found = [(a.id, a.prompt, a.response, a.finished) for a in answers]
    assert found == [(3, "p", "r", False), (None, "q", "", True), ("x", "q", "\n", True)]
    rows, _ = answer_rows(answers, Letters(), max_prompt_len=3, max_response_len=2)
    assert [list(row.response_ids) for row in rows] == [[ord("r")], [0], [ord("\n"), 0]]
    assert report.num_kept == 3 and len({answers_fingerprint(rows[:n]) for n in (1, 2, 3)}) == 3


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"prompt": "p"}, 'no "response"'),
        ({"prompt": "p", "response": None}, '"response" is null'),
        ({"response": "r"}, 'no "prompt"'),
        ({"prompt": "", "response": "r"}, '"prompt" has no text'),
        ({"prompt": "p", "response": "r", "finished": 1}, '"finished" is not true or false'),
        ({"prompt": "p", "response": "r", "id": [1]}, '"id" is a list'),
        ({"prompt": "p", "response": "r", "id": True}, '"id" is a boolean'),
    ],
)
def test_what_is_no_answer_is_refused(tmp_path, record, sentence):
    with pytest.raises(BadRecord, match="a.jsonl:1") as refused:
        read_answers(write(tmp_path / "a.jsonl", record))
    assert sentence in str(refused.value)


def test_answers_over_the_limits_are_bad_records():
    for bad, sentence in ((answer(prompt="pppp"), "the prompt has 4 tokens"), (answer(response="rr"), "the response has 3 tokens")):
        with pytest.raises(BadRecord, match=sentence):
            answer_rows([bad], Letters(), max_prompt_len=3, max_response_len=2)
        rows, report = answer_rows([bad, answer()], Letters(), max_prompt_len=3, max_response_len=2, on_bad_record="skip")
        assert len(rows) == 1 and report.num_skipped == 1


def test_labels(tmp_path):
    lines = [{"id": 1, "preference": "a"}, {"prompt": "p", "preference": "b", "labeler": 4}, {"id": 1, "preference": "tie", "prompt": "q"}]
    labels, _ = read_labels(write(tmp_path / "a.jsonl", *lines))
    assert [(label.key, label.preference) for label in labels] == [(("id", 1), 1.0), (("prompt", "p"), 0.0), (("id", 1), 0.5)]


@pytest.mark.parametrize("preference", ["A", 1, None, ["a"]])
def test_a_label_is_one_of_three(tmp_path, preference):
    with pytest.raises(BadRecord, match="unknown preference"):
        read_labels(write(tmp_path / "a.jsonl", {"id": 1, "preference": preference}))
    with pytest.raises(BadRecord, match='no "prompt"'):
        read_labels(write(tmp_path / "b.jsonl", {"preference": "a"}))


def test_answers_are_paired_by_id_where_all_have_one_and_else_by_prompt():
    ours = [answer("p", number=1), answer("q", number=2), answer("p", number=3)]
    theirs = [answer("p", number=3), answer("p", number=1), answer("q", number=2)]
    assert paired(ours, theirs) == ([(0, 1), (1, 2), (2, 0)], [])
    theirs = [answer("q"), answer("p", number=1)]
    assert paired([answer("p", number=1), answer("q", number=2)], theirs) == ([(0, 1), (1, 0)], [])


def test_what_cannot_be_paired_is_said():
    ours = [answer("p", source="a:1"), answer("q", source="a:2"), answer("p", source="a:3"), answer("r", source="a:4")]
    pairs, said = paired(ours, [answer("p", source="b:1"), answer("s", source="b:2"), answer("r", source="b:3")])
    assert pairs == [(0, 0), (3, 2)]
    assert said == [
        "a:3 has the prompt of a:1: nothing says which of the two is meant",
        "1 of 4 answers have no answer on the other side with the same prompt, a:2 the first",
        "1 of 3 answers have no answer on the other side with the same prompt, b:2 the first",
    ]
    pairs, said = paired([answer("p", number=1, source="a:1")], [answer("q", number=1, source="b:1")])
    assert pairs == [] and said == ["a:1 and b:1 have one id and other prompts"]


def test_a_run_refuses_what_is_not_paired_or_leaves_it_out_and_says_so(tmp_path):
    ours = [answer("p"), answer("q")]
    for how, refused in (("raise", True), ("skip", False)):
        read = Records(Letters(), LimitsConfig(on_bad_record=how))
        assert read.pairs(ours, [answer("q")]) == [(1, 0)]
        assert bool(read.problems) is refused and bool(read.notes) is not refused
        assert read.pairs(ours, [answer("x")]) == [] and read.problems  # nothing is left to compare
    read = Records(Letters(), LimitsConfig())
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "response": "r"}, {"prompt": "q", "response": ""})
    assert [row.answer.prompt for row in read.answers("win_rate.against", path)] == ["p", "q"]
    assert "win_rate.against" in read.fingerprints and read.answers("win_rate.responses", None) == []
    labels = write(tmp_path / "l.jsonl", {"id": 1, "preference": "x"})
    assert read.labels(labels) == [] and "unknown preference" in read.problems[0]


def test_labels_of_other_answers_are_said(tmp_path):
    """They would stand beside a win rate that they have nothing to do with."""
    lines = [{"id": 1, "preference": "a"}, {"prompt": "q", "preference": "b"}, {"id": 9, "preference": "a"}]
    lines += [{"prompt": "z", "preference": "a"}]
    path = write(tmp_path / "labels.jsonl", *lines)
    limits = LimitsConfig(max_prompt_len=9, max_response_len=9)
    for about, others in (([], 0), ([answer(number=1), answer("q")], 2), ([answer("q", number=1), answer("z", number=9)], 0)):
        records = Records(Letters(), limits)
        assert len(records.labels(path, about=about)) == 4 and not records.problems
        said = [note for note in records.notes if "about none of the pairs" in note]
        assert [note.split(" are ")[0] for note in said] == [f"{path}: {others} of 4 labels"] * bool(others)
