"""Row optimizers equal torch's, or slow ones written here, and leave rows without gradient alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_hetu.embedding import SGD, Adagrad, Adam, RowOptimizer, RowwiseAdagrad, RowwiseAdam

ROWS, DIM = 9, 5
TORCH: list[tuple[RowOptimizer, Callable[[list[Tensor]], torch.optim.Optimizer]]] = [
    (SGD(0.3), lambda p: torch.optim.SGD(p, lr=0.3)),
    (SGD(0.3, weight_decay=0.1), lambda p: torch.optim.SGD(p, lr=0.3, weight_decay=0.1)),
    (Adagrad(0.3), lambda p: torch.optim.Adagrad(p, lr=0.3)),
    (
        Adagrad(0.3, weight_decay=0.1, eps=1e-3, initial_accumulator=0.2),
        lambda p: torch.optim.Adagrad(p, lr=0.3, weight_decay=0.1, eps=1e-3, initial_accumulator_value=0.2),
    ),
    (Adam(0.3), lambda p: torch.optim.Adam(p, lr=0.3)),
    (
        Adam(0.3, weight_decay=0.1, betas=(0.5, 0.8), eps=1e-3),
        lambda p: torch.optim.Adam(p, lr=0.3, weight_decay=0.1, betas=(0.5, 0.8), eps=1e-3),
    ),
]
ROWWISE = [
    RowwiseAdagrad(0.3),
    RowwiseAdagrad(0.3, weight_decay=0.1, eps=1e-3, initial_accumulator=0.2),
    RowwiseAdam(0.3),
    RowwiseAdam(0.3, weight_decay=0.1, betas=(0.0, 0.8), eps=1e-3),
]


def gradients_in(dtype: torch.dtype, steps: int = 12) -> Tensor:
    """``[steps, ROWS, DIM]`` of very different sizes."""
    return torch.randn(steps, ROWS, DIM, dtype=dtype) * 10.0 ** torch.randint(-3, 3, (steps, ROWS, 1))


def packed(optimizer: RowOptimizer, values: Tensor) -> Tensor:
    return torch.cat([values, optimizer.initial_state(len(values), DIM, dtype=values.dtype)], dim=1)


@pytest.mark.parametrize(("optimizer", "make"), TORCH, ids=[repr(pair[0]) for pair in TORCH])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_full_batches_equal_torch(optimizer: RowOptimizer, make: Any, dtype: torch.dtype, tolerance: float) -> None:
    initial = torch.randn(ROWS, DIM, dtype=dtype)
    parameter = torch.nn.Parameter(initial.clone())
    reference = make([parameter])
    rows = packed(optimizer, initial)
    for gradients in gradients_in(dtype):
        rows = optimizer.update_packed(rows, gradients)
        parameter.grad = gradients.clone()
        reference.step()
        if isinstance(optimizer, Adam):
            torch.testing.assert_close(rows[:, :DIM], parameter.detach(), rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(rows[:, :DIM], parameter.detach())
    assert (rows[:, :DIM] - initial).abs().max() > 0.1


@pytest.mark.parametrize(("optimizer", "make"), TORCH, ids=[repr(pair[0]) for pair in TORCH])
def test_rows_step_when_they_have_a_gradient(optimizer: RowOptimizer, make: Any) -> None:
    """Each row as by an optimizer of its own, which steps only then."""
    initial = torch.randn(ROWS, DIM, dtype=torch.float64)
    parameters = [torch.nn.Parameter(row.clone()) for row in initial]
    references = [make([parameter]) for parameter in parameters]
    rows = packed(optimizer, initial)
    for step, gradients in enumerate(gradients_in(torch.float64)):
        chosen = torch.arange(ROWS)[(torch.arange(ROWS) + step) % 3 == 0]
        chosen = chosen[chosen != 4]
        rows[chosen] = optimizer.update_packed(rows[chosen], gradients[chosen])
        for row in chosen.tolist():
            parameters[row].grad = gradients[row].clone()
            references[row].step()
    expected = torch.stack([parameter.detach() for parameter in parameters])
    torch.testing.assert_close(rows[:, :DIM], expected, rtol=1e-14, atol=1e-14)
    assert torch.equal(rows[4], packed(optimizer, initial)[4])


def slow_rowwise_step(optimizer: RowOptimizer, row: dict[str, Any], gradient: list[float]) -> None:
    """One row, one number at a time, in Python's floats."""
    gradient = [g + optimizer.weight_decay * x for g, x in zip(gradient, row["values"], strict=True)]
    square = sum(g * g for g in gradient) / len(gradient)
    if isinstance(optimizer, RowwiseAdagrad):
        row["sum"] = row.get("sum", optimizer.initial_accumulator) + square
        divisor = row["sum"] ** 0.5 + optimizer.eps
        move = gradient
    else:
        assert isinstance(optimizer, RowwiseAdam)
        first_decay, second_decay = optimizer.betas
        row["step"] = row.get("step", 0) + 1
        before = row.get("first", [0.0] * len(gradient))
        row["first"] = [first_decay * m + (1 - first_decay) * g for m, g in zip(before, gradient, strict=True)]
        row["second"] = second_decay * row.get("second", 0.0) + (1 - second_decay) * square
        divisor = (row["second"] / (1 - second_decay ** row["step"])) ** 0.5 + optimizer.eps
        move = [m / (1 - first_decay ** row["step"]) for m in row["first"]]
    row["values"] = [x - optimizer.lr * m / divisor for x, m in zip(row["values"], move, strict=True)]


@pytest.mark.parametrize("optimizer", ROWWISE, ids=repr)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-13)])
def test_rowwise_forms_equal_a_slow_reference(optimizer: RowOptimizer, dtype: torch.dtype, tolerance: float) -> None:
    initial = torch.randn(ROWS, DIM, dtype=dtype)
    slow: list[dict[str, Any]] = [{"values": row} for row in initial.tolist()]
    rows = packed(optimizer, initial)
    for step, gradients in enumerate(gradients_in(dtype)):
        chosen = [row for row in range(ROWS) if (row + step) % 3]
        rows[chosen] = optimizer.update_packed(rows[chosen], gradients[chosen])
        for row in chosen:
            slow_rowwise_step(optimizer, slow[row], gradients[row].tolist())
    expected = torch.tensor([row["values"] for row in slow], dtype=dtype)
    torch.testing.assert_close(rows[:, :DIM], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("optimizer", [pair[0] for pair in TORCH] + ROWWISE, ids=repr)
def test_an_update_leaves_its_arguments_alone(optimizer: RowOptimizer) -> None:
    rows, gradients = packed(optimizer, torch.randn(ROWS, DIM)), torch.randn(ROWS, DIM)
    before = rows.clone(), gradients.clone()
    updated = optimizer.update_packed(rows, gradients)
    assert updated.shape == rows.shape and not torch.equal(updated, rows)
    assert torch.equal(rows, before[0]) and torch.equal(gradients, before[1])


def test_the_size_of_a_state() -> None:
    widths = {
        type(o).__name__: o.state_width(64) for o in (SGD(1), RowwiseAdagrad(1), Adagrad(1), RowwiseAdam(1), Adam(1))
    }
    assert widths == {"SGD": 0, "RowwiseAdagrad": 1, "Adagrad": 64, "RowwiseAdam": 66, "Adam": 129}


def test_the_learning_rate_may_change() -> None:
    optimizer = SGD(1.0)
    optimizer.lr = 0.5
    assert torch.equal(optimizer.update_packed(torch.zeros(1, DIM), torch.ones(1, DIM)), torch.full((1, DIM), -0.5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGD(-1), "lr=-1: expected at least 0"),
        (lambda: SGD(1, weight_decay=-0.1), "weight_decay=-0.1: expected at least 0"),
        (lambda: Adagrad(1, eps=-1), "eps=-1: expected at least 0"),
        (lambda: RowwiseAdagrad(1, initial_accumulator=-1), "initial_accumulator=-1: expected at least 0"),
        (lambda: Adam(1, betas=(0.9, 1.0)), r"betas=\(0.9, 1.0\): expected two numbers of at least 0 and below 1"),
        (lambda: Adam(1, eps=-1), "eps=-1: expected at least 0"),
    ],
)
def test_impossible_options_are_refused(make: Callable[[], RowOptimizer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
