"""Turn text into a pretraining corpus: ``<output-prefix>.bin`` and ``.idx``, the files of Megatron's data sets.

    python tools/preprocess_data.py --input a.jsonl b.txt --output-prefix runs/corpus --tokenizer tok.model

A ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` file has one document per record, in the field ``--json-key``; a ``.txt`` file is
one document. Each document ends with EOS.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

from megarlhf.data.fields import text_field
from megarlhf.data.files import BadRecord, record_of, stored_records
from megarlhf.data.pretraining import write_corpus
from megarlhf.data.records import RecordTally
from megarlhf.data.tokenized import TextEncoder, TextLoss, encode_text
from megarlhf.data.tokenizers import Tokenizer, load_tokenizer
from megarlhf.storage.files import system_error

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
    def encode(cls, item: tuple[str, bytes | dict, str | None]) -> tuple[str, array, TextLoss] | BadRecord:
        """(source, token ids, what was lost of the text) of (source, stored record, json key or None for plain text)."""
        source, content, json_key = item
        try:
            record = record_of(source, content) if json_key is not None else {"text": plain_text(source, content)}
            ids, loss = encode_text(cls.tokenizer, source, "document", text_field(source, record, json_key or "text"))
            return source, array("i", ids), loss
        except BadRecord as bad:
            return bad


def main() -> None:
    """Read the arguments, write the corpus, and say what is in it."""
    args = arguments().parse_args()
    existing = [path for path in (f"{args.output_prefix}.bin", f"{args.output_prefix}.idx") if os.path.exists(path)]
    if existing and not args.overwrite:
        raise SystemExit(f"error: {existing[0]} exists; choose another --output-prefix or give --overwrite")
    try:
        tokenizer = load_tokenizer(args.tokenizer, eos_token=args.eos_token)
        tally = RecordTally(", ".join(args.input), on_bad_record=args.on_bad_record)
        texts = TextEncoder(tokenizer)
        documents = with_progress(encoded_documents(args, tally, texts))
        num_documents, num_tokens = write_corpus(args.output_prefix, documents, eos_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    report = tally.report()
    print(report, *report.examples, *filter(None, [texts.lost()]), sep="\n  ")
    print(f"{args.output_prefix}.bin, .idx: {num_documents} documents, {num_tokens} tokens, EOS included")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    items = contents(args.input, args.json_key)
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


def contents(paths: Iterable[str], json_key: str) -> Iterator[tuple[str, bytes | dict, str | None]]:
    """(source, stored record, json key or None) of each document. Raises BadRecord for a file that is missing or of no known kind."""
    for path in paths:
        if path.endswith((".jsonl", ".jsonl.gz", ".parquet")):
            yield from ((source, stored, json_key) for source, stored in stored_records(path))
        elif path.endswith(".txt"):
            if not os.path.isfile(path):
                raise BadRecord(path, "missing file", "there is no such file", "Check the path.")
            yield path, Path(path).read_bytes(), None
        else:
            raise BadRecord(path, "unknown kind of file", "neither .jsonl, .jsonl.gz, .parquet nor .txt", "Rename it to what it is.")


def plain_text(source: str, content: bytes) -> str:
    """The text of a .txt file. Raises BadRecord with the line of a byte that is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BadRecord(f"{source}:{line}", "invalid UTF-8", f"byte {error.start} of the file", "Save the file as UTF-8.") from error


def start() -> int:
    """`main` with an exit status: 2 for what the user wrote wrong, 1 for what went wrong while running, 130 after Ctrl-C."""
    try:
        main()
        return 0
    except SystemExit as end:
        if not isinstance(end.code, str):
            raise
        print(end.code, file=sys.stderr)
        return 1 if isinstance(end.__cause__, OSError) else 2
    except OSError as error:  # a full disk
        print(f"error: {system_error(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: stopped by Ctrl-C; what was written so far is no corpus", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(start())
