"""What a run holds and takes in any layout, by a cheap model made of a few small dry runs.

What lies between steps is exact by description (engine/footprint.py), the rest is calibrated (planning/calibration.py); messages between
stages and copies are added by arithmetic. Seconds are those of a plan (planning/estimate.py).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from megarlhf.config.sections import TrainedModelConfig
from megarlhf.engine.footprint import bytes_kept
from megarlhf.models.architecture import Architecture
from megarlhf.models.transformer import DTYPES, layout_violations
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.planning.calibration import Line, Sampling, Training
from megarlhf.planning.choices import RECOMPUTE, RESTS, SIZES, Choice, trained_role
from megarlhf.planning.dry_run import RankRun
from megarlhf.planning.estimate import part_seconds, seconds_of
from megarlhf.planning.hardware import LINK_SHARE, Cluster
from megarlhf.planning.meter import Cost, Link
from megarlhf.planning.models import RunModels, run_models
from megarlhf.planning.plan import OF_A_STEP, PROCESSES, dry_runs
from megarlhf.planning.stages import Job
from megarlhf.planning.work import completions_of_prompt

FEWER_ROWS = dict(zip(SIZES, (1, 8, 2), strict=True))
"""Micro-batch size -> what part of the generator's rows its calibration has."""
USED = {
    "update": {"policy": ("weights", "gradients", "masters", "moments"), "value": ("weights", "gradients", "masters", "moments")},
    "generate": {"policy": ("weights",)},
    "score": dict.fromkeys(RESTS, ("weights",)),
}
"""Phase -> what of each model is on the device then, where a candidate offloads."""


@dataclass(frozen=True)
class Estimate:
    """What a candidate holds at most and takes."""

    choice: Choice
    peak_bytes: float
    phase: str
    """In which that is."""
    phase_seconds: Mapping[str, float]

    @cached_property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.phase_seconds.values())


@dataclass(frozen=True)
class TermRows:
    """What one term of an optimizer step takes."""

    units: int
    """Rows, or prompts with all their completions: what is shared out over copies and micro-batches."""
    rows_of_unit: int
    width: int
    """Tokens of a row."""


@dataclass(frozen=True)
class Shared:
    """One term's rows on one copy."""

    full: float
    """Micro-batches as its units would fill them."""
    rows: int
    """Of a full one."""
    number: int
    """Of micro-batches, one that is not full and idle ones included."""


class CheapModel:
    """The cheap model of one run on one cluster."""

    def __init__(
        self, path: Path, overrides: Sequence[str], given: dict[str, Architecture | dict], cluster: Cluster, *, processes: int = PROCESSES
    ) -> None:
        """Run the small dry runs, so many at a time. ConfigError where the configuration is not valid."""
        self.cluster = cluster
        self.path, self.overrides, self.given = path, list(overrides), given
        self.models = run_models(path, overrides, given, cluster.num_ranks)
        self.role = trained_role(self.models)
        self.plan = self.models.plans[self.role]
        self.terms = terms_of(self.models)
        self.sizes = [size * max(term.rows_of_unit for term in self.terms) for size in SIZES]
        beside = (self.role, "reference") if self.role == "policy" else (self.role,)
        self.others = {role: plan for role, plan in self.models.plans.items() if role not in beside}
        self.training: dict[tuple[int, str, int], Training] = {}
        """(tp, recompute, rows of a micro-batch) -> what was measured."""
        self.sampling: dict[tuple[int, int], Sampling] = {}
        """(tp, rows of a micro-batch) -> what was measured."""
        self._sampling_with: dict[tuple[int, float], Sampling] = {}
        """(tp, rows of the generator at a time) -> between those."""
        self._kept_by: dict[tuple, dict[str, int]] = {}
        self._calibrate(processes)

    def with_keys(self, keys: Sequence[str]) -> list[str]:
        """The user's overrides with `keys` in place of theirs."""
        taken = [key.partition("=")[0] for key in keys]
        mine = [word for word in self.overrides if not any(f"{word.partition('=')[0]}.".startswith(f"{key}.") for key in taken)]
        return [*mine, *keys]

    def models_of(self, choice: Choice) -> RunModels:
        """The run in the layout of a candidate."""
        return run_models(self.path, self.with_keys(choice.overrides(self.models)), self.given, self.cluster.num_ranks)

    def tensor_sizes(self) -> list[int]:
        """Tensor-parallel sizes that the model's widths, the nodes and the number of ranks allow."""
        fitting = (tp for tp in (1, 2, 4, 8) if tp <= self.cluster.gpus_per_node and self.cluster.num_ranks % tp == 0)
        return [tp for tp in fitting if not layout_violations(self.plan.architecture, ParallelLayout(tp=tp))]

    def _calibrate(self, processes: int) -> None:
        keys = list(itertools.product(self.tensor_sizes(), RECOMPUTE, self.sizes))
        jobs = [self._small(key, layers) for key in keys for layers in (1, 2)]
        runs = dry_runs([*jobs, *([self._beside(keys[0][0])] if self.others else [])], processes=processes)
        self.seconds_of_others = self._seconds_of_others(runs[-1]) if self.others else {}
        for number, (tp, recompute, size) in enumerate(keys):
            one, two = runs[2 * number : 2 * number + 2]
            self.training[tp, recompute, size] = Training.measured(one, two, self.role)
            if self.role == "policy" and recompute == RECOMPUTE[0]:
                dp = jobs[2 * number].models.plans[self.role].layout.dp
                batches = max(1.0, self._sampled / dp / self._slots(size))
                self.sampling[tp, size] = Sampling.measured(one, two, self.role, dp=dp, batches=batches)

    def _few_layers(self, layers: int) -> Architecture:
        return replace(self.plan.architecture, num_layers=layers)

    def _small(self, key: tuple[int, str, int], layers: int) -> Job:
        """One rank of so few layers on one stage, and of no more copies than give every micro-batch all its rows."""
        tp, recompute, size = key
        copies = max(1, min(self._sampled // self._most_slots, min(term.units for term in self.terms) // SIZES[-1]))
        layout = ParallelLayout(tp=tp, dp=copies, sequence_parallel=tp > 1)
        keys = Choice(layout, size, recompute).overrides(self.models) + [f"{role}.parallel={{tp: {tp}}}" for role in self.others]
        keys += [f"generation.sampling.max_batch_size={self._slots(size)}"] if self.role == "policy" else []
        given = self.given | dict.fromkeys(self.models.plans, self._few_layers(layers))
        models = run_models(self.path, self.with_keys(keys), given, layout.num_ranks)
        few = {role: plan for role, plan in models.plans.items() if role not in self.others}
        samples = self.role == "policy" and recompute == RECOMPUTE[0]
        return Job(replace(models, plans=few), 0, self.cluster.gpus_per_node, OF_A_STEP if samples else ("update",))

    def _beside(self, tp: int) -> Job:
        """The models that are not searched for, in their own layouts, beside one layer of the one that is."""
        choice = Choice(ParallelLayout.over(self.cluster.num_ranks, tp=tp, sequence_parallel=tp > 1), self.sizes[0], "full")
        few = {role: self._few_layers(1) for role in self.models.plans if role not in self.others}
        models = run_models(self.path, self.with_keys(choice.overrides(self.models)), self.given | few, self.cluster.num_ranks)
        return Job(models, 0, self.cluster.gpus_per_node, ("score", "update"))

    def _seconds_of_others(self, run: RankRun) -> Counter:
        """Phase -> seconds of the models that are not searched for."""
        seconds: Counter = Counter()
        for part in run.parts:
            if part.model in self.others:
                at = self.others[part.model].layout
                of_part = part_seconds([(part, 1)], self.cluster, stages=at.pp, virtual_stages=at.virtual_pp)
                seconds[part.phase] += sum(of_part.values())
        return seconds

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
        return max(1, self._most_slots // FEWER_ROWS[size])

    @cached_property
    def _steps(self) -> int:
        """Optimizer steps of one step of the run."""
        if self.role != "policy":
            return 1
        s = self.models.config.ppo
        return s.epochs * (s.batch_size // s.minibatch_size)

    def _trained(self, choice: Choice, rows: int) -> Training:
        """The calibration for passes with so many rows: between the two nearest that were run."""
        less = max((of for of in self.sizes if of <= rows), default=self.sizes[0])
        more = min((of for of in self.sizes if of >= rows), default=less)
        one, two = (self.training[choice.layout.tp, choice.recompute, of] for of in (less, more))
        return one.mixed(two, (rows - less) / (more - less)) if more > less else one

    def _generating(self, choice: Choice, slots: float) -> Sampling:
        """The calibration for generation with so many rows at a time."""
        tp = choice.layout.tp
        if (tp, slots) not in self._sampling_with:
            measured = {self._slots(size): self.sampling[tp, size] for size in SIZES}
            numbers = sorted(measured)
            above = next((at for at, number in enumerate(numbers) if number >= slots and at), len(numbers) - 1)
            less, more = numbers[max(0, above - 1)], numbers[above]
            share = (slots - less) / (more - less) if more > less else 0.0
            self._sampling_with[tp, slots] = measured[less].mixed(measured[more], share)
        return self._sampling_with[tp, slots]

    def estimate(self, choice: Choice) -> Estimate:
        """What a candidate holds and takes."""
        layout = choice.layout
        peaks = [self._peaks(choice, stage) for stage in sorted({0, min(1, layout.pp - 1), layout.pp - 1})]
        phase, peak = max((item for of in peaks for item in of.items()), key=lambda item: item[1])
        seconds = Counter({"update": self._update_seconds(choice)})
        if self.role == "policy":
            seconds += Counter({"score": self._score_seconds(choice), "generate": self._generate_seconds(choice)})
            seconds += self._copy_seconds(choice) if choice.offload else Counter()
        return Estimate(choice, peak, phase, dict(seconds + Counter(self.seconds_of_others)))

    def shares(self, choice: Choice) -> list[Shared]:
        """Each term of one optimizer step as one copy has it."""
        return [self._shared(choice.layout, term.units, choice.micro_batch_size, term.rows_of_unit) for term in self.terms]

    @staticmethod
    def _shared(layout: ParallelLayout, units: int, rows: int, rows_of_unit: int = 1) -> Shared:
        of_copy, together = -(-units // layout.dp), layout.pp if layout.virtual_pp > 1 else 1
        at_once = min(max(1, rows // rows_of_unit), of_copy)
        return Shared(of_copy / at_once, at_once * rows_of_unit, math.ceil(of_copy / at_once / together) * together)

    def _held(self, choice: Choice, stage: int) -> dict[str, dict[str, int]]:
        """Model -> kind -> bytes between steps on a rank of this stage."""
        layout = choice.layout
        rank = layout.rank(tp=0, dp=0, pp=stage)
        held = {self.role: self._kept(self.role, layout, rank, average=self.role == "policy")}
        if self.role == "policy":
            held["reference"] = self._kept("reference", layout, rank)
        of_others = {} if self.models.config.stage == "dpo" else self.others  # DPO lets go of its reference before it builds the model
        return held | {role: self._kept(role, plan.layout, rank) for role, plan in of_others.items()}

    def _kept(self, role: str, layout: ParallelLayout, rank: int, *, average: bool = False) -> dict[str, int]:
        place = layout.coordinates(rank)
        key = role, layout, place.pp, place.tp, average
        if key not in self._kept_by:
            plan = self.models.plans[role]
            how = {"precision": plan.config.precision, "trained": isinstance(plan.config, TrainedModelConfig), "average": average}
            self._kept_by[key] = bytes_kept(plan.architecture, plan.head, layout, place, **how)
        return self._kept_by[key]

    def _peaks(self, choice: Choice, stage: int) -> dict[str, float]:
        layout, a = choice.layout, self.plan.architecture
        held, shares = self._held(choice, stage), self.shares(choice)
        number, held_by_pass = sum(of.number for of in shares), self._trained(choice, max(of.rows for of in shares)).held

        def here(phase: str) -> float:
            used = USED[phase] if choice.offload else {role: tuple(kinds) for role, kinds in held.items()}
            return float(sum(size for role, kinds in held.items() for kind, size in kinds.items() if kind in used.get(role, ())))

        depth = sum(map(len, layout.chunks(a.num_layers, stage)))
        in_flight = self._in_flight(layout, stage, number)
        layers = in_flight * a.num_layers / (layout.pp * layout.virtual_pp)
        passes = self._beside_layers(choice, held_by_pass, stage) + held_by_pass.per_more * layers
        passes += in_flight * self._hidden_bytes(max(of.rows * term.width for of, term in zip(shares, self.terms, strict=True)), layout)
        peaks = {"update": here("update") + passes}
        if self.role == "policy":
            slots, _, _ = self._slots_of(choice)
            copy = self._whole_copy(choice) if choice.gathered else 0.0
            layers = a.num_layers if choice.gathered else depth
            peaks["generate"] = here("generate") + copy + self._generating(choice, slots).held.at(layers)
            peaks["score"] = here("score")
        return peaks

    def _beside_layers(self, choice: Choice, of_pass: Line[float], stage: int) -> float:
        """Bytes of the update that do not grow with the layers: the head's on the last stage, elsewhere a layer that is computed again."""
        if stage == choice.layout.pp - 1:
            return of_pass.at_one - of_pass.per_more
        rows = max(of.rows for of in self.shares(choice))
        return self._trained(replace(choice, recompute="none"), rows).held.per_more if choice.recompute == "full" else 0.0

    @staticmethod
    def _in_flight(layout: ParallelLayout, stage: int, number: int) -> int:
        """Chunks whose activations a stage holds at most (Narayanan et al. 2021, section 2.2)."""
        if layout.virtual_pp == 1:
            return min(number, layout.pp - stage)
        return min(number * layout.virtual_pp, 2 * (layout.pp - stage - 1) + (layout.virtual_pp - 1) * layout.pp + 1)

    def _whole_copy(self, choice: Choice) -> float:
        """Bytes of the generator's weights where one stage has all layers."""
        whole = ParallelLayout.over(choice.layout.num_ranks, tp=choice.layout.tp, pp=1)
        return self._kept("reference", whole, 0)["weights"]

    def _slowest(self, parts: Sequence[tuple[Line[Cost], float, Cost]], layout: ParallelLayout, bubble: float) -> float:
        """Seconds of the slower of the stage with most layers and the last, which has the head.

        Args: parts: (what one has by layers on a stage, how many there are, what it sends to another stage).
        """
        depths = [sum(map(len, layout.chunks(self.plan.architecture.num_layers, stage))) for stage in range(layout.pp)]
        middle, last = Cost(), Cost()
        for line, number, sent in parts:
            middle += (line.per_more * max(depths) + sent) * number
            last += (line.at(depths[-1]) + sent) * number
        return max(sum(seconds_of(cost, self.cluster).values()) for cost in (middle, last)) * (1 + bubble)

    def _hidden_bytes(self, tokens: float, layout: ParallelLayout) -> float:
        """Of the hidden states of so many tokens on their way to another stage."""
        size = DTYPES[self.plan.config.precision].itemsize
        return tokens * self.plan.architecture.hidden_size * size / layout.sequence_parts if layout.pp > 1 else 0.0

    def _hop(self, layout: ParallelLayout, tokens: float, times: float) -> Cost:
        """Sends of them."""
        if layout.pp == 1:
            return Cost()
        nodes = {layout.rank(tp=0, dp=0, pp=stage) // self.cluster.gpus_per_node for stage in (0, 1)}
        link = Link("send", "pp", layout.pp, len(nodes) == 1)
        return Cost(sent=Counter({link: times * self._hidden_bytes(tokens, layout)}), calls=Counter({link: times}))

    def _update_seconds(self, choice: Choice) -> float:
        layout, shares = choice.layout, self.shares(choice)
        parts = []
        for number, (term, of) in enumerate(zip(self.terms, shares, strict=True)):
            hop = self._hop(layout, of.rows * term.width, 2 * layout.virtual_pp)  # forward and backward
            parts.append((self._trained(choice, of.rows).each[number], of.full, hop))
        bubble = (layout.pp - 1) / layout.virtual_pp / sum(of.number for of in shares)
        kept = self._kept(self.role, layout, layout.num_ranks - 1, average=self.role == "policy")
        link = self.cluster.between if layout.dp * layout.tp > self.cluster.gpus_per_node else self.cluster.inside
        summed = (layout.dp - 1) / layout.dp * (kept["gradients"] + kept["weights"]) / (LINK_SHARE * link)
        return self._steps * (self._slowest(parts, layout, bubble) + summed)

    def _score_seconds(self, choice: Choice) -> float:
        layout, seconds = choice.layout, 0.0
        of_policy, of_reference = choice.micro_batch_size, self.models.plans["reference"].config.micro_batch_size
        measured = self.sampling[layout.tp, of_policy]
        models = [(measured.referred, of_reference)]
        models += [(measured.scored, of_policy)] if self.models.config.ppo.recompute_logprobs else []
        for line, size in models:
            of = self._shared(layout, self._sampled, size)
            hop = self._hop(layout, of.rows * self.terms[0].width, of.full * layout.virtual_pp * layout.dp)
            seconds += self._slowest([(line, 1 / layout.dp, hop)], layout, (layout.pp - 1) / layout.virtual_pp / of.number)
        return seconds

    def _slots_of(self, choice: Choice) -> tuple[int, int, float]:
        """(rows of a batch of the generator, groups that follow one another through its stages, batches)."""
        layout = choice.layout
        rows = -(-self._sampled // (layout.num_ranks // layout.tp if choice.gathered else layout.dp))
        slots = min(rows, self._most_slots)
        return slots, min(slots, 1 if choice.gathered else layout.pp), rows / slots

    def _generate_seconds(self, choice: Choice) -> float:
        """Prompts fill the pipeline once; tokens do without end, as every stage has a group of rows to work on."""
        layout = choice.layout
        slots, groups, batches = self._slots_of(choice)
        moved = self._whole_copy(choice) * (layout.pp - 1) / layout.pp if choice.gathered else 0.0
        stages = ParallelLayout(tp=layout.tp) if choice.gathered else replace(layout, sequence_parallel=False)
        sampling, chunks = self.models.config.generation.sampling, stages.virtual_pp
        prompts = self._hop(stages, slots / groups * self.models.config.limits.max_prompt_len, groups * chunks)
        tokens = self._hop(stages, slots / groups, (sampling.max_new_tokens - 1) * chunks)
        of_prompts = (self._generating(choice, slots).prompts, batches, prompts)
        of_tokens = (self._generating(choice, slots / groups).tokens, batches * groups, tokens)
        seconds = self._slowest([of_prompts], stages, (stages.pp - 1) / groups)
        seconds += self._slowest([of_tokens], stages, max(0.0, stages.pp / groups - 1))
        return seconds + moved / (LINK_SHARE * self.cluster.between)

    def _copy_seconds(self, choice: Choice) -> Counter:
        """Phase -> of copies to the host and back: what changes goes both ways, frozen weights come back, gradients do neither."""
        held, moved = self._held(choice, 0), 0
        for role, rests in RESTS.items():
            kinds = [kind for name in rests for kind in (("masters", "moments") if name == "optimizer" else (name,)) if kind != "gradients"]
            ways = 2 if role in ("policy", "value") else 1
            moved += ways * sum(held.get(role, {}).get(kind, 0) for kind in kinds)
        return Counter({"offload": moved / (LINK_SHARE * self.cluster.gpu.host)})


def terms_of(models: RunModels) -> list[TermRows]:
    """Of one optimizer step of the model that is searched for."""
    c = models.config
    if c.stage == "pretrain":
        return [TermRows(c.batch_size, 1, c.data.seq_len)]
    if c.stage == "ppo":
        terms = [TermRows(c.ppo.minibatch_size, 1, c.limits.max_prompt_len + c.generation.sampling.max_new_tokens)]
        text_rows = c.ppo.ptx_ratio * c.ppo.minibatch_size if c.ppo.ptx_coef else 0
    else:
        completions = completions_of_prompt(c)[0] if c.stage in ("reward", "dpo") else 1
        terms = [TermRows(c.batch_size, completions, c.limits.max_prompt_len + c.limits.max_response_len)]
        text_rows = max(1, round(c.pretraining_mix * c.batch_size)) if c.stage == "sft" and c.pretraining_mix else 0
        text_rows = c.dpo.ptx_ratio * c.batch_size if c.stage == "dpo" and c.dpo.ptx_coef else text_rows
    return [*terms, *([TermRows(text_rows, 1, c.data.pretraining.seq_len)] if text_rows else [])]
