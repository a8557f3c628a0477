"""Tasks: their files, forms and examples, and what is refused of them."""

import json

import pytest

from megarlhf.config.sections import LimitsConfig
from megarlhf.data.files import BadRecord
from megarlhf.data.task_rows import task_fingerprint, task_rows
from megarlhf.data.tasks import read_task
from megarlhf.runs.records import Records

QUIZ = {"context": "Sky?", "choices": ["blue", "red"], "answer": 0}
ASKED = {"context": "Sky?", "answers": ["blue", "azure"]}


class Letters:
    """A token per letter; 0 ends."""

    vocab_size, eos_id, pad_id, unk_id, fingerprint, opening = 128, 0, 1, 2, "letters", None

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i > 1)


def write(path, *records):
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))
    return str(path)


def rows_of(path, *, shots=None, seed=1, max_prompt_len=1000, max_response_len=20, **how):
    task, _ = read_task(path)
    limits = {"max_prompt_len": max_prompt_len, "max_response_len": max_response_len}
    return task_rows(task, Letters(), shots=shots, seed=seed, **limits, **how)[0]


def texts(rows):
    return [Letters().decode(row.prompt_ids) for row in rows]


def test_records_without_a_form_are_their_context_and_a_blank_before_the_answer(tmp_path):
    [quiz] = rows_of(write(tmp_path / "a.jsonl", QUIZ))
    [asked] = rows_of(write(tmp_path / "b.jsonl", ASKED))
    assert texts([quiz, asked]) == ["Sky?", "Sky?"]
    assert texts_of_choices(quiz) == [" blue", " red"] and quiz.record.num_right == 0 and quiz.record.metric == "accuracy"
    assert asked.choice_ids == () and asked.record.answers == ("blue", "azure") and asked.record.metric == "exact_match"
    assert asked.max_new_tokens == 20


def texts_of_choices(row):
    return [Letters().decode(ids) for ids in row.choice_ids]


def test_a_form_writes_instruction_examples_and_query_as_the_paper_does(tmp_path):
    form = {
        "instruction": "Answer.", "query": "Text: {text}\nQ{number}: {context}\nA:", "target": " {answer}.", "separator": "\n--\n",
        "shots": 2, "metric": "f1", "max_new_tokens": 7,
    }
    train = [{"part": "train", "text": f"t{i}", "number": i, "context": f"c{i}", "answers": [f"a{i}", "other"]} for i in range(2)]
    query = {"text": "{answer} {number}", "number": 1.5, "context": "why", "answers": ["x"], "metric": "contains"}
    [row] = rows_of(write(tmp_path / "a.jsonl", {"task": form}, train[0], query, train[1]))
    shown = [f"Text: t{i}\nQ{i}: c{i}\nA: a{i}." for i in range(2)]
    assert texts([row]) == ["\n--\n".join(["Answer.", *shown, "Text: {answer} {number}\nQ1.5: why\nA:"])]
    assert (row.shots, row.shots_lost, row.max_new_tokens, row.record.metric) == (2, 0, 7, "contains")
    assert texts(rows_of(tmp_path / "a.jsonl", shots=0)) == ["Answer.\n--\nText: {answer} {number}\nQ1.5: why\nA:"]


def test_examples_are_drawn_for_each_record_and_the_same_for_a_seed(tmp_path):
    train = [{"part": "train", "context": f"c{i}", "choices": ["x", "y"], "answer": i % 2} for i in range(9)]
    path = write(tmp_path / "a.jsonl", *train, *[QUIZ] * 20)
    one, same, other = (texts(rows_of(path, shots=3, seed=seed)) for seed in (1, 1, 2))
    assert one == same and one != other and len(set(one)) > 15
    for text in one:
        shown = text.split("\n\n")[:-1]
        assert len(set(shown)) == 3 and set(shown) <= {f"c{i} {'xy'[i % 2]}" for i in range(9)}


def test_a_records_own_examples_stand_before_it(tmp_path):
    own = [{"context": f"c{i}", "answers": [f"a{i}"]} for i in range(3)]
    path = write(tmp_path / "a.jsonl", {**ASKED, "examples": own}, {**ASKED, "examples": []})
    assert texts(rows_of(path)) == ["c0 a0\n\nc1 a1\n\nc2 a2\n\nSky?", "Sky?"]
    path = write(tmp_path / "b.jsonl", {**ASKED, "examples": own})
    assert texts(rows_of(path, shots=1)) == ["c0 a0\n\nSky?"]
    with pytest.raises(BadRecord, match="it has 3 examples, and 4 shots are asked for"):
        rows_of(path, shots=4)


def test_a_prompt_that_is_too_long_loses_its_first_examples_and_that_is_said(tmp_path):
    own = [{"context": f"c{i}", "answers": [f"a{i}"]} for i in range(3)]  # "c0 a0\n\n" is 7 letters
    path = write(tmp_path / "a.jsonl", {**ASKED, "examples": own}, ASKED)
    for limit, left in ((25, 3), (24, 2), (18, 2), (17, 1), (11, 1), (10, 0), (4, 0)):
        row = rows_of(path, max_prompt_len=limit)[0]
        assert (row.shots, row.shots_lost) == (left, 3 - left) and len(row.prompt_ids) == 7 * left + 4 <= limit
        assert texts([row])[0].endswith("".join(f"c{i} a{i}\n\n" for i in range(3 - left, 3)) + "Sky?")
    with pytest.raises(BadRecord, match="a.jsonl:1: prompt over limit: the query alone has 4 tokens, more than max_prompt_len 3"):
        rows_of(path, max_prompt_len=3)
    read = Records(Letters(), LimitsConfig(max_prompt_len=18, max_response_len=9))
    assert read.tasks("tasks", [path], shots=None, seed=1).keys() == {"a"} and not read.problems
    assert f"{path}: 1 of 2 prompts have fewer examples than asked for, so that limits.max_prompt_len 18 holds" in read.notes


def test_what_decides_results_decides_the_fingerprint(tmp_path):
    changes = [ASKED, {**ASKED, "context": "Sea?"}, {**ASKED, "answers": ["blue"]}, {**ASKED, "metric": "f1"}, QUIZ, {**QUIZ, "answer": 1}]
    found = [task_fingerprint(rows_of(write(tmp_path / f"{i}.jsonl", record))) for i, record in enumerate(changes)]
    assert len(set(found)) == len(found)
    assert found[0] == task_fingerprint(rows_of(write(tmp_path / "x.jsonl", {**ASKED, "more": 1})))


REFUSED = [
    (['{"task": {"metrics": "f1"}}'], 'unknown key: "task" has "metrics". It may have instruction, query, target'),
    (['{"task": []}'], '"task" is no object'),
    (['{"task": {"metric": "bleu"}}'], "unknown metric"),
    (['{"task": {"metric": "accuracy"}}'], "Take one of exact_match, contains, f1"),
    (['{"task": {"shots": -1}}'], "bad number"),
    (['{"task": {"shots": true}}'], "bad number"),
    (['{"task": {"max_new_tokens": 0}}'], "bad number"),
    (['{"task": {"query": 3}}'], '"query" of "task" is no string'),
    (['{"task": {"target": "x"}}'], "no place for the answer"),
    (['{"task": {"query": "{answer}"}}'], "no place for the answer"),
    ([QUIZ, '{"task": {}}'], "nothing to judge by"),
    ([{"context": "x"}], "nothing to judge by"),
    ([{"context": "x", "answers": []}], "nothing to judge by"),
    ([{"context": "x", "answers": "x"}], '"answers" is no list of 1 or more texts'),
    ([{"context": "x", "answers": [1]}], '"answers[0]" is a number'),
    ([{"context": "x", "answers": [" "]}], '"answers[0]" has no text'),
    ([{"answers": ["x"]}], '"query" names "context", and there is "answers"'),
    ([{"context": ["x"], "answers": ["x"]}], '"context" is neither text nor number'),
    ([{"context": "", "answers": ["x"]}], "empty text"),
    ([{**ASKED, "metric": "rouge"}], "unknown metric"),
    ([{**ASKED, "metric": ["f1"]}], "unknown metric"),
    ([{**ASKED, "part": "dev"}], "unknown part"),
    ([{**ASKED, "part": "train"}], "nothing to ask"),
    ([{**ASKED, "examples": {}}], '"examples" is no list of objects'),
    ([{**ASKED, "examples": [QUIZ]}], "an example is of another kind"),
    ([{**ASKED, "examples": [{"context": "x"}]}], "a.jsonl:1, example 0: nothing to judge by"),
    ([{**QUIZ, "choices": ["blue"]}], '"choices" is no list of 2 or more texts'),
    ([{**QUIZ, "choices": ["blue", "blue"]}], "a choice twice"),
    ([{**QUIZ, "answer": 2}], "no right choice"),
    ([{**QUIZ, "answer": -1}], "no right choice"),
    ([{**QUIZ, "answer": True}], "no right choice"),
    ([{**QUIZ, "answer": "blue"}], "no right choice"),
    ([{**QUIZ, "answers": ["blue"]}], "two kinds of record"),
    ([QUIZ, ASKED], "a.jsonl:2: two kinds of record: it is generative, and"),
    ([], "no record"),
    (['{"task": {}}'], "no record"),
    (["{"], "broken JSON"),
]


@pytest.mark.parametrize(("records", "sentence"), REFUSED)
def test_what_is_no_task_is_refused_with_its_line(tmp_path, records, sentence):
    path = write(tmp_path / "a.jsonl", *records)
    with pytest.raises(BadRecord) as refused:
        read_task(path)
    assert sentence in str(refused.value) and str(refused.value).startswith(path)


def test_bad_records_can_be_skipped_and_bad_forms_cannot(tmp_path):
    path = write(tmp_path / "a.jsonl", QUIZ, {**QUIZ, "answer": 7}, "{", {**QUIZ, "choices": ["x" * 30, "y"]}, QUIZ)
    task, report = read_task(path, on_bad_record="skip")
    assert len(task.records) == 3 and report.num_skipped == 2
    limits = {"max_prompt_len": 9, "max_response_len": 9}
    rows, report = task_rows(task, Letters(), shots=None, seed=1, **limits, on_bad_record="skip")
    assert len(rows) == 2 and report.skipped_by_reason == {"response over limit": 1}
    with pytest.raises(BadRecord, match="unknown key"):
        read_task(write(tmp_path / "b.jsonl", '{"task": {"x": 1}}', QUIZ), on_bad_record="skip")


@pytest.mark.parametrize(
    ("form", "records", "sentence"),
    [
        ({"shots": 3}, [{**ASKED, "part": "train"}, ASKED], "3 shots are asked for, and its train part has 1 records"),
        ({"shots": 1}, [ASKED], "1 shots are asked for, and its train part has 0 records"),
        ({}, [{**ASKED, "part": "train"}, ASKED], "1 records of the train part, and nothing says how many"),
        ({"max_new_tokens": 21}, [ASKED], '"max_new_tokens" of "task" is 21, more than max_response_len 20'),
    ],
)
def test_examples_that_there_are_not_and_answers_without_room_are_refused(tmp_path, form, records, sentence):
    path = write(tmp_path / "a.jsonl", {"task": form}, *records)
    for how in ("raise", "skip"):
        with pytest.raises(BadRecord) as refused:
            rows_of(path, on_bad_record=how)
        assert sentence in str(refused.value)
