"""Megatron's index of a corpus (``.idx``): written, and read with nothing taken on trust.

The file: a magic word, a version (1), a code for the type of the ids in the ``.bin``, the numbers of sequences and of document
indices; then the length of each sequence (int32), where it starts in the ``.bin`` in bytes (int64), and the number of the
sequence that begins each document, and one past the last (int64). megatron-core asserts, or fails inside numpy, where it is not so.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
ID_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""Megatron's codes of integer types; 6 and 7 are floating-point."""
DOCUMENTS_SHOWN = 1000
BLOCK = 2**20
"""Entries that are looked at together."""


@dataclass(frozen=True)
class CorpusIndex:
    """Where the documents of a corpus end, and how its ids are written."""

    id_type: np.dtype
    num_tokens: int
    document_ends: np.ndarray
    """[documents] int64: how many tokens lie before the end of each; of those with text among the first DOCUMENTS_SHOWN."""

    @staticmethod
    def read(path: Path) -> CorpusIndex:
        """The index at `path`. ValueError, with the file's name, for whatever is not the index of one document after another."""
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEADER.size)
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise ValueError(f"{path} is not an index of documents: it does not begin with {MAGIC!r} and its counts")
        _, version, code, num_sequences, num_indices = HEADER.unpack(head)
        if version != 1 or code not in ID_TYPES:
            raise ValueError(f"{path} is of version {version} with ids of type {code}; known are version 1, and types {sorted(ID_TYPES)}")
        expected = HEADER.size + 12 * num_sequences + 8 * num_indices
        if size != expected:
            kind = f"{num_sequences} sequences and {num_indices} document indices"
            raise ValueError(f"{path} has {size} bytes, and {expected} for the {kind} that it counts: it is cut or damaged")
        return _checked(path, np.dtype(ID_TYPES[code]), num_sequences, num_indices)


def id_type_for(vocab_size: int) -> np.dtype:
    """The integers that Megatron writes the ids of such a vocabulary in: of 2 bytes where they suffice, with room for a few ids more."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def write_index(path: Path, lengths: Sequence[int], id_type: np.dtype) -> None:
    """Write the index of documents of so many tokens each, one sequence a document, that follow one another in the ``.bin``."""
    code = next(code for code, known in ID_TYPES.items() if id_type == known)
    counted = np.asarray(lengths, dtype=np.int32)
    starts = (np.cumsum(counted, dtype=np.int64) - counted) * id_type.itemsize
    with path.open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, code, len(counted), len(counted) + 1))
        for part in (counted, starts, np.arange(len(counted) + 1, dtype=np.int64)):
            file.write(part.tobytes())


def _checked(path: Path, id_type: np.dtype, num_sequences: int, num_indices: int) -> CorpusIndex:
    """The index of files whose sizes fit, read a block at a time: memory does not grow with the corpus."""
    whole = np.memmap(path, dtype=np.uint8, mode="r", offset=HEADER.size)
    lengths = whole[: 4 * num_sequences].view(np.int32)
    starts = whole[4 * num_sequences : 12 * num_sequences].view(np.int64)
    first_sequences = whole[12 * num_sequences :].view(np.int64)
    if num_sequences == 0 or num_indices < 2:
        raise ValueError(f"{path} describes no document")
    num_tokens = _tokens_in_order(path, lengths, starts, id_type.itemsize)
    _require_rising(path, first_sequences, num_sequences)
    shown = first_sequences[: DOCUMENTS_SHOWN + 1]
    ends = np.cumsum(lengths[: shown[-1]], dtype=np.int64)
    return CorpusIndex(id_type, num_tokens, ends[shown[1:][np.diff(shown) > 0] - 1])


def _tokens_in_order(path: Path, lengths: np.ndarray, starts: np.ndarray, id_bytes: int) -> int:
    """How many tokens there are. ValueError where a sequence does not begin where the one before it ends."""
    num_tokens = 0
    for at in range(0, len(lengths), BLOCK):
        block = lengths[at : at + BLOCK]
        if block.min() < 0:
            raise ValueError(f"{path}: sequence {at + int(block.argmin())} has a length of {block.min()}: it is damaged")
        ends = num_tokens + np.cumsum(block, dtype=np.int64)
        wrong = np.flatnonzero(starts[at : at + BLOCK] != (ends - block) * id_bytes)
        if wrong.size:
            number = at + int(wrong[0])
            raise ValueError(f"{path}: sequence {number} starts at byte {starts[number]}, not where the one before it ends: it is damaged")
        num_tokens = int(ends[-1])
    return num_tokens


def _require_rising(path: Path, first_sequences: np.ndarray, num_sequences: int) -> None:
    last = 0
    rises = bool(first_sequences[0] == 0 and first_sequences[-1] == num_sequences)
    for at in range(0, len(first_sequences), BLOCK):
        block = first_sequences[at : at + BLOCK]
        rises = rises and bool(block[0] >= last and (np.diff(block) >= 0).all())
        last = block[-1]
    if not rises:
        raise ValueError(f"{path}: its document indices do not rise from 0 to its {num_sequences} sequences: it is damaged")
