"""The commands that train one model: pretrain, sft, reward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megarlhf.config.relations import (
    fresh_doubts,
    same_file_doubts,
    unjudged_doubts,
    unused_text_doubts,
    warmup_doubts,
    warmup_violations,
)
from megarlhf.config.rules import Count, Epochs, InputFile, Rows, ShareBelowOne
from megarlhf.config.sections import LimitsConfig, ModelConfig, PretrainingDataConfig, SamplingConfig, ScheduleConfig, TrainedModelConfig
from megarlhf.config.stage import StageConfig


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
        found = warmup_doubts("schedule.warmup_steps", self.schedule.warmup_steps, self.steps)
        return found + unjudged_doubts(self.run, {"data.valid_prefix": self.data.valid_prefix})


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
        found, text = same_file_doubts(train=self.data.train, valid=self.data.valid) + fresh_doubts(model=self.model), self.data.pretraining
        found += unused_text_doubts("pretraining_mix", self.pretraining_mix, text)
        judged = {"data.valid": self.data.valid, "data.pretraining.valid_prefix": text and text.valid_prefix}
        return found + unjudged_doubts(self.run, judged)


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
        found = same_file_doubts(train=self.data.train, valid=self.data.valid) + fresh_doubts(model=self.model)
        return found + unjudged_doubts(self.run, {"data.valid": self.data.valid, "data.demonstrations": self.data.demonstrations})
