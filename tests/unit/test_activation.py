"""The activation that is written in another form than torch's."""

import torch
import torch.nn.functional as F

from megarlhf.models.activation import gelu_tanh


def test_gelu_and_its_gradient_are_float64s_to_rounding():
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -1e-30, 1e4, -1e4, 1e12, -1e12])]).requires_grad_()
    grad = torch.linspace(-2, 3, len(x))
    exact = x.detach().double().requires_grad_()
    expected = F.gelu(exact, approximate="tanh")
    gelu_tanh(x).backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(gelu_tanh(x).double(), expected, rtol=2e-6, atol=1e-6)
    finite = exact.grad.isfinite()
    torch.testing.assert_close(x.grad.double()[finite], exact.grad[finite], rtol=1e-5, atol=2e-6)
    assert x.grad.isfinite().all()


def test_no_gradient_where_none_is_wanted_and_low_precision_is_torchs():
    x = torch.randn(64, 3)
    assert not gelu_tanh(x).requires_grad
    assert torch.equal(gelu_tanh(x.bfloat16()), F.gelu(x.bfloat16(), approximate="tanh"))
