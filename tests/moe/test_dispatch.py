"""Tokens are sorted by expert and brought back, with gradients, by loops that say the same slowly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_hetu.moe.dispatch import Dispatch
from lightning_hetu.moe.experts import Experts
from lightning_hetu.moe.layer import MoELayer

EXPERTS, DIM = 4, 3


def assignments(tokens: int, choices: int, seed: int) -> Tensor:
    """Random experts without repetition within a token; some choices are none."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(EXPERTS, generator=draw)[:choices] for _ in range(tokens)])
    return ids.masked_fill(torch.rand(tokens, choices, generator=draw) < 0.3, -1)


def cases() -> list[Tensor]:
    return [
        *(assignments(9, choices, seed) for seed, choices in enumerate((1, 2, 4))),
        torch.full((5, 2), -1),
        torch.full((6, 1), 2),
        torch.empty(0, 2, dtype=torch.int64),
        torch.tensor([[3]]),
    ]


@pytest.mark.parametrize("number", range(7))
def test_rows_are_sorted_by_expert_then_token_then_choice(number: int) -> None:
    ids = cases()[number]
    dispatch = Dispatch.build(ids, EXPERTS)
    wanted = [(expert, t, j) for t, row in enumerate(ids.tolist()) for j, expert in enumerate(row) if expert >= 0]
    wanted.sort()
    assert dispatch.token_of.tolist() == [t for _, t, _ in wanted]
    assert dispatch.counts.tolist() == [sum(e == expert for e, _, _ in wanted) for expert in range(EXPERTS)]
    assert dispatch.position_of.shape == ids.shape
    for row, (_, t, j) in enumerate(wanted):
        assert dispatch.position_of[t, j] == row
    assert (dispatch.position_of < 0).equal(ids < 0)


@pytest.mark.parametrize("number", range(7))
def test_spread_and_combine_have_the_gradients_of_loops(number: int) -> None:
    """In float64: results and gradients of tokens, rows and weights."""
    ids = cases()[number]
    tokens, choices = ids.shape
    draw = torch.Generator().manual_seed(number)
    x = torch.randn(tokens, DIM, generator=draw, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(tokens, choices, generator=draw, dtype=torch.float64, requires_grad=True)
    factors = torch.randn(EXPERTS, DIM, generator=draw, dtype=torch.float64)
    dispatch = Dispatch.build(ids, EXPERTS)
    rows = dispatch.rows(x)
    scaled = rows * factors.repeat_interleave(dispatch.counts, dim=0)
    found = dispatch.combine(scaled.square(), weights)
    zero = torch.zeros(DIM, dtype=torch.float64)
    slow = [
        sum(((x[t] * factors[e]).square() * weights[t, j] for j, e in enumerate(row) if e >= 0), zero)
        for t, row in enumerate(ids.tolist())
    ]
    wanted = torch.stack(slow) if slow else found.detach() * 0
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    direction = torch.randn(found.shape, generator=draw, dtype=torch.float64)
    have = torch.autograd.grad((found * direction).sum(), [x, weights], allow_unused=True)
    if wanted.requires_grad:
        want = torch.autograd.grad((wanted * direction).sum(), [x, weights], allow_unused=True)
    else:  # nobody has an expert
        want = (None, None)
    for one, other, like in zip(have, want, (x, weights), strict=True):
        zeros = torch.zeros_like(like)
        torch.testing.assert_close(zeros if one is None else one, zeros if other is None else other)


def test_sums_of_low_precision_are_taken_in_high() -> None:
    """Eight halves and their weights: the sum is rounded once, at the end."""
    ids = torch.arange(4).repeat(1, 1)
    dispatch = Dispatch.build(ids, EXPERTS)
    rows = torch.tensor([[256.0], [1.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert dispatch.combine(rows, torch.ones(1, 4)).item() == 260.0  # 259, to the nearest bfloat16; step by step: 256


@pytest.mark.parametrize("activation", ["swiglu", "relu", "gelu"])
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 0], [0, 9, 0, 0]])
def test_experts_are_feed_forward_networks(activation: str, counts: list[int]) -> None:
    """Every slot's rows through its own weights; slots without rows get gradients of zero, not none."""
    torch.manual_seed(0)
    experts = Experts(EXPERTS, DIM, 5, activation).double()  # type: ignore[arg-type]
    rows = torch.randn(sum(counts), DIM, dtype=torch.float64, requires_grad=True)
    found = experts(rows, torch.tensor(counts))
    slow = []
    for slot, part in enumerate(rows.split(counts)):
        first = part @ experts.w1[slot]
        if activation == "swiglu":
            assert experts.w3 is not None
            inside = first * torch.sigmoid(first) * (part @ experts.w3[slot])
        else:
            inside = first.clamp(min=0) if activation == "relu" else torch.nn.functional.gelu(first)
        slow.append(inside @ experts.w2[slot])
    wanted = torch.cat(slow)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    parameters = [rows, *experts.parameters()]
    have = torch.autograd.grad(found.square().sum(), parameters)
    want = torch.autograd.grad(wanted.square().sum(), parameters)
    for one, other in zip(have, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_backends_agree() -> None:
    """torch's grouped product and the loop, forward and backward."""
    torch.manual_seed(0)
    counts = torch.tensor([4, 0, 7, 5])
    results = []
    for backend in ("loop", "torch"):
        torch.manual_seed(1)
        experts = Experts(EXPERTS, 8, 16, backend=backend)  # type: ignore[arg-type]
        rows = torch.randn(16, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
        out = experts(rows, counts)
        out.square().sum().backward()
        results.append([out.detach(), rows.grad, *(weight.grad for weight in experts.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_sizes_and_options_are_checked() -> None:
    with pytest.raises(ValueError, match="hidden=0: expected an integer of at least 1"):
        Experts(2, 4, 0)
    with pytest.raises(ValueError, match="activation='tanh': expected one of swiglu, relu, gelu"):
        Experts(2, 4, 4, "tanh")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend='cuda': expected one of auto, loop, torch, triton"):
        Experts(2, 4, 4, backend="cuda")  # type: ignore[arg-type]


@pytest.mark.parametrize("gate", ["switch", "topk", "dts"])
def test_layers_on_kernels_give_the_same(gate: str) -> None:
    """Sorting, products and sums by hetu_kernels: the same layer, forward and backward; also with dropped tokens."""
    results = []
    for backend in ("loop", "triton"):
        torch.manual_seed(0)
        options = {"capacity_factor": 0.5} if gate == "switch" else {}
        layer = MoELayer(8, 16, EXPERTS, gate, options, backend=backend).eval()  # type: ignore[arg-type]
        x = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = layer(x)
        out.square().sum().backward()
        results.append([out.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_nobody_has_an_expert() -> None:
    """All dropped: zeros, and gradients of zero for every weight."""
    layer = MoELayer(8, 16, EXPERTS, "switch", {"capacity_factor": 0.0})
    out = layer(torch.randn(5, 8))
    assert not out.any()
    out.sum().backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in layer.experts.parameters())
