"""The models of PPO, each in its own layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megarlhf.config.ppo import PpoConfig
from megarlhf.data.tokenizers import Tokenizer
from megarlhf.engine.frozen import FrozenEngine
from megarlhf.engine.trainable import TrainEngine
from megarlhf.parallel.groups import ModelGroups
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.resharding.plan import nearest_layout
from megarlhf.runs.folder import Run
from megarlhf.runs.models import ModelPlan, ModelPlanner
from megarlhf.runs.row_lengths import row_lengths


@dataclass(frozen=True)
class PpoModels:
    """Policy and value are trained, reward and reference frozen; sizes and layouts are each model's own."""

    policy: TrainEngine
    value: TrainEngine | None
    """None where advantages are estimated without."""
    reward: FrozenEngine | None
    """None where rewards come from functions alone."""
    reference: FrozenEngine
    generation_groups: ModelGroups
    """Where the generator holds its copy of the policy: the policy's own groups when it generates in place."""
    notes: Sequence[str]
    """A line for each model."""

    @staticmethod
    def build(config: PpoConfig, run: Run, tokenizer: Tokenizer, *, problems: Sequence[str] = ()) -> PpoModels:
        """Check all of them against the run, then build them with their weights.

        ConfigError lists everything that does not fit, and the `problems` that were found before.
        """
        planner = ModelPlanner(run, tokenizer, config.parallel, problems=[*problems, *_other_rewards(config, run)])
        rows = row_lengths(config)
        policy = planner.plan("policy", config.policy, "lm", rows=rows["policy"])
        value = planner.plan("value", config.value, "scalar", rows=rows["value"]) if config.value is not None else None
        reward = planner.plan("reward", config.reward, "scalar", rows=rows["reward"]) if config.reward.load is not None else None
        reference = planner.plan("reference", config.reference, "lm", rows=rows["reference"])
        generation = _generation_layout(config, planner, policy)
        planner.check()
        models = PpoModels(
            policy=planner.build_trained(policy),
            value=planner.build_trained(value) if value is not None else None,
            reward=planner.build_frozen(reward) if reward is not None else None,
            reference=planner.build_frozen(reference),
            generation_groups=run.world.groups(generation),
            notes=(*planner.notes, f"generation: {generation}"),
        )
        models.policy.start_ema(config.ppo.ema_decay)
        return models


def _other_rewards(config: PpoConfig, run: Run) -> list[str]:
    """A reward model that a run began without, or with and goes on without."""
    if run.resumed is None or ("reward" in run.resumed.state["sources"]) == (config.reward.load is not None):
        return []
    how = "without" if config.reward.load is not None else "with"
    return [f"reward.load: the run in {run.dir} began {how} a reward model; keep it so, or choose another run.dir"]


def _generation_layout(config: PpoConfig, planner: ModelPlanner, policy: ModelPlan | None) -> ParallelLayout | None:
    if policy is None or config.generation.parallel is None:
        return policy.layout if policy else None
    if config.generation.parallel.sequence_parallel or config.generation.parallel.virtual_pp > 1:
        planner.violations.append("generation.parallel: decoding one position at a time has no use for sequence_parallel or virtual_pp")
    try:
        layout = planner.layout(config.generation.parallel, policy.architecture)
        return nearest_layout(policy.architecture, "lm", policy.layout, layout)
    except ValueError as error:
        planner.violations.append(f"generation: {error}")
        return None
