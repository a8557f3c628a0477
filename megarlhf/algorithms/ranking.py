"""The reward model's loss over K ranked completions per prompt (Ouyang et al. 2022, equation 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megarlhf.algorithms.masked import Stats


def comparisons(ranks: Tensor, prompt_index: Tensor) -> Tensor:
    """[n, n] bool: whether completion i was ranked above completion j of the same prompt; ties are no comparison."""
    same_prompt = prompt_index[:, None] == prompt_index[None, :]
    return same_prompt & (ranks[:, None] < ranks[None, :])


def ranking_loss(scores: Tensor, ranks: Tensor, prompt_index: Tensor) -> tuple[Tensor, Stats]:
    """Sum over prompts of the mean over their comparisons of -log sigmoid(r_w - r_l).

    Each prompt weighs the same: 1 / (its comparisons without ties); one whose completions all tie adds exactly 0.

    Args: scores [n] float; ranks [n] int64, 1 best; prompt_index [n] int64.
    Returns: (sum over prompts, {"accuracy" (right comparisons), "score_gap" (r_w - r_l)}).
    """
    better = comparisons(ranks, prompt_index)
    winner, loser = better.nonzero(as_tuple=True)
    gap = scores.float()[winner] - scores.float()[loser]  # [pairs]
    _, prompt = prompt_index.unique(return_inverse=True)
    pairs_of_prompt = torch.zeros(len(scores), device=scores.device).index_add_(0, prompt[winner], torch.ones_like(gap))
    loss = (-F.logsigmoid(gap) / pairs_of_prompt[prompt[winner]]).sum()
    count = torch.tensor(float(len(gap)), device=scores.device)
    return loss, {"accuracy": ((gap > 0).float().sum(), count), "score_gap": (gap.detach().sum(), count)}


def count_prompts(prompt_index: Tensor) -> int:
    """The loss's divisor: distinct prompts, those whose completions all tie included."""
    return len(prompt_index.unique())
