"""``add_rms_norm``: the reference against torch's own norm, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import hetu_kernels
from hetu_kernels.norm_act.norm_ref import add_rms_norm_reference


def test_reference_is_torch_rms_norm() -> None:
    x, residual = torch.randn(2, 6, 40, dtype=torch.float64)
    weight, bias = torch.randn(2, 40, dtype=torch.float64)
    y, z = add_rms_norm_reference(x, residual, weight, bias=bias, eps=1e-5)
    torch.testing.assert_close(z, x + bias + residual, rtol=0, atol=1e-15)
    torch.testing.assert_close(y, F.rms_norm(x + bias + residual, (40,), weight, 1e-5))
    y, z = add_rms_norm_reference(x, None, weight, eps=1e-5, zero_centered=True)
    torch.testing.assert_close(y, F.rms_norm(x, (40,), weight + 1, 1e-5))
    assert torch.equal(z, x)


def test_reference_gradients_are_right() -> None:
    x, residual = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda x, r, w, b: add_rms_norm_reference(x, r, w, bias=b, eps=0.1), (x, residual, weight, bias)
    )


@pytest.mark.interpret
def test_stream_without_addition_is_the_input_itself(device: torch.device) -> None:
    x, weight = torch.randn(3, 8, device=device), torch.ones(8, device=device)
    y, z = hetu_kernels.add_rms_norm(x, None, weight)
    assert z is x
    assert torch.equal(y, hetu_kernels.rms_norm(x, weight))


@pytest.mark.interpret
def test_only_the_stream_may_be_used(device: torch.device) -> None:
    """The gradient of an unused output is nothing, not an error."""
    x, residual = (torch.randn(3, 8, device=device, requires_grad=True) for _ in range(2))
    weight = torch.randn(8, device=device, requires_grad=True)
    _, z = hetu_kernels.add_rms_norm(x, residual, weight)
    z.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.randn(3, 0)}, ValueError, r"x has shape \[3, 0\], expected rows of at least one element"),
        ({"x": torch.arange(24).view(3, 8)}, TypeError, "x has dtype torch.int64, expected float32"),
        ({"residual": torch.randn(8)}, ValueError, r"residual has shape \[8\], expected that of x, \[3, 8\]"),
        ({"weight": torch.randn(7)}, ValueError, r"weight has shape \[7\], expected \[8\]"),
        ({"bias": torch.randn(3, 8)}, ValueError, r"bias has shape \[3, 8\], expected \[8\]"),
        ({"weight": 1.0}, TypeError, "weight is a float, expected a tensor"),
        ({"weight": None}, TypeError, "weight is None, expected a tensor"),
        ({"x": None}, TypeError, "x is None, expected a tensor"),
        ({"residual_dtype": torch.int32}, ValueError, "residual_dtype=torch.int32, expected one of torch.float32"),
        ({"residual": torch.randn(3, 8).double()}, TypeError,
         "residual has dtype torch.float64, x torch.float32: float64 does not mix"),
        ({"x": torch.randn(3, 8).double(), "residual": torch.randn(3, 8)}, TypeError,
         "residual has dtype torch.float32, x torch.float64"),
        ({"residual_dtype": torch.float64}, TypeError, "residual_dtype has dtype torch.float64, x torch.float32"),
        ({"eps": None}, TypeError, "eps is None, expected 0 or more"),
        ({"eps": -1e-6}, ValueError, "eps=-1e-06, expected 0 or more"),
        ({"eps": float("nan")}, ValueError, "eps=nan, expected 0 or more"),
        ({"zero_centered": None}, TypeError, "zero_centered is None, expected True or False"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(changes: dict, error: type[Exception], message: str) -> None:
    arguments = {"x": torch.randn(3, 8), "residual": None, "weight": torch.randn(8), **changes}
    with pytest.raises(error, match=f"add_rms_norm: {message}"):
        hetu_kernels.add_rms_norm(**arguments)


def test_norm_without_a_weight_is_refused() -> None:
    with pytest.raises(TypeError, match="weight is None, expected a tensor"):
        hetu_kernels.rms_norm(torch.randn(3, 8), None)
