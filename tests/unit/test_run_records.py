"""What a run says of its files as a whole: agreement between ranks, validation apart from training, batches, notes."""

import json
import types

import pytest
import tokenizers

from megarlhf.config.sections import HeldOutTextConfig, LimitsConfig, PretrainingDataConfig
from megarlhf.data.tokenizers import load_tokenizer
from megarlhf.preparation.corpora import write_corpus
from megarlhf.runs import records as run_records
from megarlhf.runs.records import Records

LIMITS = {"max_prompt_len": 9, "max_response_len": 9}


class Letters:
    """A token per letter of the first 128; 0 ends."""

    vocab_size, eos_id, pad_id, unk_id, fingerprint, path, opening = 128, 0, 1, 2, "letters", "letters.json", None

    def encode(self, text):
        return [ord(letter) if ord(letter) < 128 else 2 for letter in text]

    def decode(self, ids):
        return "".join("?" if i == 2 else chr(i) for i in ids if i > 1)


def write(path, *records):
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))
    return str(path)


def records(**limits):
    return Records(Letters(), LimitsConfig(**LIMITS, **limits))


def demonstrations(*prompts):
    return [{"prompt": prompt, "response": "r"} for prompt in prompts]


READ = {
    "demonstrations": demonstrations("a", "b", "c"),
    "rankings": [{"prompt": prompt, "chosen": "x", "rejected": "y"} for prompt in "abc"],
    "prompts": [{"prompt": prompt} for prompt in "abc"],
}


@pytest.mark.parametrize("kind", READ)
def test_a_file_smaller_than_a_batch_is_refused_with_the_way_out(tmp_path, kind):
    path = write(tmp_path / "a.jsonl", *READ[kind])
    enough, few = records(), records()
    assert len(getattr(enough, kind)("data.train", path, batch=("batch_size", 3))) == 3 and not enough.problems
    getattr(few, kind)("data.train", path, batch=("ppo.batch_size", 4))
    assert few.problems == [
        f"data.train: {path} has 3 records to draw from, fewer than the 4 of one batch; lower ppo.batch_size to 3 at most, or add records"
    ]


@pytest.mark.parametrize("kind", [*READ, "tasks"])
def test_plain_prompts_for_a_model_that_knows_texts_with_an_opening_are_doubted(tmp_path, kind):
    path, opened, others = write(tmp_path / "a.jsonl", *READ.get(kind, [{"context": "a", "answers": ["b"]}])), records(), records()
    opened.tokenizer.opening = "<s>"
    for read in (opened, others):
        if kind == "tasks":
            read.tasks("tasks", [path], shots=None, seed=1)
        else:
            getattr(read, kind)("data.train", path)
        read.prompts("data.prompts", write(tmp_path / "b.jsonl", {"prompt": "d"}))  # said once
    (doubt,) = [note for note in opened.notes if "is this meant?" in note]
    assert doubt.startswith(f"{path}: is this meant? letters.json has transformers begin every text with <s>, and plain text begins")
    assert not any("is this meant?" in note for note in others.notes)


def test_chats_are_remembered_with_the_template_that_writes_them(tmp_path):
    folder = tmp_path / "tok"
    folder.mkdir()
    model = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator(["a"], special_tokens=["</s>"], show_progress=False)
    model.save(str(folder / "tokenizer.json"))
    path = write(tmp_path / "chats.jsonl", {"messages": [{"role": "user", "content": "a"}]})
    found = []
    for template in ("{{ messages[0].content }}</s>", "{{ messages[0].content }}{# the same text #}</s>"):
        (folder / "chat_template.jinja").write_text(template)
        read = Records(load_tokenizer(folder), LimitsConfig(**LIMITS))
        read.prompts("data.prompts", path)
        found.append(read.fingerprints)
    assert found[0]["data.prompts"] == found[1]["data.prompts"] and found[0]["chat template"] != found[1]["chat template"]
    assert "chat template" not in records().fingerprints


@pytest.mark.parametrize("kind", READ)
def test_validation_on_what_is_trained_on_is_refused_and_shared_prompts_are_said(tmp_path, kind):
    train, copy = (write(tmp_path / name, *READ[kind]) for name in ("train.jsonl", "copy.jsonl"))
    shuffled = write(tmp_path / "shuffled.jsonl", *READ[kind][::-1], READ[kind][0] | {"prompt": "d"})
    apart = write(tmp_path / "apart.jsonl", READ[kind][0] | {"prompt": "d"})
    for valid in (train, copy):
        read = records()
        getattr(read, kind)("data.train", train)
        getattr(read, kind)("data.valid", valid, apart_from="data.train")
        [problem] = read.problems
        assert problem.startswith(f"data.valid: {valid} has the content of data.train, {train}: validation on what is trained on")
    for valid, said in ((shuffled, ["data.valid: 3 of its 4 prompts are in data.train too, which is trained on"]), (apart, [])):
        read = records()
        getattr(read, kind)("data.train", train)
        getattr(read, kind)("data.valid", valid, apart_from="data.train")
        assert not read.problems and [note for note in read.notes if "too" in note] == said


def test_held_out_text_that_is_trained_on_is_refused(tmp_path):
    for name in ("a", "b"):
        write_corpus(tmp_path / name, [[5] * 20], eos_id=0, vocab_size=128)
    write_corpus(tmp_path / "c", [[6] * 20], eos_id=0, vocab_size=128)
    for valid, refused in (("a", True), ("b", True), ("c", False)):
        read = records()
        data = PretrainingDataConfig(prefix=str(tmp_path / "a"), valid_prefix=str(tmp_path / valid), seq_len=4)
        read.text("data", data, seed=1)
        assert read.held_out("data", data).rows is not None
        assert any("has the content of data.prefix" in problem for problem in read.problems) is refused
        assert read.fingerprints.keys() == {"tokenizer", "data.prefix", "data.valid_prefix"}
    read = records()
    assert read.held_out("text", HeldOutTextConfig(valid_prefix=str(tmp_path / "none"), seq_len=4)).rows is None
    assert "none.bin is missing" in read.problems[0]


def test_rankings_without_a_comparison_are_left_out_and_a_file_of_them_is_refused(tmp_path):
    tie = {"prompt": "t", "responses": ["x", "y", "z"], "ranks": [2, 2, 2]}
    some, none = write(tmp_path / "some.jsonl", tie, *READ["rankings"], tie), write(tmp_path / "none.jsonl", tie, tie)
    read = records()
    assert [row.source for row in read.rankings("data.train", some)] == [f"{some}:{line}" for line in (2, 3, 4)]
    assert f"{some}: 2 of 5 rankings are one tie, which compares nothing: left out" in read.notes and not read.problems
    assert read.rankings("rankings", none) == []
    assert read.problems == [f"rankings: {none} compares nothing: each of its 2 rankings is one tie; rank some response higher"]


def test_what_is_skipped_is_said_line_by_line(tmp_path):
    bad = ['{"prompt"'] * 7
    path = write(tmp_path / "a.jsonl", *demonstrations("a"), *bad, {"prompt": "p", "response": "much too long"})
    read = records(on_bad_record="skip")
    assert len(read.demonstrations("data.train", path)) == 1
    assert read.notes[0] == f"{path}: kept 2 of 9 records, skipped 7 (7 broken JSON)"
    assert [note.split(": ")[0] for note in read.notes[1:6]] == [f"  skipped {path}:{line}" for line in range(2, 7)]
    assert read.notes[6:8] == ["  and 2 more", f"{path}: kept 1 of 2 records, skipped 1 (1 response over limit)"]
    assert read.notes[8].startswith(f"  skipped {path}:9: response over limit: response has 13 tokens + EOS")


def test_what_the_tokenizer_loses_is_said_for_each_file(tmp_path):
    lossy, fine = write(tmp_path / "lossy.jsonl", {"prompt": "a\u00e9"}), write(tmp_path / "fine.jsonl", {"prompt": "ab"})
    read = records()
    read.prompts("data.prompts", lossy)
    read.prompts("data.prompts_valid", fine)
    [said] = [note for note in read.notes if "tokenizer loses text" in note]
    assert said.startswith(f"{lossy}: the tokenizer loses text: 1 tokens for unknown text in 1 of 1 texts") and f"{lossy}:1, prompt" in said


@pytest.mark.parametrize("path", ["", "missing.jsonl"])
def test_a_file_that_is_not_there_is_a_problem_and_one_that_is_not_given_is_none(path):
    read = records()
    assert read.prompts("prompts", path) == [] and "missing file" in read.problems[0]
    assert records().prompts("prompts", None) == []


def test_what_ranks_read_differently_is_named_with_them(tmp_path, monkeypatch):
    path, other = write(tmp_path / "a.jsonl", *READ["prompts"]), write(tmp_path / "b.jsonl", {"prompt": "z"})
    read = records()
    read.prompts("data.prompts", path)
    read.prompts("data.prompts_valid", other)
    world = types.SimpleNamespace(size=4, rank=0)

    def with_ranks(*changes):
        monkeypatch.setattr(run_records, "gather_objects", lambda mine: [mine, *({**mine, **change} for change in changes)])
        read.problems.clear()
        return read.agree(world)

    assert with_ranks({}, {}, {}) == []
    stale = f"reads other content from {path} than rank 0: is it an old copy?"
    assert with_ranks({}, {"data.prompts": "old"}, {"data.prompts": "older"}) == [f"data.prompts: rank 2, 3 of 4 {stale}"]
    assert with_ranks({"tokenizer": "other", "data.prompts": "so it differs"}, {}, {}) == [
        "tokenizer: rank 1 of 4 reads other content from tokenizer.path than rank 0: is it an old copy?"
    ]
