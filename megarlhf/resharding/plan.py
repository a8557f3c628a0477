"""Which rank sends which slice of which parameter to which rank, for any layout to any other, over whichever ranks.

Pure arithmetic on the description in models/parameters.py: no process group and no model. Every rank computes the same
plan. The choice of senders is made once for whole families of parameters; pieces are only listed for the rank that asks.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Literal

from megarlhf.models.architecture import Architecture
from megarlhf.models.parameters import Head, ParameterSpec, Shard, parameter_specs, shard_of, shares_groups, stages_of
from megarlhf.parallel.layout import ParallelLayout

NODE_SIZE = 8
"""Ranks per node: blocks of this many consecutive ranks are near each other."""


@dataclass(frozen=True, slots=True)
class Copy:
    """One slice of one parameter, from the source rank's tensor to the target rank's: a range along `dim`, whole otherwise."""

    name: str
    source: int
    target: int
    dim: int
    source_start: int
    target_start: int
    size: int


@dataclass(frozen=True, slots=True)
class Portion:
    """What of a parameter goes with one bucket: all of it, or some rows of one that is split along its columns."""

    name: str
    rows: tuple[int, int] | None = None
    """(start, stop) along dimension 0; None for all."""


@dataclass(frozen=True)
class RankPlan:
    """One rank's part of a plan. Two ranks list the pieces between them in the same order."""

    local: tuple[Copy, ...]
    """Slices that the rank holds in both layouts."""
    sends: tuple[Copy, ...]
    receives: tuple[Copy, ...]


@dataclass(frozen=True)
class Section:
    """What of a parameter is dealt to ranks in one way: all of it, or the own or the shared elements of its groups."""

    spec: ParameterSpec
    kind: Literal["all", "own", "shared"] = "all"

    def ranges(self) -> Iterator[tuple[int, int]]:
        """(start, stop) along the parameter's split_dim."""
        length = self.spec.shape[self.spec.split_dim or 0]
        if self.kind == "all":
            yield 0, length
            return
        group = length // self.spec.groups
        for start in range(0, length, group):
            shared = start + group - self.spec.shared
            yield (start, shared) if self.kind == "own" else (shared, start + group)

    def parts(self, tp: int) -> int:
        """How many different parts of it `tp` ranks hold; rank t holds part t * parts // tp."""
        if self.spec.split_dim is None:
            return 1
        return min(tp, self.spec.groups) if self.kind == "shared" else tp

    @property
    def num_elements(self) -> int:
        """Elements of the whole section."""
        length = self.spec.shape[self.spec.split_dim or 0]
        return sum(stop - start for start, stop in self.ranges()) * (math.prod(self.spec.shape) // length)


@dataclass(frozen=True)
class Family:
    """Sections of parameters that lie on the same ranks in each layout, so that one choice of senders serves them all."""

    sections: tuple[Section, ...]
    source_stages: tuple[int, ...]
    target_stages: tuple[int, ...]
    source_parts: int
    """Equal parts that tensor-parallel ranks hold; 1 where each holds all."""
    target_parts: int

    @cached_property
    def num_elements(self) -> int:
        """Elements of the whole sections."""
        return sum(section.num_elements for section in self.sections)

    def shared_elements(self, source_part: int, target_part: int) -> int:
        """Elements in both a part in the source and a part in the target."""
        # in units of 1 / (source_parts * target_parts) of the whole
        start = max(source_part * self.target_parts, target_part * self.source_parts)
        stop = min((source_part + 1) * self.target_parts, (target_part + 1) * self.source_parts)
        return self.num_elements * max(0, stop - start) // (self.source_parts * self.target_parts)


@dataclass(frozen=True, slots=True)
class Route:
    """Which source rank serves a target rank with what both hold of a family."""

    family: int
    source: int
    target: int
    elements: int


@dataclass(frozen=True)
class ReshardPlan:
    """How the weights of a model get from the `source` layout to the `target` layout; their ranks may be the same, some, or others.

    Every element that a target rank holds arrives exactly once: from the rank itself where it holds it already, else from a rank
    of the same node, else from the holder that has sent least so far.
    """

    architecture: Architecture
    head: Head
    source: ParallelLayout
    target: ParallelLayout
    families: tuple[Family, ...] = field(repr=False)
    routes: tuple[Route, ...] = field(repr=False)

    @property
    def num_ranks(self) -> int:
        """Ranks of the smallest world that has those of both layouts."""
        return max(self.source.ranks.stop, self.target.ranks.stop)

    @cached_property
    def _routes_from(self) -> dict[int, list[Route]]:
        return _grouped(self.routes, "source")

    @cached_property
    def _routes_to(self) -> dict[int, list[Route]]:
        return _grouped(self.routes, "target")

    def for_rank(self, rank: int) -> RankPlan:
        """The pieces that `rank` copies locally, sends and receives."""
        incoming = [piece for route in self._routes_to.get(rank, []) for piece in self._pieces(route)]
        outgoing = [piece for route in self._routes_from.get(rank, []) if route.target != rank for piece in self._pieces(route)]
        return RankPlan(
            local=tuple(piece for piece in incoming if piece.source == rank),
            sends=tuple(outgoing),
            receives=tuple(piece for piece in incoming if piece.source != rank),
        )

    def bytes_local(self, rank: int, *, element_size: int) -> int:
        """Bytes that `rank` copies within itself, at `element_size` bytes per weight."""
        return element_size * sum(route.elements for route in self._routes_to.get(rank, []) if route.source == rank)

    def bytes_sent(self, rank: int, *, element_size: int) -> int:
        """Bytes that `rank` sends to others, at `element_size` bytes per weight."""
        return element_size * sum(route.elements for route in self._routes_from.get(rank, []) if route.target != rank)

    def bytes_received(self, rank: int, *, element_size: int) -> int:
        """Bytes that `rank` receives from others, at `element_size` bytes per weight."""
        return element_size * sum(route.elements for route in self._routes_to.get(rank, []) if route.source != rank)

    def views(self, rank: int) -> dict[str, Copy]:
        """By name the parameters that `rank` need not copy: its target tensor is a contiguous part of its source tensor."""
        found: dict[str, Copy] = {}
        pieces: dict[str, list[Copy]] = defaultdict(list)
        for route in self._routes_to.get(rank, []):
            for piece in self._pieces(route) if route.source == rank else ():
                pieces[piece.name].append(piece)
        if not pieces:
            return found
        source_tp, target_tp = self.source.coordinates(rank).tp, self.target.coordinates(rank).tp
        for spec in parameter_specs(self.architecture, self.head):
            if not (of_name := pieces.get(spec.name)):
                continue
            source, target = shard_of(spec, source_tp, self.source.tp), shard_of(spec, target_tp, self.target.tp)
            held, wanted = source.shape[source.dim], target.shape[target.dim]
            offsets = {piece.source_start - piece.target_start for piece in of_name}
            whole = sum(piece.size for piece in of_name) == wanted
            if whole and len(offsets) == 1 and (source.dim == 0 or held == wanted):
                found[spec.name] = Copy(spec.name, rank, rank, source.dim, offsets.pop(), 0, wanted)
        return found

    def buckets(self, element_sizes: Mapping[str, int], *, max_bytes: int) -> list[list[Portion]]:
        """The parameters in the order of their transfer, in buckets of which no rank holds more than `max_bytes`.

        A parameter that is split along its columns, whose slices have to be packed for a message, is cut by its rows where a rank
        holds more of it. One that is split along its rows has slices that can be sent as they lie: it stays whole, and where a rank
        holds more than `max_bytes` of it, it has a bucket of its own. The stages take turns: in order of depth one stage's ranks
        would send while all others wait.

        Args: element_sizes: name -> bytes per element.
        """
        turns: Counter = Counter()
        order = []
        for spec, source_stages, target_stages in _placed(self.architecture, self.head, self.source, self.target):
            order.append((turns[source_stages, target_stages], spec, source_stages, target_stages))
            turns[source_stages, target_stages] += 1
        order.sort(key=lambda entry: entry[0])

        buckets: list[list[Portion]] = []
        held: Counter = Counter()  # bytes of the open bucket by (side, stage)
        for _, spec, source_stages, target_stages in order:
            sides = (("source", source_stages, self.source.tp), ("target", target_stages, self.target.tp))
            sizes = {side: element_sizes[spec.name] * math.prod(shard_of(spec, 0, tp).shape) for side, _, tp in sides}
            for portion in _portions(spec, max(sizes.values()), max_bytes):
                share = 1 if portion.rows is None else (portion.rows[1] - portion.rows[0]) / spec.shape[0]
                added = {(side, stage): round(share * sizes[side]) for side, stages, _ in sides for stage in stages}
                if not buckets or any(held[key] + more > max_bytes for key, more in added.items()):
                    buckets.append([])
                    held.clear()
                buckets[-1].append(portion)
                held.update(added)
        return buckets

    def _pieces(self, route: Route) -> Iterator[Copy]:
        source_tp, target_tp = self.source.coordinates(route.source).tp, self.target.coordinates(route.target).tp
        for section in self.families[route.family].sections:
            spec = section.spec
            source, target = shard_of(spec, source_tp, self.source.tp), shard_of(spec, target_tp, self.target.tp)
            for source_start, target_start, size in _common(section, source, target):
                yield Copy(spec.name, route.source, route.target, source.dim, source_start, target_start, size)


def plan_reshard(architecture: Architecture, head: Head, source: ParallelLayout, target: ParallelLayout) -> ReshardPlan:
    """The plan from `source` to `target`, the same on every rank."""
    families = _families(architecture, head, source, target)
    senders = _Senders(source)
    return ReshardPlan(architecture, head, source, target, families, tuple(_routes(families, source, target, senders)))


def nearest_layout(architecture: Architecture, head: Head, source: ParallelLayout, target: ParallelLayout) -> ParallelLayout:
    """`target` with its ranks in the order in which they keep most of what they hold in `source`; as it is where no order is better.

    Rank t of T training peers lies in part t * tp // T of the target's tp parts when peers are T / tp ranks apart, since stages nest in
    rank order as they are: that one other order is looked at. It leaves generation's peers among training's, so that it is only taken
    where these are on one node. Where tp grows a rank's slice has to be one of several in its own, and no order whose groups ascend
    does better than the usual. Layouts over other ranks than the source's stay as they are.
    """
    stride, rest = divmod(source.tp, target.tp)
    if rest or stride == 1 or source.tp > NODE_SIZE or (target.pp * target.dp) % stride or source.ranks != target.ranks:
        return target
    strided = dataclasses.replace(target, tp_stride=stride)
    kept = {layout: sum(elements_kept(architecture, head, source, layout)) for layout in (target, strided)}
    return max(kept, key=kept.get)  # the first of equals


def elements_kept(architecture: Architecture, head: Head, source: ParallelLayout, target: ParallelLayout) -> list[int]:
    """By rank of the target, the elements that it holds in both layouts: what it has no need to receive."""
    families = _families(architecture, head, source, target)

    @cache
    def kept(source_tp: int, source_stage: int, target_tp: int, target_stage: int) -> int:
        return sum(
            family.shared_elements(source_tp * family.source_parts // source.tp, target_tp * family.target_parts // target.tp)
            for family in families
            if source_stage in family.source_stages and target_stage in family.target_stages
        )

    def kept_by(rank: int) -> int:
        if rank not in source.ranks:
            return 0
        a, b = source.coordinates(rank), target.coordinates(rank)
        return kept(a.tp, a.pp, b.tp, b.pp)

    return [kept_by(rank) for rank in target.ranks]


def _placed(architecture: Architecture, head: Head, source: ParallelLayout, target: ParallelLayout) -> Iterator[tuple]:
    """(spec, source stages, target stages) of every parameter in order of depth."""
    for spec in parameter_specs(architecture, head):
        yield spec, stages_of(spec, architecture, head, source), stages_of(spec, architecture, head, target)


def _portions(spec: ParameterSpec, num_bytes: int, max_bytes: int) -> Iterator[Portion]:
    """A parameter of which a rank holds `num_bytes`, cut by rows where they are more than `max_bytes` and its columns are split."""
    if spec.split_dim != 1 or num_bytes <= max_bytes:
        yield Portion(spec.name)
        return
    rows = spec.shape[0]
    step = max(1, max_bytes * rows // num_bytes)
    yield from (Portion(spec.name, (start, min(start + step, rows))) for start in range(0, rows, step))


def _families(architecture: Architecture, head: Head, source: ParallelLayout, target: ParallelLayout) -> tuple[Family, ...]:
    """The families, most elements first: small ones then even out what large ones left uneven."""
    members: dict[tuple, list[Section]] = defaultdict(list)
    for spec, source_stages, target_stages in _placed(architecture, head, source, target):
        apart = shares_groups(spec, max(source.tp, target.tp))
        for section in (Section(spec, "own"), Section(spec, "shared")) if apart else (Section(spec),):
            members[source_stages, target_stages, section.parts(source.tp), section.parts(target.tp)].append(section)
    families = [Family(tuple(sections), *key) for key, sections in members.items()]
    return tuple(sorted(families, key=lambda family: family.num_elements, reverse=True))


def _routes(families: tuple[Family, ...], source: ParallelLayout, target: ParallelLayout, senders: _Senders) -> Iterator[Route]:
    targets_of_stage: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for rank in target.ranks:
        place = target.coordinates(rank)
        targets_of_stage[place.pp].append((rank, place.tp))
    for number, family in enumerate(families):
        for source_part in range(family.source_parts):
            holders = senders.holders(family.source_stages, source_part, family.source_parts)
            for rank, target_tp in (pair for stage in family.target_stages for pair in targets_of_stage[stage]):
                elements = family.shared_elements(source_part, target_tp * family.target_parts // target.tp)
                if elements:
                    yield Route(number, senders.choose(holders, rank, elements), rank, elements)


def _common(section: Section, source: Shard, target: Shard) -> Iterator[tuple[int, int, int]]:
    """(start in the source rank's tensor, start in the target rank's, length) of every range of the section that both hold."""
    for source_at, a in source.placed():
        for target_at, b in target.placed():
            for first, stop in section.ranges():
                start = max(a.start, b.start, first)
                size = min(a.start + a.size, b.start + b.size, stop) - start
                if size > 0:
                    yield source_at + start - a.start, target_at + start - b.start, size


def _grouped(routes: tuple[Route, ...], end: str) -> dict[int, list[Route]]:
    groups: dict[int, list[Route]] = defaultdict(list)
    for route in routes:
        groups[getattr(route, end)].append(route)
    return dict(groups)


class _Holders:
    """The ranks that hold the same slices of the source, by node, and as a heap by how much they have sent."""

    def __init__(self, ranks: list[int]) -> None:
        self.ranks = frozenset(ranks)
        self.of_node: dict[int, list[int]] = defaultdict(list)
        for rank in ranks:
            self.of_node[rank // NODE_SIZE].append(rank)
        self.heap = [(0, rank) for rank in ranks]


class _Senders:
    """Chooses who sends, so that ranks that hold the same slices send about as much as each other."""

    def __init__(self, layout: ParallelLayout) -> None:
        self.layout = layout
        self.sent = dict.fromkeys(layout.ranks, 0)
        self._holders: dict[tuple, _Holders] = {}

    def holders(self, stages: tuple[int, ...], part: int, parts: int) -> _Holders:
        """Ranks of these stages that hold part `part` of `parts`."""
        layout, key = self.layout, (stages, part, parts)
        if key not in self._holders:
            of_part = [tp for tp in range(layout.tp) if tp * parts // layout.tp == part]
            places = [(stage, dp, tp) for stage in stages for dp in range(layout.dp) for tp in of_part]
            self._holders[key] = _Holders([layout.rank(tp=tp, dp=dp, pp=stage) for stage, dp, tp in places])
        return self._holders[key]

    def choose(self, holders: _Holders, target: int, elements: int) -> int:
        """The sender of `elements` to `target`: itself, else the least busy of its node (its own copy first), else the least busy."""
        if target in holders.ranks:
            return target
        if near := holders.of_node.get(target // NODE_SIZE):
            copy = self.layout.coordinates(target).dp if target in self.layout.ranks else None
            source = min(near, key=lambda rank: (self.sent[rank], self.layout.coordinates(rank).dp != copy, rank))
        else:
            source = self._least_busy(holders.heap)
        self.sent[source] += elements
        return source

    def _least_busy(self, heap: list[tuple[int, int]]) -> int:
        while (top := heap[0])[0] != self.sent[top[1]]:  # it has sent since it was put here; what a rank sent only grows
            heapq.heapreplace(heap, (self.sent[top[1]], top[1]))
        return top[1]
