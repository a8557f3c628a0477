"""The order: each item once per epoch, the same for the same seed and epoch, resumable anywhere."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest

from megarlhf.data.order import ShuffledOrder


@pytest.mark.parametrize("num_items", [1, 2, 7, 100])
@pytest.mark.parametrize("step", [1, 3, 64])
def test_each_epoch_is_a_permutation_whatever_the_step(num_items, step):
    order, taken = ShuffledOrder(num_items, seed=5), []
    while len(taken) < 4 * num_items:
        assert order.epoch == len(taken) // num_items
        taken += order.take(step)
    epochs = [taken[i * num_items : (i + 1) * num_items] for i in range(4)]
    assert all(sorted(epoch) == list(range(num_items)) for epoch in epochs)
    assert taken == ShuffledOrder(num_items, seed=5).take(len(taken))
    if num_items == 100:
        assert len({tuple(epoch) for epoch in [*epochs, range(100), ShuffledOrder(100, seed=6).take(100)]}) == 6


@pytest.mark.parametrize("num_items, batch", [(1, 1), (9, 8), (9, 3), (3, 64), (100, 7)])
def test_a_batch_is_of_one_epoch(num_items, batch):
    order, whole = ShuffledOrder(num_items, seed=5), ShuffledOrder(num_items, seed=5)
    for epoch in range(3):
        assert order.epoch == epoch
        batches = [order.take_batch(batch) for _ in range(-(-num_items // batch))]
        assert [len(taken) for taken in batches[:-1]] == [batch] * (len(batches) - 1)
        assert [item for taken in batches for item in taken] == whole.take(num_items)


def test_resuming_anywhere_equals_going_on():
    for before in range(25):
        order, resumed = ShuffledOrder(9, seed=3), ShuffledOrder(9, seed=3)
        order.take(before)
        resumed.take(4)  # the state replaces whatever was there
        resumed.load_state_dict(order.state_dict())
        assert resumed.epoch == order.epoch and resumed.take(30) == order.take(30)


def test_every_permutation_is_equally_likely():
    counts = Counter(tuple(ShuffledOrder(4, seed=seed).take(4)) for seed in range(4800))
    chi_squared = sum((counts[permutation] - 200) ** 2 / 200 for permutation in counts)
    assert len(counts) == 24 and chi_squared < 45  # 23 degrees of freedom: 0.4 % of fair shuffles exceed 45


@pytest.mark.parametrize("num_items", [1000, 4096, 10007])
def test_a_long_order_is_well_mixed(num_items):
    """Against what a fair shuffle would give, with bounds that it crosses about once in 10,000 times."""
    taken = np.array(ShuffledOrder(num_items, seed=11).take(2 * num_items))
    for order in (taken[:num_items], taken[num_items:]):
        assert sorted(order) == list(range(num_items))
        for lag in (1, 2, 3, 64, 100):  # neighbours say nothing of each other
            assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 4 / num_items**0.5
        assert abs(np.corrcoef(order, np.arange(num_items))[0, 1]) < 4 / num_items**0.5
        fixed = int((order == np.arange(num_items)).sum())  # about Poisson with mean 1
        assert fixed < 8
        cells, _, _ = np.histogram2d(order, np.arange(num_items), bins=10)
        expected = num_items / 100
        assert ((cells - expected) ** 2 / expected).sum() < 81 + 4 * (2 * 81) ** 0.5  # chi squared with 81 degrees of freedom
        steps = np.bincount(np.diff(order) % 16, minlength=16)
        assert ((steps - num_items / 16) ** 2 / (num_items / 16)).sum() < 15 + 4.5 * 30**0.5
    assert abs(np.corrcoef(taken[:num_items], taken[num_items:])[0, 1]) < 4 / num_items**0.5


def test_an_order_takes_no_memory_for_its_items():
    tracemalloc.start()
    first = ShuffledOrder(10**12, seed=1).take(512)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20 and len(set(first)) == 512 and max(first) > 10**11


def test_the_order_is_the_same_in_every_process_and_version():
    assert ShuffledOrder(10, seed=1234).take(20) == [8, 1, 0, 7, 9, 5, 4, 3, 6, 2, 3, 8, 7, 2, 0, 6, 9, 1, 5, 4]


@pytest.mark.parametrize("num_items, seed, message", [(10, 2, "seed 1, this one seed 2"), (11, 1, "num_items 10, this one num_items 11")])
def test_the_state_of_another_order_is_refused(num_items, seed, message):
    with pytest.raises(ValueError, match=message):
        ShuffledOrder(num_items, seed=seed).load_state_dict(ShuffledOrder(10, seed=1).state_dict())


def test_impossible_orders_are_refused():
    with pytest.raises(ValueError, match="num_items is 0"):
        ShuffledOrder(0, seed=1)
    with pytest.raises(ValueError, match="seed is -1"):
        ShuffledOrder(3, seed=-1)
