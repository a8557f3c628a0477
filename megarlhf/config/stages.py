"""One configuration class per command."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from megarlhf.config.errors import ConfigError
from megarlhf.config.fields import show
from megarlhf.config.loader import build_config
from megarlhf.config.relations import fresh_doubts, idle_doubts, same_file_doubts, task_violations, warmup_doubts, warmup_violations
from megarlhf.config.rules import (
    ROWS,
    WHOLE_BATCH,
    Count,
    CountOrNone,
    InputFile,
    NotNegative,
    Positive,
    Range,
    Rows,
    Share,
    ShareBelowOne,
)
from megarlhf.config.sections import (
    AdaptiveKlConfig,
    HeldOutTextConfig,
    LimitsConfig,
    ModelConfig,
    ParallelConfig,
    PretrainingDataConfig,
    RunConfig,
    SamplingConfig,
    ScheduleConfig,
    TokenizerConfig,
    TrainedModelConfig,
    WinRateConfig,
)
from megarlhf.config.yaml_tree import read_yaml

Epochs = Annotated[int, Range(1, 100_000)]
Finite = Annotated[float, Range()]


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What every command needs."""

    stage: Literal["pretrain", "sft", "reward", "ppo", "generate", "evaluate"]
    """The command this file is for; `megarlhf <command>` refuses a file for another."""
    run: RunConfig
    """Where the run lives."""
    tokenizer: TokenizerConfig
    """The tokenizer."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The layout of every model that does not name its own."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(StageConfig):
    """`megarlhf pretrain`: a language model on packed text (Brown et al. 2020)."""

    model: TrainedModelConfig
    """The model to train."""
    data: PretrainingDataConfig
    """Its text."""
    steps: Count
    """Optimizer steps."""
    batch_size: Rows = 512
    """Rows of one step."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate's schedule."""

    def violations(self) -> list[str]:
        """Rules across sections."""
        return warmup_violations(self.schedule, self.steps)

    def doubts(self) -> list[str]:
        """What is hardly meant."""
        return warmup_doubts("schedule.warmup_steps", self.schedule.warmup_steps, self.steps)


@dataclass(frozen=True, kw_only=True)
class SftDataConfig:
    """Demonstrations."""

    train: InputFile
    """JSONL of {"prompt", "response"}."""
    valid: InputFile | None = None
    """Demonstrations of other prompts, for validation."""
    pretraining: PretrainingDataConfig | None = None
    """Text for the pretraining mix and for the language-model loss on held-out text."""


@dataclass(frozen=True, kw_only=True)
class SftConfig(StageConfig):
    """`megarlhf sft`: supervised fine-tuning on demonstrations (Ouyang et al. 2022, Appendices C.1 and C.3)."""

    model: TrainedModelConfig
    """The model to fine-tune."""
    data: SftDataConfig
    """Its demonstrations."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Row lengths and bad records."""
    epochs: Epochs = 16
    """Passes over the demonstrations: 16 for the SFT baseline (C.1), 2 for the model that PPO starts from (C.3)."""
    batch_size: Rows = 32
    """Demonstrations of one step (32 for 1.3B and 6B, 8 for 175B)."""
    dropout: ShareBelowOne = 0.2
    """Residual dropout (C.1)."""
    pretraining_mix: ShareBelowOne = 0.0
    """Share of pretraining text in the loss, by tokens: 0.1 for the model that PPO starts from (C.3: "10 % pretraining data"; mixes
    are shares of full rows of equal length, so of tokens, in Brown et al. 2020, Table 2.2). Rows of it come on top of batch_size:
    that share of it, one at least; whatever their number, their tokens together weigh this much."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate's schedule: cosine to 10 %, no warm-up (C.1)."""
    select_by: Literal["last", "valid_loss", "reward"] = "last"
    """Which checkpoint becomes `best`: the last, the lowest validation loss, or the highest reward-model score of
    responses sampled for validation prompts (C.1); the last two are judged at every evaluation."""
    reward: ModelConfig | None = None
    """The reward model that judges when select_by is reward."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How validation responses are sampled for the reward model."""

    def violations(self) -> list[str]:
        """Rules across sections."""
        found = []
        if self.pretraining_mix and self.data.pretraining is None:
            found.append(f"pretraining_mix {self.pretraining_mix} needs data.pretraining")
        if self.select_by != "last" and self.data.valid is None:
            found.append(f"select_by {self.select_by} needs data.valid")
        if self.select_by != "last" and self.run.eval_every == 0:
            found.append(f"select_by {self.select_by} needs run.eval_every: judged at the end only, there is nothing to select from")
        if self.select_by == "reward" and self.reward is None:
            found.append("select_by reward needs reward, the model that judges")
        if self.select_by != "reward" and self.reward is not None:
            found.append(f"reward judges only with select_by: reward, and select_by is {self.select_by}")
        return found

    def doubts(self) -> list[str]:
        """What is hardly meant."""
        return same_file_doubts(train=self.data.train, valid=self.data.valid) + fresh_doubts(model=self.model)


@dataclass(frozen=True, kw_only=True)
class RewardDataConfig:
    """Rankings."""

    train: InputFile
    """JSONL of {"prompt", "responses", "ranks"} or {"prompt", "chosen", "rejected"}."""
    valid: InputFile | None = None
    """Rankings of other prompts, for accuracy."""
    demonstrations: InputFile | None = None
    """Demonstrations whose mean score becomes 0 (Ouyang et al. 2022, section 3.5)."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig(StageConfig):
    """`megarlhf reward`: a reward model from rankings (Ouyang et al. 2022, section 3.5 and Appendix C.2)."""

    model: TrainedModelConfig
    """The model to train; its unembedding is replaced by a scalar head."""
    data: RewardDataConfig
    """Its rankings."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Row lengths and bad records."""
    epochs: Epochs = 1
    """Passes over the rankings; more overfit (C.2)."""
    batch_size: Rows = 64
    """Prompts of one step, each with all of its completions (C.2)."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate's schedule: cosine to 10 % (C.2)."""

    def doubts(self) -> list[str]:
        """What is hardly meant."""
        return same_file_doubts(train=self.data.train, valid=self.data.valid) + fresh_doubts(model=self.model)


@dataclass(frozen=True, kw_only=True)
class PpoDataConfig:
    """Prompts."""

    prompts: InputFile
    """JSONL of {"prompt"}."""
    prompts_valid: InputFile | None = None
    """Prompts of other users, for the validation reward."""
    pretraining: PretrainingDataConfig | None = None
    """Text for the pretraining term and for the language-model loss on held-out text."""


@dataclass(frozen=True, kw_only=True)
class PpoSettings:
    """PPO-ptx (Ouyang et al. 2022, section 3.5, equation 2 and Appendix C.4)."""

    iterations: Count = 500
    """Rollout-and-update rounds: 256k episodes in batches of 512."""
    batch_size: Rows = 512
    """Episodes of one iteration."""
    minibatch_size: Rows = 64
    """Episodes of one optimizer step."""
    epochs: Epochs = 1
    """Passes over an iteration's episodes."""
    kl_coef: NotNegative = 0.02
    """beta: weight of the per-token KL penalty against the reference."""
    adaptive_kl: AdaptiveKlConfig | None = None
    """Let kl_coef follow a target; null keeps it fixed, as the paper does."""
    gamma: Share = 1.0
    """Discount: none."""
    gae_lambda: Share = 0.95
    """GAE's lambda (not in the paper; Stiennon et al. 2020, Appendix B.1)."""
    clip: Annotated[float, Range(0, 1, above=True, below=True)] = 0.2
    """Clip range of the probability ratio."""
    value_clip: Positive | None = 0.2
    """Clip range of the value's change (not in the paper; Ziegler et al. 2019's code); null does not clip."""
    standardize_advantages: bool = True
    """Advantages to mean 0 and variance 1 over the iteration's response tokens (not in the paper; Ziegler et al.'s code)."""
    ptx_coef: NotNegative = 27.8
    """gamma of equation 2: weight of the pretraining term; 0 is plain PPO."""
    ptx_ratio: Rows = 8
    """Pretraining rows per episode."""
    unfinished_penalty: Finite | None = None
    """Score of a response that did not end within its limit (Ziegler et al. 2019: -1); null keeps the reward model's."""
    recompute_logprobs: bool = True
    """Take the acting policy's log-probabilities from a forward pass of the trainer, so that the first minibatch's ratio is
    exactly 1 in every precision: it scores the micro-batches that the first epoch trains. false takes the generator's, the
    same model's up to the rounding of its precision, and saves that pass."""
    warmup_iterations: CountOrNone = 10
    """Iterations over which both learning rates rise linearly from a tenth; constant after."""
    ema_decay: ShareBelowOne = 0.992
    """Decay of the policy's moving average, per iteration; 0 keeps the newest weights."""

    def violations(self) -> list[str]:
        """Rules within the section."""
        found = []
        if rest := self.batch_size % self.minibatch_size:
            found.append(f"batch_size {self.batch_size} must be divisible by minibatch_size {self.minibatch_size}; rest {rest}")
        if self.ptx_coef and self.ptx_ratio * self.batch_size > ROWS:
            rows = f"ptx_ratio {self.ptx_ratio} times batch_size {self.batch_size}"
            found.append(f"{rows} must be at most {ROWS} rows, got {self.ptx_ratio * self.batch_size}: {WHOLE_BATCH}")
        return found

    def doubts(self) -> list[str]:
        """What is hardly meant."""
        found = warmup_doubts("warmup_iterations", self.warmup_iterations, self.iterations)
        if self.unfinished_penalty is not None and self.unfinished_penalty > 0:
            found.append(f"unfinished_penalty {self.unfinished_penalty:g} is above 0: it would reward responses that do not end")
        if self.kl_coef == 0 and self.adaptive_kl is None:
            found.append("kl_coef 0 lets the policy move away from the reference freely")
        return found


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """The generator that shares the policy's weights."""

    parallel: ParallelConfig | None = None
    """Its layout; null generates in place, in the policy's own."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How responses are sampled."""


@dataclass(frozen=True, kw_only=True)
class PpoConfig(StageConfig):
    """`megarlhf ppo`: PPO or PPO-ptx with four co-resident models."""

    policy: TrainedModelConfig
    """The policy, from the 2-epoch SFT model (Appendix C.3)."""
    value: TrainedModelConfig
    """The value function, from the reward model (Appendix C.4)."""
    reward: ModelConfig
    """The frozen reward model."""
    reference: ModelConfig
    """The frozen model that the KL penalty is taken against: what the policy starts from."""
    data: PpoDataConfig
    """Prompts and pretraining text."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Prompt lengths and bad records."""
    ppo: PpoSettings = field(default_factory=PpoSettings)
    """The algorithm."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    """The generator."""

    def violations(self) -> list[str]:
        """Rules across sections."""
        found = []
        if self.ppo.ptx_coef and self.data.pretraining is None:
            found.append(f"ppo.ptx_coef {self.ppo.ptx_coef} needs data.pretraining (or set ppo.ptx_coef to 0 for plain PPO)")
        if self.generation.sampling.temperature == 0:
            found.append("generation.sampling.temperature 0 explores nothing: PPO needs a positive temperature")
        return found

    def doubts(self) -> list[str]:
        """What is hardly meant."""
        found = same_file_doubts(prompts=self.data.prompts, prompts_valid=self.data.prompts_valid)
        found += fresh_doubts(policy=self.policy, value=self.value) + idle_doubts(self)
        if self.policy.load != self.reference.load and self.policy.load is not None:
            found.append(f"reference.load {self.reference.load} is not what the policy starts from, policy.load {self.policy.load}")
        sampling = self.generation.sampling
        biased = [name for name in ("top_k", "top_p") if getattr(sampling, name) is not None]
        return found + [f"generation.sampling.{name} samples from other probabilities than the update assumes" for name in biased]


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(StageConfig):
    """`megarlhf generate`: sample responses for a file of prompts into <run.dir>/responses.jsonl."""

    model: ModelConfig
    """The model to sample from."""
    prompts: InputFile
    """JSONL of {"prompt"}."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Prompt lengths and bad records."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How responses are sampled."""

    def doubts(self) -> list[str]:
        """What is hardly meant."""
        return idle_doubts(self)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(StageConfig):
    """`megarlhf evaluate`: what the given data allow, into <run.dir>/evaluation.json."""

    model: ModelConfig
    """The model to evaluate: a language model, or a reward model."""
    reward: ModelConfig | None = None
    """A reward model that scores the language model's responses to `prompts`, and is judged by `rankings`."""
    reference: ModelConfig | None = None
    """A language model against which the KL of the responses is taken."""
    prompts: InputFile | None = None
    """JSONL of {"prompt"} to answer."""
    demonstrations: InputFile | None = None
    """JSONL of {"prompt", "response"}: loss on the responses."""
    rankings: InputFile | None = None
    """JSONL of rankings: the accuracy of `reward`, or of `model` where that is a reward model."""
    tasks: tuple[InputFile, ...] = ()
    """JSONL files, one for each benchmark (docs/evaluation.md): multiple choice, or answers generated at temperature 0."""
    shots: Annotated[int, Range(0, 1000)] | None = None
    """Examples before each query of a task; null: as many as its file says."""
    win_rate: WinRateConfig = field(default_factory=WinRateConfig)
    """Whose answers are better, and how often."""
    text: HeldOutTextConfig | None = None
    """Packed text: language-model loss."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Row lengths and bad records."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How responses are sampled."""

    def violations(self) -> list[str]:
        """Rules across sections."""
        found, against = task_violations(self.tasks, self.shots), self.win_rate.against
        if not any((self.prompts, self.demonstrations, self.rankings, self.tasks, self.text, against, self.win_rate.labels)):
            data = "prompts, demonstrations, rankings, tasks, win_rate.against, win_rate.labels or text"
            found.append(f"{data} must be given: there is nothing to evaluate on")
        if self.reference and self.prompts is None:
            found.append("reference judges responses: it needs prompts")
        if self.reward and not any((self.prompts, self.rankings, against)):
            found.append("reward judges responses or rankings: it needs prompts, rankings or win_rate.against")
        if against and self.win_rate.responses is None and self.prompts is None:
            found.append("win_rate.against holds B's answers: win_rate.responses must name A's, or prompts what the model answers")
        return found

    def doubts(self) -> list[str]:
        """What is hardly meant."""
        return idle_doubts(self)


COMMANDS: dict[str, type[StageConfig]] = {
    "pretrain": PretrainConfig,
    "sft": SftConfig,
    "reward": RewardConfig,
    "ppo": PpoConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
}


def load_stage_config(path: Path | str, overrides: Sequence[str] = (), *, command: str | None = None) -> StageConfig:
    """Read a run's YAML as the configuration of its `stage`.

    ConfigError (a ValueError) lists every violation at once; also where the file is for another command than `command`.
    """
    path = Path(path)
    tree = read_yaml(path)
    stage = tree.get("stage")
    if not isinstance(stage, str) or stage not in COMMANDS:
        close = difflib.get_close_matches(str(stage), COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{path}: stage must be one of {', '.join(COMMANDS)}, got {show(stage)}{hint}")
    if command is not None and stage != command:
        raise ConfigError(f"{path}: stage is {stage}; run it with `megarlhf {stage}`, not `megarlhf {command}`")
    config = build_config(COMMANDS[stage], tree, overrides, name=str(path))
    if config.stage != stage:
        raise ConfigError(f"command line: stage: the file is for {stage}, and an override cannot make it one for {config.stage}")
    return config
