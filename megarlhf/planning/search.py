"""`megarlhf plan --search`: which layout is fastest among those that fit, by a cheap model made of a few small dry runs.

What lies between steps is exact by description (engine/footprint.py), the rest is calibrated (planning/calibration.py). Every candidate
of the space is estimated, so no other of them is better by the same estimate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from megarlhf.config import ConfigError
from megarlhf.config.sections import TrainedModelConfig
from megarlhf.engine.footprint import bytes_kept
from megarlhf.models.transformer import layout_violations
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.planning.calibration import Unit, measured, sum_seconds
from megarlhf.planning.hardware import LINK_SHARE, Cluster
from megarlhf.planning.models import RunModels, run_models
from megarlhf.planning.plan import PROCESSES, dry_runs

SIZES = (1, 2, 4)
"""Micro-batch sizes that are tried."""
RECOMPUTE = ("none", "selective", "full")
VIRTUAL = (1, 2, 4)
FEWER_ROWS = 8
"""Part of the generator's rows that a second calibration has."""
RESTS = {"policy": ("gradients", "optimizer", "average"), "value": ("weights", "gradients", "optimizer"),
         "reward": ("weights",), "reference": ("weights",)}  # fmt: skip
"""Model -> what rests on the host between its uses, where a candidate offloads."""
USED = {
    "update": {"policy": ("weights", "gradients", "masters", "moments"), "value": ("weights", "gradients", "masters", "moments")},
    "generate": {"policy": ("weights",)},
    "score": dict.fromkeys(RESTS, ("weights",)),
}
"""Phase -> what of each model is on the device then, where a candidate offloads."""


@dataclass(frozen=True)
class Choice:
    """One candidate for the model that is trained (PPO: the policy, with the reference beside it)."""

    layout: ParallelLayout
    micro_batch_size: int
    recompute: str
    gathered: bool = False
    """PPO: whether generation takes all layers on one stage, a copy, in place of the policy's own layout."""
    offload: bool = False
    """PPO: whether models rest on the host between their uses (RESTS)."""

    def overrides(self, models: RunModels) -> list[str]:
        """The same as keys of a configuration."""
        at, role = self.layout, trained_role(models)
        axes = f"tp: {at.tp}, pp: {at.pp}, virtual_pp: {at.virtual_pp}, sequence_parallel: {str(at.sequence_parallel).lower()}"
        rows = [f"{role}.micro_batch_size={self.micro_batch_size}", f"{role}.micro_batch_tokens=null"]
        keys = [f"{role}.parallel={{{axes}}}", *rows, f"{role}.recompute={self.recompute}"]
        if role == "policy":
            keys += [f"reference.parallel={{{axes}}}", f"generation.parallel={f'{{tp: {at.tp}}}' if self.gathered else 'null'}"]
            keys += [f"{of}.offload=[{', '.join(RESTS[of]) if self.offload else ''}]" for of in models.plans]
        return keys

    def __str__(self) -> str:
        place = (", generation gathered" if self.gathered else "") + (", offload" if self.offload else "")
        return f"{self.layout}, micro-batch {self.micro_batch_size}, recompute {self.recompute}{place}"


def trained_role(models: RunModels) -> str:
    """The model whose layout is looked for."""
    return "policy" if models.config.stage == "ppo" else "model"


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


class Estimator:
    """The cheap model of one run on one cluster."""

    def __init__(
        self, path: Path, overrides: Sequence[str], given: dict[str, dict], cluster: Cluster, *, processes: int = PROCESSES
    ) -> None:
        """Run the small dry runs, so many at a time. ConfigError where the configuration is not valid."""
        self.cluster = cluster
        self.path, self.overrides, self.given = path, list(overrides), given
        self.models = run_models(path, overrides, given, cluster.num_ranks)
        self.role = trained_role(self.models)
        self.plan = self.models.plans[self.role]
        beside = (self.role, "reference") if self.role == "policy" else (self.role,)
        self.others = {role: plan for role, plan in self.models.plans.items() if role not in beside}
        self.units: dict[tuple[int, str, int], Unit] = {}
        self._kept_by: dict[tuple, dict[str, int]] = {}
        self._calibrate(processes)

    def with_keys(self, keys: Sequence[str]) -> list[str]:
        """The user's overrides with `keys` in place of theirs."""
        taken = [key.partition("=")[0] for key in keys]
        mine = [word for word in self.overrides if not any(f"{word.partition('=')[0]}.".startswith(f"{key}.") for key in taken)]
        return [*mine, *keys]

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
                    if self.role == "policy":
                        kinds = itertools.product((False, True) if pp > 1 else (False,), (False, True))
                        yield from (Choice(layout, size, recompute, gathered, offload) for gathered, offload in kinds)
                    else:
                        yield Choice(layout, size, recompute)

    def _calibrate(self, processes: int) -> None:
        keys = [key for key in itertools.product(self.tensor_sizes(), RECOMPUTE, SIZES) if self.cluster.num_ranks % key[0] == 0]
        jobs = [self._small(key, layers) for key in keys for layers in (1, 2)]
        few = {self.role: self._few_layers(1)} | ({"reference": self._few_layers(1)} if self.role == "policy" else {})
        choice = Choice(ParallelLayout.over(self.cluster.num_ranks, tp=keys[0][0], pp=1, sequence_parallel=keys[0][0] > 1), 1, "full")
        beside = run_models(self.path, self.with_keys(choice.overrides(self.models)), self.given | few, self.cluster.num_ranks)
        every = [(models, 0) for models in ([*jobs, beside] if self.others else jobs)]
        runs = dry_runs(every, self.cluster.gpus_per_node, processes=processes)
        self.seconds_of_others = sum_seconds(runs[-1], self.cluster, ("score", "update"), list(self.others)) if self.others else 0.0
        for number, key in enumerate(keys):
            dp = jobs[2 * number].plans[self.role].layout.dp
            batches = max(1.0, self._sampled / dp / self._slots(key[2]))
            how = {"role": self.role, "steps": self._steps, "dp": dp, "batches": batches}
            self.units[key] = measured(runs[2 * number], runs[2 * number + 1], self.cluster, **how)

    def _few_layers(self, layers: int) -> dict:
        fields = {name: value for name, value in vars(self.plan.architecture).items() if name != "vocab_size"}
        return fields | {"num_layers": layers}

    def _small(self, key: tuple[int, str, int], layers: int) -> RunModels:
        tp, recompute, size = key
        copies = max(1, min(self._sampled // self._most_slots, min(self._rows()) // SIZES[-1]))  # so that a micro-batch has its rows
        layout = ParallelLayout(tp=tp, dp=copies, sequence_parallel=tp > 1)
        keys = Choice(layout, size, recompute).overrides(self.models) + [f"{role}.parallel={{tp: {tp}}}" for role in self.others]
        keys += [f"generation.sampling.max_batch_size={self._slots(size)}"] if self.role == "policy" else []
        small = {role: self._few_layers(layers) for role in self.models.plans}
        return run_models(self.path, self.with_keys(keys), self.given | small, layout.num_ranks)

    @cached_property
    def _sampled(self) -> int:
        """Rows that are sampled in a step."""
        return self.models.config.ppo.batch_size if self.role == "policy" else 1

    @cached_property
    def _most_slots(self) -> int:
        """Most rows of a batch of the generator."""
        if self.role != "policy":
            return 1
        return self.models.config.generation.sampling.max_batch_size or -(-self._sampled // min(self._sampled, self.cluster.nodes))

    def _slots(self, size: int) -> int:
        """Rows of a batch of the generator in the calibration with a micro-batch of this size."""
        return self._most_slots if size == SIZES[0] else max(1, self._most_slots // FEWER_ROWS)

    @cached_property
    def _steps(self) -> int:
        """Optimizer steps of one step of the run."""
        if self.role != "policy":
            return 1
        s = self.models.config.ppo
        return s.epochs * (s.batch_size // s.minibatch_size)

    def unit(self, choice: Choice, size: int | None = None) -> Unit:
        """The calibration for a candidate's training with its micro-batch size, or with `size`: between the two nearest that were run."""
        size = size or max(of for _, of, _ in self._terms(choice))
        less, more = max(of for of in SIZES if of <= size), min(of for of in SIZES if of >= size)
        one, two = (self.units[choice.layout.tp, choice.recompute, of] for of in (less, more))
        return one.mixed(two, (size - less) / (more - less)) if more > less else one

    def generating(self, choice: Choice, slots: float) -> Unit:
        """The calibration for its generation with so many rows at a time."""
        many, few = (self.units[choice.layout.tp, RECOMPUTE[0], size] for size in SIZES[:2])
        most, least = (self._slots(size) for size in SIZES[:2])
        return many.mixed(few, (most - slots) / (most - least)) if most > least else many

    def estimate(self, choice: Choice) -> Estimate:
        """What a candidate holds and takes."""
        unit, layout = self.unit(choice), choice.layout
        number = self.micro_batches(choice)
        peaks = [self._peaks(choice, unit, stage, number) for stage in sorted({0, min(1, layout.pp - 1), layout.pp - 1})]
        phase, peak = max((item for of in peaks for item in of.items()), key=lambda item: item[1])
        return Estimate(choice, peak, phase, self._seconds(choice, unit, number))

    def micro_batches(self, choice: Choice) -> int:
        """Of one optimizer step on each copy, idle ones included."""
        return sum(number for _, _, number in self._terms(choice))

    def _terms(self, choice: Choice) -> list[tuple[float, int, int]]:
        """Of each term of one optimizer step: (full micro-batches of a copy, rows of one, micro-batches with idle ones)."""
        return [self._shared(choice.layout, rows, choice.micro_batch_size) for rows in self._rows()]

    @staticmethod
    def _shared(layout: ParallelLayout, rows: int, size: int) -> tuple[float, int, int]:
        of_copy, unit = -(-rows // layout.dp), layout.pp if layout.virtual_pp > 1 else 1
        at_once = min(size, of_copy)
        return of_copy / at_once, at_once, math.ceil(of_copy / at_once / unit) * unit

    def _rows(self) -> list[int]:
        """Rows of each term of one optimizer step."""
        c = self.models.config
        if c.stage == "ppo":
            return [c.ppo.minibatch_size, *([c.ppo.ptx_ratio * c.ppo.minibatch_size] if c.ppo.ptx_coef else [])]
        if c.stage == "sft" and c.pretraining_mix:
            return [c.batch_size, max(1, round(c.pretraining_mix * c.batch_size))]
        return [c.batch_size]

    def _held(self, choice: Choice, stage: int) -> dict[str, dict[str, int]]:
        """Model -> kind -> bytes between steps on a rank of this stage."""
        layout = choice.layout
        rank = layout.rank(tp=0, dp=0, pp=stage)
        held = {self.role: self._kept(self.role, layout, rank, average=self.role == "policy")}
        if self.role == "policy":
            held["reference"] = self._kept("reference", layout, rank)
        of_others = {} if self.models.config.stage == "dpo" else self.others  # DPO lets go of its reference before it builds the model
        return held | {role: self._kept(role, plan.layout, rank) for role, plan in of_others.items()}

    def _peaks(self, choice: Choice, unit: Unit, stage: int, number: int) -> dict[str, float]:
        layout, a = choice.layout, self.plan.architecture
        held = self._held(choice, stage)

        def here(phase: str) -> float:
            used = USED[phase] if choice.offload else {role: tuple(kinds) for role, kinds in held.items()}
            return float(sum(size for role, kinds in held.items() for kind, size in kinds.items() if kind in used.get(role, ())))

        depth = sum(map(len, layout.chunks(a.num_layers, stage)))
        copy = self._whole_copy(choice) if choice.gathered else 0.0
        in_flight = self._in_flight(layout, stage, number) * a.num_layers / (layout.pp * layout.virtual_pp)
        peaks = {"update": here("update") + self._beside_layers(choice, unit, stage) + unit.update_bytes.per_more * in_flight}
        if self.role == "policy":
            slots, _, _ = self._slots_of(choice)
            beyond = self.generating(choice, slots).generate_bytes
            peaks["generate"] = here("generate") + copy + beyond.at(a.num_layers if choice.gathered else depth)
            peaks["score"] = here("score")
        return peaks

    def _whole_copy(self, choice: Choice) -> float:
        """Bytes of the generator's weights where one stage has all layers."""
        whole = ParallelLayout.over(choice.layout.num_ranks, tp=choice.layout.tp, pp=1)
        return self._kept("reference", whole, 0)["weights"]

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

    def _kept(self, role: str, layout: ParallelLayout, rank: int, *, average: bool = False) -> dict[str, int]:
        place = layout.coordinates(rank)
        key = role, layout, place.pp, place.tp, average
        if key not in self._kept_by:
            plan = self.models.plans[role]
            how = {"precision": plan.config.precision, "trained": isinstance(plan.config, TrainedModelConfig), "average": average}
            self._kept_by[key] = bytes_kept(plan.architecture, plan.head, layout, place, **how)
        return self._kept_by[key]

    def _seconds(self, choice: Choice, unit: Unit, number: int) -> float:
        layout, a, cluster = choice.layout, self.plan.architecture, self.cluster
        deepest = max(sum(map(len, layout.chunks(a.num_layers, stage))) for stage in range(layout.pp))
        last = sum(map(len, layout.chunks(a.num_layers, layout.pp - 1)))
        update = 0.0
        for full, rows, _ in self._terms(choice):
            passes = self.unit(choice, rows).update_seconds
            update += full * max(passes.per_more * deepest, passes.at(last))
        update *= 1 + (layout.pp - 1) / layout.virtual_pp / number
        kept = self._kept(self.role, layout, layout.num_ranks - 1, average=self.role == "policy")
        link = cluster.between if layout.dp * layout.tp > cluster.gpus_per_node else cluster.inside
        update += (layout.dp - 1) / layout.dp * (kept["gradients"] + kept["weights"]) / (LINK_SHARE * link)
        seconds = update * self._steps
        if self.role == "policy":
            seconds += self._score_seconds(choice, unit) + self._generate_seconds(choice)
            seconds += self._copy_seconds(choice) if choice.offload else 0.0
        return seconds + self.seconds_of_others

    def _score_seconds(self, choice: Choice, unit: Unit) -> float:
        layout, plans = choice.layout, self.models.plans
        depth = self.plan.architecture.num_layers / layout.pp
        parts = [(unit.reference_seconds, plans["reference"].config.micro_batch_size)]
        parts += [(unit.score_seconds, choice.micro_batch_size)] if self.models.config.ppo.recompute_logprobs else []
        bubble = (layout.pp - 1) / layout.virtual_pp
        return sum(line.at(depth) / layout.dp * (1 + bubble / self._shared(layout, self._sampled, size)[2]) for line, size in parts)

    def _slots_of(self, choice: Choice) -> tuple[int, int, float]:
        """(rows of a batch of the generator, groups that follow one another through its stages, batches)."""
        layout = choice.layout
        rows = -(-self._sampled // (layout.num_ranks // layout.tp if choice.gathered else layout.dp))
        slots = min(rows, self._most_slots)
        return slots, min(slots, 1 if choice.gathered else layout.pp), rows / slots

    def _generate_seconds(self, choice: Choice) -> float:
        """Prompts fill the pipeline once; tokens do without end, as every stage has a group of rows to work on."""
        layout, layers = choice.layout, self.plan.architecture.num_layers
        stages = 1 if choice.gathered else layout.pp
        slots, groups, batches = self._slots_of(choice)
        prompts = self.generating(choice, slots).prompt_seconds.at(layers / stages) * (1 + (stages - 1) / groups)
        tokens = self.generating(choice, slots / groups).token_seconds.at(layers / stages) * max(groups, stages)
        moved = self._whole_copy(choice) * (layout.pp - 1) / layout.pp if choice.gathered else 0.0
        return batches * (prompts + tokens) + moved / (LINK_SHARE * self.cluster.between)

    def _copy_seconds(self, choice: Choice) -> float:
        """To the host and back: what changes goes both ways, frozen weights come back, gradients do neither."""
        held, moved = self._held(choice, 0), 0
        for role, rests in RESTS.items():
            kinds = [kind for name in rests for kind in (("masters", "moments") if name == "optimizer" else (name,)) if kind != "gradients"]
            ways = 2 if role in ("policy", "value") else 1
            moved += ways * sum(held.get(role, {}).get(kind, 0) for kind in kinds)
        return moved / (LINK_SHARE * self.cluster.gpu.host)


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
