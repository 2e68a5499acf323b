"""Experts move, get copies and lose them while training goes on, and no number changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_hetu.moe import ExpertMesh, MoELayer
from lightning_hetu.moe.gradients import clip_with_experts, sync_expert_gradients
from lightning_hetu.moe.placement.operations import Expand, Migrate, Operation, Shrink
from lightning_hetu.moe.placement.split import optimal_split
from lightning_hetu.moe.relocate import Relocation, check_elementwise

DIM, HIDDEN, EXPERTS, RANKS, SLOTS, STEPS, MICRO = 6, 10, 8, 4, 4, 30, 2
MOVES: dict[int, tuple[Operation, ...]] = {
    3: (Migrate(0, 0, 1), Migrate(4, 2, 1)),
    5: (Migrate(2, 1, 3, other=6),),
    8: (Expand(5, 2, 0), Expand(5, 2, 3)),
    # Rank 2 is emptied, and later filled again.
    11: (Shrink(5, 2), Expand(1, 0, 3)),
    15: (Expand(7, 3, 2), Migrate(4, 1, 2)),
    18: (Shrink(5, 3), Shrink(1, 0)),
    21: (Migrate(5, 0, 2), Expand(4, 2, 0), Expand(3, 1, 0), Expand(0, 1, 2)),
    24: (Shrink(4, 0), Shrink(0, 2), Expand(3, 0, 2)),
    27: (Shrink(7, 3), Migrate(3, 1, 3)),
}
"""After these steps."""
MIGRATIONS: dict[int, tuple[Operation, ...]] = {
    2: (Migrate(0, 0, 3), Migrate(7, 3, 2)),
    6: (Migrate(3, 1, 2, other=4),),
}


class Model(nn.Module):
    """Two layers of experts with residuals around them between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(DIM, DIM), nn.Linear(DIM, 1)
        self.moe = nn.ModuleList(MoELayer(DIM, HIDDEN, EXPERTS, gate="topk", gate_options={"k": 2}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.into(x))
        for layer in self.moe:
            x = x + layer(x)
        return self.out(x).squeeze(-1)


def build(dtype: torch.dtype) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype)


def batches(dtype: torch.dtype) -> list[list[list[Tensor]]]:
    """For each step and micro-batch the tokens of every rank; some ranks have none."""
    draw, sizes = torch.Generator().manual_seed(1), ([5, 5, 5, 5], [9, 1, 4, 2], [0, 7, 0, 1])
    return [
        [[torch.randn(n, DIM, generator=draw, dtype=torch.float64).to(dtype) for n in sizes[(step + micro) % 3]]
         for micro in range(MICRO)]
        for step in range(STEPS)
    ]  # fmt: skip


def optimizer_of(model: nn.Module, name: str) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)


def train_one(dtype: torch.dtype, optimizer: str = "adam") -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses and the last weights on the joint batches."""
    model, losses = build(dtype), []
    stepper = optimizer_of(model, optimizer)
    for step in batches(dtype):
        for parts in step:
            loss = model(torch.cat(parts)).square().mean() / MICRO
            loss.backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        stepper.step()
        stepper.zero_grad()
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


def train_many(
    rank: int,
    dtype: torch.dtype,
    moves: dict[int, tuple[Operation, ...]],
    optimizer: str = "adam",
    flow: bool = True,
    expert_parallel: int | None = None,
) -> tuple[list[Tensor], list[dict[str, Tensor]], list[tuple[Any, ...]], int]:
    """The same on this rank; for each layer its slots by expert, and the placements there were."""
    model, losses = build(dtype), []
    groups = ExpertMesh.build("cpu", expert_parallel=expert_parallel)
    for layer in model.moe:
        layer.parallelize(groups, slots=SLOTS * RANKS // groups.expert_size)
    stepper, mover, placements = optimizer_of(model, optimizer), Relocation.among(groups), []
    check_elementwise([stepper])
    own = {id(parameter) for layer in model.moe for parameter in layer.experts.parameters()}
    for number, step in enumerate(batches(dtype)):
        for parts in step:
            loss = model(parts[rank]).square().sum() / sum(map(len, parts)) / MICRO
            loss.backward()
            total = loss.detach().clone()
            dist.all_reduce(total)
            losses.append(total)
        for parameter in model.parameters():
            if id(parameter) not in own:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(parameter.grad)
        sync_expert_gradients(model, mean=False)
        clip_with_experts(model, model.parameters(), 0.3)
        mover.finish()
        stepper.step()
        stepper.zero_grad()
        if number in moves:
            # The second layer lags by a plan, so that layers differ.
            before = [layer.placement for layer in model.moe]
            mover.move(list(model.moe)[:1], [before[0].apply(*moves[number])], [stepper])
            for layer in model.moe:
                if flow:
                    loads = torch.arange(1.0, EXPERTS + 1).numpy()
                    layer.fractions = optimal_split(loads, layer.placement).fractions
            placements.append(model.moe[0].placement.slots)
    weights = []
    for layer in model.moe:
        row = layer.placement.slots[groups.expert_rank]
        weights.append({
            f"{name}.{expert}": parameter.detach()[slot].clone()
            for name, parameter in layer.experts.named_parameters() for slot, expert in enumerate(row) if expert >= 0
        })  # fmt: skip
        for parameter in layer.experts.parameters():
            assert not parameter[[slot for slot, expert in enumerate(row) if expert < 0]].any()
    return losses, weights, placements, mover.num_bytes


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("optimizer", "flow"), [("adam", True), ("sgd", False)])
def test_moves_change_no_number(ranks: Any, dtype: torch.dtype, tolerance: float, optimizer: str, flow: bool) -> None:
    """All three kinds, a rank emptied and refilled, micro-batches, clipping; replicas are equal bit for bit."""
    kinds = [operation for step in MOVES.values() for operation in step]
    assert len(kinds) >= 6 and {type(operation) for operation in kinds} == {Expand, Shrink, Migrate}
    wanted, weights = train_one(dtype, optimizer)
    answers = ranks(RANKS).run(train_many, dtype, MOVES, optimizer, flow)
    rank_2 = [slots[2] for slots in answers[0][2]]
    assert any(set(row) == {-1} for row in rank_2) and len(set(rank_2[-1]) - {-1}) >= 2
    seen: dict[str, Tensor] = {}
    for losses, layers, placements, _ in answers:
        assert placements == answers[0][2]
        torch.testing.assert_close(torch.stack(losses), torch.stack(wanted), rtol=tolerance, atol=tolerance)
        for number, own in enumerate(layers):
            for key, value in own.items():
                name, expert = key.split(".")
                expected = weights[f"moe.{number}.experts.{name}"][int(expert)]
                torch.testing.assert_close(value, expected, rtol=0, atol=tolerance)
                assert torch.equal(seen.setdefault(f"{number}.{key}", value), value), f"replicas of {key} differ"
    assert sum(answer[3] for answer in answers) > 0
    assert {key.split(".")[2] for key in seen} == {str(expert) for expert in range(EXPERTS)}


def test_migrations_change_no_bit(ranks: Any) -> None:
    still = ranks(RANKS).run(train_many, torch.float32, {})
    moved = ranks(RANKS).run(train_many, torch.float32, MIGRATIONS)
    for one, two in zip(still, moved, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[0], two[0], strict=True))
    for layer in (0, 1):
        before, after = (
            {k: v for answer in answers for k, v in answer[1][layer].items()} for answers in (still, moved)
        )
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_groups_of_ranks_move_alike(ranks: Any) -> None:
    """2 x 2: each pair of ranks has all experts, and the pairs have the same."""
    moves = {4: (Migrate(0, 0, 1), Expand(5, 1, 0)), 9: (Shrink(5, 1), Expand(1, 0, 1))}
    wanted, weights = train_one(torch.float64)
    for losses, layers, _, _ in ranks(RANKS).run(train_many, torch.float64, moves, "adam", True, 2):
        torch.testing.assert_close(torch.stack(losses), torch.stack(wanted), rtol=1e-12, atol=1e-12)
        for key, value in layers[0].items():
            name, expert = key.split(".")
            torch.testing.assert_close(value, weights[f"moe.0.experts.{name}"][int(expert)], rtol=0, atol=1e-12)


def test_copies_on_many_ranks_share_one_reduction(ranks: Any) -> None:
    wanted, _ = train_one(torch.float64)
    moves = {1: tuple(Expand(0, 0, rank) for rank in (1, 2, 3))}
    for losses, *_ in ranks(RANKS).run(reduced, moves):
        torch.testing.assert_close(torch.stack(losses), torch.stack(wanted), rtol=1e-12, atol=1e-12)


def reduced(rank: int, moves: dict[int, tuple[Operation, ...]]) -> Any:
    from lightning_hetu.moe import replicas

    most, replicas._MOST_PEERS = replicas._MOST_PEERS, 1
    try:
        return train_many(rank, torch.float64, moves)
    finally:
        replicas._MOST_PEERS = most


def disagreeing(rank: int) -> str:
    groups, layer = ExpertMesh.build("cpu"), MoELayer(DIM, HIDDEN, EXPERTS)
    layer.parallelize(groups, slots=SLOTS)
    placement = layer.placement.apply(Migrate(0, 0, 1 + (rank == 2)))
    try:
        Relocation.among(groups).move([layer], [placement], [])
    except RuntimeError as error:
        return str(error)
    return ""


def test_ranks_that_disagree_end_at_once(ranks: Any) -> None:
    wanted = "placement: ranks have planned different placements; their counts or settings differ."
    assert ranks(RANKS).run(disagreeing) == [wanted] * RANKS


def test_optimizers_that_mix_rows_are_refused() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    check_elementwise([torch.optim.Adam([weight])])
    with pytest.raises(ValueError, match=r"optimizer=LBFGS: experts can move only with optimizers whose states are"):
        check_elementwise([torch.optim.LBFGS([weight])])
    with pytest.raises(ValueError, match="optimizer=Adafactor"):
        check_elementwise([torch.optim.Adafactor([weight])])
