"""The key-value cache: rows that leave it, and what that costs."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megarlhf.generation.cache import KeyValueCache

SHAPE = {"batch": 8, "kv_heads": 2, "max_len": 16, "head_size": 4}


class LargestHeld(TorchDispatchMode):
    """The most elements that are held at once by the tensors of a cache and those that are made within."""

    def __init__(self, cache):
        super().__init__()
        self.held = [weakref.ref(tensor) for pair in cache._stored.values() for tensor in pair]
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if made.dim() == 4:
            self.held.append(weakref.ref(made))
        self.largest = max(self.largest, sum(tensor.numel() for reference in self.held if (tensor := reference()) is not None))
        return made


def filled(num_layers):
    cache = KeyValueCache(range(1, num_layers + 1), **SHAPE, dtype=torch.float32, device=torch.device("cpu"))
    for number, (keys, values) in cache._stored.items():
        keys.copy_(torch.arange(keys.numel()).view(keys.shape) + 1000 * number)
        values.copy_(-keys)
    cache.prefill(5)
    return cache


def test_rows_that_stay_keep_what_they_had():
    cache, index = filled(3), torch.tensor([6, 0, 3])
    before = {number: (keys.clone(), values.clone()) for number, (keys, values) in cache._stored.items()}
    cache.keep(index)
    for number, (keys, values) in cache._stored.items():
        assert torch.equal(keys, before[number][0][index]) and torch.equal(values, before[number][1][index])
    assert cache.positions.shape == (3, 5)


def test_rows_leave_without_a_second_cache():
    cache = filled(6)
    whole = sum(tensor.numel() for pair in cache._stored.values() for tensor in pair)
    with LargestHeld(cache) as held:
        cache.keep(torch.arange(7))
    assert held.largest <= whole + whole / 12  # beside the cache, one layer's keys
    assert sum(tensor.numel() for pair in cache._stored.values() for tensor in pair) == whole * 7 // 8
