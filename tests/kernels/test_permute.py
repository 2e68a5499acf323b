"""``permute``: against a loop over assignments, capacities, numbers of rows, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hetu_kernels
from hetu_kernels.moe.permute_ref import permute_reference

IDS = torch.tensor([[2, 0], [0, -1], [4, 2], [-1, -1], [0, 4], [2, 0]])


def by_hand(x: Tensor, ids: Tensor, experts: int, capacity: int | None, num_rows: int | None) -> list[Any]:
    """Expert after expert, token after token, choice after choice."""
    slots: list[list[tuple[int, int]]] = [[] for _ in range(experts)]
    for t, chosen in enumerate(ids.tolist()):
        for j, expert in enumerate(chosen):
            if expert >= 0:
                slots[expert].append((t, j))
    places: list[tuple[int, int]] = []
    offsets = [0]
    for own in slots:
        places += own[:capacity]
        offsets.append(len(places))
    count = len(places) if num_rows is None else num_rows
    places = places[:count]
    position_of = torch.full(ids.shape, -1, dtype=torch.int32)
    rows = torch.zeros(count, x.shape[1], dtype=x.dtype)
    for row, (t, j) in enumerate(places):
        position_of[t, j] = row
        rows[row] = x[t]
    token_of = [t for t, _ in places] + [-1] * (count - len(places))
    return [rows, torch.tensor(token_of, dtype=torch.int32), position_of,
            torch.tensor([min(o, count) for o in offsets], dtype=torch.int32)]  # fmt: skip


@pytest.mark.interpret
@pytest.mark.parametrize("capacity", [None, 0, 1, 3, 100])
@pytest.mark.parametrize("num_rows", [None, 0, 5, 12])
def test_rows_are_grouped_by_expert(capacity: int | None, num_rows: int | None, device: torch.device) -> None:
    x = torch.randn(6, 3)
    expected = by_hand(x, IDS, 5, capacity, num_rows)
    options = {"capacity": capacity, "num_rows": num_rows}
    for function, where in ((hetu_kernels.permute, device), (permute_reference, x.device)):
        actual = function(x.to(where), IDS.to(where), 5, **options)
        for ours, theirs in zip(actual, expected, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours.cpu(), theirs)


@pytest.mark.interpret
def test_order_within_an_expert_is_that_of_tokens_and_choices(device: torch.device) -> None:
    """Over many blocks of assignments."""
    ids = torch.randint(-1, 3, (300, 4), device=device)
    permuted = hetu_kernels.permute(torch.zeros(300, 1, device=device), ids, 3)
    flat = ids.flatten()
    for expert in range(3):
        begin, end = permuted.offsets[expert : expert + 2].tolist()
        slots = (flat == expert).nonzero()[:, 0]
        assert torch.equal(permuted.position_of.flatten()[slots].long(), torch.arange(begin, end, device=device))
        assert torch.equal(permuted.token_of[begin:end].long(), slots // 4)
    assert (permuted.position_of.flatten()[flat < 0] == -1).all()


@pytest.mark.interpret
def test_capacity_keeps_the_first(device: torch.device) -> None:
    ids = torch.zeros(400, 1, dtype=torch.int32, device=device)  # of several blocks of assignments
    permuted = hetu_kernels.permute(torch.arange(400.0, device=device)[:, None], ids, 2, capacity=270)
    assert permuted.rows[:, 0].tolist() == list(range(270))
    assert permuted.offsets.tolist() == [0, 270, 270]
    assert permuted.position_of[:, 0].tolist() == [*range(270), *[-1] * 130]


@pytest.mark.interpret
def test_counts_are_those_of_the_gate(device: torch.device) -> None:
    logits = torch.randn(33, 6, device=device)
    _, ids, counts = hetu_kernels.topk_gate(logits, 2)
    permuted = hetu_kernels.permute(torch.randn(33, 4, device=device), ids, 6, num_rows=66)
    assert torch.equal(permuted.offsets.diff(), counts)


@pytest.mark.interpret
def test_bits_arrive_as_they_were(device: torch.device) -> None:
    """Negative zeros, NaN with a payload, subnormal numbers."""
    bits = torch.randint(-(2**31), 2**31 - 1, (6, 7), device=device, dtype=torch.int32)
    permuted = hetu_kernels.permute(bits.view(torch.float32), IDS.to(device), 5)
    assert torch.equal(permuted.rows.view(torch.int32), bits[permuted.token_of.long()])


@pytest.mark.parametrize("function", [hetu_kernels.permute, permute_reference])
@pytest.mark.parametrize("options", [{}, {"capacity": 2}, {"num_rows": 12}, {"num_rows": 4}])
def test_gradients_are_right(function: Any, options: dict) -> None:
    """In float64 the operator runs the reference's own formulas."""
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: function(x, IDS, 5, **options).rows, (x,))


@pytest.mark.interpret
def test_gradients_are_summed_in_float32_in_the_order_of_choices(device: torch.device) -> None:
    """To the last bit; a half-precision sum of these is far off."""
    x = torch.randn(9, 5, device=device).half().requires_grad_()
    ids = torch.rand(9, 8, device=device).argsort(1)
    permuted = hetu_kernels.permute(x, ids, 8)
    drows = (100 * torch.randn(permuted.rows.shape, device=device)).half()
    permuted.rows.backward(drows)
    total = torch.zeros(9, 5, device=device)
    for j in range(8):
        total += drows[permuted.position_of[:, j].long()].float()
    assert torch.equal(x.grad, total.half())


@pytest.mark.interpret
def test_a_given_number_of_rows_compiles_into_one_graph(device: torch.device) -> None:
    torch._dynamo.reset()
    x, ids = torch.randn(6, 3, device=device), IDS.to(device)
    compiled = torch.compile(hetu_kernels.permute, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        compiled(x, ids, 5, num_rows=12), hetu_kernels.permute(x, ids, 5, num_rows=12), strict=True
    ):
        assert torch.equal(ours, theirs)
    torch._dynamo.reset()


@pytest.mark.interpret
@pytest.mark.slow
@pytest.mark.parametrize("experts", [1, 2, 15, 16, 17, 33, 100])
@pytest.mark.parametrize("tokens", [1, 127, 256, 300])
def test_many_sizes(experts: int, tokens: int, device: torch.device) -> None:
    for choices in (1, 3):
        ids = torch.randint(-1, experts, (tokens, choices))
        x = torch.randn(tokens, 2)
        for capacity, num_rows in ((None, None), (tokens // experts + 1, None), (None, tokens), (5, tokens * choices)):
            expected = by_hand(x, ids, experts, capacity, num_rows)
            actual = hetu_kernels.permute(
                x.to(device), ids.to(device), experts, capacity=capacity, num_rows=num_rows
            )  # fmt: skip
            for ours, theirs in zip(actual, expected, strict=True):
                assert torch.equal(ours.cpu(), theirs)


@pytest.mark.interpret
@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_experts_that_do_not_exist_are_named(mode: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_HETU_KERNELS", mode)
    monkeypatch.setenv("LIGHTNING_HETU_CHECK", "1")  # without it, those on a GPU are not looked at
    with pytest.raises(ValueError, match=r"permute: expert_ids\[2, 0\] is 4, expected below 4, the experts"):
        hetu_kernels.permute(torch.randn(6, 2, device=device), IDS.to(device), 4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x is a list, expected a tensor"),
        ({"x": torch.randn(6)}, ValueError, r"x has shape \[6\], expected \[any, any\] \(tokens, dim\)"),
        ({"x": torch.ones(6, 2, dtype=torch.int32)}, TypeError, "x has dtype torch.int32, expected float32"),
        ({"x": torch.randn(5, 2)}, ValueError, r"expert_ids has shape \[6, 2\], expected \[5, any\] \(tokens of x"),
        ({"expert_ids": IDS.float()}, TypeError, "expert_ids has dtype torch.float32, expected int32 or int64"),
        ({"expert_ids": IDS[:, 0]}, ValueError, r"expert_ids has shape \[6\], expected \[6, any\]"),
        ({"num_experts": 0}, ValueError, "num_experts=0, expected at least 1"),
        ({"num_experts": 5.0}, TypeError, "num_experts=5.0, expected an integer"),
        ({"capacity": -1}, ValueError, "capacity=-1, expected at least 0, or None for any number"),
        ({"capacity": 1.25}, TypeError, "capacity=1.25, expected an integer, or None for any number"),
        ({"num_rows": -1}, ValueError, "num_rows=-1, expected at least 0, or None to count them"),
        (
            {"num_rows": torch.tensor(3)},
            TypeError,
            "num_rows is a Tensor, expected an integer, or None to count them; t",
        ),
        ({"num_rows": 2**31}, ValueError, "num_rows asks for 2147483648 rows, expected at most 2147483647: split"),
        (
            {"x": torch.randn(6, 2, device="meta"), "expert_ids": IDS.to("meta")},
            ValueError,
            "num_rows=None, expected a number: assignments on meta cannot be counted",
        ),
    ],
)
def test_wrong_arguments_are_named(changes: dict, error: type[Exception], message: str) -> None:
    arguments = {"x": torch.randn(6, 2), "expert_ids": IDS, "num_experts": 5, **changes}
    with pytest.raises(error, match=f"^permute: {message}"):
        hetu_kernels.permute(**arguments)
