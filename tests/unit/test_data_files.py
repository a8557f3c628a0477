"""Kinds of files and forms of comparisons: the same records from JSON lines, gzip and parquet; what is torn or odd is named."""

import datetime
import gzip
import json
import random

import pyarrow
import pyarrow.parquet
import pytest

from megarlhf.data.files import BadRecord
from megarlhf.data.records import Demonstration, Prompt, Ranking, read_demonstrations, read_prompts, read_rankings

RECORDS = [
    {"prompt": "p\u00e9", "response": "r", "id": "x", "tags": ["a", "b"], "more": {"score": 1.5}},
    {"prompt": "q", "response": "s", "id": "y", "tags": [], "more": {"score": 2.5}},
]


def json_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def gzipped(path, records):
    path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode()))
    return path


def parquet(path, records):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=3)
    return path


KINDS = {"a.jsonl": json_lines, "a.jsonl.gz": gzipped, "a.parquet": parquet}


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_file_holds_the_same_records(tmp_path, name):
    path = KINDS[name](tmp_path / name, RECORDS)
    assert read_demonstrations(path)[0] == [Demonstration(r["prompt"], r["response"], f"{path}:{i}") for i, r in enumerate(RECORDS, 1)]
    prompts, _ = read_prompts(path)
    assert prompts == [Prompt(r["prompt"], f"{path}:{i}", {k: r[k] for k in r if k != "prompt"}) for i, r in enumerate(RECORDS, 1)]


@pytest.mark.parametrize("name", KINDS)
def test_a_bad_record_is_named_in_each_kind_of_file(tmp_path, name):
    path = KINDS[name](tmp_path / name, [*RECORDS * 200, {"prompt": " ", "response": "r"}, *RECORDS])
    with pytest.raises(BadRecord, match=f"{name}:401: empty text"):
        read_demonstrations(path)
    records, report = read_demonstrations(path, on_bad_record="skip")
    assert len(records) == 402 and report.skipped_by_reason == {"empty text": 1}
    with pytest.raises(BadRecord, match=f"{name}:1: missing field: no completions"):
        read_rankings(path)
    with pytest.raises(BadRecord, match=f"none.{name}: missing file"):
        read_prompts(tmp_path / f"none.{name}")


def test_a_parquet_column_whose_name_is_no_text_is_a_damaged_file(tmp_path):
    path = parquet(tmp_path / "a.parquet", RECORDS)
    path.write_bytes(path.read_bytes().replace(b"response", b"resp\xefnse"))
    with pytest.raises(BadRecord, match=r"a\.parquet: damaged file: parquet breaks after row 0: 'utf-8' codec"):
        read_demonstrations(path)


@pytest.mark.parametrize("on_bad_record", ["raise", "skip"])
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_a_torn_file_is_named_whatever_is_done_with_bad_records(tmp_path, name, on_bad_record):
    whole = KINDS[name](tmp_path / name, [{"prompt": str(i) * 50, "response": "r"} for i in range(2000)]).read_bytes()
    for content in (whole[:-9], whole[: len(whole) // 2], b"", whole[:40] + bytes(60) + whole[100:], b'{"prompt": "p", "response": "r"}\n'):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadRecord, match=f"{name}: (damaged file|no record): "):
            read_demonstrations(tmp_path / name, on_bad_record=on_bad_record)


def test_a_column_of_parquet_that_is_null_is_a_field_that_lacks(tmp_path):
    ranked = {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], "chosen": None, "rejected": None}
    paired = {"prompt": "q", "responses": None, "ranks": None, "chosen": "a", "rejected": "b"}
    path = parquet(tmp_path / "a.parquet", [ranked, paired])
    assert read_rankings(path)[0] == [Ranking("p", ("a", "b"), (1, 2), f"{path}:1"), Ranking("q", ("a", "b"), (1, 2), f"{path}:2")]
    path = parquet(path, [{"prompt": None, "response": "x"}])
    with pytest.raises(BadRecord, match='a.parquet:1: missing field: no "prompt" among "response"'):
        read_demonstrations(path)
    turns = [{"role": "user", "content": "u", "name": None}, {"role": "assistant", "content": "a", "name": None}]
    [record], _ = read_demonstrations(parquet(path, [{"messages": turns}]))
    assert [message.content for message in record.prompt] == ["u"] and record.response == "a"


def test_what_json_has_no_name_for_is_named_with_its_column(tmp_path):
    for value, kind in ((datetime.datetime(2020, 1, 1), "datetime"), (b"x", "bytes"), (float("nan"), "nan"), (float("inf"), "inf")):
        path = parquet(tmp_path / "a.parquet", [{"prompt": "p", "meta": {"when": [value]}}])
        with pytest.raises(BadRecord, match=rf'a.parquet:1: wrong type: "meta".when\[0\] is .*{kind}'):
            read_prompts(path)
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names=["prompt", "prompt"]), tmp_path / "twice.parquet")
    with pytest.raises(BadRecord, match='twice.parquet: one column twice: "prompt"'):
        read_prompts(tmp_path / "twice.parquet")


HUMAN = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"


def test_transcripts_are_a_prompt_and_two_answers(tmp_path):
    path = json_lines(tmp_path / "hh.jsonl", [{"chosen": HUMAN + " Because.", "rejected": HUMAN + " No\n\nHuman is what I am"}])
    assert read_rankings(path)[0] == [Ranking(HUMAN, (" Because.", " No\n\nHuman is what I am"), (1, 2), f"{path}:1")]


POST = {"id": "t3_1", "post": "I did.\n\nIt went.", "title": "What I did", "subreddit": "tifu"}
SUMMARIES = [{"text": " I did it.", "policy": "ref", "note": None}, {"text": " It went.", "policy": "sup1", "note": None}]


def test_summaries_are_asked_for_as_their_authors_do(tmp_path):
    comparison = {"info": POST, "summaries": SUMMARIES, "choice": 1, "worker": "w", "extra": {"confidence": 5}}
    news = {"info": {"article": "It rained.", "post": None, "title": None}, "summaries": SUMMARIES, "choice": 0}
    by_axis = {"info": POST, "summary": {"text": " x", "axes": {"overall": 5}}, "worker": "w"}
    path = json_lines(tmp_path / "sff.jsonl", [by_axis, comparison, news, by_axis])
    records, report = read_rankings(path)  # though bad records are raised
    asked = "SUBREDDIT: r/tifu\n\nTITLE: What I did\n\nPOST: I did.\n\nIt went.\n\nTL;DR:"
    assert records == [
        Ranking(asked, (" I did it.", " It went."), (2, 1), f"{path}:2"),
        Ranking("Article:\n\nIt rained.\n\nTL;DR:", (" I did it.", " It went."), (1, 2), f"{path}:3"),
    ]
    assert str(report) == f"{path}: kept 2 of 4 records, skipped 2 (2 evaluation by axis)"


BAD_FORMS = [
    ({"chosen": HUMAN + " a", "rejected": HUMAN + " a"}, "a response better than itself"),
    ({"chosen": HUMAN + " a", "rejected": "\n\nHuman: Ho\n\nAssistant: b"}, "answers to two questions"),
    ({"chosen": HUMAN + " a", "rejected": HUMAN}, "empty text"),
    ({"chosen": HUMAN + " a", "rejected": "b"}, "missing field"),
    ({"chosen": HUMAN + " a"}, "missing field"),
    ({"info": POST, "summaries": SUMMARIES}, "missing field"),
    ({"info": POST, "summaries": SUMMARIES, "choice": 2}, "bad choice"),
    ({"info": POST, "summaries": SUMMARIES, "choice": True}, "bad choice"),
    ({"info": POST, "summaries": SUMMARIES[:1], "choice": 0}, "wrong type"),
    ({"info": POST, "summaries": SUMMARIES, "choice": -1}, "bad choice"),
    ({"info": POST, "summaries": [SUMMARIES[0], {"text": ""}], "choice": 0}, "empty text"),
    ({"info": POST, "summaries": [SUMMARIES[0], SUMMARIES[0]], "choice": 0}, "a response better than itself"),
    ({"info": "post", "summaries": SUMMARIES, "choice": 0}, "wrong type"),
    ({"info": {"title": "t"}, "summaries": SUMMARIES, "choice": 0}, "missing field"),
]


@pytest.mark.parametrize("record, reason", BAD_FORMS, ids=lambda value: str(value)[:60])
def test_a_bad_comparison_is_refused_with_its_line(tmp_path, record, reason):
    with pytest.raises(BadRecord) as error:
        read_rankings(json_lines(tmp_path / "a.jsonl", [record]))
    assert error.value.reason == reason and str(error.value).startswith(f"{tmp_path / 'a.jsonl'}:1")


@pytest.mark.parametrize("name", KINDS)
def test_whatever_is_broken_is_said_with_the_name_of_the_file(tmp_path, name):
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    records = [{"messages": turns, "responses": ["a", "b"], "ranks": [1, 2], "chosen": "c"}] * 3
    whole, rng = KINDS[name](tmp_path / name, records).read_bytes(), random.Random(5)
    for _ in range(700):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(content) + 1)
            content[at : at + rng.choice([0, 1, 9])] = rng.choice([b"", b"\x00", b"{", b'"', b"[]", b"null", b"\xff", rng.randbytes(4)])
        (tmp_path / name).write_bytes(content)
        for read in (read_demonstrations, read_rankings, read_prompts):
            try:
                read(tmp_path / name)
            except BadRecord as bad:
                assert bad.source.startswith(str(tmp_path / name)) and bad.way_out
