"""In which order items are taken: without replacement, reshuffled each epoch, resumable from one number."""

from __future__ import annotations

import math

import numpy as np

ROUNDS = 16
"""Of the Feistel network. Few items are the hardest to mix: of four, no order's chance is then off by more than 1 in 16000."""
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
"""splitmix64's shifts and multipliers (Steele, Lea and Flood 2014)."""


class Permutation:
    """A keyed pseudo-random permutation of 0 .. size - 1, one place at a time.

    A place is written as (left, right) with left < width and right < height, width * height just above size. In each
    round a hash of one half is added to the other, which can be undone (a Feistel network over numbers of any range: Black
    and Rogaway 2002). What lands above size goes through again until it lands below (cycle walking, ibid.). The keys of
    the rounds are the first raw outputs of the counter-based generator Philox with the key (seed, epoch).
    """

    def __init__(self, size: int, *, seed: int, epoch: int) -> None:
        self.size = size
        self._width = np.uint64(math.isqrt(size - 1) + 1)
        self._height = np.uint64(-(-size // int(self._width)))
        self._keys = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(ROUNDS)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """The items at `places` [n] uint64: [n] uint64."""
        items = self._through(places)
        while (outside := items >= self.size).any():
            items[outside] = self._through(items[outside])
        return items

    def _through(self, places: np.ndarray) -> np.ndarray:
        left, right = places % self._width, places // self._width
        for number, key in enumerate(self._keys):
            if number % 2:
                right = (right + _hashed(left, key) % self._height) % self._height
            else:
                left = (left + _hashed(right, key) % self._width) % self._width
        return right * self._width + left


def _hashed(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """splitmix64's finaliser of a key and each value [n] uint64."""
    mixed = values + key  # wraps around, as all that follows
    for shift, factor in MIX:
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed


class ShuffledOrder:
    """An endless order over `num_items` items in which each epoch is a fresh permutation.

    The permutation of an epoch depends on (seed, epoch) alone, and is the same on each rank, in each process and for each
    version of numpy. Any place of it is computed by itself, so that an order takes no memory however many items it has.
    """

    def __init__(self, num_items: int, *, seed: int):
        if num_items < 1:
            raise ValueError(f"num_items is {num_items}; an order needs at least one item")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}; it must be in 0 <= seed < 2**64")
        self.num_items, self.seed = num_items, seed
        self._num_taken = 0

    @property
    def epoch(self) -> int:
        """How many times all items have been taken: the epoch of the next item."""
        return self._num_taken // self.num_items

    def take(self, n: int) -> list[int]:
        """The next `n` items; the list goes on into the next epoch where this one ends."""
        if n < 0:
            raise ValueError(f"cannot take {n} items; n must be at least 0")
        taken = self.at(self._num_taken, n)
        self._num_taken += n
        return taken

    def at(self, place: int, n: int) -> list[int]:
        """The `n` items from `place` of the whole order on, wherever the cursor is."""
        items: list[int] = []
        while len(items) < n:
            epoch, start = divmod(place + len(items), self.num_items)
            stop = min(self.num_items, start + n - len(items))
            items += Permutation(self.num_items, seed=self.seed, epoch=epoch)(np.arange(start, stop, dtype=np.uint64)).tolist()
        return items

    def take_batch(self, n: int) -> list[int]:
        """The next `n` items of this epoch, or those that it has left where they are fewer: a batch is never of two epochs."""
        return self.take(min(n, self.num_items - self._num_taken % self.num_items))

    def begin_behind(self, state: dict[str, int]) -> None:
        """Begin the epoch after that of a saved order over fewer items; what that one had left of its epoch comes in this one."""
        self._num_taken = -(-state["num_taken"] // state["num_items"]) * self.num_items

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
