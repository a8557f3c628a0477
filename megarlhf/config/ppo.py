"""PPO and PPO-ptx."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from megarlhf.config.relations import (
    fresh_doubts,
    idle_doubts,
    reference_doubts,
    same_file_doubts,
    unjudged_doubts,
    unused_text_doubts,
    warmup_doubts,
)
from megarlhf.config.rules import (
    ROWS,
    WHOLE_BATCH,
    Count,
    CountOrNone,
    Epochs,
    FunctionInFile,
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
    prompts_may_grow: bool = False
    """A resume may find prompts added behind those that the run began with: a new epoch over all of them begins."""
    prompts_valid: InputFile | None = None
    """Prompts of other users, for the validation reward."""
    pretraining: PretrainingDataConfig | None = None
    """Text for the pretraining term and for the language-model loss on held-out text."""


MOST_OF_START = 0.2
"""Share of the first weights in a run's average above which it is asked whether that is meant."""


@dataclass(frozen=True, kw_only=True)
class PpoSettings:
    """PPO-ptx (Ouyang et al. 2022, section 3.5, equation 2 and Appendix C.4)."""

    iterations: Count = 500
    """Rollout-and-update rounds: 256k episodes in batches of 512."""
    batch_size: Rows = 512
    """Episodes of one iteration."""
    samples_per_prompt: Rows = 1
    """Responses to each prompt of an iteration, beside each other in its batch: a group for grpo and rloo (K of the papers)."""
    minibatch_size: Rows = 64
    """Episodes of one optimizer step."""
    epochs: Epochs = 1
    """Passes over an iteration's episodes."""
    advantages: Literal["gae", "grpo", "rloo", "reinforce_pp"] = "gae"
    """gae: against a value function (the paper). Without one: grpo, against the mean of the prompt's other samples and in their
    standard deviations (Shao et al. 2024, section 4.1); rloo, against the mean of the others (Ahmadian et al. 2024, section 3.3);
    reinforce_pp, the rewards to come, standardized over the iteration (Hu 2025)."""
    divide_by_std: bool = True
    """grpo: divide by the standard deviation of the prompt's samples; false leaves that bias out (Dr. GRPO: Liu et al. 2025)."""
    kl_coef: NotNegative = 0.02
    """beta: weight of the per-token KL penalty against the reference."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the penalty stands: in each token's reward (the paper's equation 2), or as a term of the loss (GRPO's equation 3)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """How it is estimated from the sampled token (Schulman 2020), with x = log pi - log pi_ref: k1 = x (the paper), k2 = x^2 / 2 (as
    a loss, its gradient is the KL's), k3 = exp(-x) - 1 + x (GRPO's equation 4)."""
    adaptive_kl: AdaptiveKlConfig | None = None
    """Let kl_coef follow a target; null keeps it fixed, as the paper does."""
    gamma: Share = 1.0
    """Discount: none."""
    gae_lambda: Share = 0.95
    """GAE's lambda (not in the paper; Stiennon et al. 2020, Appendix B.1)."""
    clip: Annotated[float, Range(0, 1, above=True, below=True)] = 0.2
    """Clip range of the probability ratio."""
    clip_high: Positive | None = None
    """Its upper end, 1 + clip_high (DAPO: Yu et al. 2025, equation 10); null: clip."""
    normalization: Literal["token", "sequence", "constant"] = "token"
    """What a minibatch's policy loss is divided by: its response tokens; each response's own tokens and then the responses (GRPO:
    long answers weigh less per token); generation.sampling.max_new_tokens and the responses (Dr. GRPO)."""
    value_clip: Positive | None = 0.2
    """Clip range of the value's change (not in the paper; Ziegler et al. 2019's code); null does not clip."""
    standardize_advantages: bool | None = None
    """Advantages to mean 0 and variance 1 over the iteration's response tokens (not in the paper; Ziegler et al.'s code); null:
    with gae and reinforce_pp, and not with grpo and rloo."""
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

    @property
    def standardizes(self) -> bool:
        """Whether advantages are standardized over the iteration."""
        if self.standardize_advantages is None:
            return self.advantages in ("gae", "reinforce_pp")
        return self.standardize_advantages

    def violations(self) -> list[str]:
        """Rules within the section."""
        found = []
        if rest := self.batch_size % self.samples_per_prompt:
            samples = f"samples_per_prompt {self.samples_per_prompt}"
            found.append(f"batch_size {self.batch_size} must be divisible by {samples}; rest {rest}")
        if self.advantages in ("grpo", "rloo") and self.samples_per_prompt == 1:
            found.append(f"advantages {self.advantages} compares the samples of a prompt: samples_per_prompt must be at least 2, got 1")
        if rest := self.batch_size % self.minibatch_size:
            found.append(f"batch_size {self.batch_size} must be divisible by minibatch_size {self.minibatch_size}; rest {rest}")
        if self.adaptive_kl is not None and self.kl_coef == 0:
            found.append("kl_coef 0 stays 0 with adaptive_kl, which multiplies it: start above 0, or set adaptive_kl to null")
        if self.ptx_coef and self.ptx_ratio * self.batch_size > ROWS:
            rows = f"ptx_ratio {self.ptx_ratio} times batch_size {self.batch_size}"
            found.append(f"{rows} must be at most {ROWS} rows, got {self.ptx_ratio * self.batch_size}: {WHOLE_BATCH}")
        return found

    def doubts(self) -> list[str]:
        """What is hardly meant."""
        found = warmup_doubts("warmup_iterations", self.warmup_iterations, self.iterations) + self._average_doubts()
        if self.unfinished_penalty is not None and self.unfinished_penalty > 0:
            found.append(f"unfinished_penalty {self.unfinished_penalty:g} is above 0: it would reward responses that do not end")
        if self.kl_coef == 0:
            found.append("kl_coef 0 lets the policy move away from the reference freely")
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            found.append("kl_estimator k1 in the loss pulls nowhere: its gradient is 0 on average; k2 and k3 have one")
        return found + [f"{key} has no effect with advantages {self.advantages}" for key in self._idle()]

    def _average_doubts(self) -> list[str]:
        """A decay that is as slow as for a longer run: what is evaluated and handed on is then mostly what the run began with."""
        left, papers = self.ema_decay**self.iterations, 0.992**500
        if left <= MOST_OF_START:
            return []
        how = f"ema_decay {self.ema_decay:g} over {self.iterations} iterations leaves {100 * left:.0f} % of the first weights"
        like_papers = f"{papers ** (1 / self.iterations):.3g} leaves {100 * papers:.0f} %, as the paper does"
        return [f"{how} in the average, which is evaluated and which later stages load; {like_papers}"]

    def _idle(self) -> list[str]:
        """Keys that are given and that the estimator of advantages does not read."""
        valued, grouped = self.advantages == "gae", self.advantages in ("grpo", "rloo")
        idle = {
            "gamma": grouped and self.gamma != 1.0,
            "gae_lambda": not valued and self.gae_lambda != 0.95,
            "value_clip": not valued and self.value_clip != 0.2,
            "divide_by_std": self.advantages != "grpo" and not self.divide_by_std,
        }
        return [key for key, given in idle.items() if given]


VerifyWeights = Literal["first", "always", "never"]


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """The generator that shares the policy's weights."""

    parallel: ParallelConfig | None = None
    """Its layout; null generates in place, in the policy's own."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How responses are sampled."""
    verify_weights: VerifyWeights = "first"
    """When a generator of another layout is compared with the policy by checksums of all weights: after they were first published,
    always, or never. A difference stops the run."""
    max_logprob_gap: Positive | None = 0.1
    """Most nats by which the generator's and the trainer's log-probability of a token may differ in the mean over an iteration's
    response tokens (rollout/generator_logprob_gap_mean); beyond it the run stops before it learns from them. Rounding is some 1e-6 in
    fp32 and 0.01 in bf16. null: never. Without ppo.recompute_logprobs the two are one, and nothing is compared."""


@dataclass(frozen=True, kw_only=True)
class RewardFunctionConfig:
    """A reward of one's own: a function of a Python file, such as a verifier."""

    function: FunctionInFile
    """my_rewards.py:score, called as score(prompts, responses, records) with lists of one length: texts, and what the prompts' records
    hold besides. It returns a number for each response, and must always give the same for the same."""
    weight: Annotated[float, Range()] = 1.0
    """What its numbers are multiplied by."""

    @property
    def path(self) -> str:
        """The file."""
        return self.function.rpartition(":")[0]

    @property
    def name(self) -> str:
        """The function, and what its metric is called by."""
        return self.function.rpartition(":")[2]


@dataclass(frozen=True, kw_only=True)
class PpoPolicyConfig(TrainedModelConfig):
    """The policy."""

    offload: tuple[Literal["gradients", "optimizer", "average"], ...] = ()
    """What of it waits in host memory while no phase uses it (gradients need not even wait): optimizer means moments and, beside weights of
    lower precision, float32 masters. Weights are used in every phase. The results are the same, bit for bit."""

    def violations(self) -> list[str]:
        """Rules within the section."""
        return super().violations() + _named_twice(self.offload)


@dataclass(frozen=True, kw_only=True)
class PpoValueConfig(TrainedModelConfig):
    """The value function."""

    offload: tuple[Literal["weights", "gradients", "optimizer"], ...] = ()
    """What of it waits in host memory while the policy generates, as for the policy."""

    def violations(self) -> list[str]:
        """Rules within the section."""
        return super().violations() + _named_twice(self.offload)


@dataclass(frozen=True, kw_only=True)
class PpoReferenceConfig(ModelConfig):
    """The frozen model that the KL penalty is taken against."""

    offload: tuple[Literal["weights"], ...] = ()
    """[weights]: they wait in host memory while nothing is scored."""

    def violations(self) -> list[str]:
        """Rules within the section."""
        return super().violations() + _named_twice(self.offload)


def _named_twice(offload: tuple[str, ...]) -> list[str]:
    return [f"offload names {kind} twice" for kind in dict.fromkeys(offload) if offload.count(kind) > 1]


@dataclass(frozen=True, kw_only=True)
class PpoRewardConfig(PpoReferenceConfig):
    """Where rewards come from: a frozen reward model, functions of one's own, or both."""

    weight: Annotated[float, Range()] = 1.0
    """What the reward model's scores are multiplied by."""
    functions: tuple[RewardFunctionConfig, ...] = ()
    """Rewards of one's own, added to the reward model's; without `load`, in its place."""
    normalize: bool = False
    """Bring each reward to mean 0 and variance 1 over an iteration's responses before it is weighted; not in validation."""

    @property
    def has_model(self) -> bool:
        """Whether there is a reward model, and not functions alone."""
        return self.load is not None or self.architecture is not None

    def violations(self) -> list[str]:
        """Rules within the section."""
        names = [function.name for function in self.functions]
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
        found = [f"functions has two of the name {name}: their metrics would share it" for name in twice]
        if "model" in names:
            found.append("functions has one of the name model, which stands for the reward model: rename it")
        if self.functions and not self.has_model:
            idle = [key for key, default in (("load_model", None), ("weight", 1.0), ("offload", ())) if getattr(self, key) != default]
            return found + [f"{key} speaks of a reward model, and load is not given" for key in idle]
        if not self.has_model:
            return [*found, "load (a reward model) or functions (rewards of one's own) must be given; neither is"]
        return found + super().violations()


@dataclass(frozen=True, kw_only=True)
class PpoConfig(StageConfig):
    """`megarlhf ppo`: PPO, PPO-ptx, or policy gradients without a value function, with up to four co-resident models."""

    policy: PpoPolicyConfig
    """The policy, from the 2-epoch SFT model (Appendix C.3)."""
    value: PpoValueConfig | None = None
    """The value function, from the reward model (Appendix C.4); only with ppo.advantages: gae."""
    reward: PpoRewardConfig
    """The frozen reward model, or rewards of one's own."""
    reference: PpoReferenceConfig
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
        if self.ppo.advantages == "gae" and self.value is None:
            found.append("value, the value function, is needed by ppo.advantages gae; grpo, rloo and reinforce_pp do without")
        if self.ppo.advantages != "gae" and self.value is not None:
            found.append(f"value is a model that ppo.advantages {self.ppo.advantages} does not use: leave it out")
        if self.generation.sampling.temperature == 0:
            found.append("generation.sampling.temperature 0 explores nothing: PPO needs a positive temperature")
        return found

    def doubts(self) -> list[str]:
        """What is hardly meant."""
        found = same_file_doubts(prompts=self.data.prompts, prompts_valid=self.data.prompts_valid)
        found += fresh_doubts(policy=self.policy, **({"value": self.value} if self.value else {})) + idle_doubts(self)
        found += reference_doubts("policy", self.policy, self.reference)
        found += unused_text_doubts("ppo.ptx_coef", self.ppo.ptx_coef, text := self.data.pretraining)
        judged = {"data.prompts_valid": self.data.prompts_valid, "data.pretraining.valid_prefix": text and text.valid_prefix}
        found += unjudged_doubts(self.run, judged)
        sampling = self.generation.sampling
        biased = [name for name in ("top_k", "top_p") if getattr(sampling, name) is not None]
        if not self.ppo.recompute_logprobs and self.generation.max_logprob_gap not in (None, 0.1):
            found.append("generation.max_logprob_gap compares nothing without ppo.recompute_logprobs")
        return found + [f"generation.sampling.{name} samples from other probabilities than the update assumes" for name in biased]
