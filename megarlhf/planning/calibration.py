"""What a layer costs: the small dry runs that a search of layouts knows its numbers from.

A transformer's layers are alike, so that dry runs of one and of two layers on one stage tell what a layer holds and takes, and what the
embedding and the head add; each micro-batch size is run, and two numbers of rows tell what a row more in generation costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from megarlhf.planning.dry_run import RankRun
from megarlhf.planning.estimate import seconds_of
from megarlhf.planning.hardware import Cluster


@dataclass(frozen=True)
class Line:
    """at_one + per_more * (n - 1), of layers."""

    at_one: float
    per_more: float

    def at(self, layers: float) -> float:
        """Its value for so many layers."""
        return self.at_one + self.per_more * (layers - 1)

    def mixed(self, other: Line, share: float) -> Line:
        """On the line through this one (share 0) and another (share 1)."""
        between = (a + share * (b - a) for a, b in ((self.at_one, other.at_one), (self.per_more, other.per_more)))
        return Line(*between)


@dataclass(frozen=True)
class Unit:
    """What dry runs of few layers on one stage have shown, by layers: bytes beyond what is kept, and seconds."""

    update_bytes: Line
    update_seconds: Line
    """Of one micro-batch, forward and backward."""
    score_seconds: Line
    """Of all rows of a step through this model, on one copy."""
    reference_seconds: Line
    """The same of the reference."""
    generate_bytes: Line
    prompt_seconds: Line
    """Of the prompts of one batch of the generator."""
    token_seconds: Line
    """Of the tokens after them."""

    def mixed(self, other: Unit, share: float) -> Unit:
        """On the line through this one (share 0) and another (share 1)."""
        return Unit(*(getattr(self, of.name).mixed(getattr(other, of.name), share) for of in fields(Unit)))


def measured(one: RankRun, two: RankRun, cluster: Cluster, *, role: str, steps: int, dp: int, batches: float) -> Unit:
    """What dry runs of one layer and of two show of the model `role`.

    Args:
        steps: optimizer steps of a step of the run.
        dp: copies that share the rows of a step.
        batches: of the generator, on each copy.
    """

    def line(value: Callable[[RankRun], float], share: float = 1.0) -> Line:
        a, b = value(one) * share, value(two) * share
        return Line(a, b - a)

    def beyond(phase: str) -> Callable[[RankRun], float]:
        return lambda run: run.peak(phase) - sum(sum(of.values()) for of in run.held.values()) if phase in run.peaks else 0.0

    def seconds(phase: str, of: str, what: str) -> Callable[[RankRun], float]:
        return lambda run: sum_seconds(run, cluster, [phase], [of], what)

    passes = "forward and backward"
    number = next(part.micro_batches for part in one.parts if part.model == role and part.what == passes)
    return Unit(
        update_bytes=line(beyond("update")),
        update_seconds=line(seconds("update", role, passes), 1 / number / steps),
        score_seconds=line(seconds("score", role, "forward"), dp),
        reference_seconds=line(seconds("score", "reference", "forward"), dp),
        generate_bytes=line(beyond("generate")),
        prompt_seconds=line(seconds("generate", role, "prompts"), 1 / batches),
        token_seconds=line(seconds("generate", role, "tokens"), 1 / batches),
    )


def sum_seconds(run: RankRun, cluster: Cluster, phases: Sequence[str], roles: Sequence[str], what: str | None = None) -> float:
    """Seconds of all parts of a run that are of these phases and models (and called `what`)."""
    chosen = [part for part in run.parts if part.phase in phases and part.model in roles and what in (None, part.what)]
    return sum(sum(seconds_of(part.cost, cluster).values()) for part in chosen)
