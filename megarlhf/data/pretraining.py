"""Packed pretraining text from Megatron's ``.bin``/``.idx`` files, for PPO-ptx and for the SFT mix.

Documents end with EOS and are packed into full rows, with no mask between the documents of a row (Brown et al. 2020,
section 2.1 and Appendix B). Row i of a corpus is its tokens [i * seq_len, (i + 1) * seq_len); the tail shorter than a
row is the only thing left out.

The files are written by megatron-core and read here; the order is our own. Its `GPTDataset` must know the number of
samples beforehand, masks and zeroes every token whose id is its pad id, and keeps index files that rank 0 writes beside
the corpus and the others read without waiting. Here all ranks compute the same rows and write nothing.

Opening a corpus reads it: SCANNED_BYTES of each file at most, all of a smaller one, else that much in blocks spread
evenly from its first byte to its last. What is read is looked through for ids outside the vocabulary, and hashed with
the file's size for the fingerprint. Rows are looked through again as they are drawn.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from torch import Tensor

from megarlhf.batch import TextBatch
from megarlhf.data.collation import packed_text_batch
from megarlhf.data.corpus_index import CorpusIndex
from megarlhf.data.order import ShuffledOrder

WAY_OUT = "Make the corpus with tools/preprocess_data.py and the run's tokenizer"
NUM_DOCUMENTS_CHECKED = 1000
SCANNED_BYTES = 2**29
BLOCK_BYTES = 2**22


class PretrainingStream:
    """Rows of pretraining text without end, in a random order that is the same on every rank."""

    def __init__(self, prefix: str | Path, *, seq_len: int, seed: int, eos_id: int, vocab_size: int):
        """Open ``<prefix>.bin`` and ``<prefix>.idx``; rows have `seq_len` tokens. Raises ValueError for an unusable corpus."""
        self._corpus = _Corpus(prefix, seq_len=seq_len, eos_id=eos_id, vocab_size=vocab_size)
        self._order = ShuffledOrder(self._corpus.num_rows, seed=seed)

    @property
    def num_rows(self) -> int:
        """Full rows in the corpus."""
        return self._corpus.num_rows

    @property
    def fingerprint(self) -> str:
        """A hash of the corpus's files, of samples where they are huge (see SCANNED_BYTES)."""
        return self._corpus.fingerprint

    @property
    def epoch(self) -> int:
        """How many times the whole corpus has been taken."""
        return self._order.epoch

    def take(self, n: int) -> TextBatch:
        """The next `n` rows: tokens [n, seq_len], loss_mask [n, seq_len - 1] all True."""
        return packed_text_batch(self._corpus.rows(self._order.take(n)))

    def state_dict(self) -> dict[str, int]:
        """The cursor, and what it is a cursor into."""
        return {**self._order.state_dict(), "seq_len": self._corpus.seq_len, "num_tokens": self._corpus.num_tokens}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to where `state` was saved. Raises ValueError for the state of another stream."""
        for name, mine in (("seq_len", self._corpus.seq_len), ("num_tokens", self._corpus.num_tokens)):
            if state[name] != mine:
                raise ValueError(
                    f"the saved pretraining stream has {name} {state[name]}, {self._corpus.prefix} {name} {mine}: they are different "
                    "streams. Resume with the corpus and row length that the checkpoint was trained with, or start a new run"
                )
        self._order.load_state_dict(state)


def held_out_rows(prefix: str | Path, *, seq_len: int, max_rows: int, eos_id: int, vocab_size: int) -> tuple[TextBatch, str]:
    """(the first `max_rows` rows of a corpus in order, all if it has fewer: tokens [rows, seq_len]; the corpus's fingerprint)."""
    corpus = _Corpus(prefix, seq_len=seq_len, eos_id=eos_id, vocab_size=vocab_size)
    return packed_text_batch(corpus.rows(range(min(max_rows, corpus.num_rows)))), corpus.fingerprint


def write_corpus(prefix: str | Path, documents: Iterable[Sequence[int]], *, eos_id: int, vocab_size: int) -> tuple[int, int]:
    """Write documents of token ids, each without its EOS, as ``<prefix>.bin`` and ``<prefix>.idx``.

    EOS ends each document; ids take 2 bytes where the vocabulary allows it. The files get their names when they are
    complete, so that a failed run leaves no corpus that looks like one. Returns (documents, tokens) written. Raises
    ValueError for an id outside the vocabulary, and for EOS inside a document, which would make two of it.
    """
    bin_path, idx_path = _paths(prefix)
    bin_path.parent.mkdir(parents=True, exist_ok=True)
    partial = [path.with_name(path.name + ".partial") for path in (bin_path, idx_path)]
    builder = IndexedDatasetBuilder(str(partial[0]), dtype=DType.optimal_dtype(vocab_size))
    num_documents = num_tokens = 0
    try:
        for document in documents:
            tokens = np.append(np.asarray(document, dtype=np.int64), eos_id)
            if (tokens[:-1] == eos_id).any():
                raise ValueError(f"document {num_documents} has EOS {eos_id} among its tokens: it would be taken for two")
            if not 0 <= tokens.min() <= tokens.max() < vocab_size:
                raise ValueError(f"document {num_documents} has ids in {tokens.min()}..{tokens.max()}, the vocabulary 0..{vocab_size - 1}")
            builder.add_document(tokens, [len(tokens)])
            num_documents, num_tokens = num_documents + 1, num_tokens + len(tokens)
        builder.finalize(str(partial[1]))
        for path, final in zip(partial, (bin_path, idx_path), strict=True):
            os.replace(path, final)
    finally:
        builder.data_file.close()
        for path in partial:
            path.unlink(missing_ok=True)
    return num_documents, num_tokens


class _Corpus:
    """The tokens of a corpus as one flat sequence on disk, cut into rows."""

    def __init__(self, prefix: str | Path, *, seq_len: int, eos_id: int, vocab_size: int):
        if seq_len < 2:
            raise ValueError(f"seq_len is {seq_len}; a row needs 2 tokens or more to predict one")
        self.prefix, self.seq_len, self._vocab_size = prefix, seq_len, vocab_size
        bin_path, idx_path = _paths(prefix)
        for path in (bin_path, idx_path):
            if not path.is_file() or path.stat().st_size == 0:
                raise ValueError(f"{path} is missing or empty. {WAY_OUT}")
        index = CorpusIndex.read(idx_path)
        self.num_tokens = index.num_tokens
        expected_bytes = self.num_tokens * index.id_type.itemsize
        if bin_path.stat().st_size != expected_bytes:
            raise ValueError(f"{bin_path} has {bin_path.stat().st_size} bytes, its index describes {expected_bytes}. {WAY_OUT}")
        self.num_rows = self.num_tokens // seq_len
        if self.num_rows == 0:
            raise ValueError(f"{prefix} has {self.num_tokens} tokens, fewer than one row of seq_len {seq_len}; lower seq_len or add text")
        # Documents lie one after the other, so that the packed text is the file itself.
        self._tokens = np.memmap(bin_path, dtype=index.id_type, mode="r")
        self._require_eos(index.document_ends, eos_id)
        self.fingerprint = self._scan(np.memmap(idx_path, dtype=np.uint8, mode="r"))

    def rows(self, indices: Sequence[int]) -> Tensor:
        """The rows at `indices`: [len(indices), seq_len] int64. Raises ValueError where an id is outside the vocabulary."""
        rows = np.empty((len(indices), self.seq_len), dtype=np.int64)
        for row, index in zip(rows, indices, strict=True):
            row[:] = self._tokens[index * self.seq_len : (index + 1) * self.seq_len]
        self._require_vocabulary(rows)
        return torch.from_numpy(rows)

    def _scan(self, index: np.ndarray) -> str:
        """Look through the tokens, and hash them with the index's bytes."""
        whole = hashlib.sha256(f"{self._tokens.nbytes} {index.nbytes}".encode())
        for block in _blocks(index):
            whole.update(block)
        for block in _blocks(self._tokens):
            self._require_vocabulary(block)
            whole.update(block)
        return whole.hexdigest()

    def _require_vocabulary(self, ids: np.ndarray) -> None:
        if ids.size and not 0 <= ids.min() <= ids.max() < self._vocab_size:
            raise ValueError(
                f"{self.prefix} has token ids in {ids.min()}..{ids.max()}, the vocabulary ids 0..{self._vocab_size - 1}: "
                f"another tokenizer made it, or it is damaged. {WAY_OUT}"
            )

    def _require_eos(self, document_ends: np.ndarray, eos_id: int) -> None:
        # Whether EOS was appended is the same for all documents of a corpus: the first ones tell.
        ends = document_ends[:NUM_DOCUMENTS_CHECKED] - 1
        wrong = np.flatnonzero(self._tokens[ends] != eos_id)
        if wrong.size:
            last = int(self._tokens[ends[wrong[0]]])
            raise ValueError(f"document {wrong[0]} of {self.prefix} ends with token {last}, not with EOS {eos_id}. {WAY_OUT}")


def _blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    """All of `values` [n], or SCANNED_BYTES of it in evenly spread blocks, the first and the last among them."""
    per_block = BLOCK_BYTES // values.itemsize
    num_blocks = -(-len(values) // per_block)
    for number in np.linspace(0, num_blocks - 1, min(num_blocks, SCANNED_BYTES // BLOCK_BYTES)).round().astype(np.int64):
        yield values[number * per_block : (number + 1) * per_block]


def _paths(prefix: str | Path) -> tuple[Path, Path]:
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
