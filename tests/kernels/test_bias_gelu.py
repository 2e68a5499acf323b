"""``bias_gelu``: the reference against torch's own GELU, the tails of the kernel, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import hetu_kernels
from hetu_kernels._common.registry import Case, op_spec
from hetu_kernels.norm_act.bias_gelu_ref import bias_gelu_reference
from tests.kernels._reads import check_reads


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_reference_is_torch_gelu(approximate: str) -> None:
    x, bias = torch.randn(4, 6, 40, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    y = bias_gelu_reference(x, bias, approximate=approximate)
    torch.testing.assert_close(y, F.gelu(x + bias, approximate=approximate))
    torch.testing.assert_close(bias_gelu_reference(x, approximate=approximate), F.gelu(x, approximate=approximate))


def test_reference_does_not_round_the_sum() -> None:
    x, bias = torch.full((1, 8), 4.0, dtype=torch.bfloat16), torch.full((8,), 0.0117, dtype=torch.bfloat16)
    y = bias_gelu_reference(x, bias)
    assert torch.equal(y, F.gelu(x.float() + bias.float()).bfloat16())


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_reference_gradients_are_right(approximate: str) -> None:
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: bias_gelu_reference(x, b, approximate=approximate), (x, bias))


@pytest.mark.interpret
def test_float64_runs_the_reference(device: torch.device) -> None:
    """A kernel would compute in float32, which is not what float64 was asked for."""
    x = torch.randn(3, 7, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(hetu_kernels.bias_gelu, (x,))


@pytest.mark.interpret
def test_kernel_is_accurate_in_the_tails(device: torch.device) -> None:
    """Torch adds 1 to the error function, which leaves nothing of GELU below -6; the kernel keeps digits of it."""
    x = torch.linspace(-12, 8, 4001, device=device)
    y = hetu_kernels.bias_gelu(x)
    wide = x.double()
    exact = wide * 0.5 * torch.special.erfc(-wide * 0.5**0.5)
    assert ((y - exact).abs() / exact.abs().clamp(min=1e-30)).max() < 5e-5
    assert ((y - exact).abs() / (1 + exact.abs())).max() < 3e-7


@pytest.mark.interpret
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_slope_is_that_of_the_kernel_itself(approximate: str, device: torch.device) -> None:
    x = torch.linspace(-9, 9, 721, device=device, requires_grad=True)
    hetu_kernels.bias_gelu(x, approximate=approximate).sum().backward()
    exact = x.detach().double().requires_grad_()
    F.gelu(exact, approximate=approximate).sum().backward()
    assert (x.grad - exact.grad).abs().max() < 1e-6


@pytest.mark.interpret
def test_bias_that_needs_no_gradient(device: torch.device) -> None:
    x, bias = torch.randn(3, 8, device=device, requires_grad=True), torch.randn(8, device=device)
    y = hetu_kernels.bias_gelu(x, bias)
    y.backward(torch.ones_like(y))
    with_both = bias.clone().requires_grad_()
    again = x.detach().clone().requires_grad_()
    hetu_kernels.bias_gelu(again, with_both).sum().backward()  # a gradient with strides of 0
    assert bias.grad is None
    assert torch.equal(x.grad, again.grad)
    torch.testing.assert_close(with_both.grad, again.grad.sum(0))


@pytest.mark.interpret
@pytest.mark.skipif(torch.cuda.is_available(), reason="watches the interpreter")
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("case", op_spec("bias_gelu").cases(), ids=lambda case: case.name)
def test_kernels_read_their_arguments_only(case: Case) -> None:
    check_reads(op_spec("bias_gelu"), case, case.dtypes[0])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.randn(3, 0)}, ValueError, r"x has shape \[3, 0\], expected rows of at least one element"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x has shape \[\], expected rows"),
        ({"x": torch.arange(24).view(3, 8)}, TypeError, "x has dtype torch.int64, expected float32"),
        ({"bias": torch.randn(7)}, ValueError, r"bias has shape \[7\], expected \[8\]"),
        ({"x": None}, TypeError, "x is None, expected a tensor"),
        ({"bias": 1.0}, TypeError, "bias is a float, expected a tensor"),
        ({"approximate": "erf"}, ValueError, "approximate='erf', expected one of 'none', 'tanh'"),
    ],
)
def test_wrong_arguments_are_named(changes: dict, error: type[Exception], message: str) -> None:
    arguments = {"x": torch.randn(3, 8), "bias": torch.randn(8), **changes}
    with pytest.raises(error, match=f"bias_gelu: {message}"):
        hetu_kernels.bias_gelu(**arguments)
