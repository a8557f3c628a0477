"""From a run's configuration to its models: everything is checked, and all that is wrong is said, before any is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from megarlhf.config.sections import AdamConfig, ModelConfig, ParallelConfig, SamplingConfig, TrainedModelConfig
from megarlhf.data.templates import FINGERPRINT, has_template, template_fingerprint
from megarlhf.data.tokenized import Row
from megarlhf.data.tokenizers import Tokenizer
from megarlhf.engine.checkpoint import load_weights, missing_from, saved_architecture
from megarlhf.engine.engine import Engine
from megarlhf.engine.footprint import bytes_kept, start_problems
from megarlhf.engine.frozen import FrozenEngine
from megarlhf.engine.offload import Kind
from megarlhf.engine.optimizer import AdamSettings
from megarlhf.engine.trainable import TrainEngine
from megarlhf.generation.cache import bytes_per_slot
from megarlhf.generation.schedule import slots_within
from megarlhf.models.architecture import Architecture, make_architecture
from megarlhf.models.parameters import Head
from megarlhf.models.transformer import DTYPES, ModelSpec, initialize, layout_violations
from megarlhf.parallel import platform
from megarlhf.parallel.groups import World
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.runs.agreement import RunError, on_rank_0, refuse_together
from megarlhf.runs.checkpoints import find_source, unfinished
from megarlhf.runs.folder import Run
from megarlhf.runs.row_lengths import RowLength
from megarlhf.storage.checkpoints import Saved

MANY_PARAMETERS = 100_000_000
"""Of a model for which the precision decides about time and memory."""


@dataclass(frozen=True)
class Source:
    """Where a model's weights come from: a saved model, found once and kept with the run."""

    saved: Saved
    model: str
    average: bool
    """Whether its moving average is taken."""
    doubt: str = ""
    """What is doubtful of it, such as that its run goes on."""

    @property
    def head(self) -> Head:
        """The head that it was saved with."""
        return self.saved.models[self.model]["head"]

    def __str__(self) -> str:
        return f"{self.saved.path} ({self.model}{', moving average' if self.average else ''})"


@dataclass(frozen=True)
class ModelPlan:
    """One model of a run, resolved but not yet built."""

    role: str
    config: ModelConfig
    architecture: Architecture
    head: Head
    layout: ParallelLayout
    source: Source | None
    """None for fresh weights, and for a trained model that goes on from the run's own checkpoint."""
    resumed: bool
    """Whether its weights are the run's own checkpoint's."""

    def spec(self, *, dropout: float = 0.0) -> ModelSpec:
        """How to build it."""
        recompute = self.config.recompute if isinstance(self.config, TrainedModelConfig) else "none"
        return ModelSpec(
            architecture=self.architecture, head=self.head, precision=self.config.precision, recompute=recompute, dropout=dropout
        )

    def bytes_kept(self, rank: int) -> dict[str, int]:
        """Kind -> bytes that `rank` keeps of it between steps, without the average."""
        place, trained = self.layout.coordinates(rank), isinstance(self.config, TrainedModelConfig)
        return bytes_kept(self.architecture, self.head, self.layout, place, precision=self.config.precision, trained=trained)

    def cache_problems(self, key: str, sampling: SamplingConfig, prompt_len: int, *, layout: ParallelLayout | None = None) -> list[str]:
        """What is wrong where the section `key` allows a cache too small for one prompt of `prompt_len` tokens; `layout`: None, its own."""
        capacity = min(prompt_len + sampling.max_new_tokens, self.architecture.max_seq_len)
        of_one = bytes_per_slot(self.architecture, layout or self.layout, DTYPES[self.config.precision], capacity)
        try:
            slots_within(sampling.kv_cache_bytes, of_one, wanted=1, capacity=capacity)
        except ValueError as error:
            return [f"{key}.{error}"]
        return []

    def frozen(self, world: World) -> FrozenEngine:
        """The model for forward passes, its weights unset."""
        c = self.config
        how = {"micro_batch_size": c.micro_batch_size, "micro_batch_tokens": c.micro_batch_tokens, "offload": self.offload}
        return FrozenEngine(self.spec(), world.groups(self.layout), **how)

    def trained(self, world: World, *, seed: int, dropout: float = 0.0) -> TrainEngine:
        """The model with a new optimizer, its weights unset."""
        assert isinstance(self.config, TrainedModelConfig)
        return TrainEngine(
            self.spec(dropout=dropout),
            world.groups(self.layout),
            micro_batch_size=self.config.micro_batch_size,
            micro_batch_tokens=self.config.micro_batch_tokens,
            adam=adam_settings(self.config.adam),
            seed=seed,
            offload=self.offload,
            overlap=self.config.overlap,
        )

    @property
    def offload(self) -> tuple[Kind, ...]:
        """What of it rests on the host between uses: only some stages have phases that do not use a model."""
        return getattr(self.config, "offload", ())

    def __str__(self) -> str:
        new_head = ", with a new scalar head" if self.source and self.source.head != self.head else ""
        given = f"from {self.source}{new_head}{self.source.doubt}" if self.source else "fresh weights"
        source = "from this run's checkpoint" if self.resumed else given
        idle = getattr(self.config, "overlap", False) and self.layout.dp == 1
        doubt = "; is this meant? overlap has no effect with dp 1: there is nothing to exchange" if idle else ""
        parameters = f"{self.architecture.num_parameters(self.head):,} parameters"
        return f"{self.role}: {parameters}, {self.layout}, {self.config.precision}, {source}{doubt}"


class ModelPlanner:
    """Resolves the models of a run and collects every violation; `check` raises them together.

    What a run took its models from when it began is kept in its checkpoints: a resume takes the same, or refuses.
    """

    def __init__(self, run: Run, tokenizer: Tokenizer, default_parallel: ParallelConfig, *, problems: Sequence[str] = ()) -> None:
        """`problems` were found before, and are raised with the planner's own."""
        self.run = run
        self._found: dict[str, Source] = {}
        self.world = run.world
        self.tokenizer = tokenizer
        self.default_parallel = default_parallel
        self.seed = run.config.seed
        self.violations = list(problems)
        self.plans: list[ModelPlan] = []
        self.notes: list[str] = []
        """A line for every model that was planned."""

    def plan(self, role: str, config: ModelConfig, head: Head, *, rows: Sequence[RowLength]) -> ModelPlan | None:
        """The plan of a model that must hold `rows` (see runs/row_lengths.py); None when it cannot be made (see `check`)."""
        resumed = self._resumed_model(role) if isinstance(config, TrainedModelConfig) else None
        try:
            source = self._kept_source(role, config, head, trained=resumed is not None)
            architecture = resumed or self._architecture(config, source)
            layout = self.layout(config.parallel, architecture)
        except ValueError as error:
            self.violations.append(f"{role}: {error}")
            return None
        origin = self.run.resumed if resumed else source.saved if source is not None else None
        if architecture.vocab_size != self.tokenizer.vocab_size and not self._belongs_to(origin, architecture):
            self.violations.append(
                f"{role}: its vocabulary has {architecture.vocab_size} ids, the tokenizer's {self.tokenizer.vocab_size}: "
                "models and tokenizer must be the ones that were trained together"
            )
        for longest in (row.on(multiple=layout.sequence_parts) for row in rows):
            if architecture.max_seq_len < longest.tokens:
                self.violations.append(
                    f"{role}: its context of {architecture.max_seq_len} tokens is shorter than the {longest.tokens} that the run needs "
                    f"({longest.keys}); lower them, or take a model with a longer context"
                )
        if source is not None and resumed is None:
            self._check_source(role, config, head, source)
        plan = ModelPlan(role, config, architecture, head, layout, None if resumed else source, resumed is not None)
        self.plans.append(plan)
        self.notes.append(f"{plan}{precision_doubt(config.precision, architecture.num_parameters(head), self.world.device.type)}")
        return plan

    def sample(
        self, key: str, sampling: SamplingConfig, plan: ModelPlan | None, rows: Sequence[Row], *, layout: ParallelLayout | None = None
    ) -> None:
        """The section `key` says how responses to the prompts of `rows` will be sampled, in the plan's own layout or in `layout`."""
        device = self.world.device.type
        if sampling.cuda_graphs and device != "cuda":
            self.violations.append(f"{key}.cuda_graphs: this process runs on a {device.upper()}, which has no CUDA graphs")
        if plan is not None and rows:
            self.violations += plan.cache_problems(key, sampling, max(len(row.prompt_ids) for row in rows), layout=layout)

    def _belongs_to(self, saved: Saved | None, architecture: Architecture) -> bool:
        """Whether a checkpoint was written with this very tokenizer and has room for it: many released models have ids to spare."""
        known = saved.state.get("fingerprints", {}).get("tokenizer") if saved is not None else None
        return known == self.tokenizer.fingerprint and architecture.vocab_size > self.tokenizer.vocab_size

    def _resumed_model(self, role: str) -> Architecture | None:
        """The architecture of a trained model in the checkpoint that the run goes on from."""
        saved = self.run.resumed
        if saved is None:
            return None
        return saved_architecture(saved, role if role in saved.models else next(iter(saved.models)))

    def _check_source(self, role: str, config: ModelConfig, head: Head, source: Source) -> None:
        path = source.saved.path
        if head == "lm" and source.head == "scalar":
            self.violations.append(f"{role}: {path} holds a model with a scalar head (reward or value), and a language model is needed")
        if head == "scalar" and source.head == "lm" and not isinstance(config, TrainedModelConfig):
            self.violations.append(f"{role}: {path} holds a language model, and a trained reward model is needed")
        tokenizer = source.saved.state.get("fingerprints", {}).get("tokenizer")
        if tokenizer is not None and tokenizer != self.tokenizer.fingerprint:
            self.violations.append(f"{role}: {path} was trained with another tokenizer than tokenizer.path, though of the same size")

    def saved_heads(self, config: ModelConfig) -> set[Head]:
        """The heads of the models that `load` holds, or of the one that load_model names; none where `plan` will say what is wrong."""
        if config.load is None:
            return {"lm"}
        try:
            models = on_rank_0(self.world, find_source, config.load).models
        except (ValueError, RunError):
            return set()
        return {model["head"] for name, model in models.items() if config.load_model in (None, name)}

    def layout(self, parallel: ParallelConfig | None, architecture: Architecture) -> ParallelLayout:
        """A layout over the world. ValueError where it fits neither the world nor the model."""
        layout = self.world.layout(**dataclasses.asdict(parallel or self.default_parallel))
        if found := layout_violations(architecture, layout):
            raise ValueError(f"the layout {layout} does not fit the model: " + "; ".join(found))
        return layout

    def check(self) -> None:
        """Raise ConfigError with everything that any rank found, if anything was; a collective of the world.

        On CUDA that includes models whose weights and optimizers are larger than the device: `megarlhf plan` says so before.

        Then the files of every source are read and compared with their checksums, each rank reading its share.
        """
        refuse_together([*self.violations, *self.too_large_for(platform.device_memory_bytes())], self.world)
        sources = {source.saved.path: source.saved for source in self._found.values()}
        refuse_together([wrong for saved in sources.values() for wrong in saved.damages(self.world.rank, self.world.size)], self.world)

    def too_large_for(self, capacity: int | None) -> list[str]:
        """A sentence where the models that an update takes, without any activation, do not fit `capacity` bytes; None: of unknown size."""
        here = [plan for plan in self.plans if "weights" not in plan.offload or isinstance(plan.config, TrainedModelConfig)]
        kept = [(plan.role, sum(plan.bytes_kept(self.world.rank).values())) for plan in here]
        return start_problems(kept, capacity, rank=self.world.rank)

    def _kept_source(self, role: str, config: ModelConfig, head: Head, *, trained: bool) -> Source | None:
        """The source of a model, the same that the run began with.

        With `trained` the weights are the run's own by now, and the source need not be there any more.
        """
        configured = {"load": config.load, "load_model": config.load_model, "load_average": config.load_average}
        before = self.run.resumed.state["sources"].get(role) if self.run.resumed is not None else None
        same = before is not None and all(before[key] == value for key, value in configured.items())
        if trained and (same or before is None):
            if before is None and config.load is not None:
                raise ValueError(f"load {config.load}: the run in {self.run.dir} began with fresh weights, and keeps its own")
            self.run.sources |= {role: before} if before is not None else {}
            return None
        if config.load is None:
            if before is not None:
                raise ValueError(f"load is null, but the run in {self.run.dir} began with {before['path']}")
            return None
        source = self._find(config, role, head, path=before["path"] if same else config.load)
        found = {"model": source.model, "average": source.average, "identity": source.saved.identity}
        if before is not None and any(before[key] != value for key, value in found.items()):
            raise ValueError(
                f"load {config.load} is now {source}, which is not what the run in {self.run.dir} began with, "
                f"{before['path']} ({before['model']}); bring that back, or choose another run.dir"
            )
        self.run.sources[role] = {**configured, "path": str(source.saved.path), **found}
        self._found[role] = source
        return source

    def _find(self, config: ModelConfig, role: str, head: Head, *, path: str) -> Source:
        saved = on_rank_0(self.world, find_source, path)
        model = chosen_model(saved, config.load_model, role, head)
        average = config.load_average and saved.models[model]["has_ema"]
        doubt = on_rank_0(self.world, lambda: unfinished(path, saved) + self._other_template(saved))
        return Source(saved, model, average, doubt)

    def _other_template(self, saved: Saved) -> str:
        """What is doubtful of a model that was trained on chats, where the template beside the tokenizer writes them otherwise now."""
        theirs = saved.state.get("fingerprints", {}).get(FINGERPRINT)
        if theirs is None or not has_template(self.tokenizer.path) or template_fingerprint(self.tokenizer.path) == theirs:
            return ""
        return "; is this meant? it was trained on chats that another template wrote than the one beside tokenizer.path"

    def _architecture(self, config: ModelConfig, source: Source | None) -> Architecture:
        if source is not None:
            return saved_architecture(source.saved, source.model)
        fields = dataclasses.asdict(config.architecture)
        del fields["init_std"]
        return make_architecture(fields.pop("preset"), vocab_size=self.tokenizer.vocab_size, **fields)

    def build_frozen(self, plan: ModelPlan) -> FrozenEngine:
        """The model with its weights, for forward passes."""
        engine = plan.frozen(self.world)
        self._fill(engine, plan)
        engine.offload.rest()
        return engine

    def build_trained(self, plan: ModelPlan, *, dropout: float = 0.0) -> TrainEngine:
        """The model with its weights and a new optimizer."""
        engine = plan.trained(self.world, seed=self.seed, dropout=dropout)
        if not plan.resumed:
            self._fill(engine, plan)
        engine.offload.rest()
        return engine

    def _fill(self, engine: Engine, plan: ModelPlan) -> None:
        """Initial weights where there are no saved ones; then those, which a trained model keeps in float32."""
        source = plan.source
        std = plan.config.architecture.init_std if plan.config.architecture is not None else 0.02
        fresh = missing_from(source.saved, source.model, engine) if source is not None else None
        initialize(engine.transformers, engine.spec, engine.groups, seed=self.seed, std=std, names=fresh)
        if isinstance(engine, TrainEngine):
            engine.optimizer.adopt_parameters()
        if source is not None:
            load_weights(source.saved, source.model, engine, average=source.average)


def precision_doubt(precision: str, num_parameters: int, device: str) -> str:
    """A doubt about a large model in float32, the default, where 16 bits are what the device is made for."""
    if precision != "fp32" or num_parameters < MANY_PARAMETERS or device != "cuda":
        return ""
    return "; is this meant? a GPU multiplies bf16 some ten times as fast as fp32, and its activations take half the memory"


def chosen_model(saved: Saved, named: str | None, role: str, head: Head) -> str:
    """Which model of a checkpoint is meant. ValueError where only its user can say.

    The one that is named, else the only one, else the one of the role's own name with the head that is needed, else the only
    language model where one is needed.
    """
    models = saved.models
    if named is not None:
        if named not in models:
            raise ValueError(f"load_model must name one of {', '.join(models)} in {saved.path}, got {named!r}")
        return named
    if len(models) == 1:
        return next(iter(models))
    if role in models and models[role]["head"] == head:
        return role
    language_models = [name for name, model in models.items() if model["head"] == "lm"]
    if head == "lm" and len(language_models) == 1:
        return language_models[0]
    raise ValueError(f"load_model must name one of {', '.join(models)} in {saved.path}: none of them is named {role}")


def adam_settings(config: AdamConfig) -> AdamSettings:
    """The optimizer's constants as the engine takes them."""
    return AdamSettings(
        betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=config.weight_decay, clip_grad=config.clip_grad
    )
