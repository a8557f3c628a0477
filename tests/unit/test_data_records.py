"""Records: each kind of bad input is refused with its line, or counted; nothing is dropped in silence."""

import contextlib
import json
import pickle
from pathlib import Path

import pytest

from megarlhf.data.collation import ranking_batch
from megarlhf.data.fields import Message
from megarlhf.data.files import BadRecord
from megarlhf.data.records import Demonstration, Prompt, Ranking, read_demonstrations, read_prompts, read_rankings
from megarlhf.data.shares import Shares
from megarlhf.data.tokenized import demonstration_rows, prompt_rows, ranking_rows, rows_fingerprint
from megarlhf.data.tokenizers import UnwritableText


def write(path, *lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return path


GOOD_DEMONSTRATION = {"prompt": "p", "response": "r", "unknown": 1}
GOOD_RANKING = {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, 1, 1]}
GOOD = {read_demonstrations: GOOD_DEMONSTRATION, read_rankings: GOOD_RANKING, read_prompts: {"prompt": "p"}}

BAD_ANYWHERE = [
    (b'{"prompt": "x"\n', "broken JSON"),
    (b'{"prompt": ' + b"[" * 100_000 + b"\n", "broken JSON"),
    (b'{"prompt": ' + b"1" * 5000 + b"}\n", "broken JSON"),
    (b'{"prompt": "\xff"}\n', "invalid UTF-8"),
    (b'{"prompt": "x", "prompt": "y"}\n', "broken JSON"),
    (b'{"prompt": "x", "responses": [{"a": 1, "a": 1}]}\n', "broken JSON"),
    (b'{"prompt": "x", "score": NaN}\n', "broken JSON"),
    (b'{"prompt": "x", "scores": [1, -Infinity]}\n', "broken JSON"),
    (b'{"prompt": "x", "score": 1e999}\n', "broken JSON"),
    (["prompt"], "not an object"),
    (None, "not an object"),
    ({}, "missing field"),
    ({"Prompt": "x"}, "missing field"),
    ({"prompt": 3}, "wrong type"),
    ({"prompt": None}, "wrong type"),
    ({"prompt": ""}, "empty text"),
    ({"prompt": " \n"}, "empty text"),
    ({"prompt": "\ud800"}, "invalid Unicode"),
]
BAD_DEMONSTRATIONS = [
    ({"prompt": "x"}, "missing field"),
    ({"prompt": "x", "response": ["r"]}, "wrong type"),
    ({"prompt": "x", "response": ""}, "empty text"),
]
BAD_RANKINGS = [
    ({"prompt": "x"}, "missing field"),
    ({"prompt": "x", "responses": ["a", "b"]}, "missing field"),
    ({"prompt": "x", "ranks": [1, 2]}, "missing field"),
    ({"prompt": "x", "chosen": "a"}, "missing field"),
    ({"prompt": "x", "rejected": "a"}, "missing field"),
    ({"prompt": "x", "chosen": "a", "rejected": [{}]}, "wrong type"),
    ({"prompt": "x", "chosen": "a", "rejected": ""}, "empty text"),
    ({"prompt": "x", "responses": "ab", "ranks": [1, 2]}, "wrong type"),
    ({"prompt": "x", "responses": ["a", 1], "ranks": [1, 2]}, "wrong type"),
    ({"prompt": "x", "responses": ["a", ""], "ranks": [1, 2]}, "empty text"),
    ({"prompt": "x", "responses": ["a"], "ranks": [1]}, "too few responses"),
    ({"prompt": "x", "responses": [], "ranks": []}, "too few responses"),
    ({"prompt": "x", "responses": ["a", "b"], "ranks": 1}, "wrong type"),
    ({"prompt": "x", "responses": ["a", "b"], "ranks": [1]}, "wrong number of ranks"),
    ({"prompt": "x", "responses": ["a", "b"], "ranks": [1, 2, 3]}, "wrong number of ranks"),
    ({"prompt": "x", "responses": ["a", "b"], "ranks": [0, 1]}, "bad rank"),
    ({"prompt": "x", "responses": ["a", "b"], "ranks": [1.0, 2]}, "bad rank"),
    ({"prompt": "x", "responses": ["a", "b"], "ranks": [True, 2]}, "bad rank"),
    ({"prompt": "x", "responses": ["a", "b"], "ranks": ["1", 2]}, "bad rank"),
    ({"prompt": "x", "responses": ["a", "b"], "ranks": [1, 10**30]}, "bad rank"),
    ({"prompt": "x", "responses": ["a", "b"], "ranks": [1, 2**63]}, "bad rank"),
    ({"prompt": "x", "chosen": "a", "rejected": "a"}, "a response better than itself"),
    ({"prompt": "x", "responses": ["a", "b", "a"], "ranks": [1, 2, 2]}, "a response better than itself"),
    ({"prompt": "x", "chosen": "a", "rejected": "b", "responses": ["a", "b"], "ranks": [2, 1]}, "two rankings in one"),
]
BAD_PROMPTS = [({"prompt": "x", "id": True}, "wrong type"), ({"prompt": "x", "id": 1.5}, "wrong type")]
CASES = [(read, *case) for read in GOOD for case in BAD_ANYWHERE]
CASES += [(read_demonstrations, *case) for case in BAD_DEMONSTRATIONS]
CASES += [(read_rankings, *case) for case in BAD_RANKINGS]
CASES += [(read_prompts, *case) for case in BAD_PROMPTS]


@pytest.mark.parametrize("read, bad, reason", CASES, ids=lambda value: str(getattr(value, "__name__", value))[:40])
def test_a_bad_record_is_refused_with_its_line_or_counted(tmp_path, read, bad, reason):
    path = write(tmp_path / "a.jsonl", GOOD[read], b"\n", GOOD[read], bad, GOOD[read])
    with pytest.raises(BadRecord) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:4: {reason}: ")
    assert error.value.way_out

    records, report = read(path, on_bad_record="skip")
    assert [record.source for record in records] == [f"{path}:{line}" for line in (1, 3, 5)]
    assert (report.num_records, report.num_kept, report.num_skipped) == (4, 3, 1)
    assert report.skipped_by_reason == {reason: 1}
    assert report.examples == (str(error.value),)

    with pytest.raises(BadRecord, match="no usable record.*kept 0 of 2.*a.jsonl:1"):
        read(write(path, bad, bad), on_bad_record="skip")


@pytest.mark.parametrize("read", GOOD)
@pytest.mark.parametrize("on_bad_record", ["raise", "skip"])
def test_files_without_records_are_refused(tmp_path, read, on_bad_record):
    with pytest.raises(BadRecord, match="missing.jsonl: missing file"):
        read(tmp_path / "missing.jsonl", on_bad_record=on_bad_record)
    for content in (b"", b"\n \n"):
        with pytest.raises(BadRecord, match="empty.jsonl: no record"):
            read(write(tmp_path / "empty.jsonl", content), on_bad_record=on_bad_record)


def test_good_records_come_back_whole(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": " p\n", "response": "\u00e9\r\n", "labeler": 3})
    assert read_demonstrations(path)[0] == [Demonstration(" p\n", "\u00e9\r\n", f"{path}:1")]
    path = write(tmp_path / "a.jsonl", GOOD_RANKING, {"prompt": "q", "chosen": "good", "rejected": "bad"})
    records, report = read_rankings(path)
    assert records == [Ranking("p", ("a", "b", "c"), (2, 1, 1), f"{path}:1"), Ranking("q", ("good", "bad"), (1, 2), f"{path}:2")]
    assert str(report) == f"{path}: kept 2 of 2 records"
    path = write(tmp_path / "a.jsonl", {"prompt": "p"}, {"prompt": "q", "id": "x7"}, {"prompt": "r", "id": 8}, b'{"prompt": "no newline"}')
    records, _ = read_prompts(path)
    assert records[1:3] == [Prompt("q", f"{path}:2", {"id": "x7"}), Prompt("r", f"{path}:3", {"id": 8})]
    assert records[3].prompt == "no newline"


ASKED, ANSWERED, OTHER = {"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}


def test_records_as_other_trainers_have_them(tmp_path):
    """TRL's forms: "prompt" and answers as lists of messages, "completion"; and UltraFeedback's, which repeats the better chat."""
    chat = (Message("user", "p"),)
    written = [{"prompt": "p", "completion": "a"}]
    written += [{"prompt": [ASKED], name: [ANSWERED]} for name in ("completion", "response")]
    read, _ = read_demonstrations(write(tmp_path / "a.jsonl", *written))
    assert [(record.prompt, record.response) for record in read] == [("p", "a"), (chat, "a"), (chat, "a")]

    pair, chats = {"chosen": [ANSWERED], "rejected": [OTHER]}, {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, OTHER]}
    written = [{"prompt": [ASKED], **pair}, {"prompt": [ASKED], **chats}, {"messages": [ASKED], **pair}]
    written.append({"prompt": "p", **chats, "messages": chats["chosen"], "score_chosen": 7.5})
    read, _ = read_rankings(write(tmp_path / "a.jsonl", *written))
    assert {(record.prompt, record.responses, record.ranks) for record in read} == {(chat, ("a", "b"), (1, 2))}

    [prompt], _ = read_prompts(write(tmp_path / "a.jsonl", {"prompt": [ASKED], "answer": "72"}))
    assert (prompt.prompt, prompt.fields) == (chat, {"messages": [ASKED], "answer": "72"})


@pytest.mark.parametrize(
    "read, bad, reason",
    [
        (read_demonstrations, {"prompt": [ASKED], "completion": [ANSWERED, ASKED, ANSWERED]}, "several turns"),
        (read_demonstrations, {"prompt": [ASKED], "completion": [ASKED]}, "wrong last turn"),
        (read_demonstrations, {"prompt": [ASKED, ANSWERED], "completion": [ANSWERED]}, "wrong last turn"),
        (read_rankings, {"prompt": [ASKED], "chosen": [ASKED, ASKED, ANSWERED], "rejected": [OTHER]}, "two prompts in one"),
        (read_rankings, {"prompt": [ASKED], "chosen": [ANSWERED], "rejected": "b"}, "wrong type"),
        (read_prompts, {"prompt": []}, "no messages"),
    ],
)
def test_lists_of_messages_that_hold_no_question_and_answer_are_refused(tmp_path, read, bad, reason):
    with pytest.raises(BadRecord, match=f"a.jsonl:1: {reason}"):
        read(write(tmp_path / "a.jsonl", bad))


@pytest.mark.parametrize("read", GOOD)
def test_a_byte_order_mark_is_no_text(tmp_path, read):
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf", GOOD[read], GOOD[read], b"\xef\xbb\xbf", GOOD[read])
    assert [record.source for record in read(path)[0]] == [f"{path}:{line}" for line in (1, 2, 3)]
    with pytest.raises(BadRecord, match="no record"):
        read(write(path, b"\xef\xbb\xbf"))


def test_the_largest_rank_and_one_response_twice_at_one_rank_are_fine(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "responses": ["a", "b", "a"], "ranks": [2**63 - 1, 1, 2**63 - 1]})
    [row], _ = ranking_rows(read_rankings(path)[0], Letters(), max_prompt_len=3, max_response_len=3)
    assert ranking_batch([row], pad_id=1).ranks.tolist() == [2**63 - 1, 1, 2**63 - 1]


def test_a_wrong_policy_is_refused_and_a_bad_record_can_be_pickled(tmp_path):
    with pytest.raises(ValueError, match='"raise" or "skip"'):
        read_prompts(write(tmp_path / "a.jsonl", {"prompt": "p"}), on_bad_record="ignore")
    bad = BadRecord("a:1", "reason", "detail", "Way out.")
    assert str(pickle.loads(pickle.dumps(bad))) == str(bad) == "a:1: reason: detail. Way out."


class Letters:
    """One token per letter; spaces give none."""

    path = Path("of/letters")  # where no template is
    vocab_size, eos_id, pad_id, unk_id = 128, 0, 1, None

    def encode(self, text):
        return [ord(character) for character in text if character != " "]

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i > 1)


def test_rows_hold_the_tokens_with_eos_up_to_the_very_limit():
    limits = {"max_prompt_len": 3, "max_response_len": 3}
    [row], report = demonstration_rows([Demonstration("abc", "de", "f:1")], Letters(), **limits)
    assert (list(row.prompt_ids), list(row.response_ids), row.source) == ([97, 98, 99], [100, 101, 0], "f:1")
    assert str(report) == "f: kept 1 of 1 records"
    [row], _ = ranking_rows([Ranking("a", ("de", "f"), (2, 1), "f:1")], Letters(), **limits)
    assert ([list(ids) for ids in row.response_ids], row.ranks) == ([[100, 101, 0], [102, 0]], (2, 1))
    [row], _ = prompt_rows([Prompt("abc", "f:1", {"id": "x", "topic": [1]})], Letters(), max_prompt_len=3)
    assert (list(row.prompt_ids), row.fields) == ([97, 98, 99], {"id": "x", "topic": [1]})


@pytest.mark.parametrize(
    "prompt, response, reason",
    [
        ("abcd", "de", "prompt over limit"),
        ("abc", "def", "response over limit"),  # three letters fit, their EOS does not
        (" ", "de", "empty after tokenization"),
        ("abc", " ", "empty after tokenization"),
    ],
)
def test_rows_out_of_limits_are_refused_with_their_line_or_counted(prompt, response, reason):
    limits = {"max_prompt_len": 3, "max_response_len": 3}
    demonstrations = [Demonstration("a", "b", "f:1"), Demonstration(prompt, response, "f:2")]
    rankings = [Ranking("a", ("b", "c"), (1, 2), "f:1"), Ranking(prompt, ("b", response), (1, 2), "f:2")]
    for rows, records in ((demonstration_rows, demonstrations), (ranking_rows, rankings)):
        with pytest.raises(BadRecord, match=f"^f:2: {reason}"):
            rows(records, Letters(), **limits)
        kept, report = rows(records, Letters(), **limits, on_bad_record="skip")
        assert [row.source for row in kept] == ["f:1"]
        assert report.skipped_by_reason == {reason: 1} and report.num_records == 2
        with pytest.raises(BadRecord, match="^f: no usable record"):
            rows(records[1:], Letters(), **limits, on_bad_record="skip")


def test_one_response_to_the_model_is_one_response():
    limits = {"max_prompt_len": 3, "max_response_len": 3}
    with pytest.raises(BadRecord, match="^f:2: a response better than itself: responses 0 and 2 are one text, ranked 1 and 3"):
        ranking_rows([Ranking("a", ("b", "c"), (1, 2), "f:1"), Ranking("a", ("b", "c", " b"), (1, 2, 3), "f:2")], Letters(), **limits)


class Lossy(Letters):
    """Knows lower case only."""

    unk_id = 2

    def encode(self, text):
        return [ord(character) if character in "abcdefghij " else 2 for character in text]

    def decode(self, ids):
        return "".join("?" if i == 2 else chr(i) for i in ids if i > 1)


def test_what_the_tokenizer_loses_is_counted_with_an_example():
    limits = {"max_prompt_len": 30, "max_response_len": 30}
    records = [Demonstration("a b", "c", "f:1"), Demonstration("a\nb", "cDE", "f:2"), Demonstration("a", "F", "f:3")]
    _, report = demonstration_rows(records, Lossy(), **limits)
    numbers = "4 tokens for unknown text in 3 of 6 texts; 3 of 6 texts do not come back as they were"
    assert report.lost == rf"the tokenizer loses text: {numbers} (the first: f:2, prompt: 'a\nb' becomes 'a?b')"
    spaces = [Prompt("ab", "g:1"), Prompt("a really long b c", "g:9")]
    _, report = prompt_rows(spaces, Letters(), max_prompt_len=30)
    assert report.lost == (
        "the tokenizer loses text: 1 of 2 texts do not come back as they were (the first: g:9, prompt: 'a really long b c' becomes "
        "'areallylongbc')"
    )
    assert ranking_rows([Ranking("a", ("b", "c"), (1, 2), "f:1")], Letters(), **limits)[1].lost == ""


class Ending(Letters):
    """Has no way to write a z but its end."""

    def encode(self, text):
        if "z" in text:
            raise UnwritableText("only its control token 0")
        return super().encode(text)


def test_a_text_that_would_end_itself_is_refused_with_its_line_or_counted():
    records = [Prompt("a", "g:1"), Prompt("az", "g:2")]
    with pytest.raises(BadRecord, match="^g:2: unwritable text: prompt: only its control token 0"):
        prompt_rows(records, Ending(), max_prompt_len=3)
    kept, report = prompt_rows(records, Ending(), max_prompt_len=3, on_bad_record="skip")
    assert [row.source for row in kept] == ["g:1"] and report.skipped_by_reason == {"unwritable text": 1}


def test_the_fingerprint_of_rows_is_of_their_ids_and_ranks():
    limits = {"max_prompt_len": 9, "max_response_len": 9}

    def of(*records):
        rows = {Prompt: lambda r: prompt_rows(r, Letters(), max_prompt_len=9)}.get(type(records[0]))
        convert = demonstration_rows if isinstance(records[0], Demonstration) else ranking_rows
        return rows_fingerprint((rows(records) if rows else convert(records, Letters(), **limits))[0])

    assert of(Prompt("ab", "f:1"), Prompt("c", "f:2")) == of(Prompt("a b", "g:7", {"id": 3}), Prompt("c", "g:9"))
    differing = [
        of(Prompt("ab", "f:1"), Prompt("c", "f:2")),
        of(Prompt("c", "f:1"), Prompt("ab", "f:2")),
        of(Prompt("a", "f:1"), Prompt("bc", "f:2")),
        of(Prompt("abc", "f:1")),
        of(Demonstration("ab", "c", "f:1")),
        of(Demonstration("a", "bc", "f:1")),
        of(Ranking("a", ("b", "c"), (1, 2), "f:1")),
        of(Ranking("a", ("b", "c"), (2, 1), "f:1")),
        of(Ranking("a", ("b", "c"), (1, 1), "f:1")),
        of(Ranking("a", ("c", "b"), (1, 2), "f:1")),
    ]
    assert len(set(differing)) == len(differing)


def test_prompts_out_of_limits_are_refused_or_counted():
    records = [Prompt("a", "f:1"), Prompt("abcd", "g:7"), Prompt(" ", "g:8")]
    with pytest.raises(BadRecord, match="^g:7: prompt over limit: the prompt has 4 tokens, more than max_prompt_len 3"):
        prompt_rows(records, Letters(), max_prompt_len=3)
    _, report = prompt_rows(records, Letters(), max_prompt_len=3, on_bad_record="skip")
    assert str(report) == "f, g: kept 1 of 3 records, skipped 2 (1 empty after tokenization, 1 prompt over limit)"


def on_rank_of(size, rank, convert, records, **how):
    """What rank `rank` of `size` gets that share the work, and what all of them have handed over."""
    parts = []
    for other in range(size):
        with contextlib.suppress(ValueError):
            convert(records, Letters(), shares=Shares(other, size, lambda mine: parts.append(mine) or [mine]), **how)
    return outcome_of(convert, records, shares=Shares(rank, size, lambda mine: pickle.loads(pickle.dumps(parts))), **how), parts


def outcome_of(convert, records, **how):
    try:
        return convert(records, Letters(), **how)
    except ValueError as error:
        return type(error), str(error)


@pytest.mark.parametrize("on_bad_record", ["raise", "skip"])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_ranks_that_share_the_work_get_what_one_alone_gets(size, on_bad_record):
    texts = ["good", "b d", "far too long for it", "d e", "x" * 20, "ok"]
    cases = [
        (demonstration_rows, [Demonstration(text, "r", f"f:{i}") for i, text in enumerate(texts)], {"max_response_len": 9}),
        (ranking_rows, [Ranking(text, ("a", "b c"), (1, 2), f"f:{i}") for i, text in enumerate(texts)], {"max_response_len": 9}),
        (prompt_rows, [Prompt(text, f"f:{i}", {"id": i}) for i, text in enumerate(texts)], {}),
        (prompt_rows, [Prompt("fine", f"f:{i}", {}) for i in range(3)], {}),
        (prompt_rows, [Prompt("plain", "f:1", {}), Prompt((Message("user", "chat"),), "f:2", {}), Prompt("p", "f:3", {})], {}),
    ]
    for convert, records, limits in cases:
        how = {"max_prompt_len": 9, "on_bad_record": on_bad_record, **limits}
        alone = outcome_of(convert, records, **how)
        for rank in range(size):
            shared, parts = on_rank_of(size, rank, convert, records, **how)
            assert shared == alone
            assert sum(len(outcomes) for outcomes, _ in parts) <= len(records) and len(parts) == size
