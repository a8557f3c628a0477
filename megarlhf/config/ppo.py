"""PPO and PPO-ptx."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from megarlhf.config.relations import fresh_doubts, idle_doubts, same_file_doubts, warmup_doubts
from megarlhf.config.rules import (
    ROWS,
    WHOLE_BATCH,
    Count,
    CountOrNone,
    Epochs,
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
    LimitsConfig,
    ModelConfig,
    ParallelConfig,
    PretrainingDataConfig,
    SamplingConfig,
    TrainedModelConfig,
)
from megarlhf.config.stage import StageConfig


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
    unfinished_penalty: Annotated[float, Range()] | None = None
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
