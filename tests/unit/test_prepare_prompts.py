"""The prompt tool against the slow obvious version, its rules for personal data, and what it says of wrong input."""

import gzip
import json
import random
import tracemalloc
from pydoc_data.topics import topics

import pytest

from megarlhf.data.personal import personal_data
from megarlhf.data.tokenizer_training import train_sentencepiece
from megarlhf.data.tokenizers import load_tokenizer
from tools import prepare_prompts as tool


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [text for _, text in sorted(topics.items())][:20]
    return train_sentencepiece(texts, tmp_path_factory.mktemp("tokenizer") / "t", vocab_size=400)


def json_lines(path, records):
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))
    return path


def run(tmp_path, tokenizer, records, *options):
    path = json_lines(tmp_path / "in.jsonl", records)
    out = tmp_path / "out"
    args = ["--input", path, "--output-dir", out, "--tokenizer", tokenizer, "--overwrite", *options]
    table = tool.prepare(tool.arguments().parse_args(list(map(str, args))))
    files = {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in out.glob("*.jsonl")}
    assert not list(out.glob("*.partial")) and (out / "report.txt").read_text() == table + "\n"
    return table, files


def common_prefix(one, other):
    n = 0
    while n < min(len(one), len(other)) and one[n] == other[n]:
        n += 1
    return n


def slowly(records, *, prefix, per_user, max_tokens, tokenizer):
    """What is kept, by comparing everything with everything."""
    kept, dropped = [], []
    for i, record in enumerate(records, 1):
        earlier = [other["prompt"] for other in kept]
        if "user" not in record:
            reason = "no user"
        elif next(other["org"] for other in records if other.get("user") == record["user"]) != record["org"]:
            reason = "user in two organizations"
        elif len(tokenizer.encode(record["prompt"])) > max_tokens:
            reason = "prompt too long"
        elif any(common_prefix(p, record["prompt"]) >= prefix or p == record["prompt"] for p in earlier):
            reason = "same prefix"
        elif sum(other["user"] == record["user"] for other in kept) >= per_user:
            reason = "user over limit"
        else:
            kept.append(record)
            continue
        dropped.append((i, reason))
    return kept, dropped


@pytest.mark.parametrize("seed", range(4))
def test_the_tool_keeps_and_drops_what_the_slow_version_does(tmp_path, tokenizer, seed):
    rng = random.Random(seed)
    records = []
    for number in range(300):
        prompt = "".join(rng.choices("ab", k=rng.randint(1, 14))) + " word" * rng.choice([0, 0, 0, 3])
        organization = f"o{rng.randrange(2)}" if rng.random() < 0.05 else "o"
        record = {"prompt": prompt, "user": f"u{rng.randrange(20)}", "org": organization, "n": number}
        if rng.random() < 0.05:
            del record["user"]
        records.append(record)
    options = ["--prefix-characters", 8, "--max-per-user", 5, "--max-prompt-tokens", 12, "--organization-key", "org", "--pii-on"]
    table, files = run(tmp_path, tokenizer, records, "--splits", "train=1", *options)
    kept, dropped = slowly(records, prefix=8, per_user=5, max_tokens=12, tokenizer=load_tokenizer(tokenizer))
    assert files["train"] == kept
    assert [(drop["source"], drop["reason"]) for drop in files["dropped"]] == [(f"{tmp_path / 'in.jsonl'}:{i}", r) for i, r in dropped]
    assert len(set(reason for _, reason in dropped)) == 5
    for reason in {reason for _, reason in dropped}:
        [line] = [line for line in table.splitlines() if reason in line]
        assert int(line.split()[-1]) == sum(r == reason for _, r in dropped)


@pytest.mark.parametrize("by", ["user", "org"])
def test_nobody_is_in_two_splits_and_shares_are_as_asked(tmp_path, tokenizer, by):
    records = [{"prompt": f"{i}", "user": f"u{i % 900}", "org": f"o{i % 900 % 450}"} for i in range(1800)]
    options = ["--organization-key", "org"] if by == "org" else []
    _, files = run(tmp_path, tokenizer, records, "--splits", "a=0.5", "b=0.3", "c=0.2", *options)
    names = {split: {record[by] for record in files[split]} for split in "abc"}
    assert not names["a"] & names["b"] and not names["b"] & names["c"] and not names["a"] & names["c"]
    assert sum(len(files[split]) for split in "abc") == 1800 and not files["dropped"]
    for split, share in (("a", 0.5), ("b", 0.3), ("c", 0.2)):
        assert len(files[split]) / 1800 == pytest.approx(share, abs=0.07)
    again = run(tmp_path, tokenizer, records[::-1], "--splits", "a=0.5", "b=0.3", "c=0.2", *options)[1]
    assert {record[by] for record in again["a"]} == names["a"]  # whatever the order
    other = run(tmp_path, tokenizer, records, "--splits", "a=0.5", "b=0.3", "c=0.2", "--seed", 2, *options)[1]
    assert {record[by] for record in other["a"]} != names["a"]


def test_a_user_who_changes_organization_stays_in_one_split(tmp_path, tokenizer):
    records = [{"prompt": f"{u} {o}", "user": u, "org": f"{u}{o}"} for u in range(50) for o in range(2)]
    _, files = run(tmp_path, tokenizer, records, "--splits", "a=0.5", "b=0.5", "--organization-key", "org")
    assert len(files["a"]) + len(files["b"]) == 50 and {drop["reason"] for drop in files["dropped"]} == {"user in two organizations"}


def test_k_pairs_give_k_demonstrations_each_with_the_others_in_its_prompt(tmp_path, tokenizer):
    pairs = [{"query": f"q{i}", "response": f"r{i}"} for i in range(4)]
    sets = [{"instruction": "Do it.", "pairs": pairs, "user": 7, "id": "x"}, {"instruction": "Do it.", "pairs": pairs[:2], "user": 7}]
    table, files = run(tmp_path, tokenizer, [*sets, sets[0]], "--splits", "train=1", "--max-per-user", 2, "--prefix-characters", 5)
    rows = files["train"]
    assert [row["response"] for row in rows] == ["r0", "r1", "r2", "r3", "r0", "r1"] and rows[0]["id"] == "x"
    assert rows[1]["prompt"] == "Do it.\n\nq0\nr0\n\nq2\nr2\n\nq3\nr3\n\nq1\n"
    assert rows[4]["prompt"] == "Do it.\n\nq1\nr1\n\nq0\n"
    assert [(drop["reason"], drop["source"].split(":")[-1]) for drop in files["dropped"]] == [
        ("same prefix", f"3, pair {i}") for i in range(4)
    ]
    for bad in (sets[0] | {"pairs": pairs[:1]}, sets[0] | {"pairs": "x"}, sets[0] | {"pairs": [{"query": "q"}] * 2}, {"pairs": pairs}):
        with pytest.raises(ValueError, match="in.jsonl:1"):
            run(tmp_path, tokenizer, [bad])


PERSONAL = {
    "e-mail address": ["Mail jane.doe+x@mail.example.org now", "<a_b@c-d.co>"],
    "phone number": ["+49 (0)30 1234567", "+1-415-555-2671", "(415) 555-2671", "415-555-2671", "1 415.555.2671"],
    "card number": ["4111 1111 1111 1111", "5500-0000-0000-0004", "pay 378282246310005.", "6011000990139424"],
    "bank account number": ["DE89370400440532013000", "GB82 WEST 1234 5698 7654 32", "AT61 1904 3002 3457 3201 OK"],
    "social security number": ["My SSN is 123-45-6789."],
    "IP address": ["ping 8.8.8.8.", "2001:4860:4860::8888", "[2a00:1450:4001:82a::200e]"],
}
HARMLESS = [
    "a@b", "@name", "user@localhost", "x = a @ b.T", "3.14159265358979323846", "4111 1111 1111 1112", "1234567890123",
    "DE89370400440532013001", "000-12-3456", "666-12-3456", "123-00-4567", "987-65-4321", "127.0.0.1", "192.168.1.1", "300.1.1.1",
    "10:20:30", "std::vector", "2021-03-04", "2021-03-04 10:20:30", "1.2.3", "+5 points", "10-20-3000", "555-2671", "ABCD 1234 5678",
    "1" * 5000, "a" * 5000 + "@", "a." * 3000, "1:" * 3000, "\u0661\u0662\u0663-\u0664\u0665-\u0666\u0667\u0668\u0669",
]  # fmt: skip


def test_the_rules_find_what_they_say_and_nothing_else():
    for kind, texts in PERSONAL.items():
        for text in texts:
            assert list(personal_data(text)) == [kind], text
            assert list(personal_data(f"\u00e9 ({text})\n")) == [kind], text
    for text in HARMLESS:
        assert list(personal_data(text)) == [], text[:60]


def test_personal_data_is_dropped_from_the_splits_named_and_never_repeated(tmp_path, tokenizer):
    told = {"id": "a@b.org", "notes": {"x": ["call", "me: a@mail.org"]}}
    records = [{"prompt": f"p{i}", "user": f"jane{i}@mail.org"} | told for i in range(40)]
    _, files = run(tmp_path, tokenizer, records, "--splits", "train=0.5", "valid=0.5")
    assert not files["train"] and len(files["valid"]) + len(files["dropped"]) == 40 and files["dropped"]
    assert {(drop["reason"], drop["detail"]) for drop in files["dropped"]} == {("personal data", 'e-mail address in "notes.x"')}
    _, files = run(tmp_path, tokenizer, records, "--splits", "train=0.5", "valid=0.5", "--pii-on")
    assert files["train"] and not files["dropped"]
    for form, where in (
        ({"card": 4111111111111111}, 'card number in "card"'),
        ({"about": {"paid": [7, {"with": 4111111111111111}]}}, 'card number in "about.paid.with"'),
        ({"inbox": {"a@mail.org": 3}}, 'e-mail address in "inbox"'),
    ):
        records = [{"prompt": "p", "user": 1} | form, {"prompt": "q", "user": 1, "n": 41}]
        _, files = run(tmp_path, tokenizer, records, "--splits", "train=0.5", "valid=0.5", "--pii-on", "train", "valid")
        assert [drop["detail"] for drop in files["dropped"]] == [where] and len(files["train"] + files["valid"]) == 1
    chats = [{"messages": [{"role": "user", "content": f"{i} a@mail.org"}], "user": i} for i in range(9)]
    with pytest.raises(ValueError, match="comes without a chat template"):
        run(tmp_path, tokenizer, chats)


def test_rules_of_ones_own(tmp_path, tokenizer):
    rules = tmp_path / "mine.py"
    rules.write_text("def find(text):\n    return 'a name' if 'Jane' in text else None\n\ndef bad(text):\n    return 1 / 0\n\nyes = len\n")
    records = [{"prompt": "I am Jane", "user": 1}, {"prompt": "I am", "user": 1}]
    _, files = run(tmp_path, tokenizer, records, "--splits", "train=1", "--pii-rules", f"{rules}:find")
    assert [record["prompt"] for record in files["train"]] == ["I am"] and files["dropped"][0]["detail"] == 'a name in "prompt"'
    (tmp_path / "broken.py").write_text("def")
    for rule, message in (
        ("none.py:find", "there is no file none.py"),
        (f"{rules}:lost", "has no function lost"),
        (f"{rules}:bad", "ZeroDivisionError"),
        (f"{rules}:yes", "returned 9; it must return the name"),
        (f"{tmp_path / 'broken.py'}:find", "cannot be loaded: SyntaxError"),
        ("find", "there is no file find"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path, tokenizer, records, "--splits", "train=1", "--pii-rules", rule)


def test_lengths_of_prompts_and_responses_are_their_tokens(tmp_path, tokenizer):
    model = load_tokenizer(tokenizer)
    text = "word " * 20
    n = len(model.encode(text))
    records = [{"prompt": text, "response": text, "user": 1}]
    limits = ["--splits", "train=1", "--max-prompt-tokens"]
    assert len(run(tmp_path, tokenizer, records, *limits, n, "--max-response-tokens", n + 1)[1]["train"]) == 1
    for options, reason in (((n - 1,), "prompt too long"), ((n, "--max-response-tokens", n), "response too long")):
        assert run(tmp_path, tokenizer, records, *limits, *options)[1]["dropped"][0]["reason"] == reason


def test_broken_records_stop_the_tool_or_are_dropped_and_wrong_options_are_named(tmp_path, tokenizer):
    records = [{"prompt": "a", "user": 1}, '{"prompt"', {"prompt": "", "user": 1}, {"prompt": "b", "user": True}]
    with pytest.raises(ValueError, match="in.jsonl:2: broken JSON"):
        run(tmp_path, tokenizer, records)
    table, files = run(tmp_path, tokenizer, records, "--on-bad-record", "skip", "--splits", "train=1")
    assert [drop["reason"] for drop in files["dropped"]] == ["broken JSON", "empty text", "wrong type"] and "records read" in table
    for options, message in (
        (["--splits", "train=0.5", "valid=0.4"], "add up to 0.9"),
        (["--splits", "train"], "'train' needs a share"),
        (["--splits", "train=0.5", "train=0.5"], "needs a name of its own"),
        (["--splits", "../x=1"], "needs a name of its own"),
        (["--splits", "a=1", "--pii-on", "b"], "--pii-on names b, and the splits are a"),
        (["--splits", "a=1"], "holds train.jsonl, which is no split of this run"),
        (["--max-per-user", "0"], "--max-per-user is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path, tokenizer, records, *options)
    assert not list((tmp_path / "out").glob("*.partial"))
    with pytest.raises(ValueError, match="exists; choose another"):
        tool.prepare(tool.arguments().parse_args(["--input", "x", "--output-dir", str(tmp_path / "out"), "--tokenizer", str(tokenizer)]))


def test_memory_grows_by_hashes_and_not_by_texts(tmp_path, tokenizer):
    def peak(num_records):
        path = tmp_path / "big.jsonl.gz"
        with gzip.open(path, "wt", compresslevel=1) as file:
            for i in range(num_records):
                file.write(json.dumps({"prompt": f"{i} " + "x" * 1000, "user": i % 10}) + "\n")
        args = ["--input", path, "--output-dir", tmp_path / "out", "--tokenizer", tokenizer, "--overwrite"]
        args += ["--max-per-user", 10**6, "--pii-on"]
        tracemalloc.start()
        tool.prepare(tool.arguments().parse_args(list(map(str, args))))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    few, many = peak(500), peak(2500)
    assert (many - few) / 2000 < 150  # bytes per kept record, of which each has 600 letters
