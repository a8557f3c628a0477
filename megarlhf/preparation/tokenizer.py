"""Train a tokenizer on text of one's own, and say how well it fits.

    megarlhf tokenizer --input a.jsonl b.txt --to runs/tokenizer --vocab-size 8000

A ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` file has one text per record, the fields ``--json-key`` of it; a ``.txt`` file is one text.
The folder --to is what tokenizer.path takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megarlhf.data.documents import document_text, stored_documents
from megarlhf.data.files import BadRecord
from megarlhf.data.records import RecordTally
from megarlhf.data.tokenized import TextEncoder
from megarlhf.data.tokenizer_training import train_byte_level, train_sentencepiece
from megarlhf.data.tokenizers import load_tokenizer
from megarlhf.endings import ended

FILES = {"sentencepiece": "tokenizer.model", "bpe": "tokenizer.json"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, and print the report; returns the exit status (see `ended`)."""
    options = parser().parse_args(arguments)
    return ended("megarlhf tokenizer", lambda: _train(options), after_ctrl_c="no tokenizer is written")


def parser() -> argparse.ArgumentParser:
    """Of the words after `megarlhf tokenizer`."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="megarlhf tokenizer", description=__doc__, formatter_class=shape, allow_abbrev=False)
    parser.add_argument("--input", nargs="+", required=True, help=".jsonl, .jsonl.gz, .parquet and .txt files")
    parser.add_argument("--to", type=Path, required=True, help="the folder to write into")
    parser.add_argument("--vocab-size", type=int, required=True, help="tokens, control tokens included")
    kind = "sentencepiece's BPE with bytes for rare characters, or GPT-2's BPE over bytes (default: sentencepiece)"
    parser.add_argument("--kind", choices=tuple(FILES), default="sentencepiece", help=kind)
    keys = "fields of a record that hold its text, joined in this order (default: text)"
    parser.add_argument("--json-key", nargs="+", default=["text"], help=keys)
    parser.add_argument("--held-out", nargs="+", help="files to report on instead of --input: text that it was not trained on")
    parser.add_argument("--on-bad-record", choices=("raise", "skip"), default="raise", help="stop at a bad record, or count it")
    return parser


def _train(options: argparse.Namespace) -> None:
    path = options.to / FILES[options.kind]
    if there := [name for name in FILES.values() if (options.to / name).exists()]:
        raise ValueError(f"{options.to / there[0]} exists; choose another --to")
    tally = RecordTally(", ".join(options.input), on_bad_record=options.on_bad_record)
    texts = list(_texts(options.input, options.json_key, tally))
    report = tally.report()
    if options.kind == "sentencepiece":
        train_sentencepiece(texts, path.with_suffix(""), vocab_size=options.vocab_size)
    else:
        train_byte_level(texts, path, vocab_size=options.vocab_size)
    if options.held_out:
        held_out = RecordTally(", ".join(options.held_out), on_bad_record=options.on_bad_record)
        texts = list(_texts(options.held_out, options.json_key, held_out))
        report = held_out.report()
    print(report, *report.examples, sep="\n  ")
    print(*fit(path, texts, vocab_size=options.vocab_size).lines(), sep="\n")


def _texts(paths: Sequence[str], keys: Sequence[str], tally: RecordTally) -> Iterator[str]:
    for source, stored in stored_documents(paths):
        try:
            text = document_text(source, stored, keys)
        except BadRecord as bad:
            tally.skip(bad)
            continue
        tally.keep()
        yield text


@dataclass(frozen=True)
class Fit:
    """How a tokenizer fits some texts."""

    path: Path
    vocab_size: int
    asked: int
    num_texts: int
    num_tokens: int
    num_words: int
    """What blanks separate."""
    num_bytes: int
    lengths: tuple[int, int, int]
    """Tokens of the median text, of one longer than 99 % of them, and of the longest."""
    lost: str

    def lines(self) -> list[str]:
        """To be read."""
        fewer = f" of the {self.asked} asked for: the texts have no more" if self.vocab_size < self.asked else ""
        median, most, longest = self.lengths
        return [
            f"{self.path}: {self.vocab_size} tokens{fewer}; tokenizer.path takes {self.path.parent}",
            f"{self.num_texts} texts, {self.num_tokens} tokens: {self.num_tokens / self.num_words:.2f} for each word, "
            f"{self.num_bytes / self.num_tokens:.2f} bytes in each",
            f"tokens of a text: median {median}, 99 % at most {most}, longest {longest}",
            self.lost or "every text comes back as it was",
        ]


def fit(path: Path, texts: Sequence[str], *, vocab_size: int) -> Fit:
    """How the tokenizer at `path` fits `texts`; vocab_size: what was asked for. BadRecord where it cannot encode one."""
    tokenizer = load_tokenizer(path)
    encoder = TextEncoder(tokenizer)
    lengths = sorted(len(encoder.encode("the texts", f"text {number}", text)) for number, text in enumerate(texts))
    return Fit(
        path=path,
        vocab_size=tokenizer.vocab_size,
        asked=vocab_size,
        num_texts=len(texts),
        num_tokens=sum(lengths),
        num_words=sum(len(text.split()) for text in texts),
        num_bytes=sum(len(text.encode()) for text in texts),
        lengths=(lengths[len(lengths) // 2], lengths[int(0.99 * len(lengths))], lengths[-1]),
        lost=encoder.lost(),
    )
