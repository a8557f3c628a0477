"""From a run's configuration to its models: everything is checked, and all that is wrong is said, before any is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megarlhf.config.sections import AdamConfig, ModelConfig, ParallelConfig, TrainedModelConfig
from megarlhf.data.tokenizers import Tokenizer
from megarlhf.engine.checkpoint import load_weights, read_state
from megarlhf.engine.engine import Engine
from megarlhf.engine.frozen import FrozenEngine
from megarlhf.engine.optimizer import AdamSettings
from megarlhf.engine.trainable import TrainEngine
from megarlhf.models.architecture import Architecture, make_architecture
from megarlhf.models.parameters import Head
from megarlhf.models.transformer import ModelSpec, initialize, layout_violations
from megarlhf.parallel.groups import World
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.runs.agreement import refuse_together
from megarlhf.runs.folder import find_checkpoint


@dataclass(frozen=True)
class ModelPlan:
    """One model of a run, resolved but not yet built."""

    role: str
    config: ModelConfig
    architecture: Architecture
    head: Head
    layout: ParallelLayout
    checkpoint: Path | None
    saved_model: str | None
    """Its name in the checkpoint."""
    average: bool
    """Whether the checkpoint's moving average is taken."""

    def spec(self, *, dropout: float = 0.0) -> ModelSpec:
        """How to build it."""
        recompute = self.config.recompute if isinstance(self.config, TrainedModelConfig) else "none"
        return ModelSpec(
            architecture=self.architecture, head=self.head, precision=self.config.precision, recompute=recompute, dropout=dropout
        )

    def __str__(self) -> str:
        average = ", moving average" if self.average else ""
        source = f"from {self.checkpoint} ({self.saved_model}{average})" if self.checkpoint else "fresh weights"
        return f"{self.role}: {self.architecture.num_parameters():,} parameters, {self.layout}, {self.config.precision}, {source}"


class ModelPlanner:
    """Resolves the models of a run and collects every violation; `check` raises them together."""

    def __init__(
        self, world: World, tokenizer: Tokenizer, default_parallel: ParallelConfig, *, seed: int, problems: Sequence[str] = ()
    ) -> None:
        """`problems` were found before, and are raised with the planner's own."""
        self.world = world
        self.tokenizer = tokenizer
        self.default_parallel = default_parallel
        self.seed = seed
        self.violations = list(problems)
        self.notes: list[str] = []
        """A line for every model that was planned."""

    def plan(self, role: str, config: ModelConfig, head: Head, *, context: int) -> ModelPlan | None:
        """The plan of a model that must hold rows of `context` tokens; None when it cannot be made (see `check`)."""
        try:
            path, saved_model, average = self._source(config)
            architecture = self._architecture(config, path, saved_model)
            layout = self.layout(config.parallel, architecture)
        except ValueError as error:
            self.violations.append(f"{role}: {error}")
            return None
        if architecture.vocab_size != self.tokenizer.vocab_size:
            self.violations.append(
                f"{role}: its vocabulary has {architecture.vocab_size} ids, the tokenizer's {self.tokenizer.vocab_size}: "
                "models and tokenizer must be the ones that were trained together"
            )
        if architecture.max_seq_len < context:
            self.violations.append(
                f"{role}: its context of {architecture.max_seq_len} tokens is shorter than the {context} that the run needs "
                "(prompt plus response, or packed row)"
            )
        if path is not None:
            self._check_head(role, config, head, read_state(path).models[saved_model]["head"], path)
        plan = ModelPlan(role, config, architecture, head, layout, path, saved_model, average)
        self.notes.append(str(plan))
        return plan

    def _check_head(self, role: str, config: ModelConfig, head: Head, saved: Head, path: Path) -> None:
        if head == "lm" and saved == "scalar":
            self.violations.append(f"{role}: {path} holds a model with a scalar head (reward or value), and a language model is needed")
        if head == "scalar" and saved == "lm" and not isinstance(config, TrainedModelConfig):
            self.violations.append(f"{role}: {path} holds a language model, and a trained reward model is needed")

    def saved_head(self, config: ModelConfig) -> Head:
        """The head that a model was saved with; "lm" for fresh weights, and where `plan` will say what is wrong."""
        try:
            path, saved_model, _ = self._source(config)
        except ValueError:
            return "lm"
        return read_state(path).models[saved_model]["head"] if path is not None else "lm"

    def layout(self, parallel: ParallelConfig | None, architecture: Architecture) -> ParallelLayout:
        """A layout over the world. ValueError where it fits neither the world nor the model."""
        layout = self.world.layout(**dataclasses.asdict(parallel or self.default_parallel))
        if found := layout_violations(architecture, layout):
            raise ValueError(f"the layout {layout} does not fit the model: " + "; ".join(found))
        return layout

    def check(self) -> None:
        """Raise ConfigError with everything that any rank found, if anything was; a collective of the world."""
        refuse_together(self.violations, self.world)

    def _source(self, config: ModelConfig) -> tuple[Path | None, str | None, bool]:
        if config.load is None:
            return None, None, False
        path = find_checkpoint(config.load, self.world)
        models = read_state(path).models
        name = config.load_model or ("policy" if "policy" in models else next(iter(models)) if len(models) == 1 else None)
        if name not in models:
            raise ValueError(f"load_model must name one of {', '.join(models)} in {path}, got {config.load_model!r}")
        return path, name, config.load_average and models[name]["has_ema"]

    def _architecture(self, config: ModelConfig, path: Path | None, saved_model: str | None) -> Architecture:
        if path is not None:
            return read_state(path).architecture(saved_model)
        fields = dataclasses.asdict(config.architecture)
        del fields["init_std"]
        return make_architecture(fields.pop("preset"), vocab_size=self.tokenizer.vocab_size, **fields)

    def build_frozen(self, plan: ModelPlan) -> FrozenEngine:
        """The model with its weights, for forward passes."""
        engine = FrozenEngine(plan.spec(), self.world.groups(plan.layout), micro_batch_size=plan.config.micro_batch_size)
        self._fill(engine, plan)
        return engine

    def build_trained(self, plan: ModelPlan, *, dropout: float = 0.0) -> TrainEngine:
        """The model with its weights and a new optimizer."""
        assert isinstance(plan.config, TrainedModelConfig)
        engine = TrainEngine(
            plan.spec(dropout=dropout),
            self.world.groups(plan.layout),
            micro_batch_size=plan.config.micro_batch_size,
            adam=adam_settings(plan.config.adam),
            seed=self.seed,
        )
        self._fill(engine, plan)
        engine.optimizer.adopt_parameters()
        return engine

    def _fill(self, engine: Engine, plan: ModelPlan) -> None:
        missing = None
        if plan.checkpoint is not None:
            missing = load_weights(plan.checkpoint, plan.saved_model, engine, average=plan.average)
        std = plan.config.architecture.init_std if plan.config.architecture is not None else 0.02
        initialize(engine.transformers, engine.spec, engine.groups, seed=self.seed, std=std, names=missing)


def adam_settings(config: AdamConfig) -> AdamSettings:
    """The optimizer's constants as the engine takes them."""
    return AdamSettings(
        betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=config.weight_decay, clip_grad=config.clip_grad
    )
