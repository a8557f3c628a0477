"""Megatron's parallel linear layers, with the plain linear of torch where nothing is split, and the product behind logits.

On one tensor-parallel rank there is nothing to communicate, and torch adds the bias inside the matrix product, which saves
a pass over the activations for each bias.
"""

from __future__ import annotations

import torch
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


def float32_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, in] times weight [out, in] transposed: [n, out] in float32, accumulated and left in it whatever the precision of both."""
    return F.linear(x, weight) if weight.dtype == torch.float32 else _Float32Linear.apply(x, weight)


class _Float32Linear(torch.autograd.Function):
    """Keeps x and the weight in their own precision for the backward pass, and returns gradients in it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _float32_product(x, weight.t())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = _float32_product(grad, weight).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = _float32_product(grad.t(), x).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, b of a lower precision.

    CUDA's tensor cores accumulate in float32 and can leave the result there. A CPU multiplies float32 several times
    faster than bfloat16 or float16, the conversion included.
    """
    if b.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    return a.float() @ b.float()
