"""``unpermute``: against a loop over assignments, what has no row, the order of its sums, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hetu_kernels
from hetu_kernels.moe.permute_ref import unpermute_reference

POSITIONS = torch.tensor([[4, 0], [1, -1], [6, 5], [-1, -1], [2, 7]])  # row 3 has no name, row 8 neither


def by_hand(rows: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    y = torch.zeros(positions.shape[0], rows.shape[1], dtype=rows.dtype)
    for t, j in (positions >= 0).nonzero().tolist():
        y[t] = y[t] + weights[t, j] * rows[positions[t, j]]
    return y


@pytest.mark.interpret
def test_tokens_are_weighted_sums_of_their_rows(device: torch.device) -> None:
    rows, weights = torch.randn(9, 3), torch.rand(5, 2)
    expected = by_hand(rows, POSITIONS, weights)
    torch.testing.assert_close(unpermute_reference(rows, POSITIONS, weights), expected)
    for integers in (torch.int32, torch.int64):
        actual = hetu_kernels.unpermute(rows.to(device), POSITIONS.to(device, integers), weights.to(device))
        torch.testing.assert_close(actual.cpu(), expected)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unpermute_undoes_permute(dtype: torch.dtype, device: torch.device) -> None:
    """With weights that are powers of two and sum to one, to the last bit."""
    x = torch.randn(21, 10, device=device).to(dtype)
    ids = torch.rand(21, 6, device=device).argsort(1)[:, :3]
    weights = torch.tensor([0.5, 0.25, 0.25], device=device).expand(21, 3)
    for num_rows in (None, 70):
        permuted = hetu_kernels.permute(x, ids, 6, num_rows=num_rows)
        assert torch.equal(hetu_kernels.unpermute(permuted.rows, permuted.position_of, weights), x)


@pytest.mark.parametrize("function", [hetu_kernels.unpermute, unpermute_reference])
def test_gradients_are_right(function: Any) -> None:
    """In float64 the operator runs the reference's own formulas."""
    rows = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, w: function(r, POSITIONS, w), (rows, weights))


@pytest.mark.interpret
def test_what_has_no_row_counts_for_nothing(device: torch.device) -> None:
    """Rows without a token, and weights without a row, may be NaN and get gradients of 0."""
    rows, weights = torch.randn(9, 3), torch.rand(5, 2)
    rows[[3, 8]] = float("nan")
    weights[POSITIONS < 0] = float("nan")
    rows, weights = rows.to(device).requires_grad_(), weights.to(device).requires_grad_()
    y = hetu_kernels.unpermute(rows, POSITIONS.to(device), weights)
    assert (y[3] == 0).all() and y.isfinite().all()
    y.backward(torch.randn(5, 3).to(device))
    assert (rows.grad[[3, 8]] == 0).all() and rows.grad.isfinite().all()
    assert (weights.grad.cpu()[POSITIONS < 0] == 0).all() and weights.grad.isfinite().all()
    assert (rows.grad.cpu()[[0, 1, 2, 4, 5, 6, 7]] != 0).all()


@pytest.mark.interpret
def test_gradients_of_weights_are_inner_products_in_float32(device: torch.device) -> None:
    """Of half-precision rows whose products overflow that precision."""
    rows = (300 * torch.randn(9, 50, device=device)).half().requires_grad_()
    weights = torch.rand(5, 2, device=device).requires_grad_()
    dy = (30 * torch.randn(5, 50, device=device)).half()
    hetu_kernels.unpermute(rows, POSITIONS.to(device), weights).backward(dy)
    assert weights.grad.dtype == torch.float32 and rows.grad.dtype == torch.float16
    at = POSITIONS.to(device).clamp(min=0)
    expected = (dy.double()[:, None] * rows.detach().double()[at]).sum(-1).where(POSITIONS.to(device) >= 0, 0.0)
    torch.testing.assert_close(weights.grad.double(), expected, rtol=1e-4, atol=1e-1)
    assert expected.abs().max() > 65504


@pytest.mark.interpret
def test_gradients_with_strides_of_zero(device: torch.device) -> None:
    rows = torch.randn(9, 3, device=device, requires_grad=True)
    weights = torch.rand(5, 2, device=device, requires_grad=True)
    hetu_kernels.unpermute(rows, POSITIONS.to(device), weights).sum().backward()
    named = POSITIONS >= 0
    torch.testing.assert_close(weights.grad.cpu()[named], rows.detach().cpu()[POSITIONS[named]].sum(-1))
    torch.testing.assert_close(rows.grad.cpu()[POSITIONS[named]], weights.detach().cpu()[named][:, None].expand(-1, 3))


@pytest.mark.interpret
@pytest.mark.slow
@pytest.mark.parametrize("dim", [1, 3, 64, 100, 2047, 2048, 2049, 5000])
@pytest.mark.parametrize("choices", [1, 2, 7, 8, 9, 17])
def test_many_sizes(dim: int, choices: int, device: torch.device) -> None:
    for tokens in (1, 5):
        order = torch.randperm(tokens * choices + 2)[: tokens * choices].view(tokens, choices)
        positions = torch.where(torch.rand(tokens, choices) < 0.2, -1, order)
        positions[0, 0] = order[0, 0]  # or a loop over nothing has no gradients
        rows, weights = torch.randn(tokens * choices + 2, dim), torch.rand(tokens, choices)
        dy = torch.randn(tokens, dim)
        results = []
        for function, where, dtype in (
            (hetu_kernels.unpermute, device, torch.float32),
            (by_hand, rows.device, torch.float64),
        ):
            leaves = [t.to(where, dtype).requires_grad_() for t in (rows, weights)]
            y = function(leaves[0], positions.to(where), leaves[1])
            results.append([t.detach().cpu().double() for t in (y, *torch.autograd.grad(y, leaves, dy.to(y)))])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.interpret
@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_positions_that_cannot_be_are_named(mode: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_HETU_KERNELS", mode)
    monkeypatch.setenv("LIGHTNING_HETU_CHECK", "1")  # without it, those on a GPU are not looked at
    rows, weights = torch.randn(7, 3, device=device), torch.rand(5, 2, device=device)
    with pytest.raises(ValueError, match=r"unpermute: position_of\[4, 1\] is 7, expected below 7, the rows"):
        hetu_kernels.unpermute(rows, POSITIONS.to(device), weights)
    positions = POSITIONS.clamp(max=5).to(device)
    with pytest.raises(ValueError, match=r"unpermute: position_of has row 5 3 times, expected each once at most"):
        hetu_kernels.unpermute(rows, positions, weights)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rows": None}, TypeError, "rows is None, expected a tensor"),
        ({"rows": torch.randn(9)}, ValueError, r"rows has shape \[9\], expected \[any, any\] \(num_rows, dim\)"),
        ({"rows": torch.ones(9, 3, dtype=torch.int64)}, TypeError, "rows has dtype torch.int64, expected float32"),
        ({"position_of": POSITIONS.float()}, TypeError, "position_of has dtype torch.float32, expected int32 or int64"),
        ({"position_of": POSITIONS[0]}, ValueError, r"position_of has shape \[2\], expected \[any, any\]"),
        ({"weights": torch.rand(5, 3)}, ValueError, r"weights has shape \[5, 3\], expected \[5, 2\] \(that of"),
        (
            {"weights": torch.rand(5, 2).half()},
            TypeError,
            "weights has dtype torch.float16, expected torch.float32, for torch.float32 rows: pass weights.to",
        ),
        (
            {"rows": torch.randn(9, 3).double()},
            TypeError,
            "weights has dtype torch.float32, expected torch.float64, for torch.float64 rows",
        ),
    ],
)
def test_wrong_arguments_are_named(changes: dict, error: type[Exception], message: str) -> None:
    arguments = {"rows": torch.randn(9, 3), "position_of": POSITIONS, "weights": torch.rand(5, 2), **changes}
    with pytest.raises(error, match=f"unpermute: {message}"):
        hetu_kernels.unpermute(**arguments)
