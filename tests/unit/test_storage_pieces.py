"""Pieces of parameters: any cut and any flat range of it, copied to any other, against index arithmetic written out."""

import random

import pytest
import torch

from megarlhf.storage.pieces import Piece, overlaps


def cuts(rng, shape):
    """The slices of every rank's part for one random way to cut a parameter, as (dim, [slices of each rank])."""
    dim = rng.randrange(len(shape))
    kind = rng.choice(["whole", "equal", "blocks", "uneven", "shared"])
    size = shape[dim]
    if kind == "whole":
        return 0, [((0, shape[0]),)] * rng.randint(1, 3)
    if kind == "uneven":
        edges = sorted(rng.sample(range(1, size), min(size - 1, rng.randint(1, 3))))
        return dim, [((start, stop - start),) for start, stop in zip([0, *edges], [*edges, size], strict=True)]
    parts = rng.choice([n for n in (1, 2, 3, 4, 6) if size % n == 0])
    if kind == "blocks" and size % (2 * parts) == 0:
        half = size // 2
        return dim, [((r * half // parts, half // parts), (half + r * half // parts, half // parts)) for r in range(parts)]
    if kind == "shared":  # two ranks hold the same first slice, as key-value heads that are fewer than tp
        return dim, [((0, size // parts), (r * size // parts, size // parts)) for r in range(parts)]
    return dim, [((r * size // parts, size // parts),) for r in range(parts)]


def indices(shape, dim, slices):
    """The flat index in the whole parameter of each element of a part, in order: the slow obvious version."""
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    return torch.cat([whole.narrow(dim, start, size) for start, size in slices], dim=dim).reshape(-1)


def pieces(rng, shape):
    """(piece, flat indices of its elements) that cover a parameter, each part cut into flat ranges as an optimizer cuts it."""
    dim, by_rank = cuts(rng, shape)
    made = []
    for slices in by_rank:
        index = indices(shape, dim, slices)
        edges = sorted(rng.sample(range(len(index) + 1), min(len(index) + 1, rng.randint(0, 3))))
        for start, stop in zip([0, *edges], [*edges, len(index)], strict=True):
            made.append((Piece(tuple(shape), dim, slices, start, stop), index[start:stop]))
    return made


@pytest.mark.parametrize("seed", range(300))
def test_every_shared_element_is_found_once_and_in_its_place(seed):
    rng = random.Random(seed)
    shape = rng.choice([(12,), (7,), (12, 5), (6, 8), (1, 12), (24, 1), (12, 12)])
    sources, targets = pieces(rng, shape), pieces(rng, shape)
    for target, wanted in targets:
        out = torch.full((len(wanted),), -1)
        counted = torch.zeros(len(wanted), dtype=torch.int64)
        held = torch.zeros(len(wanted), dtype=torch.int64)
        for source, values in sources:
            assert Piece.from_json(source.to_json()) == source
            held += (wanted[:, None] == values[None]).sum(dim=1)
            shared = overlaps(source, target)
            for part in shared:
                first, last = part.source_span
                part.target(out).copy_(part.source(values[first:last], first))
                part.target(counted).add_(1)
        in_target = (wanted[:, None] == wanted[None]).sum(dim=1)
        assert torch.equal(out, wanted)
        assert torch.equal(counted, held) or (in_target > 1).any()


def test_a_whole_piece_is_all_of_a_parameter():
    piece = Piece.whole((4, 3))
    (part,) = overlaps(piece, piece)
    assert (part.rows, part.columns, piece.num_elements) == (4, 3, 12)
