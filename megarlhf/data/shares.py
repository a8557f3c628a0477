"""Work on what all ranks have alike, done by each in part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


def _nobody_else(mine: Any) -> list:
    return [mine]


@dataclass(frozen=True)
class Shares:
    """Who does which part, and how the parts come together; as it is made without arguments one rank does all."""

    rank: int = 0
    size: int = 1
    exchange: Callable[[Any], list] = _nobody_else
    """A rank's result -> the results of all, in their order. Every rank must call it as often."""

    def of(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part: the parts of all, in their order, are `items`."""
        start, stop = (len(items) * rank // self.size for rank in (self.rank, self.rank + 1))
        return items[start:stop]
