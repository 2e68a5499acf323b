"""Figures on where tokens go add counts before they divide, over batches and ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_hetu.moe import BalanceRatio, DropRate, ExpertLoad, GateOutput, MeanActiveExperts, build_gate


def decided(logits: list[list[float]], **options: Any) -> GateOutput:
    gate = build_gate("topk", dim=2, num_experts=len(logits[0]), **{"k": 1, **options})
    return gate.route(torch.tensor(logits))


LEFT, RIGHT = [5.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 5.0]


def test_loads_of_batches_are_added() -> None:
    """Three tokens for one expert, then one for another: shares of 3/4, 0, 0, 1/4."""
    metric = ExpertLoad(4)
    metric.update(decided([LEFT] * 3))
    metric.update(decided([RIGHT]))
    found = metric.compute()
    share = torch.tensor([0.75, 0.0, 0.0, 0.25], dtype=torch.float64)
    assert found["max_over_mean"] == 3.0 and found["dead"] == 0.5
    assert found["cv"] == pytest.approx(float((share - 0.25).square().mean().sqrt() / 0.25))
    assert found["entropy"] == pytest.approx(
        float(-(share[share > 0] * share[share > 0].log()).sum() / torch.tensor(4.0).log())
    )


def test_even_loads_and_no_loads() -> None:
    metric = ExpertLoad(2)
    assert metric.compute() == {"cv": 0.0, "max_over_mean": 1.0, "entropy": pytest.approx(1.0), "dead": 0.0}
    metric.update(decided([[1.0, 0.0], [0.0, 1.0]]))
    assert metric.compute() == {"cv": 0.0, "max_over_mean": 1.0, "entropy": pytest.approx(1.0), "dead": 0.0}
    with pytest.raises(ValueError, match="num_experts=0: expected an integer of at least 1"):
        ExpertLoad(0)


def test_active_and_dropped() -> None:
    """Two choices for a token and none for a row of NaN; three of four assignments find no room for one."""
    active, dropped = MeanActiveExperts(), DropRate()
    assert active.compute() == 0 and dropped.compute() == 0
    active.update(decided([LEFT, [float("nan")] * 4], k=2))
    assert active.compute() == 1.0
    dropped.update(decided([LEFT] * 4, capacity_factor=1.0))
    assert dropped.compute() == 0.75


def test_ratio_of_ranks() -> None:
    """Experts 0 and 1 on one rank, 2 and 3 on the other."""
    metric = BalanceRatio([0, 0, 1, 1])
    assert metric.compute() == 1.0
    metric.update(decided([LEFT, LEFT, LEFT, RIGHT]))
    assert metric.compute() == 1.5
    with pytest.raises(ValueError, match=r"owners=\[\]: expected the number of a rank for each expert"):
        BalanceRatio([])


def over_ranks(rank: int) -> list[float]:
    metrics = [ExpertLoad(4), MeanActiveExperts(), DropRate(), BalanceRatio([0, 0, 1, 1])]
    output = decided([LEFT] * 3 if rank else [RIGHT], capacity_factor=2.0)
    for metric in metrics:
        metric.update(output)
    load, *others = (metric.compute() for metric in metrics)
    return [float(load["max_over_mean"]), *map(float, others)]


def test_counts_of_ranks_are_added(ranks: Any) -> None:
    """One rank has one token, the other three, of which one is dropped: not the mean of ranks' figures."""
    for found in ranks(2).run(over_ranks):
        assert found == pytest.approx([3.0, 1.0, 0.25, 4 / 3])


def test_balance_of_rows_that_ranks_worked_on() -> None:
    metric = BalanceRatio([0, 0, 1, 1])
    metric.update((3, 1))
    metric.update((2, 2))
    assert metric.compute() == 5 / 4
