"""A run's plan: what every kind of rank holds in every phase, whether that fits, and how long it takes."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from unittest import mock

from megarlhf.engine.footprint import does_not_fit
from megarlhf.planning.dry_run import Part, RankRun
from megarlhf.planning.estimate import part_seconds
from megarlhf.planning.hardware import Cluster
from megarlhf.planning.models import RunModels
from megarlhf.planning.rank_classes import RankClass, rank_classes
from megarlhf.planning.stages import Job, dry_run_each
from megarlhf.planning.work import PF_DAY, Work, work_of
from megarlhf.storage.tensors import BUFFER_BYTES

PHASES = ("build", "reshard", "generate", "score", "update", "save")
OF_A_STEP = ("reshard", "generate", "score", "update")
PROCESSES = 2


@dataclass(frozen=True)
class Plan:
    """What a run needs on a cluster."""

    models: RunModels
    cluster: Cluster
    classes: Sequence[RankClass]
    runs: Sequence[RankRun]
    """Of the first rank of each class."""
    work: Work

    @cached_property
    def phases(self) -> list[str]:
        """That the stage has."""
        return [phase for phase in PHASES if any(phase in run.peaks for run in self.runs)]

    def peak(self, phase: str) -> tuple[float, int]:
        """(the most bytes of a phase, the number of the class that holds them)."""
        peaks = [run.peak(phase) if phase in run.peaks else 0 for run in self.runs]
        extra = BUFFER_BYTES if phase == "save" else 0
        return max(peaks) + extra, peaks.index(max(peaks))

    @cached_property
    def largest_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: self.peak(phase)[0])

    @property
    def host_bytes(self) -> int:
        """Pinned host memory of the rank that has most at rest."""
        return max(run.host_bytes for run in self.runs)

    @property
    def host_bytes_of_node(self) -> int:
        """The same of all ranks of a node, each as the one that has most."""
        return self.host_bytes * self.cluster.gpus_per_node

    @property
    def missing_bytes(self) -> float:
        """What the largest phase needs beyond a GPU's memory; not above 0 where it fits."""
        return self.peak(self.largest_phase)[0] - self.cluster.usable_bytes

    @property
    def fits(self) -> bool:
        """Whether the run can be started on this cluster."""
        return self.missing_bytes <= 0 and not self.models.shrunk

    @property
    def verdict(self) -> list[str]:
        """Whether it fits, in sentences."""
        needed, number = self.peak(self.largest_phase)
        gpu, said = self.cluster.gpu, list(self.models.shrunk)
        if self.missing_bytes > 0:
            said.append(
                does_not_fit(
                    f"{self.largest_phase} on ranks of the class '{self.classes[number].name}' (rank {self.classes[number].rank})",
                    needed, gpu.memory_bytes, self.cluster.reserved_bytes, device=gpu.name,
                    way_out=f"what needs less of each GPU: {self._smaller()}; --search looks for the fastest layout that fits",
                )
            )
        elif not said:
            free = -self.missing_bytes / 1e9
            said.append(f"it fits: {self.largest_phase} needs most, {needed / 1e9:.1f} GB, and leaves {free:.1f} GB of each GPU free")
        return said

    def _smaller(self) -> str:
        """What can be changed so that the phase that needs most needs less."""
        ppo = self.models.config.stage == "ppo"
        of_phase = {
            "generate": ["a smaller generation.sampling.max_batch_size"],
            "score": ["a smaller micro_batch_size (or micro_batch_tokens)"],
            "update": ["a smaller micro_batch_size (or micro_batch_tokens)", "recompute"],
        }
        return ", ".join([*of_phase.get(self.largest_phase, ()), "larger tp or pp", "more nodes", *(["offload"] if ppo else [])])

    @cached_property
    def seconds(self) -> dict[tuple[str, str, str], Counter]:
        """(phase, model, what) -> term -> seconds of a step."""
        found = {}
        for index, part in enumerate(self.runs[0].parts):
            if part.phase not in OF_A_STEP:
                continue
            layout = self._layout(part)
            of_class = [
                (run.parts[index], of.stages["generation" if part.phase == "generate" and "generation" in of.stages else part.model])
                for run, of in zip(self.runs, self.classes, strict=True)
            ]
            found[part.phase, part.model, part.what] = part_seconds(
                of_class, self.cluster, stages=layout.pp, virtual_stages=layout.virtual_pp
            )
        return found

    def _layout(self, part: Part):
        of_generator = part.phase == "generate" and self.models.generation is not None
        return self.models.generation if of_generator else self.models.plans[part.model].layout

    def phase_seconds(self, phase: str) -> Counter:
        """Term -> seconds of a phase in one step."""
        total: Counter = Counter()
        for (of, _, _), seconds in self.seconds.items():
            if of == phase:
                total.update(seconds)
        return total

    @property
    def step_seconds(self) -> float:
        """Of one step (PPO: iteration)."""
        return sum(sum(seconds.values()) for seconds in self.seconds.values())

    @property
    def utilisation(self) -> float:
        """Model FLOPs of a step over what the GPUs could do in its time."""
        return self.work.model_flops / (self.step_seconds * self.cluster.num_ranks * self.cluster.gpu.flops)

    @property
    def update_utilisation(self) -> float:
        """The same of the update alone."""
        update = sum(self.phase_seconds("update").values())
        return self.work.update_flops / (update * self.cluster.num_ranks * self.cluster.gpu.flops)

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Tokens of a step (PPO: of its episodes) per second of it and per GPU."""
        return (self.work.episode_tokens or self.work.tokens) / self.step_seconds / self.cluster.num_ranks

    @property
    def hours(self) -> float:
        """Of all steps."""
        return self.step_seconds * self.work.steps / 3600

    @property
    def pf_days(self) -> float:
        """Model FLOPs of the run."""
        return self.work.model_flops * self.work.steps / PF_DAY


def make_plan(models: RunModels, cluster: Cluster, *, processes: int = PROCESSES) -> Plan:
    """Dry-run one rank of each class: see `dry_runs`."""
    classes = rank_classes(models)
    runs = dry_runs([Job(models, of.rank, cluster.gpus_per_node) for of in classes], processes=processes)
    return Plan(models, cluster, classes, runs, work_of(models))


def dry_runs(jobs: Sequence[Job], *, processes: int = PROCESSES) -> list[RankRun]:
    """Of each job, shared out over processes of their own; with one process in this one, which must not be in a world."""
    if processes == 1:
        return dry_run_each(jobs)
    share = -(-len(jobs) // processes)
    hands = [jobs[start : start + share] for start in range(0, len(jobs), share)]  # alike ones together: one knows what another has seen
    spawn = multiprocessing.get_context("spawn")
    seen = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # torch wonders about process groups without a backend
    seen["CUDA_VISIBLE_DEVICES"] = ""  # where there is a GPU, megatron would build on it what is to have no values
    with mock.patch.dict(os.environ, seen), concurrent.futures.ProcessPoolExecutor(len(hands), mp_context=spawn) as pool:
        return [run for of_hand in pool.map(dry_run_each, hands) for run in of_hand]
