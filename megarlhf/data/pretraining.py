"""Pretraining text for PPO-ptx and for the SFT mix: rows of one or several corpora without end.

The files are Megatron's (megarlhf/preparation/corpora.py), read here; the order is our own. Its `GPTDataset` must
know the number of samples beforehand, masks and zeroes every token whose id is its pad id, and keeps index files that rank 0 writes
beside the corpus and the others read without waiting. Here all ranks compute the same rows and write nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from megarlhf.batch import TextBatch
from megarlhf.data.blend import BlendedOrder, BlendedText
from megarlhf.data.collation import packed_text_batch
from megarlhf.data.corpus import Corpus
from megarlhf.data.loaders import make_loader

PASSES = 4
MANY_PASSES = f"; is this meant? After about {PASSES} passes text teaches little more (Muennighoff et al. 2023)"


class PretrainingStream:
    """Rows of pretraining text without end, in a random order that is the same on every rank and with every loader."""

    def __init__(
        self,
        corpora: Sequence[Corpus],
        *,
        seed: int,
        weights: Sequence[float] = (1.0,),
        loader: Literal["default", "dali"] = "default",
    ) -> None:
        """Args: corpora: of one row length. weights: how their rows are shared out, see `BlendedOrder`."""
        self.corpora, self._seed = tuple(corpora), seed
        self._order = BlendedOrder([corpus.num_rows for corpus in corpora], weights, seed=seed)
        self._loader = make_loader(loader, BlendedText(self.corpora, self._order))
        self._num_taken = 0

    @property
    def num_rows(self) -> int:
        """Full rows in the corpora."""
        return sum(corpus.num_rows for corpus in self.corpora)

    @property
    def epochs(self) -> list[float]:
        """How many times each corpus has been taken."""
        return self._order.epochs(self._num_taken)

    def take(self, n: int) -> TextBatch:
        """The next `n` rows: tokens [n, seq_len], loss_mask [n, seq_len - 1] all True.

        ValueError where an id is outside the vocabulary: a huge corpus is not looked through as a whole when it is opened.
        """
        rows = self._loader.rows(self._num_taken, n)
        low, high = (int(end) for end in torch.aminmax(rows)) if rows.numel() else (0, 0)
        if low < 0 or high >= self.corpora[0].vocab_size:
            for corpus, row in self._order.rows(self._num_taken, n):
                self.corpora[corpus].require_vocabulary(self.corpora[corpus].row(row))
        self._num_taken += n
        return packed_text_batch(rows)

    def metrics(self) -> dict[str, float]:
        """Of several corpora: how often each has been passed, and its share of the rows so far."""
        if len(self.corpora) == 1 or not self._num_taken:
            return {}
        taken = self._order.taken(self._num_taken)
        found = {}
        for name, epochs, count in zip(self._names(), self.epochs, taken, strict=True):
            found |= {f"text/{name}_epochs": epochs, f"text/{name}_row_share": count / self._num_taken}
        return found

    def notes(self, total_rows: int) -> list[str]:
        """What is drawn from each corpus over a run of so many rows, and whether one is passed again and again."""
        lines = []
        shares, epochs = self._order.shares, self._order.epochs(total_rows)
        for corpus, share, passed in zip(self.corpora, shares, epochs, strict=True):
            line = f"{corpus.prefix}: {corpus.num_rows} rows of {corpus.seq_len} tokens"
            line += f", {float(share):.4g} of the rows drawn" if len(self.corpora) > 1 else ""
            if len(self.corpora) > 1 or passed > PASSES:
                line += f": passed {passed:.2f} times in this run"
            line += MANY_PASSES if passed > PASSES else ""
            lines.append(line)
        return lines

    def state_dict(self) -> dict:
        """The cursor, and what it is a cursor into."""
        return {**self._identity(), "num_taken": self._num_taken}

    def load_state_dict(self, state: dict) -> None:
        """Go to where `state` was saved. Raises ValueError for the state of another stream."""
        for name, mine in self._identity().items():
            if (theirs := state.get(name, ["1"] if name == "shares" else None)) != mine:
                raise ValueError(
                    f"the saved pretraining stream has {name} {theirs}, that of {', '.join(corpus.prefix for corpus in self.corpora)} "
                    f"{name} {mine}: they are different streams. Resume with the corpora, weights, seed and row length that the "
                    "checkpoint was trained with, or start a new run"
                )
        self._num_taken = state["num_taken"]

    def _identity(self) -> dict:
        return {
            "seq_len": self.corpora[0].seq_len,
            "num_tokens": sum(corpus.num_tokens for corpus in self.corpora),
            "num_items": self.num_rows,
            "seed": self._seed,
            "shares": [str(share) for share in self._order.shares],
        }

    def _names(self) -> list[str]:
        """Names of the files, with their number where several have one name."""
        names = [Path(corpus.prefix).name for corpus in self.corpora]
        return [f"{number}_{name}" if names.count(name) > 1 else name for number, name in enumerate(names)]


def held_out_rows(prefix: str | Path, *, seq_len: int, max_rows: int, eos_id: int, vocab_size: int) -> tuple[TextBatch, str]:
    """(the first `max_rows` rows of a corpus in order, all if it has fewer: tokens [rows, seq_len]; the corpus's fingerprint)."""
    corpus = Corpus(prefix, seq_len=seq_len, eos_id=eos_id, vocab_size=vocab_size)
    rows = np.stack([corpus.row(index) for index in range(min(max_rows, corpus.num_rows))]).astype(np.int64)
    corpus.require_vocabulary(rows)
    return packed_text_batch(torch.from_numpy(rows)), corpus.fingerprint
