"""Rows of text through NVIDIA DALI: read ahead by a process of its own.

They stay on the host, with or without a GPU: rows are picked and packed there, and go to the device with all others (parallel/upload.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megarlhf.data.blend import BlendedText, NumberedBatches

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

AHEAD = 2
"""Batches that are read before they are asked for."""


class DaliLoader:
    """Batches of one size, one after the other, out of a DALI pipeline; another place or size starts a new one."""

    def __init__(self, text: BlendedText) -> None:
        self._text = text
        self._pipeline: Pipeline | None = None
        self._next = (0, 0)
        """(place, size) of the batch that the pipeline gives next."""

    def rows(self, start: int, n: int) -> Tensor:
        """See `Loader`."""
        if self._pipeline is None or self._next != (start, n):
            self._pipeline = _pipeline(NumberedBatches(self._text, start, n))
        (out,) = self._pipeline.run()
        self._next = (start + n, n)
        return torch.from_dlpack(out.as_tensor())[0].clone()  # the pipeline writes into its buffers again


def _pipeline(batches: NumberedBatches) -> Pipeline:
    """A pipeline whose every sample is a whole batch: DALI then has no rows to count."""
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(
        batch_size=1,
        num_threads=1,
        device_id=None,
        prefetch_queue_depth=AHEAD,
        py_num_workers=1,
        py_start_method="spawn",
    )
    with pipeline:
        rows = fn.external_source(
            batches, batch=False, parallel=True, prefetch_queue_depth=AHEAD, dtype=types.INT64, ndim=2, bytes_per_sample_hint=batches.bytes
        )
        pipeline.set_outputs(rows)
    pipeline.build()
    return pipeline
