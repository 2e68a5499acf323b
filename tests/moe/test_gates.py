"""Gates that choose by scores decide what plain loops decide, and have their gradients, on awkward input too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_hetu.moe.gates import RouterGate, build_gate
from lightning_hetu.moe.gates._capacity import arrival_positions, expert_capacity
from tests.moe._gate_reference import Expected, best, compare, compare_gradients, is_valid, softmax, top, z

NUM_EXPERTS = 6


def random_logits(tokens: int = 9, seed: int = 0) -> Tensor:
    return 2 * torch.randn(tokens, NUM_EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spoiled() -> Tensor:
    logits = random_logits()
    logits[1, 2] = torch.nan
    logits[4] = -torch.inf
    logits[5, 0] = torch.inf
    logits[8] = torch.nan
    return logits


def masked() -> Tensor:
    logits = random_logits()
    logits[2, [0, 3]] = -torch.inf
    logits[6, [1, 2, 5]] = -torch.inf
    return logits


def to_one_expert() -> Tensor:
    logits = random_logits()
    logits[:, 3] += 20
    return logits


LOGITS: dict[str, Callable[[], Tensor]] = {
    "random": random_logits,
    "ties": lambda: random_logits().sign(),
    "all equal": lambda: torch.zeros(7, NUM_EXPERTS, dtype=torch.float64),
    "to one expert": to_one_expert,
    "rows without softmax": spoiled,
    "experts ruled out": masked,
    "one token": lambda: random_logits(1),
    "no token": lambda: random_logits(0),
    "not contiguous": lambda: torch.cat([random_logits(), random_logits(seed=1)], dim=1).T.contiguous().T[:, ::2],
}


def in_groups(row: list[Tensor], groups: int) -> list[list[Tensor]]:
    size = len(row) // groups
    return [row[start : start + size] for start in range(0, len(row), size)]


def from_two_groups_of_three(scores: list[Tensor]) -> list[int]:
    of_groups = [sum(group[i].item() for i in best(group, 2)) for group in in_groups(scores, 3)]
    kept = best(of_groups, 2)
    return best([value if e // 2 in kept else -1.0 for e, value in enumerate(scores)], 3)


def one_of_each_pair(scores: list[Tensor]) -> list[int]:
    return [2 * i + best(pair, 1)[0] for i, pair in enumerate(in_groups(scores, 3))]


def inside_the_best_pair(scores: list[Tensor]) -> list[int]:
    group = best([a.item() + b.item() for a, b in in_groups(scores, 3)], 1)[0]
    return best([value if e // 2 == group else -1.0 for e, value in enumerate(scores)], 2)


def over_the_sum(scores: list[Tensor]) -> list[Tensor]:
    return [score / sum(scores) for score in scores]


def sigmoids(row: Tensor) -> list[Tensor]:
    return [value.exp() / (1 + value.exp()) for value in row]


def ktop1(logits: Tensor, **options: Any) -> Expected:
    def score(row: Tensor) -> list[Tensor]:
        return [value for pair in in_groups(list(row), 3) for value in softmax(pair)]

    expected = top(logits, 3, score=score, choose=one_of_each_pair, scale=2.0, **options)
    expected.losses["z"] = z(logits, parts=3)
    return expected


def sam(logits: Tensor, **options: Any) -> Expected:
    expected = top(logits, 2, choose=inside_the_best_pair, **options)
    rows = [(softmax(list(row)), ids) for row, ids in zip(logits, expected.ids, strict=True) if is_valid(row)]
    total = torch.zeros((), dtype=torch.float64)
    for scores, ids in rows:
        for expert, value in enumerate(scores):
            if expert // 2 != ids[0] // 2 and value.item() > scores[ids[-1]].item():
                total = total + (value - scores[ids[-1]]) / len(rows)
    expected.losses["alignment"] = total
    return expected


# A gate, and the same in loops.
GATES: dict[str, tuple[str, dict[str, Any], Callable[..., Expected]]] = {
    "switch": ("switch", {"z_loss": True}, lambda x, **o: top(x, **o)),
    "gshard, normalized before": (
        "gshard",
        {"z_loss": True},
        lambda x, **o: top(x, 2, counted=1, when="before_drop", **o),
    ),
    "gshard, normalized after": (
        "gshard",
        {"normalize": "after_drop"},
        lambda x, **o: top(x, 2, counted=1, when="after_drop", **o),
    ),
    "topk": ("topk", {"k": 3, "z_loss": True}, lambda x, **o: top(x, 3, **o)),
    "topk, all": (
        "topk",
        {"k": 6, "normalize": "before_drop", "balance_scale": "sum"},
        lambda x, **o: top(x, 6, when="before_drop", scale=6.0, **o),
    ),
    "topk, sigmoid": (
        "topk",
        {"k": 2, "score": "sigmoid", "normalize": "after_drop"},
        lambda x, **o: top(x, 2, score=sigmoids, share=over_the_sum, when="after_drop", **o),
    ),
    "topk, groups": (
        "topk",
        {"k": 3, "num_groups": 3, "top_groups": 2},
        lambda x, **o: top(x, 3, choose=from_two_groups_of_three, **o),
    ),
    "ktop1": ("ktop1", {"k": 3, "z_loss": True}, ktop1),
    "sam": ("sam", {"k": 2, "num_groups": 3}, sam),
}
CAPACITIES: list[dict[str, Any]] = [
    {},
    {"capacity_factor": 0.0},
    {"capacity_factor": 0.1},
    {"capacity_factor": 1.0},
    {"capacity_factor": 0.5, "min_capacity": 2},
    {"capacity_factor": 1.1, "capacity_rounding": "hetu"},
]


def built(name: str, **options: Any) -> RouterGate:
    gate = build_gate(name, dim=5, num_experts=NUM_EXPERTS, **options)
    assert isinstance(gate, RouterGate)
    return gate


def of_reference(capacity: dict[str, Any]) -> dict[str, Any]:
    return {
        "factor": capacity.get("capacity_factor"),
        "minimum": capacity.get("min_capacity", 0),
        "hetu": "capacity_rounding" in capacity,
    }


@pytest.mark.parametrize("case", LOGITS)
@pytest.mark.parametrize("kind", GATES)
def test_decisions_losses_and_gradients_are_those_of_loops(kind: str, case: str) -> None:
    name, options, reference = GATES[kind]
    for capacity in CAPACITIES:
        gate = built(name, **options, **capacity)
        logits, copy = (LOGITS[case]().requires_grad_() for _ in range(2))
        output, expected = gate.route(logits), reference(copy, **of_reference(capacity))
        compare(output, expected, NUM_EXPERTS)
        compare_gradients(output, expected, logits, copy)
        assert (output.position is None) == (not capacity)


@pytest.mark.parametrize("kind", GATES)
def test_sure_tokens_come_first_if_asked_for(kind: str) -> None:
    name, options, reference = GATES[kind]
    gate = built(name, **options, capacity_factor=0.6, batch_prioritized=True)
    logits = random_logits(12)
    compare(gate.route(logits), reference(logits, factor=0.6, by_confidence=True), NUM_EXPERTS)
    position = gate.route(logits[[3, 1, 3, 3]]).position
    assert position is not None and position[[0, 2, 3], 0].diff().tolist() == [1, 1]


@pytest.mark.parametrize("kind", GATES)
def test_low_precision_logits_are_widened(kind: str) -> None:
    name, options, reference = GATES[kind]
    logits = random_logits().bfloat16()
    output = built(name, **options, capacity_factor=1.0).route(logits)
    assert output.weights.dtype == torch.float32 and output.scores is not None
    assert output.scores.dtype == torch.float32
    compare(output, reference(logits.double(), factor=1.0), NUM_EXPERTS, tolerance=1e-5)


@pytest.mark.parametrize("kind", GATES)
def test_tokens_of_any_shape_and_dtype_are_routed_by_float32_logits(kind: str) -> None:
    name, options, reference = GATES[kind]
    gate = built(name, **options, capacity_factor=1.0).bfloat16()
    x = torch.randn(5, 4, 3).bfloat16().transpose(0, 2)
    wide = (x.float().reshape(-1, 5) @ gate.weight.detach().float().T).double()
    outputs = [gate(x)]
    with torch.autocast("cpu", torch.bfloat16):
        outputs.append(gate(x))
    for output in outputs:
        assert output.weights.dtype == torch.float32
        compare(output, reference(wide, factor=1.0), NUM_EXPERTS, tolerance=1e-5)


@pytest.mark.parametrize("kind", GATES)
def test_a_broken_token_changes_nothing_for_the_others(kind: str) -> None:
    name, options, _ = GATES[kind]
    gate = built(name, **options).double()
    clean = torch.randn(7, 5, dtype=torch.float64)
    broken = torch.cat([clean[:3], torch.full((1, 5), torch.nan), clean[3:]])
    broken[3, 1] = torch.inf
    found = []
    for x in (clean, broken):
        gate.zero_grad()
        output = gate(x)
        rows = [t for t in range(len(x)) if x[t].isfinite().all()]
        (output.weights.square().sum() + sum(output.losses.values())).backward()
        assert gate.weight.grad is not None
        found.append((output.expert_ids[rows], output.weights[rows], *output.losses.values(), gate.weight.grad.clone()))
    for with_out, with_it in zip(*found, strict=True):
        torch.testing.assert_close(with_it, with_out, rtol=1e-12, atol=1e-14)
    assert output.expert_ids[3].tolist() == [-1] * output.expert_ids.shape[1] and not output.weights[3].any()


@pytest.mark.parametrize("kind", GATES)
def test_no_token_gives_the_router_a_gradient_of_zeros(kind: str) -> None:
    name, options, _ = GATES[kind]
    gate = built(name, **options, capacity_factor=1.0)
    output = gate(torch.empty(2, 0, 5))
    (output.weights.sum() + sum(output.losses.values())).backward()
    assert gate.weight.grad is not None and gate.weight.grad.shape == (6, 5) and not gate.weight.grad.any()


@pytest.mark.parametrize("seed", range(25))
def test_no_two_assignments_have_the_same_place(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for name, options, _ in GATES.values():
        gate = built(name, **options, capacity_factor=draw(1, 20) / 10, batch_prioritized=bool(draw(0, 2)))
        logits = torch.randn(draw(1, 60), 6, generator=generator) * draw(1, 4)
        output = gate.route(logits)
        kept = (output.expert_ids >= 0) & ~output.dropped
        assert output.position is not None and output.capacity is not None
        pairs = list(zip(output.expert_ids[kept].tolist(), output.position[kept].tolist(), strict=True))
        filled = [(e, i) for e, kept_of in enumerate(output.kept_per_expert.tolist()) for i in range(kept_of)]
        assert sorted(pairs) == filled
        assert max(output.kept_per_expert.tolist()) <= output.capacity


@pytest.mark.parametrize("tokens", [0, 1, 30])
def test_positions_count_first_choices_first(tokens: int) -> None:
    ids = torch.randint(-1, 4, (tokens, 3))
    seen: dict[int, int] = {}
    expected = torch.full_like(ids, -1)
    for j in range(3):
        for t in range(tokens):
            expert = int(ids[t, j])
            if expert >= 0:
                expected[t, j] = seen.get(expert, 0)
                seen[expert] = seen.get(expert, 0) + 1
    assert torch.equal(arrival_positions(ids, 4), expected)


@pytest.mark.parametrize(
    ("arguments", "capacity"),
    [
        ((10, 1, 1, 1.1), 11),  # in binary, 1.1 * 10 is more than 11
        ((10, 4, 2, 1.0), 5),
        ((10, 4, 2, 1.0, 0, "hetu"), 6),
        ((10, 4, 1.5, 1.0), 4),
        ((10, 4, 1.5, 1.0, 0, "hetu"), 5),
        ((0, 4, 2, 1.0), 0),
        ((0, 4, 2, 1.0, 3), 3),
        ((1000, 4, 2, 0.0), 0),
        ((3, 4, 1, 0.001), 1),
    ],
)
def test_capacity_is_what_the_formula_says(arguments: tuple[Any, ...], capacity: int) -> None:
    assert expert_capacity(*arguments) == capacity
