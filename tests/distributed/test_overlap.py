"""Exchanges beside the computation: the same training as without, whatever comes between steps and however few rows a copy has."""

from unittest import mock

import pytest
import torch

from megarlhf.engine import optimizer
from megarlhf.engine.terms import Term
from megarlhf.parallel.groups import World
from tests.distributed.training import LEARNING_RATE, build, local_weights, outputs, terms_of

SP = {"sequence_parallel": True}
CASES = {
    "gpt2": [{}, {"tp": 2}, {"pp": 2}],  # tied embeddings; of four copies some are idle
    "deep": [{"pp": 2, "virtual_pp": 2}],
    "llama": [{"tp": 2, **SP}, {"pp": 2}],  # an untied head, which no module calls
    "value": [{}, {"pp": 2}],
}


def trained(name, groups, *, overlap):
    """Steps of three micro-batches, of two, and of so few rows that copies are idle, with readers between them."""
    with mock.patch.object(optimizer, "BUCKET_SIZE", 400):
        engine = build(name, groups, overlap=overlap)
    engine.start_ema(0.9)
    buckets = [len(chunk.bucket_groups) for chunk in engine.chunks]
    seen, results = [], []
    for number, rows in enumerate((None, 2, 1, None, 3)):
        terms = terms_of(name) if rows is None else [fewer(term, rows) for term in terms_of(name)[:1]]
        results.append(engine.step(terms, learning_rate=LEARNING_RATE))
        if number == 1:
            engine.ema.update()
        if number == 2:
            seen += outputs(engine)
        if number == 3:
            with engine.ema.swapped_in():
                seen += outputs(engine)
    engine.offload.need("weights")
    return seen, results, local_weights(engine), buckets


def fewer(term, rows):
    return Term(term.name, term.loss, term.batch.rows(torch.arange(rows)), weight=term.weight)


def check_overlap(name, layouts):
    world = World.connect()
    for axes in layouts:
        groups = world.groups(world.layout(**axes))
        plain, overlapped = (trained(name, groups, overlap=overlap) for overlap in (False, True))
        if groups.is_first_stage:  # megatron exchanges a later stage's gradients in one piece
            assert max(overlapped[3]) > max(plain[3]), "one bucket: nothing overlaps"
        for mine, theirs in zip(overlapped[0], plain[0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        for mine, theirs in zip(overlapped[1], plain[1], strict=True):
            assert mine.losses == pytest.approx(theirs.losses, rel=1e-5, abs=1e-7) and not mine.skipped
            assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
        for parameter, value in plain[2].items():
            where = f"{axes} {parameter}"
            torch.testing.assert_close(overlapped[2][parameter], value, rtol=1e-5, atol=1e-6, msg=lambda m, where=where: f"{where}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_training_is_the_same_with_and_without_overlap(name, ranks4):
    ranks4.run(check_overlap, name, CASES[name])
