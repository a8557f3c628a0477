"""The models of PPO, each in its own layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megarlhf.config.ppo import PpoConfig
from megarlhf.data.tokenized import PromptRow
from megarlhf.data.tokenizers import Tokenizer
from megarlhf.engine.engine import Engine
from megarlhf.engine.frozen import FrozenEngine
from megarlhf.engine.offload import Kind
from megarlhf.engine.trainable import TrainEngine
from megarlhf.parallel.groups import ModelGroups
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.resharding.plan import nearest_layout
from megarlhf.runs.folder import Run
from megarlhf.runs.models import ModelPlan, ModelPlanner
from megarlhf.runs.row_lengths import row_lengths

TRAINED: tuple[Kind, ...] = ("weights", "gradients", "optimizer")
USES: dict[str, dict[str, tuple[Kind, ...]]] = {
    "reshard": {"policy": ("weights",)},
    "generate": {"policy": ("weights",)},
    "score": {"reward": ("weights",), "policy": ("weights",), "reference": ("weights",), "value": ("weights",)},
    "update": {"policy": TRAINED, "value": TRAINED},
    "average": {"policy": ("weights", "optimizer", "average")},
    "evaluate": {"policy": ("weights",)},
}
"""Phase of an iteration, or part of one -> role -> what the phase uses of it, in the order of its use. What an evaluation takes beside the
policy's weights each model sends for itself."""


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

    def turn_to(self, phase: str) -> None:
        """Let what the phase does not use rest on the host, where that is configured, and send for what it uses, the first first."""
        engines = self.engines
        for role, engine in engines.items():
            engine.offload.rest(but=USES[phase].get(role, ()))
        for role, kinds in USES[phase].items():
            if role in engines:
                engines[role].offload.send_for(*kinds)

    @property
    def engines(self) -> dict[str, Engine]:
        """The models that there are, by role."""
        models = {"policy": self.policy, "value": self.value, "reward": self.reward, "reference": self.reference}
        return {role: engine for role, engine in models.items() if engine is not None}

    def offload_metrics(self) -> dict[str, float]:
        """"time/offload_seconds": what copies to and from the host made the computation wait since the last call."""
        if not any(engine.offload.kinds for engine in self.engines.values()):
            return {}
        return {"time/offload_seconds": self.generation_groups.side_stream.take_seconds()}

    @staticmethod
    def build(
        config: PpoConfig, run: Run, tokenizer: Tokenizer, prompts: Sequence[PromptRow], *, problems: Sequence[str] = ()
    ) -> PpoModels:
        """Check all of them against the run and its prompts, then build them with their weights.

        ConfigError lists everything that does not fit, and the `problems` that were found before.
        """
        planner = ModelPlanner(run, tokenizer, config.parallel, problems=[*problems, *_other_rewards(config, run)])
        rows = row_lengths(config)
        policy = planner.plan("policy", config.policy, "lm", rows=rows["policy"])
        value = planner.plan("value", config.value, "scalar", rows=rows["value"]) if config.value is not None else None
        reward = planner.plan("reward", config.reward, "scalar", rows=rows["reward"]) if config.reward.has_model else None
        reference = planner.plan("reference", config.reference, "lm", rows=rows["reference"])
        generation = _generation_layout(config, planner, policy)
        planner.sample("generation.sampling", config.generation.sampling, policy, prompts, layout=generation)
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
        models.policy.offload.rest()
        return models


def _other_rewards(config: PpoConfig, run: Run) -> list[str]:
    """A reward model that a run began without, or with and goes on without."""
    if run.resumed is None or ("reward" in run.resumed.state["sources"]) == config.reward.has_model:
        return []
    how = "without" if config.reward.has_model else "with"
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
