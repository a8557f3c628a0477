"""One rank's part of a run, run through on tensors without values: its phases, the most it holds in each, and what each costs.

The engines, the generator and the publisher are the run's own, and so are the rows' lengths: the longest that the configuration
allows. Of equal micro-batches a few are run, enough to fill the pipeline and to tell one from the fixed part, and the costs are those
of all.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from operator import add

import torch
import torch.distributed as dist
from torch import Tensor

from megarlhf.batch import Rows
from megarlhf.engine.engine import Engine, padded_share
from megarlhf.engine.terms import Term
from megarlhf.engine.trainable import TrainEngine
from megarlhf.parallel.groups import ModelGroups, World
from megarlhf.planning.holdings import bytes_held, holdings
from megarlhf.planning.meter import Axis, Cost, Meter
from megarlhf.trainers.ppo_models import PpoModels

AXES = ("world", "outputs", "copy", "dp", "pp_back", "pp", "embeddings", "tp")
"""Process groups of a model; where two have the same ranks the later name stands."""
ACTIVATIONS = "activations"
OF_PHASES = (ACTIVATIONS, "logits", "key-value cache", "buckets", "other")
"""Tags of what a phase holds beside what is kept between steps."""


@dataclass(frozen=True)
class Part:
    """What one model costs one rank in one phase of a step."""

    phase: str
    model: str
    what: str
    cost: Cost
    """Of all micro-batches of a step."""
    micro_batches: int = 0
    """That follow one another through the pipeline without its running empty; 0 where nothing does."""
    each: tuple[Cost, ...] = ()
    """Forward and backward passes: of one micro-batch of each term."""


@dataclass
class RankRun:
    """What a dry run of one rank has shown."""

    rank: int
    held: dict[str, dict[str, int]] = field(default_factory=dict)
    """Model -> kind (see `holdings`) -> bytes between steps."""
    peaks: dict[str, dict[str, int]] = field(default_factory=dict)
    """Phase -> tag -> bytes when most was live."""
    parts: list[Part] = field(default_factory=list)
    host_bytes: int = 0
    """Host memory for what rests there between uses."""

    def peak(self, phase: str) -> int:
        """The most bytes live at once in a phase."""
        return sum(self.peaks[phase].values())


@dataclass(frozen=True)
class Batch:
    """One term of a step: its rows, and how many micro-batches of them each copy has in a real step."""

    make: Callable[[int], Term]
    """Units (rows, or prompts with their completions) -> the term."""
    units: int
    """Of a real step."""
    per_micro_batch: int
    """Units that one micro-batch holds."""


class Recorder:
    """Runs engines' phases under a meter and notes what they show."""

    def __init__(self, world: World, meter: Meter, *, gpus_per_node: int, only: Collection[str] | None = None) -> None:
        """`only`: the phases that are wanted beside "build"; None: all."""
        self.world, self.meter, self.only = world, meter, only
        self.gpus_per_node = gpus_per_node
        self.run = RankRun(world.rank)
        self.engines: dict[str, Engine] = {}

    def wants(self, phase: str) -> bool:
        """Whether a phase is to be run."""
        return self.only is None or phase in self.only

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens in this context is the phase `name`."""
        gc.collect()  # what earlier phases left in cycles is garbage, at whatever moment Python would have noticed
        self.meter.new_phase()
        with self.meter.tagged(ACTIVATIONS):
            yield
        peak = {tag: size for tag, size in self.meter.peak.items() if size}
        if name not in self.run.peaks or sum(peak.values()) > self.run.peak(name):
            self.run.peaks[name] = peak

    def add(self, role: str, engine: Engine) -> None:
        """Watch an engine that was built."""
        self.engines[role] = engine
        self._name_holdings()

    def _name_holdings(self) -> None:
        for role, engine in self.engines.items():
            for kind, tensors in holdings(engine).items():
                self.meter.retag(tensors, f"{role}: {kind}")
            self.run.held[role] = bytes_held(engine)

    def use(self, groups: ModelGroups, *, logits_width: int = 0) -> None:
        """Name the process groups of the model that works now."""
        self.meter.logits_width = logits_width
        self.meter.axes = {}
        for name in AXES:
            group = getattr(groups, name)
            if group is not None:
                ranks = dist.get_process_group_ranks(group)
                inside = len({rank // self.gpus_per_node for rank in ranks}) == 1
                self.meter.axes[group.group_name] = Axis(name, tuple(ranks), inside)

    def _use_engine(self, role: str) -> None:
        engine = self.engines[role]
        a, layout = engine.spec.architecture, engine.groups.layout
        self.use(engine.groups, logits_width=a.padded_vocab_size // layout.tp if engine.spec.head == "lm" else 0)

    def let_go(self, role: str) -> None:
        """An engine that is not used any more; what it held stays noted."""
        del self.engines[role]

    def forward(self, phase: str, role: str, call: Callable[[Engine, Rows], object], rows: Rows, *, of_a_step: float = 1.0) -> None:
        """Time a forward pass over `rows`, `call(engine, some of them)`; `of_a_step`: how much of it a step has."""
        engine = self.engines[role]
        self._use_engine(role)
        dp, share = engine.groups.layout.dp, _share(rows, engine)
        total, size = len(share), len(share[0])
        few = min(total, 2 * _unit(engine))
        before = self.meter.cost.copy()
        call(engine, rows.rows(torch.arange(min(rows.num_rows, few * size * dp))))
        cost = (self.meter.cost - before) * (of_a_step * total / few)
        self.run.parts.append(Part(phase, role, "forward", cost, micro_batches=total))

    def warm_up(self, role: str, batches: Sequence[Batch]) -> Cost:
        """A first, small step, which makes the moments; returns what its forward and backward passes cost."""
        engine = self._trained(role)
        engine.offload.need(*engine.offload.kinds)  # so that these copies are not taken for the passes'
        unit = _unit(engine)
        passes, _, _ = self._step(engine, [batch.make(self._units(engine, batch, unit)) for batch in batches])
        self._name_holdings()
        return passes

    def update(self, phase: str, role: str, batches: Sequence[Batch], first: Cost, *, steps: int) -> None:
        """One step with a full pipeline, after `first`, the passes of one with a micro-batch of each; noted as `steps` real ones."""
        engine = self._trained(role)
        unit, pp = _unit(engine), engine.groups.layout.pp
        totals = [self._micro_batches(engine, batch) for batch in batches]
        amounts = [self._full_micro_batches(engine, batch) for batch in batches]
        most = totals.index(max(totals))
        full = max(2 * unit, (2 * pp if unit > 1 else pp + 1) - unit * (len(batches) - 1))  # two at least, to tell what one more costs
        counts = [unit] * len(batches)
        counts[most] = max(unit, min(totals[most], -(-full // unit) * unit))
        terms = [batch.make(self._units(engine, batch, count)) for batch, count in zip(batches, counts, strict=True)]
        passes, finalize, update = self._step(engine, terms)
        each = [first * (1 / unit / len(batches))] * len(batches)
        if counts[most] > unit:
            of_most = (passes - first) * (1 / (counts[most] - unit))
            of_others = (first - of_most * unit) * (1 / unit / max(1, len(batches) - 1))
            each = [of_most if number == most else of_others for number in range(len(batches))]
        cost = functools.reduce(add, (of_one * (amount * steps) for of_one, amount in zip(each, amounts, strict=True)))
        self.run.parts += [
            Part(phase, role, "forward and backward", cost, micro_batches=sum(totals), each=tuple(each)),
            Part(phase, role, "gradient sums", finalize * steps),
            Part(phase, role, "optimizer", update * steps),
        ]

    def turn_to(self, phase: str, models: PpoModels, *, part_of: str | None = None) -> None:
        """Between two phases: what the next does not use goes to the host, what it uses comes back."""
        before = self.meter.cost.copy()
        models.turn_to(phase)
        if any(engine.offload.kinds for engine in self.engines.values()):
            self.run.parts.append(Part(part_of or phase, "policy", f"offload before {phase}", self.meter.cost - before))
            self.run.host_bytes = sum(engine.offload.host_bytes for engine in self.engines.values())

    def once(self, phase: str, role: str, what: str, call: Callable[[], object]) -> None:
        """Time what is done once in a step."""
        self._use_engine(role)
        before = self.meter.cost.copy()
        call()
        self.run.parts.append(Part(phase, role, what, self.meter.cost - before))

    def _trained(self, role: str) -> TrainEngine:
        self._use_engine(role)
        engine = self.engines[role]
        assert isinstance(engine, TrainEngine)
        return engine

    def _units(self, engine: Engine, batch: Batch, micro_batches: int) -> int:
        return micro_batches * self._at_once(engine, batch) * engine.groups.layout.dp

    def _at_once(self, engine: Engine, batch: Batch) -> int:
        """Units of one micro-batch, which has no more than a copy's share of them."""
        return min(batch.per_micro_batch, -(-batch.units // engine.groups.layout.dp))

    def _micro_batches(self, engine: Engine, batch: Batch) -> int:
        """Of a real step, one that is not full and idle ones included."""
        unit = _unit(engine)
        return math.ceil(self._full_micro_batches(engine, batch) / unit) * unit

    def _full_micro_batches(self, engine: Engine, batch: Batch) -> float:
        """As many as the units of a copy would fill."""
        return -(-batch.units // engine.groups.layout.dp) / self._at_once(engine, batch)

    def _step(self, engine: TrainEngine, terms: list[Term]) -> tuple[Cost, Cost, Cost]:
        """A step; returns the costs of (forward and backward passes, what finishes the gradients, the optimizer)."""
        meter, marks = self.meter, [self.meter.cost.copy()]
        config, optimizer = engine.transformers[0].config, engine.optimizer
        finish, update = config.finalize_model_grads_func, optimizer.step

        def marked(call: Callable) -> Callable:
            def run(*args: object, **kwargs: object) -> object:
                marks.append(meter.cost.copy())
                return call(*args, **kwargs)

            return run

        config.finalize_model_grads_func, optimizer.step = marked(finish), marked(update)
        try:
            engine.step(terms, learning_rate=1e-6)
        finally:
            config.finalize_model_grads_func = finish
            del optimizer.step
        start, finalize, apply, end = *marks, meter.cost.copy()
        return finalize - start, apply - finalize, end - apply


def _unit(engine: Engine) -> int:
    """Micro-batches that interleaved stages run together."""
    layout = engine.groups.layout
    return layout.pp if layout.virtual_pp > 1 else 1


def _share(rows: Rows, engine: Engine) -> list[Tensor]:
    return padded_share(engine.shares(rows)[0], engine.groups)


def tags_by_kind(peak: dict[str, int]) -> Counter:
    """Bytes at a peak by kind, over all models."""
    kinds: Counter = Counter()
    for tag, size in peak.items():
        kinds[tag.rpartition(": ")[2]] += size
    return kinds
