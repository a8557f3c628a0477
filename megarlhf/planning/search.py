"""`megarlhf plan --search`: which layout is fastest among those that fit, by a cheap model made of a few small dry runs.

A transformer's layers are alike, so that dry runs of one and of two layers tell what a layer holds and costs, and what the embedding and
the head add; two micro-batch sizes tell the rest. What lies between steps is exact by description (engine/footprint.py). Every candidate
of the space is estimated, so no other of them is better by the same estimate.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megarlhf.config import ConfigError
from megarlhf.config.sections import TrainedModelConfig
from megarlhf.engine.footprint import bytes_kept
from megarlhf.models.transformer import layout_violations
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.planning.dry_run import RankRun
from megarlhf.planning.estimate import seconds_of
from megarlhf.planning.hardware import LINK_SHARE, Cluster
from megarlhf.planning.models import RunModels, run_models
from megarlhf.planning.stages import dry_run

SIZES = (1, 2, 4)
"""Micro-batch sizes that are tried."""
RECOMPUTE = ("none", "selective", "full")
VIRTUAL = (1, 2, 4)
PROCESSES = 2


@dataclass(frozen=True)
class Choice:
    """One candidate for the model that is trained (PPO: the policy, with the reference beside it)."""

    layout: ParallelLayout
    micro_batch_size: int
    recompute: str
    gathered: bool = False
    """PPO: whether generation takes all layers on one stage, a copy, in place of the policy's own layout."""

    def overrides(self, role: str) -> list[str]:
        """The same as keys of a configuration."""
        at = self.layout
        axes = f"tp: {at.tp}, pp: {at.pp}, virtual_pp: {at.virtual_pp}, sequence_parallel: {str(at.sequence_parallel).lower()}"
        rows = [f"{role}.micro_batch_size={self.micro_batch_size}", f"{role}.micro_batch_tokens=null"]
        keys = [f"{role}.parallel={{{axes}}}", *rows, f"{role}.recompute={self.recompute}"]
        if role == "policy":
            keys += [f"reference.parallel={{{axes}}}", f"generation.parallel={f'{{tp: {at.tp}}}' if self.gathered else 'null'}"]
        return keys

    def __str__(self) -> str:
        place = ", generation gathered" if self.gathered else ""
        return f"{self.layout}, micro-batch {self.micro_batch_size}, recompute {self.recompute}{place}"


@dataclass(frozen=True)
class Estimate:
    """What a candidate holds at most and takes."""

    choice: Choice
    peak_bytes: float
    phase: str
    seconds: float


@dataclass(frozen=True)
class Found:
    """The outcome of a search."""

    best: Sequence[Estimate]
    """Those that fit, the fastest first."""
    too_large: Sequence[Estimate]
    """Those that do not, the smallest first."""


@dataclass(frozen=True)
class Line:
    """at_one + per_more * (n - 1), of layers."""

    at_one: float
    per_more: float

    def at(self, layers: float) -> float:
        """Its value for so many layers."""
        return self.at_one + self.per_more * (layers - 1)


@dataclass(frozen=True)
class Unit:
    """What dry runs of few layers on one stage have shown, by layers: bytes beyond what is kept, and seconds."""

    update_bytes: Line
    generate_bytes: Line
    update_seconds: Line
    """Of one micro-batch, forward and backward."""
    score_seconds: Line
    """Of all rows of a step through this model (and the reference), on one copy of the calibration's dp."""
    generate_seconds: Line
    """Of one batch of the generator."""
    dp: int

    def mixed(self, other: Unit, share: float) -> Unit:
        """On the line through this one (share 0) and another (share 1)."""
        lines = {}
        for name in ("update_bytes", "generate_bytes", "update_seconds", "score_seconds", "generate_seconds"):
            a, b = getattr(self, name), getattr(other, name)
            lines[name] = Line(a.at_one + share * (b.at_one - a.at_one), a.per_more + share * (b.per_more - a.per_more))
        return Unit(**lines, dp=self.dp)


class Estimator:
    """The cheap model of one run on one cluster."""

    def __init__(self, path: Path, overrides: Sequence[str], given: dict[str, dict], cluster: Cluster) -> None:
        """Run the small dry runs, two at a time. ConfigError where the configuration is not valid."""
        self.cluster = cluster
        self.path, self.overrides, self.given = path, list(overrides), given
        self.models = run_models(path, overrides, given, cluster.num_ranks)
        self.role = "policy" if self.models.config.stage == "ppo" else "model"
        self.plan = self.models.plans[self.role]
        self.others = {role: plan for role, plan in self.models.plans.items() if role not in (self.role, "reference")}
        self.units: dict[tuple[int, str, int], Unit] = {}
        self._calibrate()

    def tensor_sizes(self) -> list[int]:
        """Tensor-parallel sizes that the model's widths and the nodes allow."""
        return [tp for tp in (1, 2, 4, 8) if tp <= self.cluster.gpus_per_node and self._holds(ParallelLayout(tp=tp))]

    def _holds(self, layout: ParallelLayout) -> bool:
        return not layout_violations(self.plan.architecture, layout)

    def candidates(self) -> Iterator[Choice]:
        """The whole space."""
        ranks, layers = self.cluster.num_ranks, self.plan.architecture.num_layers
        for tp in self.tensor_sizes():
            if ranks % tp:
                continue
            stages = [pp for pp in range(1, layers + 1) if ranks // tp % pp == 0]
            for pp, virtual in itertools.product(stages, VIRTUAL):
                if (virtual > 1 and (pp == 1 or layers % (pp * virtual))) or pp * virtual > layers:
                    continue
                layout = ParallelLayout.over(ranks, tp=tp, pp=pp, virtual_pp=virtual, sequence_parallel=tp > 1)
                for size, recompute in itertools.product(SIZES, RECOMPUTE):
                    yield Choice(layout, size, recompute)
                    if self.role == "policy" and pp > 1:
                        yield Choice(layout, size, recompute, gathered=True)

    def _calibrate(self) -> None:
        keys = [key for key in itertools.product(self.tensor_sizes(), RECOMPUTE, SIZES[:2]) if self.cluster.num_ranks % key[0] == 0]
        jobs = [self._small(key, layers) for key in keys for layers in (1, 2)]
        few = {self.role: self._few_layers(1)} | ({"reference": self._few_layers(1)} if self.role == "policy" else {})
        choice = Choice(ParallelLayout.over(self.cluster.num_ranks, tp=keys[0][0], pp=1, sequence_parallel=keys[0][0] > 1), 1, "full")
        beside = run_models(self.path, [*self.overrides, *choice.overrides(self.role)], self.given | few, self.cluster.num_ranks)
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(PROCESSES, mp_context=spawn) as pool:
            of_others = pool.submit(dry_run, beside, 0, self.cluster.gpus_per_node) if self.others else None
            runs = list(pool.map(dry_run, jobs, [0] * len(jobs), [self.cluster.gpus_per_node] * len(jobs)))
            self.other_run = of_others.result() if of_others else None
        for number, key in enumerate(keys):
            self.units[key] = self._unit(runs[2 * number], runs[2 * number + 1], jobs[2 * number])

    def _few_layers(self, layers: int) -> dict:
        fields = {name: value for name, value in vars(self.plan.architecture).items() if name != "vocab_size"}
        return fields | {"num_layers": layers}

    def _small(self, key: tuple[int, str, int], layers: int) -> RunModels:
        tp, recompute, size = key
        rows, batch = self._generated()
        layout = ParallelLayout(tp=tp, dp=max(1, rows // batch), sequence_parallel=tp > 1)
        keys = Choice(layout, size, recompute).overrides(self.role) + [f"{role}.parallel={{tp: {tp}}}" for role in self.others]
        small = {role: self._few_layers(layers) for role in self.models.plans}
        return run_models(self.path, [*self.overrides, *keys], self.given | small, layout.num_ranks)

    def _generated(self) -> tuple[int, int]:
        """(rows that are sampled in a step, most rows of a batch of the generator)."""
        if self.role != "policy":
            return 1, 1
        c = self.models.config
        return c.ppo.batch_size, c.generation.sampling.max_batch_size or -(-c.ppo.batch_size // min(c.ppo.batch_size, self.cluster.nodes))

    def _unit(self, one: RankRun, two: RankRun, models: RunModels) -> Unit:
        def line(value) -> Line:
            a, b = value(one), value(two)
            return Line(a, b - a)

        def beyond(phase: str):
            return lambda run: run.peak(phase) - sum(sum(of.values()) for of in run.held.values()) if phase in run.peaks else 0.0

        def seconds(phase: str, roles: Sequence[str], what: str | None = None):
            def total(run: RankRun) -> float:
                chosen = [part for part in run.parts if part.phase == phase and part.model in roles and what in (None, part.what)]
                return sum(sum(seconds_of(part.cost, self.cluster).values()) for part in chosen)

            return total

        passes = "forward and backward"
        number = next(part.micro_batches for part in one.parts if part.model == self.role and part.what == passes)
        steps = self._steps()
        update = line(seconds("update", (self.role,), passes))
        dp = models.plans[self.role].layout.dp
        rows, batch = self._generated()
        batches = max(1.0, rows / dp / batch)
        generate = line(seconds("generate", (self.role,)))
        return Unit(
            update_bytes=line(beyond("update")),
            generate_bytes=line(beyond("generate")),
            update_seconds=Line(update.at_one / number / steps, update.per_more / number / steps),
            score_seconds=line(seconds("score", (self.role, "reference"))),
            generate_seconds=Line(generate.at_one / batches, generate.per_more / batches),
            dp=dp,
        )

    def _steps(self) -> int:
        """Optimizer steps of one step of the run."""
        if self.role != "policy":
            return 1
        s = self.models.config.ppo
        return s.epochs * (s.batch_size // s.minibatch_size)

    def unit(self, choice: Choice) -> Unit:
        """The calibration for a candidate, its micro-batch size on the line through the two that were run."""
        one, two = (self.units[choice.layout.tp, choice.recompute, size] for size in SIZES[:2])
        return one.mixed(two, choice.micro_batch_size - 1)

    def estimate(self, choice: Choice) -> Estimate:
        """What a candidate holds and takes."""
        unit, layout = self.unit(choice), choice.layout
        number = self.micro_batches(choice)
        peaks = [self._peaks(choice, unit, stage, number) for stage in sorted({0, min(1, layout.pp - 1), layout.pp - 1})]
        phase, peak = max((item for of in peaks for item in of.items()), key=lambda item: item[1])
        return Estimate(choice, peak, phase, self._seconds(choice, unit, number))

    def micro_batches(self, choice: Choice) -> int:
        """Of one optimizer step on each copy, idle ones included."""
        dp, size = choice.layout.dp, choice.micro_batch_size
        unit = choice.layout.pp if choice.layout.virtual_pp > 1 else 1
        return sum(-(-max(1, -(-rows // (dp * size))) // unit) * unit for rows in self._rows())

    def _rows(self) -> list[int]:
        """Rows of each term of one optimizer step."""
        c = self.models.config
        if c.stage == "ppo":
            return [c.ppo.minibatch_size, *([c.ppo.ptx_ratio * c.ppo.minibatch_size] if c.ppo.ptx_coef else [])]
        if c.stage == "sft" and c.pretraining_mix:
            return [c.batch_size, max(1, round(c.pretraining_mix * c.batch_size))]
        return [c.batch_size]

    def _peaks(self, choice: Choice, unit: Unit, stage: int, number: int) -> dict[str, float]:
        layout, a = choice.layout, self.plan.architecture
        place_rank = layout.rank(tp=0, dp=0, pp=stage)
        kept = float(sum(self._kept(self.plan, layout, place_rank, average=self.role == "policy").values()))
        if "reference" in self.models.plans and self.role == "policy":
            kept += sum(self._kept(self.models.plans["reference"], layout, place_rank).values())
        kept += sum(sum(self._kept(plan, plan.layout, place_rank).values()) for plan in self.others.values())
        here = sum(map(len, layout.chunks(a.num_layers, stage)))
        whole = ParallelLayout.over(layout.num_ranks, tp=layout.tp, pp=1)
        copy = self._kept(self.models.plans["reference"], whole, place_rank)["weights"] if choice.gathered else 0.0
        in_flight = self._in_flight(layout, stage, number) * a.num_layers / (layout.pp * layout.virtual_pp)
        peaks = {"update": kept + copy + self._beside_layers(choice, unit, stage) + unit.update_bytes.per_more * in_flight}
        if self.role == "policy":
            rows, batch = self._generated()
            share = -(-rows // (layout.num_ranks // layout.tp if choice.gathered else layout.dp))
            beyond = unit.generate_bytes.at(a.num_layers if choice.gathered else here)
            peaks["generate"] = kept + copy + beyond * min(1.0, share / batch)
        return peaks

    def _beside_layers(self, choice: Choice, unit: Unit, stage: int) -> float:
        """Bytes of the update that do not grow with the layers: the head's on the last stage, elsewhere a layer that is computed again."""
        if stage == choice.layout.pp - 1:
            return unit.update_bytes.at_one - unit.update_bytes.per_more
        return self.unit(replace(choice, recompute="none")).update_bytes.per_more if choice.recompute == "full" else 0.0

    @staticmethod
    def _in_flight(layout: ParallelLayout, stage: int, number: int) -> int:
        """Chunks whose activations a stage holds at most (Narayanan et al. 2021, section 2.2)."""
        if layout.virtual_pp == 1:
            return min(number, layout.pp - stage)
        return min(number * layout.virtual_pp, 2 * (layout.pp - stage - 1) + (layout.virtual_pp - 1) * layout.pp + 1)

    def _kept(self, plan, layout: ParallelLayout, rank: int, *, average: bool = False) -> dict[str, int]:
        trained = isinstance(plan.config, TrainedModelConfig)
        place, precision = layout.coordinates(rank), plan.config.precision
        return bytes_kept(plan.architecture, plan.head, layout, place, precision=precision, trained=trained, average=average)

    def _seconds(self, choice: Choice, unit: Unit, number: int) -> float:
        layout, a, cluster = choice.layout, self.plan.architecture, self.cluster
        deepest = max(sum(map(len, layout.chunks(a.num_layers, stage))) for stage in range(layout.pp))
        last = sum(map(len, layout.chunks(a.num_layers, layout.pp - 1)))
        slowest = max(unit.update_seconds.per_more * deepest, unit.update_seconds.at(last))
        update = (number + (layout.pp - 1) / layout.virtual_pp) * slowest
        kept = self._kept(self.plan, layout, layout.num_ranks - 1)
        link = cluster.between if layout.dp * layout.tp > cluster.gpus_per_node else cluster.inside
        update += (layout.dp - 1) / layout.dp * (kept["gradients"] + kept["weights"]) / (LINK_SHARE * link)
        seconds = update * self._steps()
        if self.role == "policy":
            share = unit.dp / layout.dp  # rows of a copy, over those of the calibration's
            seconds += share * unit.score_seconds.at(a.num_layers / layout.pp)
            rows, batch = self._generated()
            of_copy = rows / (layout.num_ranks // layout.tp if choice.gathered else layout.dp)
            seconds += max(1.0, of_copy / batch) * unit.generate_seconds.at(a.num_layers)
            if choice.gathered:
                whole = ParallelLayout.over(layout.num_ranks, tp=layout.tp, pp=1)
                moved = self._kept(self.models.plans["reference"], whole, 0)["weights"] * (layout.pp - 1) / layout.pp
                seconds += moved / (LINK_SHARE * cluster.between)
        return seconds + self._seconds_of_others()

    def _seconds_of_others(self) -> float:
        if self.other_run is None:
            return 0.0
        parts = [part for part in self.other_run.parts if part.model in self.others and part.phase in ("score", "update")]
        return sum(sum(seconds_of(part.cost, self.cluster).values()) for part in parts)


def search(estimator: Estimator) -> Found:
    """All candidates, ranked. ConfigError where there is none."""
    estimates = [estimator.estimate(choice) for choice in estimator.candidates()]
    if not estimates:
        raise ConfigError(f"no layout of {estimator.cluster.num_ranks} ranks holds {estimator.role}")
    usable = estimator.cluster.usable_bytes
    fitting = sorted((e for e in estimates if e.peak_bytes <= usable), key=lambda e: e.seconds)
    return Found(fitting, sorted((e for e in estimates if e.peak_bytes > usable), key=lambda e: e.peak_bytes))


def as_text(found: Found, cluster: Cluster, *, shown: int = 10) -> str:
    """The best candidates, and why others fell out."""
    lines = [f"{len(found.best) + len(found.too_large)} layouts, {len(found.best)} of which fit {cluster}; by estimated time of a step:"]
    for estimate in found.best[:shown]:
        lines.append(f"  {estimate.seconds:8.1f} s  {estimate.peak_bytes / 1e9:6.1f} GB in {estimate.phase:8}  {estimate.choice}")
    if found.too_large:
        lines.append("fell out for their memory, those that miss least first:")
    for estimate in found.too_large[: math.ceil(shown / 2)]:
        missing = (estimate.peak_bytes - cluster.usable_bytes) / 1e9
        lines.append(f"  {estimate.seconds:8.1f} s  {missing:6.1f} GB missing in {estimate.phase:8}  {estimate.choice}")
    return "\n".join(lines) + "\n"
