"""Learning rates at the steps that define them."""

import pytest

from megarlhf.algorithms.learning_rate import constant_with_warmup, cosine


def test_constant_after_a_linear_warmup_from_a_tenth():
    rates = [constant_with_warmup(step, peak=2.0, warmup_steps=10) for step in range(13)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[10:] == [2.0, 2.0, 2.0]
    rises = [after - before for before, after in zip(rates[:11], rates[1:11], strict=False)]
    assert rises == pytest.approx([0.18] * 10)


def test_no_warmup():
    assert constant_with_warmup(0, peak=3e-6, warmup_steps=0) == 3e-6
    assert cosine(0, peak=3e-6, total_steps=5) == 3e-6


def test_cosine_ends_at_a_tenth_on_the_last_step():
    rates = [cosine(step, peak=1.0, total_steps=101) for step in range(101)]
    assert rates[50] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    assert all(after < before for before, after in zip(rates, rates[1:], strict=False))
    assert [a + b for a, b in zip(rates, reversed(rates), strict=True)] == pytest.approx([1.1] * 101)
    assert cosine(500, peak=1.0, total_steps=101) == pytest.approx(0.1)


def test_cosine_with_warmup():
    rates = [cosine(step, peak=1.0, total_steps=13, final_fraction=0.0, warmup_steps=4) for step in range(13)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[8] == pytest.approx(0.5)
    assert rates[12] == pytest.approx(0.0)


def test_cosine_of_one_step_is_the_peak():
    assert cosine(0, peak=1.0, total_steps=1) == 1.0
