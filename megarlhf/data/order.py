"""In which order items are taken: without replacement, reshuffled each epoch, resumable from one number."""

from __future__ import annotations

import numpy as np


class ShuffledOrder:
    """An endless order over `num_items` items in which each epoch is a fresh permutation.

    The permutation of an epoch depends on (seed, epoch) alone: the raw 64-bit output of the counter-based generator
    Philox with that key, sorted. It is so the same on each rank, in each process and for each version of numpy, whose
    promise of stability covers raw output but not `permutation`. It takes 8 bytes of host memory per item.
    """

    def __init__(self, num_items: int, *, seed: int):
        if num_items < 1:
            raise ValueError(f"num_items is {num_items}; an order needs at least one item")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}; it must be in 0 <= seed < 2**64")
        self.num_items, self.seed = num_items, seed
        self._num_taken = 0
        self._shuffled_epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    @property
    def epoch(self) -> int:
        """How many times all items have been taken: the epoch of the next item."""
        return self._num_taken // self.num_items

    def take(self, n: int) -> list[int]:
        """The next `n` items; the list goes on into the next epoch where this one ends."""
        if n < 0:
            raise ValueError(f"cannot take {n} items; n must be at least 0")
        taken: list[int] = []
        while len(taken) < n:
            start = self._num_taken % self.num_items
            part = self._permutation_of(self.epoch)[start : start + n - len(taken)].tolist()
            taken += part
            self._num_taken += len(part)
        return taken

    def take_batch(self, n: int) -> list[int]:
        """The next `n` items of this epoch, or those that it has left where they are fewer: a batch is never of two epochs."""
        return self.take(min(n, self.num_items - self._num_taken % self.num_items))

    def state_dict(self) -> dict[str, int]:
        """The cursor, and what it is a cursor into."""
        return {"num_items": self.num_items, "seed": self.seed, "num_taken": self._num_taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to where `state` was saved. Raises ValueError for the state of another order."""
        for name, mine in (("num_items", self.num_items), ("seed", self.seed)):
            if state[name] != mine:
                raise ValueError(
                    f"the saved order has {name} {state[name]}, this one {name} {mine}: they are different orders. "
                    "Resume with the data and seed that the checkpoint was trained with, or start a new run"
                )
        self._num_taken = state["num_taken"]

    def _permutation_of(self, epoch: int) -> np.ndarray:
        if epoch != self._shuffled_epoch:
            noise = np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64)).random_raw(self.num_items)
            self._permutation = np.argsort(noise, kind="stable")
            self._shuffled_epoch = epoch
        return self._permutation
