"""``add_layer_norm``: the reference against torch's own norm, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import hetu_kernels
from hetu_kernels.norm_act.norm_ref import add_layer_norm_reference


def test_reference_is_torch_layer_norm() -> None:
    x, residual = torch.randn(2, 6, 40, dtype=torch.float64)
    weight, shift, bias = torch.randn(3, 40, dtype=torch.float64)
    y, z = add_layer_norm_reference(x, residual, weight, shift, bias=bias)
    torch.testing.assert_close(z, x + bias + residual, rtol=0, atol=1e-15)
    torch.testing.assert_close(y, F.layer_norm(z, (40,), weight, shift))
    y, _ = add_layer_norm_reference(x, None, weight)
    torch.testing.assert_close(y, F.layer_norm(x, (40,), weight))


def test_reference_gradients_are_right() -> None:
    x, residual = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, shift, bias = (torch.randn(7, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(
        lambda x, r, w, s, b: add_layer_norm_reference(x, r, w, s, bias=b, eps=0.1), (x, residual, weight, shift, bias)
    )


@pytest.mark.interpret
def test_variance_survives_a_large_mean(device: torch.device) -> None:
    """E[z^2] - E[z]^2 would be all rounding error here."""
    x = torch.randn(4, 64, device=device) + 10_000
    y = hetu_kernels.layer_norm(x, torch.ones(64, device=device))
    expected = F.layer_norm(x.double(), (64,))
    assert (y.double() - expected).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"shift": torch.randn(9)}, ValueError, r"shift has shape \[9\], expected \[8\]"),
        ({"weight": torch.randn(8, 1)}, ValueError, r"weight has shape \[8, 1\], expected \[8\]"),
        ({"residual": torch.randn(3, 7)}, ValueError, r"residual has shape \[3, 7\], expected that of x"),
        ({"weight": None}, TypeError, "weight is None, expected a tensor"),
        ({"residual_dtype": torch.int32}, ValueError, "residual_dtype=torch.int32, expected one of torch.float32"),
        ({"residual": torch.randn(3, 8).double()}, TypeError, "residual has dtype torch.float64, x torch.float32"),
        ({"eps": -1.0}, ValueError, "eps=-1.0, expected 0 or more"),
        ({"eps": "1"}, TypeError, "eps='1', expected 0 or more"),
    ],
)
def test_wrong_arguments_are_named(changes: dict, error: type[Exception], message: str) -> None:
    arguments = {"x": torch.randn(3, 8), "residual": None, "weight": torch.randn(8), **changes}
    with pytest.raises(error, match=f"add_layer_norm: {message}"):
        hetu_kernels.add_layer_norm(**arguments)


def test_norm_without_a_weight_is_refused() -> None:
    with pytest.raises(TypeError, match="weight is None, expected a tensor"):
        hetu_kernels.layer_norm(torch.randn(3, 8), None)
