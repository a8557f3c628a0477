"""Turn text into a pretraining corpus: ``<output-prefix>.bin`` and ``.idx``, the files of Megatron's data sets.

    megarlhf preprocess --input a.jsonl b.txt --output-prefix runs/corpus --tokenizer tok.model

A ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` file has one document per record, in the field ``--json-key``; a ``.txt`` file is
one document. Each document ends with EOS.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice

from megarlhf.data.documents import document_text, stored_documents
from megarlhf.data.files import BadRecord
from megarlhf.data.records import RecordTally
from megarlhf.data.tokenized import TextEncoder, TextLoss, encode_text
from megarlhf.data.tokenizers import Tokenizer, load_tokenizer
from megarlhf.endings import ended
from megarlhf.preparation.corpora import write_corpus

BATCH_SIZE = 4096  # documents in memory at once
REPORT_EVERY_S = 5.0


class Encoder:
    """A document of a file as token ids; or, as a value that crosses process borders, why it has none."""

    tokenizer: Tokenizer  # of a worker process, set once by `start`

    @classmethod
    def start(cls, path: str, eos_token: str | None) -> None:
        """Load the tokenizer of this process."""
        cls.tokenizer = load_tokenizer(path, eos_token=eos_token)

    @classmethod
    def encode(cls, item: tuple[str, bytes | dict, str]) -> tuple[str, array, TextLoss] | BadRecord:
        """(source, token ids, what was lost of the text) of (source, what is stored, the field that holds the text)."""
        source, stored, json_key = item
        try:
            ids, loss = encode_text(cls.tokenizer, source, "document", document_text(source, stored, [json_key]))
            return source, array("i", ids), loss
        except BadRecord as bad:
            return bad


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the corpus and say what is in it; returns the exit status (see `ended`)."""
    options = parser().parse_args(arguments)
    return ended("megarlhf preprocess", lambda: _write(options), after_ctrl_c="what was written so far is no corpus")


def _write(args: argparse.Namespace) -> None:
    existing = [path for path in (f"{args.output_prefix}.bin", f"{args.output_prefix}.idx") if os.path.exists(path)]
    if existing and not args.overwrite:
        raise ValueError(f"{existing[0]} exists; choose another --output-prefix or give --overwrite")
    tokenizer = load_tokenizer(args.tokenizer, eos_token=args.eos_token)
    tally, texts = RecordTally(", ".join(args.input), on_bad_record=args.on_bad_record), TextEncoder(tokenizer)
    documents = with_progress(encoded_documents(args, tally, texts))
    num_documents, num_tokens = write_corpus(args.output_prefix, documents, eos_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size)
    report = tally.report()
    print(report, *report.examples, *filter(None, [texts.lost()]), sep="\n  ")
    print(f"{args.output_prefix}.bin, .idx: {num_documents} documents, {num_tokens} tokens, EOS included")


def parser() -> argparse.ArgumentParser:
    """Of the words after `megarlhf preprocess`."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="megarlhf preprocess", description=__doc__, formatter_class=shape, allow_abbrev=False)
    parser.add_argument("--input", nargs="+", required=True, help=".jsonl, .jsonl.gz, .parquet and .txt files, in the order of the corpus")
    parser.add_argument("--output-prefix", required=True, help="path of the corpus without .bin or .idx")
    parser.add_argument("--tokenizer", required=True, help="a .model, a tokenizer.json, a vocab.json, or a folder with one")
    parser.add_argument("--eos-token", help="name of the EOS token, where the tokenizer does not say it")
    parser.add_argument("--json-key", default="text", help="field of a .jsonl record that holds the document")
    parser.add_argument("--on-bad-record", choices=("raise", "skip"), default="raise", help="stop at a bad document, or count it")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that tokenize")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing corpus")
    return parser


def encoded_documents(args: argparse.Namespace, tally: RecordTally, texts: TextEncoder) -> Iterator[array]:
    """The documents as token ids, in the order of the input; `texts` counts what is lost of them. Raises BadRecord."""
    if args.workers < 1:
        raise ValueError(f"--workers is {args.workers}; it must be at least 1")
    items = ((source, stored, args.json_key) for source, stored in stored_documents(args.input))
    with ProcessPoolExecutor(args.workers, initializer=Encoder.start, initargs=(args.tokenizer, args.eos_token)) as pool:
        # Batch by batch, because a pool reads all of its input ahead, and a corpus does not fit in memory.
        while batch := list(islice(items, BATCH_SIZE)):
            for encoded in pool.map(Encoder.encode, batch, chunksize=16):
                if isinstance(encoded, BadRecord):
                    tally.skip(encoded)
                    continue
                source, tokens, loss = encoded
                tally.keep()
                texts.count(source, "document", loss)
                yield tokens
    tally.report()  # refuses an input of which nothing is left


def with_progress(documents: Iterable[array]) -> Iterator[array]:
    """The same documents, with their count on stderr now and then."""
    start = last_report = time.monotonic()
    num_tokens = 0
    for num_documents, document in enumerate(documents, start=1):
        yield document
        num_tokens += len(document)
        now = time.monotonic()
        if now - last_report >= REPORT_EVERY_S:
            last_report = now
            print(f"{num_documents} documents, {num_tokens} tokens, {num_tokens / (now - start):.0f} tokens/s", file=sys.stderr)
