"""Gate, ``permute`` and ``unpermute`` together: a mixture of experts against one that computes every expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hetu_kernels

EXPERTS, DIM, TOKENS = 5, 6, 13


def mixture(x: Tensor, router: Tensor, experts: Tensor, k: int, **options: Any) -> Tensor:
    """Each expert multiplies its own rows; what is behind the last row is never read."""
    weights, ids, _ = hetu_kernels.topk_gate(x @ router, k, renormalize=True)
    permuted = hetu_kernels.permute(x, ids, EXPERTS, **options)
    ends = permuted.offsets.tolist()
    parts = [permuted.rows[a:b] @ experts[e] for e, (a, b) in enumerate(zip(ends, ends[1:], strict=False))]
    results = torch.cat([*parts, permuted.rows[ends[-1] :]])
    return hetu_kernels.unpermute(results, permuted.position_of, weights)


def dense(x: Tensor, router: Tensor, experts: Tensor, k: int, capacity: int | None = None, **_: Any) -> Tensor:
    """Every expert for every token, times a weight that is mostly 0."""
    logits = x @ router
    best = logits.topk(k)
    weights = torch.zeros_like(logits).scatter(1, best.indices, best.values.softmax(-1))
    if capacity is not None:  # every expert takes its first tokens: it meets each at most once
        weights = weights * ((weights > 0).cumsum(0) <= capacity)
    return torch.einsum("te,td,edf->tf", weights, x, experts)


@pytest.mark.interpret
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize(
    "options", [{}, {"num_rows": 5 * TOKENS}, {"capacity": 3}], ids=["dropless", "rows", "capacity"]
)
def test_mixture_and_its_gradients_are_those_of_all_experts(k: int, options: dict, device: torch.device) -> None:
    shapes = ((TOKENS, DIM), (DIM, EXPERTS), (EXPERTS, DIM, DIM))
    leaves = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    dy = torch.randn(TOKENS, DIM, device=device)
    y, expected = mixture(*leaves, k, **options), dense(*wide, k, **options)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, wide, dy.double())
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.interpret
def test_dropped_tokens_are_zero(device: torch.device) -> None:
    """Expert 0 gets all tokens and keeps two."""
    x = torch.randn(6, DIM, device=device)
    ids = torch.zeros(6, 1, dtype=torch.int32, device=device)
    permuted = hetu_kernels.permute(x, ids, EXPERTS, capacity=2)
    y = hetu_kernels.unpermute(permuted.rows, permuted.position_of, torch.ones(6, 1, device=device))
    assert torch.equal(y[:2], x[:2]) and (y[2:] == 0).all()


@pytest.mark.interpret
def test_tokens_of_nan_reach_no_expert(device: torch.device) -> None:
    """One broken token does not spoil the others, nor the gradients of the experts."""
    x = torch.randn(TOKENS, DIM, device=device)
    x[4] = float("nan")
    router, experts = torch.randn(DIM, EXPERTS, device=device), torch.randn(EXPERTS, DIM, DIM, device=device)
    experts.requires_grad_()
    y = mixture(x, router, experts, 2)
    others = [t for t in range(TOKENS) if t != 4]
    assert (y[4] == 0).all()
    torch.testing.assert_close(y[others], mixture(x[others], router, experts, 2))
    y.sum().backward()
    assert experts.grad.isfinite().all()
