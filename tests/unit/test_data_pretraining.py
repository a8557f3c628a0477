"""The pretraining stream yields exactly the corpus; the tool writes exactly the documents."""

import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megarlhf.data import corpus as corpus_module
from megarlhf.data.corpus import Corpus
from megarlhf.data.pretraining import PretrainingStream, held_out_rows
from megarlhf.data.tokenizer_training import train_sentencepiece
from megarlhf.data.tokenizers import load_tokenizer
from megarlhf.preparation import preprocess
from megarlhf.preparation.corpora import write_corpus

ROOT = Path(__file__).parents[2]
EOS, VOCAB = 7, 70_000
KINDS = {"eos_id": EOS, "vocab_size": VOCAB}


def documents(num_documents=40, *, vocab_size=VOCAB):
    rng = random.Random(0)
    return [[rng.randrange(8, vocab_size) for _ in range(rng.randint(1, 30))] for _ in range(num_documents)]


@pytest.fixture
def corpus(tmp_path):
    write_corpus(tmp_path / "corpus", documents(), **KINDS)
    return tmp_path / "corpus"


def stream_of(*prefixes, seq_len, seed, eos_id=EOS, vocab_size=VOCAB, **options):
    return PretrainingStream(
        [Corpus(prefix, seq_len=seq_len, eos_id=eos_id, vocab_size=vocab_size) for prefix in prefixes], seed=seed, **options
    )


def packed(seq_len):
    flat = [token for document in documents() for token in [*document, EOS]]
    return [tuple(flat[i : i + seq_len]) for i in range(0, len(flat) - seq_len + 1, seq_len)]


@pytest.mark.parametrize("seq_len", [2, 16, 100])
def test_each_epoch_holds_exactly_the_packed_corpus(corpus, seq_len):
    expected = packed(seq_len)
    stream = stream_of(corpus, seq_len=seq_len, seed=1)
    assert stream.num_rows == len(expected)
    orders = []
    for epoch in range(3):
        assert stream.epochs == [epoch]
        batch = stream.take(len(expected))
        assert batch.loss_mask.all() and batch.loss_mask.shape == (len(expected), seq_len - 1)
        orders.append([tuple(row) for row in batch.tokens.tolist()])
        assert sorted(orders[-1]) == sorted(expected)
    assert orders[0] != orders[1] != orders[2] != expected
    held_out, fingerprint = held_out_rows(corpus, seq_len=seq_len, max_rows=3, **KINDS)
    assert fingerprint == stream.corpora[0].fingerprint
    assert [tuple(row) for row in held_out.tokens.tolist()] == expected[:3]
    assert held_out_rows(corpus, seq_len=seq_len, max_rows=10**9, **KINDS)[0].num_rows == len(expected)


@pytest.mark.parametrize("before", [0, 3, 50])
def test_a_resumed_stream_equals_an_uninterrupted_one(corpus, before):
    stream, resumed = (stream_of(corpus, seq_len=16, seed=1) for _ in range(2))
    stream.take(before)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    for n in (1, 40, 7):
        assert stream.take(n).tokens.equal(resumed.take(n).tokens)
    for kwargs in ({"seq_len": 15, "seed": 1}, {"seq_len": 16, "seed": 2}):
        with pytest.raises(ValueError, match="different"):
            stream_of(corpus, **kwargs).load_state_dict(stream.state_dict())


def test_files_are_what_megatron_writes_and_ids_take_two_bytes_where_the_vocabulary_allows(tmp_path):
    for vocab_size, dtype in ((65_000, np.uint16), (70_000, np.int32)):
        write_corpus(tmp_path / "c", documents(vocab_size=vocab_size), eos_id=EOS, vocab_size=vocab_size)
        builder = IndexedDatasetBuilder(str(tmp_path / "megatron.bin"), dtype=DType.optimal_dtype(vocab_size))
        for ids in documents(vocab_size=vocab_size):
            builder.add_document([*ids, EOS], [len(ids) + 1])
        builder.finalize(str(tmp_path / "megatron.idx"))
        for ending in (".bin", ".idx"):
            assert (tmp_path / f"c{ending}").read_bytes() == (tmp_path / f"megatron{ending}").read_bytes()
        dataset = IndexedDataset(str(tmp_path / "c"))
        assert dataset.index.dtype == dtype
        assert [dataset[i].tolist() for i in range(len(dataset))] == [[*ids, EOS] for ids in documents(vocab_size=vocab_size)]
        assert dataset.document_indices.tolist() == list(range(41))


def test_an_unusable_corpus_is_refused(corpus, tmp_path):
    def open_stream(prefix=corpus, **changes):
        return stream_of(prefix, **{"seq_len": 16, "seed": 1, **changes})

    with pytest.raises(ValueError, match="none.bin is missing or empty.*megarlhf preprocess"):
        open_stream(tmp_path / "none")
    with pytest.raises(ValueError, match="fewer than one row of seq_len 100000"):
        open_stream(seq_len=100_000)
    with pytest.raises(ValueError, match="document 0 of .* ends with token 7, not with EOS 8"):
        open_stream(eos_id=8)
    with pytest.raises(ValueError, match="vocabulary ids 0..99: another tokenizer"):
        open_stream(vocab_size=100)
    content = Path(f"{corpus}.bin").read_bytes()
    Path(f"{corpus}.bin").write_bytes(content[:-4])
    with pytest.raises(ValueError, match="its index describes"):
        open_stream()
    Path(f"{corpus}.idx").write_bytes(b"not an index")
    with pytest.raises(ValueError, match="not an index of documents"):
        open_stream()


HEAD = "<9sQBQQ"


def packed_index(path, **changes):
    """An index's head with some of its parts replaced."""
    parts = dict(zip(("magic", "version", "code", "sequences", "indices"), struct.unpack_from(HEAD, path.read_bytes()), strict=True))
    return struct.pack(HEAD, *(parts | changes).values())


def edited(content, at, value, form):
    return content[:at] + struct.pack(form, value) + content[at + struct.calcsize(form) :]


def damaged_indices(path):
    """What it is -> (an index that is damaged so, what is said of it)."""
    whole = path.read_bytes()
    size, n = struct.calcsize(HEAD), 40
    body, starts, indices = whole[size:], size + 4 * n, size + 12 * n
    rng = random.Random(1)
    return {
        "random": (rng.randbytes(500), "is not an index of documents"),
        "empty": (b"", "missing or empty"),
        "short": (whole[:20], "is not an index of documents"),
        "cut": (whole[:-1], "cut or damaged"),
        "half": (whole[: len(whole) // 2], "cut or damaged"),
        "longer": (whole + b"\0", "cut or damaged"),
        "version": (packed_index(path, version=2) + body, "version 2"),
        "unknown type": (packed_index(path, code=77) + body, "ids of type 77"),
        "floats": (packed_index(path, code=6) + body, "ids of type 6"),
        "another type": (packed_index(path, code=8) + body, "sequence 1 starts at byte"),
        "huge count": (packed_index(path, sequences=2**60) + body, "cut or damaged"),
        "huge indices": (packed_index(path, indices=2**64 - 1) + body, "cut or damaged"),
        "nothing": (packed_index(path, sequences=0, indices=0), "no document"),
        "negative length": (edited(whole, size + 8, -3, "<i"), "sequence 2 has a length of -3"),
        "long length": (edited(whole, size + 8, 2**31 - 1, "<i"), "sequence 3 starts at byte"),
        "offset out of range": (edited(whole, starts + 8 * 5, 2**62, "<q"), "sequence 5 starts at byte"),
        "negative offset": (edited(whole, starts, -4, "<q"), "sequence 0 starts at byte -4"),
        "document out of range": (edited(whole, indices + 8 * n, n + 1, "<q"), "document indices do not rise"),
        "documents not in order": (edited(whole, indices + 8, 39, "<q"), "document indices do not rise"),
    }


def test_a_damaged_index_is_refused_by_its_name(corpus):
    path = Path(f"{corpus}.idx")
    for what, (content, said) in damaged_indices(path).items():
        whole = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"corpus.idx.*{said}"):
            pytest.fail(f"{what}: {stream_of(corpus, seq_len=16, seed=1)}")
        path.write_bytes(whole)
    rng = random.Random(2)
    for _ in range(300):  # any byte of it: refused, or harmless
        content = bytearray(whole)
        content[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            assert stream_of(corpus, seq_len=16, seed=1).num_rows == len(packed(16))
        except ValueError as error:
            assert "corpus" in str(error)


@pytest.mark.parametrize("at", [0, 17, -2])
@pytest.mark.parametrize("bad", [VOCAB, 2**31 - 1, -1])
def test_an_id_outside_the_vocabulary_is_found_before_it_is_drawn(corpus, at, bad):
    ids = np.fromfile(f"{corpus}.bin", dtype=np.int32)
    ids[at] = bad
    ids.tofile(f"{corpus}.bin")
    with pytest.raises(ValueError, match=f"corpus has token ids in .*{bad}.*the vocabulary ids 0..{VOCAB - 1}"):
        stream_of(corpus, seq_len=16, seed=1)


def test_a_fingerprint_is_of_the_content(corpus, tmp_path):
    def fingerprint(ids, name="other"):
        write_corpus(tmp_path / name, ids, **KINDS)
        return Corpus(tmp_path / name, seq_len=16, **KINDS).fingerprint

    same = fingerprint(documents())
    assert same == Corpus(corpus, seq_len=32, **KINDS).fingerprint
    changed = documents()
    changed[3][0] += 1
    moved = documents()
    moved[0], moved[1] = moved[0] + moved[1][:1], moved[1][1:] or [9]
    assert len({same, fingerprint(changed), fingerprint(moved), fingerprint(documents()[::-1])}) == 4


def test_a_huge_corpus_is_read_in_blocks_from_its_first_byte_to_its_last(corpus, monkeypatch):
    values = np.arange(1000, dtype=np.int32)
    monkeypatch.setattr(corpus_module, "BLOCK_BYTES", 40)
    assert np.concatenate(list(corpus_module._blocks(values))).tolist() == values.tolist()
    monkeypatch.setattr(corpus_module, "SCANNED_BYTES", 400)
    blocks = list(corpus_module._blocks(values))
    assert len(blocks) == 10 and blocks[0][0] == 0 and blocks[-1][-1] == 999 and all(len(block) == 10 for block in blocks)
    assert np.ptp(np.diff([block[0] for block in blocks])) <= 10


def test_a_document_with_an_end_inside_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="document 1 has EOS 7 among its tokens"):
        write_corpus(tmp_path / "c", [[8], [9, EOS, 9]], **KINDS)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="document 1 has ids in 7..90000"):
        write_corpus(tmp_path / "c", [[8], [90_000]], **KINDS)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def tool_run(tmp_path):
    """The texts, the tokenizer's path and the tool's arguments for a run in which line 3 of a.jsonl is bad."""
    texts = [text for _, text in sorted(topics.items())][:20]
    model = train_sentencepiece(texts, tmp_path / "tok", vocab_size=400)
    lines = [json.dumps({"body": text}) for text in texts]
    lines.insert(2, '{"body": ""}')
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "b.txt").write_text("one\n\ndocument")
    args = ["--output-prefix", tmp_path / "out" / "corpus", "--tokenizer", model, "--json-key", "body", "--workers", 2]
    return texts, model, [str(arg) for arg in [*args, "--input", tmp_path / "a.jsonl", tmp_path / "b.txt"]]


def test_the_tool_writes_the_documents_and_counts_what_it_skips(tmp_path, tool_run):
    texts, model, args = tool_run
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "preprocess_data.py"), *args, "--on-bad-record", "skip"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "the tokenizer loses text" not in done.stdout
    assert "kept 21 of 22 records, skipped 1 (1 empty text)" in done.stdout and "a.jsonl:3: empty text" in done.stdout
    tokenizer, dataset = load_tokenizer(model), IndexedDataset(str(tmp_path / "out" / "corpus"))
    assert [tokenizer.decode(dataset[i]) for i in range(len(dataset))] == [*texts, "one\n\ndocument"]
    assert all(dataset[i][-1] == tokenizer.eos_id for i in range(len(dataset)))


def test_the_tool_refuses_bad_input_with_its_line_and_leaves_nothing(tmp_path, tool_run, capsys):
    _, _, args = tool_run

    def refusal(*more):
        assert preprocess.main([*map(str, args), *map(str, more)]) == 2
        return capsys.readouterr().err.strip()

    way_out = "Write some text or remove the record."
    assert refusal() == f'megarlhf preprocess: {tmp_path}/a.jsonl:3: empty text: "body" has no text. {way_out}'
    assert f"{tmp_path}/missing.jsonl: missing file" in refusal("--input", tmp_path / "missing.jsonl")
    (tmp_path / "b.txt").write_bytes(b"fine\nfine\nnot \xff fine\n")
    assert f"{tmp_path}/b.txt:3: invalid UTF-8" in refusal("--input", tmp_path / "b.txt")
    assert "c.md: unknown kind of file" in refusal("--input", "c.md")
    assert "--workers is 0" in refusal("--workers", 0)
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "out" / "corpus.idx").write_text("mine")
    assert "corpus.idx exists; choose another --output-prefix or give --overwrite" in refusal()
