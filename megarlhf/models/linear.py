"""Megatron's parallel linear layers, with the plain linear of torch where nothing is split.

On one tensor-parallel rank there is nothing to communicate, and torch adds the bias inside the matrix product, which saves
a pass over the activations for each bias.
"""

from __future__ import annotations

import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor


class ColumnLinear(ColumnParallelLinear):
    """Output features split over tp. Returns (output, bias that is still to be added or None)."""

    def forward(self, input_: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        """input_ [seq (/ tp), batch, in] -> [seq, batch, out / tp]."""
        if self.tp_group.size() == 1:
            return F.linear(input_, self.weight, self.bias), None
        return super().forward(input_, *args, **kwargs)


class RowLinear(RowParallelLinear):
    """Input features split over tp. Returns (output, bias that is still to be added or None)."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """input_ [seq, batch, in / tp] -> [seq (/ tp), batch, out]."""
        if self.tp_group.size() == 1:
            return F.linear(input_, self.weight, self.bias), None
        return super().forward(input_)
