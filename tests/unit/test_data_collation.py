"""Collation against the slow obvious loop."""

import random
from array import array

import pytest
import torch

from megarlhf.data.collation import packed_text_batch, prompt_batch, ranking_batch, text_batch
from megarlhf.data.tokenized import DemonstrationRow, PromptRow, RankingRow

PAD = 9


def ids(rng, longest):
    return array("i", [rng.randrange(9) for _ in range(rng.randint(1, longest))])


@pytest.mark.parametrize("seed", range(5))
def test_text_batches_have_the_loss_on_the_response_and_nowhere_else(seed):
    rng = random.Random(seed)
    rows = [DemonstrationRow(ids(rng, 6), ids(rng, 6), "f:1") for _ in range(7)]
    batch = text_batch(rows, pad_id=PAD)
    assert batch.tokens.dtype == batch.lengths.dtype == torch.int64 and batch.loss_mask.dtype == torch.bool
    width = max(len(row.prompt_ids) + len(row.response_ids) for row in rows)
    for i, row in enumerate(rows):
        full = [*row.prompt_ids, *row.response_ids]
        assert batch.tokens[i].tolist() == full + [PAD] * (width - len(full))
        assert batch.lengths[i] == len(full)
        learned = [(t + 1, int(batch.tokens[i, t + 1])) for t in range(width - 1) if batch.loss_mask[i, t]]
        assert learned == [(len(row.prompt_ids) + j, token) for j, token in enumerate(row.response_ids)]


@pytest.mark.parametrize("seed", range(5))
def test_ranking_batches_have_a_row_per_completion(seed):
    rng = random.Random(seed)
    rows = []
    for _ in range(4):
        responses = tuple(ids(rng, 5) for _ in range(rng.randint(2, 5)))
        rows.append(RankingRow(ids(rng, 4), responses, tuple(rng.randint(1, 3) for _ in responses), "f:1"))
    batch = ranking_batch(rows, pad_id=PAD)
    expected = [
        ([*row.prompt_ids, *ids], rank, i) for i, row in enumerate(rows) for ids, rank in zip(row.response_ids, row.ranks, strict=True)
    ]
    got = [
        (tokens[:length].tolist(), int(rank), int(prompt))
        for tokens, length, rank, prompt in zip(batch.tokens, batch.lengths, batch.ranks, batch.prompt_index, strict=True)
    ]
    assert got == expected
    assert all((tokens[length:] == PAD).all() for tokens, length in zip(batch.tokens, batch.lengths, strict=True))


def test_prompt_batches_count_their_ids():
    batch = prompt_batch([PromptRow(array("i", [1, 2, 3]), "f:1"), PromptRow(array("i", [4]), "f:2")], pad_id=PAD, first_id=5)
    assert batch.tokens.tolist() == [[1, 2, 3], [4, PAD, PAD]]
    assert batch.lengths.tolist() == [3, 1] and batch.ids.tolist() == [5, 6]


def test_packed_batches_count_every_position():
    batch = packed_text_batch(torch.arange(12).view(3, 4))
    assert batch.tokens.tolist() == torch.arange(12).view(3, 4).tolist()
    assert batch.lengths.tolist() == [4, 4, 4] and batch.loss_mask.shape == (3, 3) and batch.loss_mask.all()
    assert batch.rows(torch.tensor([2, 0])).tokens.tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
