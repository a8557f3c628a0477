"""Direct preference optimisation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from megarlhf.config.relations import fresh_doubts, reference_doubts, same_file_doubts, unjudged_doubts, unused_text_doubts
from megarlhf.config.rules import ROWS, WHOLE_BATCH, Epochs, InputFile, NotNegative, Positive, Range, Rows
from megarlhf.config.sections import LimitsConfig, ModelConfig, PretrainingDataConfig, ScheduleConfig, TrainedModelConfig
from megarlhf.config.stage import StageConfig


@dataclass(frozen=True, kw_only=True)
class DpoDataConfig:
    """Rankings."""

    train: InputFile
    """JSONL of {"prompt", "responses", "ranks"} or {"prompt", "chosen", "rejected"}."""
    valid: InputFile | None = None
    """Rankings of other prompts, for loss, accuracy and margins."""
    pretraining: PretrainingDataConfig | None = None
    """Text for the pretraining term and for the language-model loss on held-out text."""


@dataclass(frozen=True, kw_only=True)
class DpoSettings:
    """The objective (Rafailov et al. 2023, equation 7)."""

    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid: the paper's; ipo: a squared distance from 1 / (2 beta), of means over tokens (Azar et al. 2024, equation 17)."""
    beta: Positive = 0.1
    """Strength of the implicit KL penalty (Rafailov et al. 2023, Appendix B); tau of ipo."""
    label_smoothing: Annotated[float, Range(0, 0.5, below=True)] = 0.0
    """Share of comparisons that are taken to be labelled the wrong way round (conservative DPO: Mitchell 2023); only with sigmoid."""
    ptx_coef: NotNegative = 0.0
    """Weight of the language-model loss on pretraining text, as in PPO-ptx; 0 leaves it out."""
    ptx_ratio: Rows = 1
    """Pretraining rows per prompt."""

    def violations(self) -> list[str]:
        """Rules within the section."""
        if self.loss == "ipo" and self.label_smoothing:
            return [f"label_smoothing {self.label_smoothing:g} is for loss sigmoid, and loss is ipo"]
        return []


@dataclass(frozen=True, kw_only=True)
class DpoConfig(StageConfig):
    """`megarlhf dpo`: direct preference optimisation, a policy straight from rankings (Rafailov et al. 2023)."""

    model: TrainedModelConfig
    """The policy, from the SFT model."""
    reference: ModelConfig
    """The frozen model that the policy is held against: what it starts from. It is asked once, before the first step."""
    data: DpoDataConfig
    """Its rankings."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Row lengths and bad records."""
    epochs: Epochs = 1
    """Passes over the rankings."""
    batch_size: Rows = 64
    """Prompts of one step, each with all of its completions (Rafailov et al. 2023, Appendix B)."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate's schedule."""
    dpo: DpoSettings = field(default_factory=DpoSettings)
    """The objective."""

    def violations(self) -> list[str]:
        """Rules across sections."""
        found = []
        if self.dpo.ptx_coef and self.data.pretraining is None:
            found.append(f"dpo.ptx_coef {self.dpo.ptx_coef} needs data.pretraining (or set dpo.ptx_coef to 0)")
        if self.dpo.ptx_coef and self.dpo.ptx_ratio * self.batch_size > ROWS:
            rows = f"dpo.ptx_ratio {self.dpo.ptx_ratio} times batch_size {self.batch_size}"
            found.append(f"{rows} must be at most {ROWS} rows, got {self.dpo.ptx_ratio * self.batch_size}: {WHOLE_BATCH}")
        return found

    def doubts(self) -> list[str]:
        """What is hardly meant."""
        found = same_file_doubts(train=self.data.train, valid=self.data.valid) + fresh_doubts(model=self.model)
        found += reference_doubts("model", self.model, self.reference)
        found += unused_text_doubts("dpo.ptx_coef", self.dpo.ptx_coef, text := self.data.pretraining)
        judged = {"data.valid": self.data.valid, "data.pretraining.valid_prefix": text and text.valid_prefix}
        return found + unjudged_doubts(self.run, judged)
