"""The order: each item once per epoch, the same for the same seed and epoch, resumable anywhere."""

from collections import Counter

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


def test_the_order_is_the_same_in_every_process_and_version():
    assert ShuffledOrder(10, seed=1234).take(20) == [8, 9, 7, 3, 0, 1, 4, 2, 5, 6, 0, 9, 5, 6, 4, 2, 8, 1, 7, 3]


@pytest.mark.parametrize("num_items, seed, message", [(10, 2, "seed 1, this one seed 2"), (11, 1, "num_items 10, this one num_items 11")])
def test_the_state_of_another_order_is_refused(num_items, seed, message):
    with pytest.raises(ValueError, match=message):
        ShuffledOrder(num_items, seed=seed).load_state_dict(ShuffledOrder(10, seed=1).state_dict())


def test_impossible_orders_are_refused():
    with pytest.raises(ValueError, match="num_items is 0"):
        ShuffledOrder(0, seed=1)
    with pytest.raises(ValueError, match="seed is -1"):
        ShuffledOrder(3, seed=-1)
