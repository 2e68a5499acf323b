"""Gates token by token, in plain loops and float64: what the fast ones are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from lightning_hetu.moe.gates import GateOutput


@dataclass
class Expected:
    """What a gate should say; weights and losses have graphs."""

    ids: list[list[int]]
    weights: list[list[Tensor]]
    losses: dict[str, Tensor] = field(default_factory=dict)
    position: list[list[int]] | None = None
    dropped: list[list[bool]] = field(default_factory=list)

    def weight_tensor(self) -> Tensor:
        return torch.stack([torch.stack(row) for row in self.weights]) if self.weights else torch.zeros(0)


def softmax(row: Sequence[Tensor]) -> list[Tensor]:
    top = max(value.item() for value in row)
    exponentials = [(value - top).exp() for value in row]
    total = sum(exponentials[1:], exponentials[0])
    return [value / total for value in exponentials]


def best(values: Sequence[Tensor | float], k: int) -> list[int]:
    """Indices of the largest values, of equal ones the lower index."""
    numbers = [value.item() if isinstance(value, Tensor) else value for value in values]
    return sorted(range(len(numbers)), key=lambda i: (-numbers[i], i))[:k]


def is_valid(row: Tensor) -> bool:
    values = row.tolist()
    return not any(math.isnan(v) or v == math.inf for v in values) and any(v > -math.inf for v in values)


def capacity_of(tokens: int, experts: int, k: int, factor: float | None, minimum: int = 0, hetu: bool = False) -> int:
    if factor is None:
        return 10**9
    share = Fraction(str(factor)) * tokens / experts
    return max(minimum, k * math.ceil(share) if hetu else math.ceil(k * share))


def admit(expected: Expected, capacity: int, confidence: list[float] | None = None) -> None:
    """Lets choices in one by one: all first choices, then all second ones."""
    tokens = list(range(len(expected.ids)))
    if confidence is not None:
        tokens.sort(key=lambda t: (-confidence[t], t))
    slots = len(expected.ids[0]) if expected.ids else 0
    seen: dict[int, int] = {}
    expected.position = [[-1] * slots for _ in tokens]
    expected.dropped = [[False] * slots for _ in tokens]
    for j in range(slots):
        for t in tokens:
            expert = expected.ids[t][j]
            if expert < 0:
                continue
            expected.position[t][j] = seen.get(expert, 0)
            seen[expert] = seen.get(expert, 0) + 1
            if expected.position[t][j] >= capacity:
                expected.dropped[t][j] = True
                expected.weights[t][j] = 0.0 * expected.weights[t][j]


def normalize(rows: list[list[Tensor]]) -> None:
    for row in rows:
        total = sum(row[1:], row[0])
        if total.item() > 0:
            row[:] = [value / total for value in row]


def balance(counted: list[list[int]], probabilities: list[list[Tensor] | None], experts: int, scale: float) -> Tensor:
    """``scale`` times sum over experts of assignments per token times mean probability; ``None`` rows do not count."""
    tokens = sum(row is not None for row in probabilities)
    total = torch.zeros((), dtype=torch.float64)
    for expert in range(experts):
        times = sum(ids.count(expert) for ids, row in zip(counted, probabilities, strict=True) if row is not None)
        for row in probabilities:
            if row is not None:
                total = total + scale * (times / tokens) * row[expert] / tokens
    return total


def z(logits: Tensor, parts: int = 1) -> Tensor:
    rows = [row for row in logits if is_valid(row)]
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        for part in row.chunk(parts):
            total = total + sum((value.exp() for value in part), torch.zeros(())).log() ** 2 / (parts * len(rows))
    return total


def top(
    logits: Tensor,
    k: int = 1,
    *,
    counted: int | None = None,
    choose: Callable[[list[Tensor]], list[int]] | None = None,
    score: Callable[[Tensor], list[Tensor]] = lambda row: softmax(list(row)),
    share: Callable[[list[Tensor]], list[Tensor]] = lambda scores: scores,
    when: str = "none",
    factor: float | None = None,
    minimum: int = 0,
    hetu: bool = False,
    by_confidence: bool = False,
    scale: float | None = None,
) -> Expected:
    """Top-k routing and its relatives.

    Args:
        logits: ``[T, E]`` float64.
        k: Choices.
        counted: Choices that the balance loss counts; default all.
        choose: Experts of a token by its scores, instead of the ``k`` best.
        score: Scores of a row of logits.
        share: Probabilities of the balance loss, of scores.
        when: Weights are normalized never (``none``), ``before_drop`` or ``after_drop``.
        factor: Of capacity.
        minimum: Of capacity.
        hetu: The other rounding.
        by_confidence: The surest token comes first.
        scale: Of the balance loss; default E over the counted choices.
    """
    tokens, experts = logits.shape
    nothing = torch.zeros((), dtype=torch.float64)
    rows = [score(row) if is_valid(row) else None for row in logits]
    ids = [[-1] * k if row is None else choose(row) if choose else best(row, k) for row in rows]
    weights = [
        [nothing] * k if row is None else [row[e] for e in chosen] for row, chosen in zip(rows, ids, strict=True)
    ]
    if when == "before_drop":
        normalize(weights)
    counted = k if counted is None else counted
    losses = {
        "balance": balance(
            [chosen[:counted] for chosen in ids],
            [None if row is None else share(row) for row in rows],
            experts,
            experts / counted if scale is None else scale,
        ),
        "z": z(logits),
    }
    expected = Expected(ids, weights, losses)
    surest = [0.0 if row is None else max(value.item() for value in row) for row in rows]
    admit(expected, capacity_of(tokens, experts, k, factor, minimum, hetu), surest if by_confidence else None)
    if when == "after_drop":
        normalize(expected.weights)
    return expected


def compare(output: GateOutput, expected: Expected, num_experts: int, *, tolerance: float = 1e-12) -> None:
    """Decisions are equal, numbers close; losses that the gate does not report are not compared."""
    ids = torch.tensor(expected.ids, dtype=torch.int64).view(output.expert_ids.shape)
    dropped = torch.tensor(expected.dropped, dtype=torch.bool).view(ids.shape)
    assert output.expert_ids.dtype == torch.int64 and torch.equal(output.expert_ids, ids)
    assert output.dropped.dtype == torch.bool and torch.equal(output.dropped, dropped)
    close: dict[str, Any] = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(
        output.weights.double(), expected.weight_tensor().double().view(ids.shape), check_device=False, **close
    )
    if output.position is not None:
        assert torch.equal(output.position, torch.tensor(expected.position, dtype=torch.int64).view(ids.shape))
    flat = [
        (e, d)
        for row, gone in zip(ids.tolist(), dropped.tolist(), strict=True)
        for e, d in zip(row, gone, strict=False)
    ]
    assert output.tokens_per_expert.tolist() == [sum(e == i for e, _ in flat) for i in range(num_experts)]
    assert output.kept_per_expert.tolist() == [sum(e == i and not d for e, d in flat) for i in range(num_experts)]
    for name, loss in output.losses.items():
        torch.testing.assert_close(loss.double(), expected.losses[name], **close)


def compare_gradients(output: GateOutput, expected: Expected, logits: Tensor, reference: Tensor) -> None:
    """Gradients of a weighted sum of all weights and of all losses are close.

    Args:
        output: Of ``logits``.
        expected: Of ``reference``.
        logits: A leaf, float64.
        reference: A leaf of the same values.
    """
    coefficients = torch.linspace(0.5, 2.0, max(output.weights.numel(), 1), dtype=torch.float64)
    coefficients = coefficients[: output.weights.numel()].view(output.weights.shape)
    total = (output.weights * coefficients).sum()
    wanted = (expected.weight_tensor().double().view(coefficients.shape) * coefficients).sum()
    for factor, name in enumerate(sorted(output.losses), start=1):
        total = total + factor * output.losses[name]
        wanted = wanted + factor * expected.losses[name]
    (found,) = torch.autograd.grad(total, logits)
    assert found.isfinite().all()
    if not wanted.requires_grad:
        assert not found.any()
        return
    (gradient,) = torch.autograd.grad(wanted, reference)
    torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-11)
