"""``swiglu``: the reference against torch's own activations, its two forms, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import hetu_kernels
from hetu_kernels._common.registry import Case, op_spec
from hetu_kernels.norm_act.swiglu_ref import swiglu_reference
from tests.kernels._reads import check_reads

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_torch_activation(activation: str) -> None:
    gate, up = torch.randn(2, 5, 12, dtype=torch.float64)
    bias = torch.randn(24, dtype=torch.float64)
    act = ACTIVATIONS[activation]
    torch.testing.assert_close(swiglu_reference(gate, up, activation=activation), act(gate) * up)
    expected = act(gate + bias[:12]) * (up + bias[12:])
    torch.testing.assert_close(swiglu_reference(gate, up, bias=bias, activation=activation), expected)
    packed = torch.cat([gate, up], -1)
    torch.testing.assert_close(swiglu_reference(packed, bias=bias, activation=activation), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_gradients_are_right(activation: str) -> None:
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = torch.randn(10, dtype=torch.float64, requires_grad=True)
    packed = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda g, u, b: swiglu_reference(g, u, bias=b, activation=activation), (gate, up, bias)
    )
    assert torch.autograd.gradcheck(lambda p, b: swiglu_reference(p, bias=b, activation=activation), (packed, bias))


@pytest.mark.interpret
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_packed_is_the_same_bit_for_bit(activation: str, device: torch.device) -> None:
    gate, up = torch.randn(2, 5, 12, device=device)
    bias = torch.randn(24, device=device)
    cotangent = torch.randn(5, 12, device=device)
    both = {"gate": gate.clone().requires_grad_(), "up": up.clone().requires_grad_()}
    packed = torch.cat([gate, up], -1).requires_grad_()
    biases = [bias.clone().requires_grad_() for _ in range(2)]
    y = hetu_kernels.swiglu(**both, bias=biases[0], activation=activation)
    other = hetu_kernels.swiglu(packed, bias=biases[1], activation=activation)
    assert torch.equal(y, other)
    y.backward(cotangent)
    other.backward(cotangent)
    assert torch.equal(packed.grad, torch.cat([both["gate"].grad, both["up"].grad], -1))
    assert torch.equal(biases[0].grad, biases[1].grad)


@pytest.mark.interpret
def test_some_inputs_need_no_gradient(device: torch.device) -> None:
    gate, up = torch.randn(2, 3, 8, device=device)
    bias = torch.randn(16, device=device)
    up.requires_grad_()
    hetu_kernels.swiglu(gate, up, bias=bias).sum().backward()  # a gradient with strides of 0
    assert gate.grad is None
    assert bias.grad is None
    torch.testing.assert_close(up.grad, F.silu(gate + bias[:8]))


@pytest.mark.interpret
def test_halves_may_lie_apart(device: torch.device) -> None:
    """Gate and up with row strides of their own, as slices of different tensors have."""
    wide, up = torch.randn(37, 20, device=device), torch.randn(37, 12, device=device)
    cotangent = torch.randn(12, 37, device=device).t()
    results = []
    for gate in (wide[:, 3:15], wide[:, 3:15].clone()):
        leaves = [gate.detach().requires_grad_(), up.detach().requires_grad_()]
        y = hetu_kernels.swiglu(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, cotangent)])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.interpret
@pytest.mark.skipif(torch.cuda.is_available(), reason="watches the interpreter")
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("case", op_spec("swiglu").cases(), ids=lambda case: case.name)
def test_kernels_read_their_arguments_only(case: Case) -> None:
    check_reads(op_spec("swiglu"), case, case.dtypes[0])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"gate": torch.randn(3, 0), "up": None}, ValueError, r"gate has shape \[3, 0\], expected rows"),
        ({"gate": torch.randn(3, 7), "up": None}, ValueError, r"gate has shape \[3, 7\], expected an even number"),
        ({"up": torch.randn(3, 4)}, ValueError, r"up has shape \[3, 4\], expected that of gate, \[3, 8\]"),
        ({"up": torch.randn(3, 8).half()}, TypeError, "up has dtype torch.float16, gate torch.float32"),
        ({"gate": torch.arange(24).view(3, 8)}, TypeError, "gate has dtype torch.int64, expected float32"),
        ({"gate": None}, TypeError, "gate is None, expected a tensor"),
        ({"bias": torch.randn(8)}, ValueError, r"bias has shape \[8\], expected \[16\]"),
        ({"bias": torch.randn(16), "up": None}, ValueError, r"bias has shape \[16\], expected \[8\]"),
        ({"activation": "relu"}, ValueError, "activation='relu', expected one of 'silu', 'gelu', 'gelu_tanh'"),
    ],
)
def test_wrong_arguments_are_named(changes: dict, error: type[Exception], message: str) -> None:
    arguments = {"gate": torch.randn(3, 8), "up": torch.randn(3, 8), **changes}
    with pytest.raises(error, match=f"swiglu: {message}"):
        hetu_kernels.swiglu(**arguments)
