"""One configuration class per command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from megarlhf.config.loader import ConfigError, load_config
from megarlhf.config.sections import (
    HeldOutTextConfig,
    LimitsConfig,
    ModelConfig,
    ParallelConfig,
    PretrainingDataConfig,
    RunConfig,
    SamplingConfig,
    TokenizerConfig,
    TrainedModelConfig,
    at_least,
)


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
class ScheduleConfig:
    """How the learning rate moves from step to step."""

    shape: Literal["cosine", "constant"] = "cosine"
    """cosine: to final_fraction of the peak over the whole run (Ouyang et al. 2022, Appendices C.1 to C.3); constant."""
    warmup_steps: int = 0
    """Linear warm-up steps (the paper's SFT: none)."""
    final_fraction: float = 0.1
    """What the cosine ends at, as a fraction of the peak."""

    def violations(self) -> list[str]:
        """Rules within the section."""
        return at_least(self, 0, "warmup_steps", "final_fraction")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(StageConfig):
    """`megarlhf pretrain`: a language model on packed text (Brown et al. 2020)."""

    model: TrainedModelConfig
    """The model to train."""
    data: PretrainingDataConfig
    """Its text."""
    steps: int
    """Optimizer steps."""
    batch_size: int = 512
    """Rows of one step."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate's schedule."""

    def violations(self) -> list[str]:
        """Rules across sections."""
        return at_least(self, 1, "steps", "batch_size")


@dataclass(frozen=True, kw_only=True)
class SftDataConfig:
    """Demonstrations."""

    train: str
    """JSONL of {"prompt", "response"}."""
    valid: str | None = None
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
    epochs: int = 16
    """Passes over the demonstrations: 16 for the SFT baseline (C.1), 2 for the model that PPO starts from (C.3)."""
    batch_size: int = 32
    """Demonstrations of one step (32 for 1.3B and 6B, 8 for 175B)."""
    dropout: float = 0.2
    """Residual dropout (C.1)."""
    pretraining_mix: float = 0.0
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
        found = at_least(self, 1, "epochs", "batch_size")
        if not 0 <= self.dropout < 1:
            found.append(f"dropout must be in [0, 1), got {self.dropout}")
        if not 0 <= self.pretraining_mix < 1:
            found.append(f"pretraining_mix must be in [0, 1), got {self.pretraining_mix}")
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


@dataclass(frozen=True, kw_only=True)
class RewardDataConfig:
    """Rankings."""

    train: str
    """JSONL of {"prompt", "responses", "ranks"} or {"prompt", "chosen", "rejected"}."""
    valid: str | None = None
    """Rankings of other prompts, for accuracy."""
    demonstrations: str | None = None
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
    epochs: int = 1
    """Passes over the rankings; more overfit (C.2)."""
    batch_size: int = 64
    """Prompts of one step, each with all of its completions (C.2)."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate's schedule: cosine to 10 % (C.2)."""

    def violations(self) -> list[str]:
        """Rules across sections."""
        return at_least(self, 1, "epochs", "batch_size")


@dataclass(frozen=True, kw_only=True)
class PpoDataConfig:
    """Prompts."""

    prompts: str
    """JSONL of {"prompt"}."""
    prompts_valid: str | None = None
    """Prompts of other users, for the validation reward."""
    pretraining: PretrainingDataConfig | None = None
    """Text for the pretraining term and for the language-model loss on held-out text."""


@dataclass(frozen=True, kw_only=True)
class AdaptiveKlConfig:
    """A coefficient that follows a target KL (Ziegler et al. 2019, section 2.2); the paper's is fixed."""

    target: float = 6.0
    """KL of a whole response in nats."""
    horizon: int = 10000
    """Episodes over which the coefficient may move by about a fifth."""

    def violations(self) -> list[str]:
        """Rules within the section."""
        found = [] if self.target > 0 else [f"target must be above 0, got {self.target}"]
        return found + at_least(self, 1, "horizon")


@dataclass(frozen=True, kw_only=True)
class PpoSettings:
    """PPO-ptx (Ouyang et al. 2022, section 3.5, equation 2 and Appendix C.4)."""

    iterations: int = 500
    """Rollout-and-update rounds: 256k episodes in batches of 512."""
    batch_size: int = 512
    """Episodes of one iteration."""
    minibatch_size: int = 64
    """Episodes of one optimizer step."""
    epochs: int = 1
    """Passes over an iteration's episodes."""
    kl_coef: float = 0.02
    """beta: weight of the per-token KL penalty against the reference."""
    adaptive_kl: AdaptiveKlConfig | None = None
    """Let kl_coef follow a target; null keeps it fixed, as the paper does."""
    gamma: float = 1.0
    """Discount: none."""
    gae_lambda: float = 0.95
    """GAE's lambda (not in the paper; Stiennon et al. 2020, Appendix B.1)."""
    clip: float = 0.2
    """Clip range of the probability ratio."""
    value_clip: float | None = 0.2
    """Clip range of the value's change (not in the paper; Ziegler et al. 2019's code); null does not clip."""
    standardize_advantages: bool = True
    """Advantages to mean 0 and variance 1 over the iteration's response tokens (not in the paper; Ziegler et al.'s code)."""
    ptx_coef: float = 27.8
    """gamma of equation 2: weight of the pretraining term; 0 is plain PPO."""
    ptx_ratio: int = 8
    """Pretraining rows per episode."""
    unfinished_penalty: float | None = None
    """Score of a response that did not end within its limit (Ziegler et al. 2019: -1); null keeps the reward model's."""
    recompute_logprobs: bool = True
    """Take the acting policy's log-probabilities from a forward pass of the trainer, so that the first minibatch's ratio is
    exactly 1 in every precision: it scores the micro-batches that the first epoch trains. false takes the generator's, the
    same model's up to the rounding of its precision, and saves that pass."""
    warmup_iterations: int = 10
    """Iterations over which both learning rates rise linearly from a tenth; constant after."""
    ema_decay: float = 0.992
    """Decay of the policy's moving average, per iteration."""

    def violations(self) -> list[str]:
        """Rules within the section."""
        found = at_least(self, 1, "iterations", "batch_size", "minibatch_size", "epochs", "ptx_ratio")
        found += at_least(self, 0, "kl_coef", "clip", "value_clip", "ptx_coef", "warmup_iterations")
        if self.minibatch_size >= 1 and self.batch_size % self.minibatch_size:
            rest = self.batch_size % self.minibatch_size
            found.append(f"batch_size {self.batch_size} must be divisible by minibatch_size {self.minibatch_size}; rest {rest}")
        names = ("gamma", "gae_lambda", "ema_decay")
        return found + [f"{n} must be in [0, 1], got {getattr(self, n)}" for n in names if not 0 <= getattr(self, n) <= 1]


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


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(StageConfig):
    """`megarlhf generate`: sample responses for a file of prompts into <run.dir>/responses.jsonl."""

    model: ModelConfig
    """The model to sample from."""
    prompts: str
    """JSONL of {"prompt"}."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Prompt lengths and bad records."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How responses are sampled."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(StageConfig):
    """`megarlhf evaluate`: what the given data allow, into <run.dir>/evaluation.json."""

    model: ModelConfig
    """The model to evaluate: a language model, or a reward model."""
    reward: ModelConfig | None = None
    """A reward model that scores the language model's responses to `prompts`, and is judged by `rankings`."""
    reference: ModelConfig | None = None
    """A language model against which the KL of the responses is taken."""
    prompts: str | None = None
    """JSONL of {"prompt"} to answer."""
    demonstrations: str | None = None
    """JSONL of {"prompt", "response"}: loss on the responses."""
    rankings: str | None = None
    """JSONL of rankings: the accuracy of `reward`, or of `model` where that is a reward model."""
    text: HeldOutTextConfig | None = None
    """Packed text: language-model loss."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Row lengths and bad records."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How responses are sampled."""

    def violations(self) -> list[str]:
        """Rules across sections."""
        found = []
        if all(data is None for data in (self.prompts, self.demonstrations, self.rankings, self.text)):
            found.append("prompts, demonstrations, rankings or text must be given: there is nothing to evaluate on")
        if self.reference and self.prompts is None:
            found.append("reference judges responses: it needs prompts")
        if self.reward and self.prompts is None and self.rankings is None:
            found.append("reward judges responses or rankings: it needs prompts or rankings")
        return found


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
    stage = _stage_of(path)
    if command is not None and stage != command:
        raise ConfigError(f"{path}: stage is {stage}; run it with `megarlhf {stage}`, not `megarlhf {command}`")
    return load_config(COMMANDS[stage], path, overrides)


def _stage_of(path: Path) -> str:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    stage = content.get("stage") if isinstance(content, dict) else None
    if stage not in COMMANDS:
        raise ConfigError(f"{path}: stage must be one of {', '.join(COMMANDS)}, got {stage!r}")
    return stage
