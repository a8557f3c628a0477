"""How long rows can get: the one place that says it, for every model of every stage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

from megarlhf.config.dpo import DpoConfig
from megarlhf.config.inference import EvaluateConfig, GenerateConfig
from megarlhf.config.ppo import PpoConfig
from megarlhf.config.sections import HeldOutTextConfig, LimitsConfig, SamplingConfig
from megarlhf.config.stage import StageConfig
from megarlhf.config.training import PretrainConfig, RewardConfig, SftConfig


@dataclass(frozen=True)
class RowLength:
    """The longest row of one kind, and the keys that make it so."""

    tokens: int
    keys: str
    """Such as "limits.max_prompt_len 1024 + sampling.max_new_tokens 16"."""

    @staticmethod
    def of(**parts: int) -> RowLength:
        """The sum of some keys' values; "__" in a name stands for the dot of its key."""
        named = [f"{name.replace('__', '.')} {tokens}" for name, tokens in parts.items()]
        return RowLength(sum(parts.values()), " + ".join(named))

    def on(self, *, multiple: int) -> RowLength:
        """What becomes of it where rows are padded to a `multiple`: sequence parallelism splits them over tp ranks."""
        padded = -(-self.tokens // multiple) * multiple
        if padded == self.tokens:
            return self
        return RowLength(padded, f"{self.keys} = {self.tokens}, rounded up to {padded} for sequence_parallel over tp {multiple}")


def row_lengths(config: StageConfig) -> dict[str, list[RowLength]]:
    """Model's name in the configuration -> the longest row of each kind that it is given."""
    return _row_lengths(config)


@singledispatch
def _row_lengths(config: StageConfig) -> dict[str, list[RowLength]]:
    raise TypeError(f"no rule for rows of {type(config).__name__}")


@_row_lengths.register
def _(config: PretrainConfig) -> dict[str, list[RowLength]]:
    return {"model": [RowLength.of(data__seq_len=config.data.seq_len)]}


@_row_lengths.register
def _(config: SftConfig) -> dict[str, list[RowLength]]:
    # Samples that nobody judges end where the model's context does: they are there to be read.
    sampled = [_sampled(config.limits, config.sampling)] if config.select_by == "reward" else []
    return {"model": [_given(config.limits), *sampled, *_packed(config.data.pretraining)], "reward": sampled}


@_row_lengths.register
def _(config: RewardConfig) -> dict[str, list[RowLength]]:
    return {"model": [_given(config.limits)]}


@_row_lengths.register
def _(config: PpoConfig) -> dict[str, list[RowLength]]:
    sampled = RowLength.of(
        limits__max_prompt_len=config.limits.max_prompt_len,
        generation__sampling__max_new_tokens=config.generation.sampling.max_new_tokens,
    )
    others = {role: [sampled] for role in ("value", "reward", "reference")}
    return {"policy": [sampled, *_packed(config.data.pretraining)], **others}


@_row_lengths.register
def _(config: DpoConfig) -> dict[str, list[RowLength]]:
    return {"model": [_given(config.limits), *_packed(config.data.pretraining)], "reference": [_given(config.limits)]}


@_row_lengths.register
def _(config: GenerateConfig) -> dict[str, list[RowLength]]:
    return {"model": [_sampled(config.limits, config.sampling)]}


@_row_lengths.register
def _(config: EvaluateConfig) -> dict[str, list[RowLength]]:
    sampled = [_sampled(config.limits, config.sampling)] if config.prompts is not None else []
    read = [_given(config.limits)] if config.demonstrations is not None or config.tasks else []
    judged = [_given(config.limits)] if config.rankings is not None or config.win_rate.against is not None else []
    text = [RowLength.of(text__seq_len=config.text.seq_len)] if config.text and config.text.valid_prefix is not None else []
    model = [*sampled, *(read or (judged if config.reward is None else [])), *text]
    return {"model": model, "reward": [*sampled, *judged], "reference": sampled}


def _given(limits: LimitsConfig) -> RowLength:
    return RowLength.of(limits__max_prompt_len=limits.max_prompt_len, limits__max_response_len=limits.max_response_len)


def _sampled(limits: LimitsConfig, sampling: SamplingConfig) -> RowLength:
    return RowLength.of(limits__max_prompt_len=limits.max_prompt_len, sampling__max_new_tokens=sampling.max_new_tokens)


def _packed(data: HeldOutTextConfig | None) -> list[RowLength]:
    return [RowLength.of(data__pretraining__seq_len=data.seq_len)] if data is not None else []
