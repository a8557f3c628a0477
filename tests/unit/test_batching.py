"""Micro-batches: every row once, balanced by tokens, groups whole."""

import pytest
import torch

from megarlhf.batch import RankingBatch, Rows
from megarlhf.engine.batching import micro_batch_rows


def ragged(num_rows, *, seed=0, longest=50):
    lengths = torch.randint(2, longest + 1, (num_rows,), generator=torch.Generator().manual_seed(seed))
    return Rows(tokens=torch.zeros(num_rows, longest, dtype=torch.int64), lengths=lengths)


@pytest.mark.parametrize("num_rows", [1, 3, 64])
@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 4, 100])
def test_every_row_stands_in_one_micro_batch(num_rows, dp, micro_batch_size):
    shares = micro_batch_rows(ragged(num_rows), dp=dp, micro_batch_size=micro_batch_size)
    assert len(shares) == dp
    assert sorted(row for share in shares for rows in share for row in rows.tolist()) == list(range(num_rows))
    for share in shares:
        assert all(len(rows) == micro_batch_size for rows in share[:-1]) and all(0 < len(rows) <= micro_batch_size for rows in share)


def test_shares_are_balanced_and_micro_batches_hold_rows_of_like_length():
    batch = ragged(256)
    shares = micro_batch_rows(batch, dp=4, micro_batch_size=8)
    tokens = [sum(int(batch.lengths[rows].sum()) for rows in share) for share in shares]
    assert max(tokens) - min(tokens) <= 50  # one row
    for share in shares:
        lengths = batch.lengths[torch.cat(share)].tolist()
        assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("tokens", [1, 60, 200, 10**6])
def test_micro_batches_are_filled_up_to_their_tokens(tokens):
    batch = ragged(64)
    shares = micro_batch_rows(batch, dp=2, micro_batch_size=1, micro_batch_tokens=tokens)
    assert sorted(row for share in shares for rows in share for row in rows.tolist()) == list(range(64))
    for share in shares:
        sums = [int(batch.lengths[rows].sum()) for rows in share]
        assert all(total <= tokens or len(rows) == 1 for total, rows in zip(sums, share, strict=True))
        assert all(total + int(batch.lengths[following[0]]) > tokens for total, following in zip(sums, share[1:], strict=False))


@pytest.mark.parametrize("micro_batch_size", [1, 4, 9])
def test_a_prompts_completions_are_never_parted(micro_batch_size):
    generator = torch.Generator().manual_seed(1)
    prompt_index = torch.arange(20).repeat_interleave(torch.randint(2, 10, (20,), generator=generator))
    prompt_index = prompt_index[torch.randperm(len(prompt_index), generator=generator)]
    rows = ragged(len(prompt_index))
    batch = RankingBatch(tokens=rows.tokens, lengths=rows.lengths, ranks=torch.ones_like(prompt_index), prompt_index=prompt_index)
    shares = micro_batch_rows(batch, dp=3, micro_batch_size=micro_batch_size)
    homes = {}
    for number, index in enumerate(index for share in shares for index in share):
        prompts = set(prompt_index[index].tolist())
        assert len(index) <= micro_batch_size or len(prompts) == 1
        for prompt in prompts:
            assert homes.setdefault(prompt, number) == number
    assert sorted(torch.cat([index for share in shares for index in share]).tolist()) == list(range(len(prompt_index)))
