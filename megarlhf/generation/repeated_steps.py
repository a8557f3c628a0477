"""A step of decoding as one function of tensors that stay where they are, over batches of a few sizes: what a CUDA graph can hold.

A step is hundreds of small kernels, which a host launches more slowly than a GPU runs them. A graph launches all of them at once, but
repeats them to the address: so inputs are copied into buffers, batches are filled up to a few sizes, and nothing may follow from a number
that only the host knows. The rows that fill a batch up stand in slots that nobody holds, at position 0: whoever takes such a slot writes
that position before reading it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megarlhf.generation.cache import SlotCache
from megarlhf.models.decoding import packed_forward
from megarlhf.models.transformer import Transformer

Choose = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(hidden states [rows, h], samples [rows], positions [rows]) -> (tokens [rows], log-probabilities [rows])."""
Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Of a function that reads and writes the same memory each time: what repeats it."""
LEAST_BATCH = 4
LEAST_REACH = 64


class CudaGraphs:
    """A `Capture` into CUDA graphs, which share one pool of memory and live as long as what repeats them."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Runs `function` once, for libraries to take the workspaces and make the communicators that a capture forbids them to."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            function()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            function()
        return graph.replay


def batch_size(rows: int, slots: int) -> int:
    """Rows filled up to: a quarter more of them at most, beyond the smallest sizes, and never more than there are slots."""
    step = max(LEAST_BATCH, 2 ** ((rows - 1).bit_length() - 3)) if rows > 1 else LEAST_BATCH
    return min(slots, -(-rows // step) * step)


def reach_of(longest: int, capacity: int) -> int:
    """Positions that are looked at where the longest row has `longest`: a power of two."""
    return min(capacity, max(LEAST_REACH, 2 ** (longest - 1).bit_length()))


class RepeatedSteps:
    """The passes of one group of rows through one chunk of the model that only decode."""

    def __init__(self, chunk: Transformer, cache: SlotCache, choose: Choose, *, hidden_size: int, capture: Capture) -> None:
        """`choose` is asked on the chunk that ends the model. Cache and weights stay where they are as long as this lives."""
        self._chunk, self._cache, self._choose, self._capture = chunk, cache, choose, capture
        whole = {"device": cache.device, "dtype": torch.int64}
        self._tokens, self._positions, self._samples = (torch.zeros(cache.slots, **whole) for _ in range(3))
        self._chosen = torch.zeros(cache.slots, **whole)
        self._logprobs = torch.zeros(cache.slots, device=cache.device)
        self._hidden, self._passed_on = (torch.zeros(cache.slots, hidden_size, dtype=cache.dtype, device=cache.device) for _ in range(2))
        self._known: dict[tuple[int, int], Callable[[], None]] = {}

    def __call__(self, tokens: Tensor, positions: Tensor, samples: Tensor, hidden: Tensor | None, longest: int) -> tuple[Tensor, ...]:
        """One step of the first rows, of which the longest sees `longest` positions: (hidden states,) or (tokens, log-probabilities)."""
        rows = len(tokens)
        size = batch_size(rows, self._cache.slots)
        given = [(self._tokens, tokens), (self._positions, positions), (self._samples, samples)]
        for buffer, values in given + ([] if hidden is None else [(self._hidden, hidden)]):
            buffer[:rows].copy_(values)
        self._tokens[rows:size].zero_()
        self._positions[rows:size].zero_()
        key = size, reach_of(longest, self._cache.capacity) if self._cache.reads_by_mask else 0
        if key not in self._known:
            self._known[key] = self._capture(lambda: self._step(*key))
        self._known[key]()
        if self._chunk.post_process:
            return self._chosen[:rows].clone(), self._logprobs[:rows].clone()
        return (self._passed_on[:rows].clone(),)

    def _step(self, size: int, reach: int) -> None:
        """No input is written over: done twice, for a capture, it does the same."""
        tokens, positions = self._tokens[:size], self._positions[:size]
        self._cache.begin_decoding(positions, reach)
        hidden = None if self._chunk.pre_process else self._hidden[:size]
        found = packed_forward(self._chunk, tokens, positions, hidden, self._cache, wanted=size)
        if not self._chunk.post_process:
            self._passed_on[:size].copy_(found)
            return
        chosen, logprobs = self._choose(found, self._samples[:size], positions + 1)
        self._chosen[:size].copy_(chosen)
        self._logprobs[:size].copy_(logprobs)
