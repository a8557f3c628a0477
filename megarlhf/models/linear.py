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
            return linear(input_, self.weight, self.bias), None
        return super().forward(input_, *args, **kwargs)


class RowLinear(RowParallelLinear):
    """Input features split over tp. Returns (output, bias that is still to be added or None)."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """input_ [seq, batch, in / tp] -> [seq (/ tp), batch, out]."""
        if self.tp_group.size() == 1:
            return linear(input_, self.weight, self.bias), None
        return super().forward(input_)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] weight^T [out, in] + bias [out]: [..., out]. Where the optimizer allows it (`gradient_is_collected`), the weight's
    gradient is added to `weight.main_grad` by the product that makes it, and autograd sees none.
    """
    if getattr(weight, "gradient_is_collected", False) and torch.is_grad_enabled():
        return _Collecting.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class _Collecting(torch.autograd.Function):
    """A gradient of its own would be written, read and added for every micro-batch: three passes over as much memory as all weights."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        torch.addmm(weight.main_grad, rows.t(), x.flatten(0, -2), out=weight.main_grad)
        grad_x = (rows @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, rows.sum(dim=0) if ctx.needs_input_grad[2] else None


def float32_product(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] times b [k, n]: [m, n] float32, accumulated and left in it whatever the precision of b, which a is brought to."""
    return a @ b if b.dtype == torch.float32 else _float32_product(a, b)


COLUMNS_AT_ONCE = 1024
"""Of a product with a tall weight on a CPU: a piece of the weight that stays in its cache."""


def few_by_many(x: Tensor, weight: Tensor) -> Tensor:
    """x [m, k] times weight [n, k] transposed, as `float32_product`, where n is much larger than m.

    A CPU's BLAS arranges the whole weight for itself before it multiplies, and does that faster for a piece that stays in its cache.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return float32_product(x, weight.t())
    out = torch.empty(len(x), len(weight), device=x.device)
    for start in range(0, len(weight), COLUMNS_AT_ONCE):
        torch.mm(x, weight[start : start + COLUMNS_AT_ONCE].t(), out=out[:, start : start + COLUMNS_AT_ONCE])
    return out


def add_float32_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """`float32_product`, added to `total` [m, n] in place where there is one."""
    if total is None:
        return float32_product(a, b)
    return total.addmm_(a, b) if b.dtype == torch.float32 else total.add_(_float32_product(a, b))


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    """The same, b of a lower precision.

    CUDA's tensor cores accumulate in float32 and can leave the result there. A CPU multiplies float32 several times
    faster than bfloat16 or float16, the conversion included.
    """
    if b.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    return a.float() @ b.float()
