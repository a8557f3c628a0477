"""The reward model's loss over K ranked completions per prompt (Ouyang et al. 2022, equation 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megarlhf.algorithms.masked import Stats


def completions_by_prompt(prompt_index: Tensor) -> Tensor:
    """[prompts, K] int64: the positions in prompt_index [n] of each prompt's completions, then -1 where it has fewer than K."""
    _, prompt, counts = prompt_index.unique(return_inverse=True, return_counts=True)
    order = prompt.argsort(stable=True)
    first = counts.cumsum(0) - counts
    place = torch.arange(len(order), device=order.device) - first[prompt[order]]
    table = torch.full((len(counts), int(counts.max())), -1, device=order.device)
    table[prompt[order], place] = order
    return table


def comparisons(ranks: Tensor, prompt_index: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(`completions_by_prompt`, which of them is better than which [prompts, winner, loser] bool, each prompt's number [prompts]).

    All on `device`, wherever ranks are. prompt_index says the shapes: on a device it would be asked for them, and waited for.
    """
    table, ranks = (x.to(device, non_blocking=True) for x in (completions_by_prompt(prompt_index), ranks))
    real, rank = table >= 0, ranks[table]  # [prompts, K]
    better = real[:, :, None] & real[:, None, :] & (rank[:, :, None] < rank[:, None, :])
    return table, better, better.sum(dim=(1, 2))


def ranking_loss(scores: Tensor, ranks: Tensor, prompt_index: Tensor) -> tuple[Tensor, Stats]:
    """Sum over prompts of the mean over their comparisons of -log sigmoid(r_w - r_l).

    Each prompt weighs the same: 1 / (its comparisons without ties); one whose completions all tie adds exactly 0, and is
    not counted by `count_prompts`.

    Args: scores [n] float, on any device; ranks [n] int64, 1 best; prompt_index [n] int64.
    Returns: (sum over prompts, {"accuracy" (comparisons whose winner scores higher), "score_gap" (r_w - r_l)}).
    """
    table, better, pairs = comparisons(ranks, prompt_index, scores.device)
    score = scores.float()[table]  # [prompts, K]
    gap = torch.where(better, score[:, :, None] - score[:, None, :], 0.0)
    loss = torch.where(better, -F.logsigmoid(gap), 0.0).sum(dim=(1, 2)) / pairs.clamp(min=1)
    count = pairs.sum()
    return loss.sum(), {"accuracy": ((gap > 0).sum(), count), "score_gap": (gap.detach().sum(), count)}


def count_prompts(ranks: Tensor, prompt_index: Tensor) -> int:
    """The loss's divisor: distinct prompts that have a comparison, that is, whose completions do not all tie; both [n] int64."""
    table = completions_by_prompt(prompt_index)
    first = ranks[table[:, :1]]
    return int(((table >= 0) & (ranks[table] != first)).any(dim=1).sum())
