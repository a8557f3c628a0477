"""What a layer costs: the small dry runs that a search of layouts knows its numbers from.

A transformer's layers are alike, so that dry runs of one and of two layers on one stage tell what a layer holds and does, and what the
embedding and the head add; each micro-batch size is run, and two numbers of rows tell what a row more in generation costs. What is noted
are operations and messages, not seconds: those add up over layers, and seconds do not (estimate.py).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from operator import add
from typing import Generic, TypeVar

from megarlhf.planning.dry_run import Part, RankRun
from megarlhf.planning.meter import Cost

V = TypeVar("V", float, Cost)


@dataclass(frozen=True)
class Line(Generic[V]):
    """at_one + per_more * (n - 1), of layers."""

    at_one: V
    per_more: V

    def at(self, layers: float) -> V:
        """Its value for so many layers."""
        return self.at_one + self.per_more * (layers - 1)

    def mixed(self, other: Line[V], share: float) -> Line[V]:
        """On the line through this one (share 0) and another (share 1)."""
        return Line(self.at_one * (1 - share) + other.at_one * share, self.per_more * (1 - share) + other.per_more * share)


@dataclass(frozen=True)
class Training:
    """Forward and backward passes of one kind and micro-batch size, by layers on one stage."""

    held: Line[float]
    """Bytes beyond what is kept."""
    each: tuple[Line[Cost], ...]
    """Of one micro-batch of each term of a step."""

    @staticmethod
    def measured(one: RankRun, two: RankRun, role: str) -> Training:
        """What the dry runs of one layer and of two show."""
        passes = [_part(run, "update", role, "forward and backward").each for run in (one, two)]
        return Training(_beyond(one, two, "update"), tuple(Line(a, b - a) for a, b in zip(*passes, strict=True)))


@dataclass(frozen=True)
class Sampling:
    """Passes without backward ones, by layers on one stage."""

    scored: Line[Cost]
    """Of all rows of a step through this model, on one copy."""
    referred: Line[Cost]
    """The same of the reference."""
    held: Line[float]
    """Bytes beyond what is kept, in generation."""
    prompts: Line[Cost]
    """Of one batch of the generator."""
    tokens: Line[Cost]
    """That follow them."""

    @staticmethod
    def measured(one: RankRun, two: RankRun, role: str, *, dp: int, batches: float) -> Sampling:
        """What the dry runs of one layer and of two show. Args: dp: copies that share the rows; batches: of the generator on each."""

        def line(phase: str, of: str, what: str, share: float) -> Line[Cost]:
            a, b = (_cost(run, phase, of, what) * share for run in (one, two))
            return Line(a, b - a)

        return Sampling(
            scored=line("score", role, "forward", dp),
            referred=line("score", "reference", "forward", dp),
            held=_beyond(one, two, "generate"),
            prompts=line("generate", role, "prompts", 1 / batches),
            tokens=line("generate", role, "tokens", 1 / batches),
        )

    def mixed(self, other: Sampling, share: float) -> Sampling:
        """On the line through this one (share 0) and another (share 1)."""
        return Sampling(*(getattr(self, of.name).mixed(getattr(other, of.name), share) for of in fields(Sampling)))


def _beyond(one: RankRun, two: RankRun, phase: str) -> Line[float]:
    a, b = (float(run.peak(phase) - sum(sum(of.values()) for of in run.held.values())) for run in (one, two))
    return Line(a, b - a)


def _cost(run: RankRun, phase: str, role: str, what: str) -> Cost:
    costs = [part.cost for part in run.parts if (part.phase, part.model, part.what) == (phase, role, what)]
    return functools.reduce(add, costs, Cost())


def _part(run: RankRun, phase: str, role: str, what: str) -> Part:
    return next(part for part in run.parts if (part.phase, part.model, part.what) == (phase, role, what))
