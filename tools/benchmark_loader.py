"""How long a step waits for its rows of pretraining text, by loader: python tools/benchmark_loader.py [--rounds 9]

Two corpora of random ids, blended, are read in batches by each loader in turn. `busy` reads one batch after the other; `paced` lets as
much time pass between two batches as a step might take, in which a loader may read ahead. Prints medians over the rounds, and whether
the batches were the same. A loader that is not installed is left out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from megarlhf.config.packages import INSTALL_DALI, has_dali
from megarlhf.data.corpus import Corpus
from megarlhf.data.pretraining import PretrainingStream
from megarlhf.preparation.corpora import write_corpus

EOS, VOCAB = 0, 50_000


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, default=20, help="of a round")
    parser.add_argument("--rows", type=int, default=512, help="of a batch")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--megabytes", type=int, default=256, help="of each corpus")
    parser.add_argument("--pause", type=float, default=0.1, help="seconds between two batches when paced")
    options = parser.parse_args()
    loaders = ["default", *(["dali"] if has_dali() else [])]
    if len(loaders) == 1:
        print(f"DALI is not installed, and is left out: {INSTALL_DALI}")
    with tempfile.TemporaryDirectory() as folder:
        corpora = [make_corpus(Path(folder) / name, options, seed) for seed, name in enumerate(("first", "second"))]
        streams = {loader: PretrainingStream(corpora, weights=(0.3, 0.7), seed=1, loader=loader) for loader in loaders}
        first = {loader: timed(stream, options.rows) for loader, stream in streams.items()}
        same = all(torch.equal(tokens.cpu(), first["default"][1].cpu()) for _, tokens in first.values())
        found = measured(streams, options)
    print(f"{options.rows} rows of {options.seq_len} tokens a batch; the batches are {'the same' if same else 'NOT the same'}")
    for loader in loaders:
        busy, paced = (1000 * statistics.median(found[loader, pause]) for pause in (0.0, options.pause))
        print(f"{loader:8} first {1000 * first[loader][0]:7.1f} ms, then a batch: busy {busy:6.2f} ms, paced {paced:6.2f} ms")


def make_corpus(prefix: Path, options: argparse.Namespace, seed: int) -> Corpus:
    """A corpus of random documents of 4000 tokens."""
    rng = np.random.default_rng(seed)
    documents = (rng.integers(1, VOCAB, size=4000) for _ in range(options.megabytes * 2**20 // 8000))
    write_corpus(prefix, documents, eos_id=EOS, vocab_size=VOCAB)
    return Corpus(prefix, seq_len=options.seq_len, eos_id=EOS, vocab_size=VOCAB)


def measured(streams: dict[str, PretrainingStream], options: argparse.Namespace) -> dict[tuple[str, float], list[float]]:
    """(loader, pause) -> seconds of a batch, the median of each round; the loaders in turn."""
    found: dict[tuple[str, float], list[float]] = {}
    for _ in range(options.rounds):
        for pause in (0.0, options.pause):
            for loader, stream in streams.items():
                seconds = []
                for _ in range(options.batches):
                    time.sleep(pause)
                    seconds.append(timed(stream, options.rows)[0])
                found.setdefault((loader, pause), []).append(statistics.median(seconds))
    return found


def timed(stream: PretrainingStream, rows: int) -> tuple[float, torch.Tensor]:
    """(seconds that the next batch takes, its tokens)."""
    start = time.perf_counter()
    tokens = stream.take(rows).tokens
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, tokens


if __name__ == "__main__":
    main()
