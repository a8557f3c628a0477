"""Objectives as terms: what a model is trained on is a weighted sum of losses over batches.

PPO-ptx is ``[Term("policy", PolicyLoss(...), minibatch), Term("ptx", LanguageModelLoss(), texts, weight=27.8)]``: the
micro-batches of both go through one schedule call into the same gradient buffers, and one optimizer step follows
(Ouyang et al. 2022, Appendix C.4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from megarlhf.algorithms.dpo import Kind, dpo_loss
from megarlhf.algorithms.kl import ESTIMATORS
from megarlhf.algorithms.kl import Estimator as KlEstimator
from megarlhf.algorithms.language_model import language_model_loss
from megarlhf.algorithms.logprobs import response_logprobs
from megarlhf.algorithms.masked import Stats, masked_sum, one_over_length
from megarlhf.algorithms.ppo import clipped_policy_loss, clipped_value_loss
from megarlhf.algorithms.ranking import count_prompts, ranking_loss
from megarlhf.batch import Experience, PreferenceBatch, RankingBatch, Rows, TextBatch, ValueTargets

Output = Literal["logprobs", "logprobs and entropy", "values", "scores"]


class Loss(Protocol):
    """A loss that is a sum over what counts, divided once by the global count."""

    output: ClassVar[Output]
    """What the loss reads of the model: logprobs or values [batch, seq - 1], both logprobs and entropy [2, batch, seq - 1]
    (the entropy in nats, without a gradient), or scores [batch]."""
    stats: ClassVar[tuple[str, ...]]
    """Names of the statistics that come with the sum."""
    temperature: float
    """What logits are divided by for log-probabilities."""

    def count(self, batch: Rows) -> int:
        """The divisor: how many tokens (or prompts) of the whole batch count."""
        ...

    def positions(self, batch: Rows) -> Tensor | None:
        """[batch, seq - 1] bool: positions whose output is needed; None for scores."""
        ...

    def __call__(self, output: Tensor, batch: Rows) -> tuple[Tensor, Stats]:
        """(loss summed over what counts in this micro-batch, statistics)."""
        ...


@dataclass(frozen=True)
class Term:
    """One loss over one (global, replicated) batch, and its weight in the objective."""

    name: str
    loss: Loss
    batch: Rows
    weight: float = 1.0


@dataclass(frozen=True)
class PolicyLoss:
    """The clipped surrogate objective (Schulman et al. 2017, equation 7), and a KL against the reference where one is in the loss."""

    clip: float
    temperature: float = 1.0
    """That of the sampling: the ratio is between the policies that were sampled from."""
    clip_high: float | None = None
    """The upper end of the clip range; None: clip."""
    kl_coef: float = 0.0
    """Weight of the KL in this loss; 0 where it is in the rewards."""
    kl_estimator: KlEstimator = "k3"
    normalization: Literal["token", "sequence", "constant"] = "token"
    """What the sum over response tokens is divided by: their number; each response's own, and the number of responses (GRPO:
    Shao et al. 2024, equation 3); max_len for each response (Dr. GRPO: Liu et al. 2025)."""
    max_len: int | None = None
    """Most tokens of a response; only for "constant"."""
    output: ClassVar[Output] = "logprobs and entropy"
    stats: ClassVar[tuple[str, ...]] = ("clip_fraction", "approx_kl", "ratio", "entropy")

    def count(self, batch: Experience) -> int:
        """Response tokens, responses, or the tokens that they could have."""
        if self.normalization == "token":
            return int(batch.response_mask.sum())
        return batch.num_rows * (self.max_len if self.normalization == "constant" else 1)

    def positions(self, batch: Experience) -> Tensor:
        """The responses."""
        return batch.response_mask

    def __call__(self, output: Tensor, batch: Experience) -> tuple[Tensor, Stats]:
        """See `clipped_policy_loss`; the entropy is reported, not optimised."""
        logprobs, entropy = output
        mask = batch.response_mask
        weights = one_over_length(mask) if self.normalization == "sequence" else 1.0
        how = {"clip": self.clip, "clip_high": self.clip_high, "weights": weights}
        loss, stats = clipped_policy_loss(logprobs, batch.old_logprobs, batch.advantages, mask, **how)
        if self.kl_coef:
            loss = loss + self.kl_coef * masked_sum(weights * ESTIMATORS[self.kl_estimator](logprobs, batch.ref_logprobs), mask)
        return loss, stats | {"entropy": (masked_sum(entropy, mask), mask.sum())}


@dataclass(frozen=True)
class ValueLoss:
    """The clipped value loss (Ziegler et al. 2019's code), token mean over the responses."""

    clip: float | None
    output: ClassVar[Output] = "values"
    stats: ClassVar[tuple[str, ...]] = ("clip_fraction", "error", "returns", "values")
    temperature: ClassVar[float] = 1.0

    def count(self, batch: ValueTargets) -> int:
        """Response tokens."""
        return int(batch.response_mask.sum())

    def positions(self, batch: ValueTargets) -> Tensor:
        """The responses."""
        return batch.response_mask

    def __call__(self, output: Tensor, batch: ValueTargets) -> tuple[Tensor, Stats]:
        """See `clipped_value_loss`."""
        return clipped_value_loss(output, batch.old_values, batch.returns, batch.response_mask, clip=self.clip)


@dataclass(frozen=True)
class LanguageModelLoss:
    """Negative log-likelihood per token."""

    output: ClassVar[Output] = "logprobs"
    stats: ClassVar[tuple[str, ...]] = ("nll",)
    temperature: ClassVar[float] = 1.0

    def count(self, batch: TextBatch) -> int:
        """Tokens in the loss."""
        return int(batch.loss_mask.sum())

    def positions(self, batch: TextBatch) -> Tensor:
        """The tokens in the loss."""
        return batch.loss_mask

    def __call__(self, output: Tensor, batch: TextBatch) -> tuple[Tensor, Stats]:
        """See `language_model_loss`."""
        return language_model_loss(output, batch.loss_mask)


@dataclass(frozen=True)
class RankingLoss:
    """The K-wise comparison loss (Ouyang et al. 2022, equation 1), mean over the prompts that have a comparison."""

    output: ClassVar[Output] = "scores"
    stats: ClassVar[tuple[str, ...]] = ("accuracy", "score_gap")
    temperature: ClassVar[float] = 1.0

    def count(self, batch: RankingBatch) -> int:
        """Prompts whose completions do not all tie."""
        return count_prompts(batch.ranks, batch.prompt_index)

    def positions(self, batch: RankingBatch) -> None:
        """Scores are read at the last token of each completion."""
        return None

    def __call__(self, output: Tensor, batch: RankingBatch) -> tuple[Tensor, Stats]:
        """See `ranking_loss`."""
        return ranking_loss(output, batch.ranks, batch.prompt_index)


@dataclass(frozen=True)
class DpoLoss:
    """Direct preference optimisation (Rafailov et al. 2023), mean over the prompts that have a comparison."""

    kind: Kind
    beta: float
    label_smoothing: float = 0.0
    output: ClassVar[Output] = "logprobs"
    stats: ClassVar[tuple[str, ...]] = ("accuracy", "margin", "reward_chosen", "reward_rejected")
    temperature: ClassVar[float] = 1.0

    def count(self, batch: PreferenceBatch) -> int:
        """Prompts whose completions do not all tie."""
        return count_prompts(batch.ranks, batch.prompt_index)

    def positions(self, batch: PreferenceBatch) -> Tensor:
        """The completions."""
        return batch.response_mask

    def __call__(self, output: Tensor, batch: PreferenceBatch) -> tuple[Tensor, Stats]:
        """See `dpo_loss`."""
        mask = batch.response_mask
        how = {"kind": self.kind, "beta": self.beta, "label_smoothing": self.label_smoothing}
        logprobs = response_logprobs(output, mask)
        return dpo_loss(logprobs, batch.ref_logprobs, mask.sum(dim=1), batch.ranks, batch.prompt_index, **how)
