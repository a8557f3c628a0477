"""Direct preference optimisation over K ranked completions per prompt (Rafailov et al. 2023)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megarlhf.algorithms.masked import Stats
from megarlhf.algorithms.ranking import comparisons

Kind = Literal["sigmoid", "ipo"]


def dpo_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    lengths: Tensor,
    ranks: Tensor,
    prompt_index: Tensor,
    *,
    kind: Kind,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Stats]:
    """Sum over prompts of the mean over their comparisons of a loss of the margin h_w - h_l, h = log pi(y | x) - log pi_ref(y | x).

    "sigmoid": -(1 - s) log sigmoid(beta (h_w - h_l)) - s log sigmoid(-beta (h_w - h_l)), equation 7 with s, the share of labels that
    are taken to be wrong, as in conservative DPO (Mitchell 2023). "ipo": (h_w - h_l - 1 / (2 beta))^2 (Azar et al. 2024, equation
    17) with each h a mean over its response's tokens, as its authors run it. Ties and weights of prompts as in `ranking_loss`.

    Args: logprobs, ref_logprobs [n] of whole responses; lengths [n] int64, their tokens; ranks [n] int64, 1 best; prompt_index [n].
    Returns: (sum over prompts, over comparisons {"accuracy" (h_w > h_l), "margin" (beta (h_w - h_l)), "reward_chosen" (beta h_w),
    "reward_rejected" (beta h_l)}).
    """
    table, better, pairs = comparisons(ranks, prompt_index, logprobs.device)
    gained = logprobs - ref_logprobs
    if kind == "ipo":
        gained = gained / lengths.clamp(min=1)
    gained = gained[table]  # [prompts, K]
    margin = torch.where(better, gained[:, :, None] - gained[:, None, :], 0.0)  # [prompts, winner, loser]
    if kind == "ipo":
        losses = (margin - 1 / (2 * beta)) ** 2
    else:
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * margin) - label_smoothing * F.logsigmoid(-beta * margin)
    loss = torch.where(better, losses, 0.0).sum(dim=(1, 2)) / pairs.clamp(min=1)
    count = pairs.sum()
    with torch.no_grad():
        stats = {
            "accuracy": ((margin > 0).sum(), count),
            "margin": (beta * margin.sum(), count),
            "reward_chosen": (beta * torch.where(better, gained[:, :, None], 0.0).sum(), count),
            "reward_rejected": (beta * torch.where(better, gained[:, None, :], 0.0).sum(), count),
        }
    return loss.sum(), stats
