"""Rows of a run's longest kind, as many as are wanted: what a dry run is given in place of data."""

from __future__ import annotations

import torch
from torch import Tensor

from megarlhf.batch import Experience, PreferenceBatch, Prompts, RankingBatch, TextBatch, ValueTargets


def text(num_rows: int, width: int) -> TextBatch:
    """Packed text: every position counts."""
    return TextBatch(**_tokens(num_rows, width), loss_mask=torch.ones(num_rows, width - 1, dtype=torch.bool))


def demonstrations(num_rows: int, prompt_len: int, response_len: int) -> TextBatch:
    """Prompt and response; the response counts."""
    width = prompt_len + response_len
    return TextBatch(**_tokens(num_rows, width), loss_mask=_response_mask(num_rows, prompt_len, response_len))


def prompts(num_rows: int, width: int, *, samples: int = 1) -> Prompts:
    """Prompts to answer, each with `samples` rows; they differ, as equal ones would share their prefill."""
    number = torch.arange(num_rows)
    rows = _tokens(num_rows, width)
    rows["tokens"][:, 0] = number // samples
    return Prompts(**rows, ids=number)


def experience(num_rows: int, prompt_len: int, response_len: int) -> Experience:
    """Episodes whose responses took all that they might."""
    return Experience(**_episodes(num_rows, prompt_len, response_len, "old_logprobs", "ref_logprobs", "advantages"))


def value_targets(num_rows: int, prompt_len: int, response_len: int) -> ValueTargets:
    """The same episodes for a value function."""
    return ValueTargets(**_episodes(num_rows, prompt_len, response_len, "old_values", "returns"))


def rankings(num_prompts: int, completions: int, width: int) -> RankingBatch:
    """Prompts with `completions` ranked answers each."""
    number = torch.arange(num_prompts * completions)
    return RankingBatch(**_tokens(len(number), width), ranks=number % completions + 1, prompt_index=number // completions)


def preferences(num_prompts: int, completions: int, prompt_len: int, response_len: int) -> PreferenceBatch:
    """The same for a language model."""
    ranked = vars(rankings(num_prompts, completions, prompt_len + response_len))
    num_rows = num_prompts * completions
    mask = _response_mask(num_rows, prompt_len, response_len)
    return PreferenceBatch(**ranked, response_mask=mask, ref_logprobs=torch.zeros(num_rows, dtype=torch.float64))


def _tokens(num_rows: int, width: int) -> dict[str, Tensor]:
    return {"tokens": torch.zeros(num_rows, width, dtype=torch.int64), "lengths": torch.full((num_rows,), width)}


def _episodes(num_rows: int, prompt_len: int, response_len: int, *numbers: str) -> dict[str, Tensor]:
    mask = _response_mask(num_rows, prompt_len, response_len)
    return {**_tokens(num_rows, prompt_len + response_len), "response_mask": mask, **{name: torch.zeros(mask.shape) for name in numbers}}


def _response_mask(num_rows: int, prompt_len: int, response_len: int) -> Tensor:
    mask = torch.zeros(num_rows, prompt_len + response_len - 1, dtype=torch.bool)
    mask[:, prompt_len - 1 :] = True
    return mask
