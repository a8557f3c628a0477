"""Token rows to batches: right padded, with the mask of what counts in the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megarlhf.batch import PreferenceBatch, Prompts, RankingBatch, TextBatch, pad_rows
from megarlhf.data.tokenized import DemonstrationRow, PromptRow, RankingRow


def text_batch(rows: Sequence[DemonstrationRow], *, pad_id: int) -> TextBatch:
    """Demonstrations with the loss on the response, EOS included, and on earlier answers: tokens [rows, seq], loss_mask [rows, seq - 1]."""
    tokens, lengths = pad_rows([[*row.prompt_ids, *row.response_ids] for row in rows], pad_id=pad_id)
    prompt_lengths = torch.tensor([len(row.prompt_ids) for row in rows], dtype=torch.int64)
    predicted = torch.arange(1, tokens.shape[1])  # position t is about token t + 1
    loss_mask = (predicted >= prompt_lengths[:, None]) & (predicted < lengths[:, None])
    for i, row in enumerate(rows):
        for start, end in row.earlier_answers:
            loss_mask[i, start - 1 : end - 1] = True
    return TextBatch(tokens=tokens, lengths=lengths, loss_mask=loss_mask)


def packed_text_batch(rows: Tensor) -> TextBatch:
    """Full rows of packed text, [n, seq] int64, with every position in the loss."""
    num_rows, seq_len = rows.shape
    return TextBatch(
        tokens=rows,
        lengths=torch.full((num_rows,), seq_len, dtype=torch.int64),
        loss_mask=torch.ones(num_rows, seq_len - 1, dtype=torch.bool),
    )


def prompt_batch(rows: Sequence[PromptRow], *, pad_id: int, first_id: int = 0) -> Prompts:
    """Prompts to answer: tokens [rows, prompt_len]; their ids, the keys of the sampling noise, count up from `first_id`."""
    tokens, lengths = pad_rows([list(row.prompt_ids) for row in rows], pad_id=pad_id)
    return Prompts(tokens=tokens, lengths=lengths, ids=torch.arange(first_id, first_id + len(rows)))


def ranking_batch(rows: Sequence[RankingRow], *, pad_id: int) -> RankingBatch:
    """Rankings, one row per completion, a prompt's completions together: tokens [completions, seq], ranks [completions]."""
    completions = [[*row.prompt_ids, *response] for row in rows for response in row.response_ids]
    tokens, lengths = pad_rows(completions, pad_id=pad_id)
    return RankingBatch(
        tokens=tokens,
        lengths=lengths,
        ranks=torch.tensor([rank for row in rows for rank in row.ranks], dtype=torch.int64),
        prompt_index=torch.tensor([i for i, row in enumerate(rows) for _ in row.ranks], dtype=torch.int64),
    )


def preference_batch(rows: Sequence[RankingRow], *, pad_id: int, ref_logprobs: Sequence[Tensor] = ()) -> PreferenceBatch:
    """Rankings for DPO: see `ranking_batch`. ref_logprobs: of each ranking's completions [K] float64; 0 without them."""
    ranked = ranking_batch(rows, pad_id=pad_id)
    prompt_lengths = torch.tensor([len(row.prompt_ids) for row in rows for _ in row.ranks], dtype=torch.int64)
    predicted = torch.arange(1, ranked.tokens.shape[1])  # position t is about token t + 1
    return PreferenceBatch(
        **vars(ranked),
        response_mask=(predicted >= prompt_lengths[:, None]) & (predicted < ranked.lengths[:, None]),
        ref_logprobs=torch.cat(list(ref_logprobs)) if ref_logprobs else torch.zeros(len(ranked.ranks), dtype=torch.float64),
    )
