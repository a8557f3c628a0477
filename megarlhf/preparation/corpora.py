"""How a pretraining corpus is written: Megatron's `.bin` and `.idx`, without megatron-core: it takes longer to import than this."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from megarlhf.data.corpus import corpus_paths
from megarlhf.data.corpus_index import id_type_for, write_index


def write_corpus(prefix: str | Path, documents: Iterable[Sequence[int]], *, eos_id: int, vocab_size: int) -> tuple[int, int]:
    """Write documents of token ids, each without its EOS, as ``<prefix>.bin`` and ``<prefix>.idx``.

    EOS ends each document; ids take 2 bytes where the vocabulary allows it. The files get their names when they are
    complete, so that a failed run leaves no corpus that looks like one. Returns (documents, tokens) written. Raises
    ValueError for an id outside the vocabulary, and for EOS inside a document, which would make two of it.
    """
    bin_path, idx_path = corpus_paths(prefix)
    bin_path.parent.mkdir(parents=True, exist_ok=True)
    partial = [path.with_name(path.name + ".partial") for path in (bin_path, idx_path)]
    lengths, num_tokens, id_type = array("i"), 0, id_type_for(vocab_size)
    try:
        with partial[0].open("wb") as file:
            for number, document in enumerate(documents):
                tokens = np.append(np.asarray(document, dtype=np.int64), eos_id)
                if (tokens[:-1] == eos_id).any():
                    raise ValueError(f"document {number} has EOS {eos_id} among its tokens: it would be taken for two")
                if not 0 <= tokens.min() <= tokens.max() < vocab_size:
                    raise ValueError(f"document {number} has ids in {tokens.min()}..{tokens.max()}, the vocabulary 0..{vocab_size - 1}")
                file.write(tokens.astype(id_type).tobytes())
                lengths.append(len(tokens))
                num_tokens += len(tokens)
        write_index(partial[1], lengths, id_type)
        for path, final in zip(partial, (bin_path, idx_path), strict=True):
            os.replace(path, final)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)
    return len(lengths), num_tokens
