"""Blends of corpora: each has its share of every stretch of rows, one number is the cursor of all, and every loader gives the same."""

import json
import random
from fractions import Fraction

import pytest

from megarlhf.config.packages import INSTALL_DALI, has_dali
from megarlhf.config.sections import CorpusConfig, PretrainingDataConfig
from megarlhf.data.blend import BlendedOrder
from megarlhf.data.corpus import Corpus
from megarlhf.data.pretraining import PretrainingStream
from megarlhf.data.tokenizer_training import train_sentencepiece
from megarlhf.data.tokenizers import load_tokenizer
from megarlhf.preparation.corpora import write_corpus
from megarlhf.runs.records import LimitsConfig, Records

EOS, VOCAB, SEQ_LEN = 7, 500, 8
WEIGHTS = [(1.0,), (0.3, 0.7), (1, 1, 1), (5, 0.01, 2, 2), (0.5, 0.25, 0.125, 0.125), tuple(range(1, 13)), (1e-6, 1e6)]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_every_stretch_of_rows_is_shared_out_by_the_weights(weights):
    order = BlendedOrder([10] * len(weights), weights, seed=1)
    assert order.shares == [Fraction(str(weight)) / sum(Fraction(str(w)) for w in weights) for weight in weights]
    farthest, before = 0, [0] * len(weights)
    for n in (*range(1, 3000), 10**15, 10**15 + 1):
        counts = order.taken(n)
        assert sum(counts) == n
        farthest = max(farthest, *(abs(count - n * share) for count, share in zip(counts, order.shares, strict=True)))
        if n < 3000:
            assert sorted(after - count for after, count in zip(counts, before, strict=True)) == [0] * (len(weights) - 1) + [1]
            before = counts
    assert farthest <= len(weights) / 2
    common = 1
    for share in order.shares:
        common *= share.denominator
    assert order.taken(common) == [common * share for share in order.shares]


def test_a_place_tells_its_row_and_each_corpus_has_an_order_of_its_own():
    sizes = (20, 20, 7)
    order = BlendedOrder(sizes, (3, 2, 1), seed=5)
    whole = order.rows(0, 400)
    rng = random.Random(0)
    for _ in range(100):
        start, n = rng.randrange(390), rng.randrange(11)
        assert order.rows(start, n) == whole[start : start + n]
    walks = [[row for corpus, row in whole if corpus == number] for number in range(3)]
    for walk, size in zip(walks, sizes, strict=True):
        epochs = [walk[at : at + size] for at in range(0, len(walk) - size + 1, size)]
        assert len(epochs) > 2 and all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert epochs[0] != epochs[1]
    assert walks[0][:20] != walks[1][:20]
    assert order.epochs(400) == [len(walk) / size for walk, size in zip(walks, sizes, strict=True)]
    same_ratios = BlendedOrder(sizes, (0.3, 0.2, 0.1), seed=5)
    assert order.rows(10**15, 3) == same_ratios.rows(10**15, 3), "a far place costs nothing"


@pytest.fixture
def corpora(tmp_path):
    rng = random.Random(3)
    for name, num_documents in (("wiki", 30), ("books", 12), ("code", 5)):
        documents = [[rng.randrange(8, VOCAB) for _ in range(rng.randint(1, 30))] for _ in range(num_documents)]
        write_corpus(tmp_path / name, documents, eos_id=EOS, vocab_size=VOCAB)
    return [Corpus(tmp_path / name, seq_len=SEQ_LEN, eos_id=EOS, vocab_size=VOCAB) for name in ("wiki", "books", "code")]


LOADERS = ["default", pytest.param("dali", marks=pytest.mark.skipif(not has_dali(), reason=INSTALL_DALI))]


@pytest.mark.parametrize("loader", LOADERS)
def test_a_resumed_blend_equals_an_uninterrupted_one_with_every_loader(corpora, loader):
    def stream(kind):
        return PretrainingStream(corpora, weights=(5, 3, 2), seed=9, loader=kind)

    whole, read = stream("default"), stream(loader)
    for n in (4, 4, 4, 9, 1):  # of one size, and of others
        assert read.take(n).tokens.equal(whole.take(n).tokens)
    saved = json.loads(json.dumps(read.state_dict()))
    assert saved == whole.state_dict() and saved["num_taken"] == 22, "what was read ahead is not taken"
    resumed = stream(loader)
    resumed.load_state_dict(saved)
    for _ in range(3):
        expected = whole.take(4).tokens
        assert resumed.take(4).tokens.equal(expected) and read.take(4).tokens.equal(expected)
    read.load_state_dict(saved)  # back to before what has been read ahead
    again = stream("default")
    again.load_state_dict(saved)
    assert read.take(4).tokens.equal(again.take(4).tokens)
    assert read.metrics() == again.metrics() and again.metrics()["text/wiki_row_share"] == 0.5


def test_another_blend_is_another_stream(corpora):
    state = PretrainingStream(corpora, weights=(5, 3, 2), seed=9).state_dict()
    for others, weights in ((corpora, (5, 2, 3)), (corpora[:2], (5, 5))):
        with pytest.raises(ValueError, match="they are different streams. Resume with the corpora, weights, seed"):
            PretrainingStream(others, weights=weights, seed=9).load_state_dict(state)
    alone = PretrainingStream(corpora[:1], seed=9)
    blend_of_one = PretrainingStream(corpora[:1], weights=(3,), seed=9)
    blend_of_one.load_state_dict({name: value for name, value in alone.state_dict().items() if name != "shares"})  # of an older version
    assert alone.take(5).tokens.equal(blend_of_one.take(5).tokens)


def test_what_is_said_of_a_blend(corpora):
    notes = PretrainingStream(corpora, weights=(0.5, 0.3, 0.2), seed=9).notes(200)
    assert "0.5 of the rows drawn: passed" in notes[0] and "is this meant" not in notes[0]
    assert "After about 4 passes" in notes[2]
    alone, rows = PretrainingStream(corpora[:1], seed=9), corpora[0].num_rows
    assert alone.notes(4 * rows) == [f"{corpora[0].prefix}: {rows} rows of 8 tokens"]
    (note,) = alone.notes(500 * rows)
    assert "rows of 8 tokens: passed 500.00 times in this run; is this meant? After about 4 passes" in note


@pytest.mark.parametrize("loader", LOADERS)
def test_an_id_outside_the_vocabulary_is_named_with_its_corpus_when_it_is_drawn(corpora, loader):
    stream = PretrainingStream([corpora[0], corpora[1]], weights=(1, 1), seed=9, loader=loader)
    corpora[0].vocab_size = 501  # all files hold smaller ids; as if it had not been looked at
    with open(f"{corpora[1].prefix}.bin", "r+b") as file:
        file.seek(20)
        file.write(b"\xff\xff")
    with pytest.raises(ValueError, match="books has token ids in .*65535, the vocabulary ids 0..499"):
        stream.take(2 * corpora[1].num_rows)


def test_records_read_a_blend_by_its_keys(tmp_path):
    tokenizer = load_tokenizer(train_sentencepiece([f"{i} is {i * i}." for i in range(3000)], tmp_path / "tok", vocab_size=300))
    for number, name in enumerate(("a", "b", "copy_of_a")):
        write_corpus(tmp_path / name, [[5 + number % 2] * 20] * 3, eos_id=tokenizer.eos_id, vocab_size=300)

    def read(*names, valid=None):
        records = Records(tokenizer, LimitsConfig())
        blend = tuple(CorpusConfig(prefix=f"{tmp_path}/{name}", weight=1.0) for name in names)
        data = PretrainingDataConfig(blend=blend, seq_len=4, valid_prefix=valid and f"{tmp_path}/{valid}")
        stream = records.text("data", data, seed=1)
        records.held_out("data", data)
        return stream, records

    stream, records = read("a", "b")
    assert stream is not None and not records.problems
    assert list(records.fingerprints) == ["tokenizer", "data.blend[0].prefix", "data.blend[1].prefix"]
    assert f"data.blend[1].prefix: {tmp_path}/copy_of_a has the content of data.blend[0].prefix" in read("a", "copy_of_a")[1].problems[0]
    stream, records = read("gone", "b", "missing")
    assert stream is None and len(records.problems) == 2
    assert "data.valid_prefix: " in read("a", "b", valid="b")[1].problems[0]
