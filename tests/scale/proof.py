"""The parallelism of a 175B run on a few processes, at tiny width: it trains to the curve of one rank, and holds the bytes of its plan.

    python -m tests.scale.proof [--shapes "tp2 pp4" "tp2 pp2 dp2"]

PPO-ptx of the tests' recipe, with a policy of eight layers: interleaved stages, sequence parallelism, selective recomputation, the
distributed optimizer, everything that may rest on the host at rest, four models in four layouts, weights resharded for generation.
Compared are every metric of every step and every sampled response with a run on one rank in float32; each rank's bytes of weights,
gradients, master weights, moments and average after training with the plan's; and its peak in every phase of the longest rows, in
which ranks exchange, attend and activate as on GPUs: a plan knows no CPU's own ways.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from megarlhf.generation import cache
from megarlhf.models import activation
from megarlhf.models.transformer import initialize
from megarlhf.parallel.groups import World
from megarlhf.planning.dry_run import RankRun, Recorder
from megarlhf.planning.holdings import bytes_held
from megarlhf.planning.meter import Meter
from megarlhf.planning.models import RunModels, run_models
from megarlhf.planning.stages import STAGES, Job, dry_run_each
from megarlhf.resharding.near_memory import NearMemory
from megarlhf.runs.models import ModelPlan
from tests.distributed.harness import RankProcesses, Ranks
from tests.distributed.recipe import check_stages, curves, lines_of, make_recipe, run_stage_of

CURVE, PEAK = 1e-5, 0.05
"""Relative differences that rounding explains, and that a plan's peaks may have."""
OFFLOAD = [
    "policy.offload=[gradients, optimizer, average]", "value.offload=[weights, gradients, optimizer]", "reward.offload=[weights]",
    "reference.offload=[weights]",
]  # fmt: skip
INTERLEAVED = "virtual_pp: 2, sequence_parallel: true"


@dataclass(frozen=True)
class Shape:
    """How the four models lie on the ranks."""

    num_ranks: int
    keys: Sequence[str]


SHAPES = {
    "tp2 pp2": Shape(4, [
        f"policy.parallel={{tp: 2, pp: 2, {INTERLEAVED}}}", "value.parallel={tp: 2, sequence_parallel: true}", "reward.parallel={pp: 2}",
        "reference.parallel={tp: 4}", "generation.parallel={tp: 2}",
    ]),
    "tp2 pp2 dp2": Shape(8, [
        f"policy.parallel={{tp: 2, pp: 2, {INTERLEAVED}}}", "value.parallel={tp: 2, sequence_parallel: true}", "reward.parallel={pp: 2}",
        "reference.parallel={tp: 2, pp: 2}", "generation.parallel={tp: 2}",
    ]),
    "tp2 pp4": Shape(8, [
        f"policy.parallel={{tp: 2, pp: 4, {INTERLEAVED}}}", "value.parallel={tp: 2, pp: 2}", "reward.parallel={tp: 2}",
        "reference.parallel={pp: 4}", "generation.parallel={tp: 1, pp: 2}",
    ]),
}  # fmt: skip


@dataclass(frozen=True)
class Proof:
    """What was seen."""

    curve: float
    """The largest relative difference of any metric or log-probability of any step from those of one rank."""
    peak: float
    """The largest relative difference of any rank's peak in any phase from its plan's."""
    wrong_bytes: Sequence[str]
    """What a rank holds that its plan does not say."""

    @property
    def holds(self) -> bool:
        """Whether all is as it should be."""
        return self.curve <= CURVE and self.peak <= PEAK and not self.wrong_bytes


def prove(recipe: Path, runs: Path, ranks: Ranks, shape: Shape) -> Proof:
    """Train PPO of the recipe in `shape` into runs/ppo, beside the run of one rank in recipe/runs/ppo, and hold it against its plan."""
    yaml = recipe / "ppo.yaml"
    keys = [*shape.keys, *OFFLOAD, "policy.recompute=selective", "value.recompute=selective"]
    models = run_models(yaml, keys, {}, shape.num_ranks)
    seen = ranks.run(trained_and_planned, yaml, [f"run.dir={runs / 'ppo'}", *keys], models)
    wrong, peak = [], 0.0
    plans = dry_run_each([Job(models, rank, shape.num_ranks // 2) for rank in range(shape.num_ranks)])
    for rank, ((held, host_bytes, real), plan) in enumerate(zip(seen, plans, strict=True)):
        wrong += [f"rank {rank}: {role} holds {held[role]}, planned {plan.held[role]}" for role in held if held[role] != plan.held[role]]
        if host_bytes != plan.host_bytes or not host_bytes:
            wrong.append(f"rank {rank}: {host_bytes} bytes rest on the host, planned {plan.host_bytes}")
        phases = [phase for phase in plan.peaks if phase != "build"]
        peak = max(peak, *(abs(plan.peak(phase) / real.peak(phase) - 1) for phase in phases))
    one, other = recipe / "runs" / "ppo", runs / "ppo"
    curve = difference([*curves(one), *lines_of(one / "samples.jsonl")], [*curves(other), *lines_of(other / "samples.jsonl")])
    return Proof(curve, peak, wrong)


def trained_and_planned(yaml: Path, overrides: Sequence[str], models: RunModels) -> tuple[dict, int, RankRun]:
    """(what each model holds after training, its bytes on the host, the plan's step with the longest rows) of this rank."""
    engines = run_stage_of(yaml, overrides).roles.engines
    held = {role: bytes_held(engine) for role, engine in engines.items()}
    return held, sum(engine.offload.host_bytes for engine in engines.values()), run_for_real(models)


def gelu_in_one_pass(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def run_for_real(models: RunModels) -> RankRun:
    """A plan's step on this rank of a world that exists, under the plan's meter."""
    world = World.connect()
    as_on_gpus = (
        mock.patch.object(NearMemory, "_sees", return_value=False),  # messages: what is read from memory takes no buckets
        mock.patch.object(cache, "has_sparse_products", return_value=False),  # a mask where a CPU's attention has tensors of indices
        mock.patch.object(activation._GeluTanh, "apply", gelu_in_one_pass),  # a CPU's passes have tensors between them
    )
    with Meter(world.device) as meter, _initial_weights(), contextlib.ExitStack() as patches:
        for patch in as_on_gpus:
            patches.enter_context(patch)
        recorder = Recorder(world, meter, gpus_per_node=max(1, models.num_ranks // 2))
        STAGES[models.config.stage](models, world, recorder)
    return recorder.run


@contextlib.contextmanager
def _initial_weights():
    """Models are built with weights, without which a step would be skipped."""
    trained, frozen = ModelPlan.trained, ModelPlan.frozen

    def filled(make):
        def build(plan, world, **how):
            engine = make(plan, world, **how)
            initialize(engine.transformers, engine.spec, engine.groups, seed=1)
            return engine

        return build

    with mock.patch.object(ModelPlan, "trained", filled(trained)), mock.patch.object(ModelPlan, "frozen", filled(frozen)):
        yield


def difference(one: object, other: object) -> float:
    """The largest of |a - b| / max(1, |a|) over the floats of two nested values; infinite where anything else differs."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return max((difference(one[key], other[key]) for key in one), default=0.0)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return max((difference(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) / max(1.0, abs(one))
    return 0.0 if one == other else float("inf")


def main() -> int:
    """Prove the shapes that were asked for; exit status 1 where one does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["tp2 pp2 dp2", "tp2 pp4"])
    shapes = parser.parse_args().shapes
    held = True
    with tempfile.TemporaryDirectory() as folder, RankProcesses() as processes:
        recipe = make_recipe(Path(folder) / "recipe")
        one = Ranks(processes, world_size=1)
        one.run(check_stages, recipe, recipe / "runs", ["base"], ["model.architecture.num_layers=8"])
        one.run(check_stages, recipe, recipe / "runs", ["sft", "reward", "ppo"], [])
        for number, name in enumerate(shapes):
            start = time.monotonic()
            proof = prove(recipe, Path(folder) / str(number), Ranks(processes, world_size=SHAPES[name].num_ranks), SHAPES[name])
            held &= proof.holds
            of = f"{SHAPES[name].num_ranks} ranks, policy {name}"
            print(
                f"{of}: {'holds' if proof.holds else 'DOES NOT HOLD'}; metrics differ by at most {proof.curve:.1e}, peaks by "
                f"{100 * proof.peak:.1f} %, kept bytes {'exact' if not proof.wrong_bytes else 'wrong'}, {time.monotonic() - start:.0f} s"
            )
            print("".join(f"  {line}\n" for line in proof.wrong_bytes), end="", flush=True)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
