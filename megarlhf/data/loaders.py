"""How rows of text come from disk into memory: one interface, bitwise the same batches.

Which rows a batch has follows from its place in the order alone. So a loader may read ahead as far as it likes: what it has read
and nobody has taken is in no cursor, and is read again after a resume.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from megarlhf.data.blend import BlendedText


class Loader(Protocol):
    """Reads the rows of an order."""

    def rows(self, start: int, n: int) -> Tensor:
        """The rows of the places start .. start + n - 1: [n, seq_len] int64."""


class DirectLoader:
    """Copies rows out of the mapped files when they are asked for."""

    def __init__(self, text: BlendedText) -> None:
        self._text = text

    def rows(self, start: int, n: int) -> Tensor:
        """See `Loader`."""
        return torch.from_numpy(self._text.rows(start, n))


def make_loader(kind: Literal["default", "dali"], text: BlendedText) -> Loader:
    """The loader that the configuration's `loader` names."""
    if kind == "dali":
        from megarlhf.data.dali import DaliLoader

        return DaliLoader(text)
    return DirectLoader(text)
