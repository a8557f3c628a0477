"""How a pretraining corpus is written: Megatron's `.bin` and `.idx`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from megarlhf.data.corpus import corpus_paths
from megarlhf.parallel.platform import prepare_megatron


def write_corpus(prefix: str | Path, documents: Iterable[Sequence[int]], *, eos_id: int, vocab_size: int) -> tuple[int, int]:
    """Write documents of token ids, each without its EOS, as ``<prefix>.bin`` and ``<prefix>.idx``.

    EOS ends each document; ids take 2 bytes where the vocabulary allows it. The files get their names when they are
    complete, so that a failed run leaves no corpus that looks like one. Returns (documents, tokens) written. Raises
    ValueError for an id outside the vocabulary, and for EOS inside a document, which would make two of it.
    """
    prepare_megatron()  # before the import below does it, more slowly
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    bin_path, idx_path = corpus_paths(prefix)
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
