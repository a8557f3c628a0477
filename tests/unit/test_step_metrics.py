"""A step's metrics are means over what they count, however its optimizer steps shared that out."""

import pytest

from megarlhf.engine.trainable import StepResult
from megarlhf.runs.loop import step_metrics

UPDATE = {"skipped": False, "loss_scale_used": 1.0, "loss_scale": 1.0, "searching_loss_scale": False, "consecutive_skips": 0}


def result(**terms):
    sums = {name: (float(sum(values)), len(values)) for name, values in terms.items()}
    stats = {f"{name}/nll": of for name, of in sums.items()}
    return StepResult(**UPDATE, grad_norm=2.0, sums=sums, stats=stats, tokens=7, positions=8)


def test_minibatches_weigh_what_is_in_them():
    """Long answers in one minibatch and short ones in the other: the mean of the two means is no mean over tokens."""
    minibatches = [result(policy=[1, 2, 3, 4, 5, 6], ptx=[3]), result(policy=[10], ptx=[5, 5, 5])]
    assert [of.losses for of in minibatches] == [{"policy": 3.5, "ptx": 3.0}, {"policy": 10.0, "ptx": 5.0}]
    metrics = step_metrics("policy", minibatches, 0.1)
    assert metrics["policy/loss"] == metrics["policy/nll"] == pytest.approx(31 / 7)
    assert metrics["ptx/loss"] == metrics["ptx/nll"] == pytest.approx(4.5)
    assert metrics["policy/grad_norm"] == 2 and metrics["throughput/policy_padding_fraction"] == 1 / 8
