"""A corpus in Megatron's ``.bin``/``.idx`` files, read as rows of packed text.

Documents end with EOS and are packed into full rows, with no mask between the documents of a row (Brown et al. 2020,
section 2.1 and Appendix B). Row i of a corpus is its tokens [i * seq_len, (i + 1) * seq_len); the tail shorter than a
row is the only thing left out.

Opening a corpus reads it: SCANNED_BYTES of each file at most, all of a smaller one, else that much in blocks spread
evenly from its first byte to its last. What is read is looked through for ids outside the vocabulary, and hashed with
the file's size for the fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from megarlhf.data.corpus_index import CorpusIndex

WAY_OUT = "Make the corpus with megarlhf preprocess and the run's tokenizer"
SCANNED_BYTES = 2**29
BLOCK_BYTES = 2**22


class Corpus:
    """The tokens of a corpus as one flat sequence on disk, cut into rows. It travels to another process by its files' names."""

    def __init__(self, prefix: str | Path, *, seq_len: int, eos_id: int, vocab_size: int) -> None:
        """Open ``<prefix>.bin`` and ``<prefix>.idx``; rows have `seq_len` tokens. Raises ValueError for an unusable corpus."""
        if seq_len < 2:
            raise ValueError(f"seq_len is {seq_len}; a row needs 2 tokens or more to predict one")
        self.prefix, self.seq_len, self.vocab_size = str(prefix), seq_len, vocab_size
        bin_path, idx_path = corpus_paths(prefix)
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
        self._id_type = index.id_type
        self._require_eos(index.document_ends, eos_id)
        self.fingerprint = self._scan(np.memmap(idx_path, dtype=np.uint8, mode="r"))

    @cached_property
    def _tokens(self) -> np.ndarray:
        # Documents lie one after the other, so that the packed text is the file itself.
        return np.memmap(corpus_paths(self.prefix)[0], dtype=self._id_type, mode="r")

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_tokens"}  # a map would travel as its content

    def row(self, index: int) -> np.ndarray:
        """Row `index`: [seq_len], of the type that its ids have on disk."""
        return self._tokens[index * self.seq_len : (index + 1) * self.seq_len]

    def _scan(self, index: np.ndarray) -> str:
        """Look through the tokens, and hash them with the index's bytes."""
        whole = hashlib.sha256(f"{self._tokens.nbytes} {index.nbytes}".encode())
        for block in _blocks(index):
            whole.update(block)
        for block in _blocks(self._tokens):
            self.require_vocabulary(block)
            whole.update(block)
        return whole.hexdigest()

    def require_vocabulary(self, ids: np.ndarray) -> None:
        """ValueError where an id is outside the vocabulary."""
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(
                f"{self.prefix} has token ids in {ids.min()}..{ids.max()}, the vocabulary ids 0..{self.vocab_size - 1}: "
                f"another tokenizer made it, or it is damaged. {WAY_OUT}"
            )

    def _require_eos(self, document_ends: np.ndarray, eos_id: int) -> None:
        # Whether EOS was appended is the same for all documents of a corpus: the first ones tell.
        ends = document_ends - 1
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


def corpus_paths(prefix: str | Path) -> tuple[Path, Path]:
    """The .bin and the .idx file of a corpus."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
