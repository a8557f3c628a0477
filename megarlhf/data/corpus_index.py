"""Megatron's index of a corpus (``.idx``), read with nothing taken on trust.

The file: a magic word, a version (1), a code for the type of the ids in the ``.bin``, the numbers of sequences and of document
indices; then the length of each sequence (int32), where it starts in the ``.bin`` in bytes (int64), and the number of the
sequence that begins each document, and one past the last (int64). megatron-core asserts, or fails inside numpy, where it is not so.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
ID_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""Megatron's codes of integer types; 6 and 7 are floating-point."""


@dataclass(frozen=True)
class CorpusIndex:
    """Where the documents of a corpus end, and how its ids are written."""

    id_type: np.dtype
    num_tokens: int
    document_ends: np.ndarray
    """[documents] int64: how many tokens lie before the end of each."""

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


def _checked(path: Path, id_type: np.dtype, num_sequences: int, num_indices: int) -> CorpusIndex:
    whole = np.memmap(path, dtype=np.uint8, mode="r", offset=HEADER.size)
    lengths = whole[: 4 * num_sequences].view(np.int32)
    starts = whole[4 * num_sequences : 12 * num_sequences].view(np.int64)
    first_sequences = whole[12 * num_sequences :].view(np.int64)
    if num_sequences == 0 or num_indices < 2:
        raise ValueError(f"{path} describes no document")
    if lengths.min() < 0:
        raise ValueError(f"{path}: sequence {int(lengths.argmin())} has a length of {lengths.min()}: it is damaged")
    ends = np.cumsum(lengths, dtype=np.int64)
    wrong = np.flatnonzero(starts != (ends - lengths) * id_type.itemsize)
    if wrong.size:
        raise ValueError(f"{path}: sequence {wrong[0]} starts at byte {starts[wrong[0]]}, not where the one before it ends: it is damaged")
    if first_sequences[0] != 0 or first_sequences[-1] != num_sequences or (np.diff(first_sequences) < 0).any():
        raise ValueError(f"{path}: its document indices do not rise from 0 to its {num_sequences} sequences: it is damaged")
    with_text = first_sequences[1:][np.diff(first_sequences) > 0]
    return CorpusIndex(id_type, int(ends[-1]), ends[with_text - 1])
