"""Steps and copies cost what the formulas say, written out pair by pair."""

from __future__ import annotations

import random

import numpy as np
import pytest
from test_placement import random_placement

from lightning_hetu.moe.placement import Placement, PlacementCostModel, apportion, optimal_split, plan
from lightning_hetu.planning import ClusterSpec, Link, Topology

NEAR, FAR = Link(1e9, 1e-6), Link(1e8, 1e-5)
MODEL = PlacementCostModel(
    token_seconds=1e-6,
    token_bytes=100,
    weight_bytes=5000,
    state_bytes=35000,
    topology=Topology(2, NEAR, FAR, nics_per_node=1),
    launch_seconds=1e-4,
    sync_overlap=0.25,
)
SHARED = 0.5e8  # bytes per second of a rank to other nodes: two share an adapter


def by_hand(counts: np.ndarray, placement: Placement) -> tuple[float, float, float]:
    """Seconds of computation, exchange and synchronization."""
    ranks = placement.num_ranks
    tokens = apportion(counts, optimal_split(counts, placement).fractions, placement)
    compute = []
    for rank in range(ranks):
        here = tokens[:, :, rank].sum(axis=0)
        compute.append(here.sum() * 1e-6 + (here > 0).sum() * 1e-4)
    busiest = 0.0
    for rank in range(ranks):
        sent = received = 0.0
        for other in range(ranks):
            if other != rank:
                speed = 1e9 if rank // 2 == other // 2 else SHARED
                sent += tokens[rank, :, other].sum() * 100 / speed
                received += tokens[other, :, rank].sum() * 100 / speed
        busiest = max(busiest, sent, received)
    sync = 0.0
    for holders in placement.all_holders:
        count = len(holders)
        if count > 1:
            near = len({rank // 2 for rank in holders}) == 1
            latency, speed = (1e-6, 1e9) if near else (1e-5, SHARED)
            sync += 0.75 * 2 * (count - 1) * (latency + 5000 / count / speed)
    return max(compute), 4 * (busiest + (1e-5 if ranks > 2 else 1e-6)), sync


def test_steps_cost_what_the_formulas_say() -> None:
    draw, noise = random.Random(0), np.random.default_rng(0)
    for _ in range(40):
        placement = random_placement(draw, draw.randint(2, 8), 4, 4)
        # Whole tokens and fractions of them differ a little, so there are many.
        counts = noise.integers(0, 10**6, (4, placement.num_experts))
        found = MODEL.step_seconds(counts.astype(float), optimal_split(counts, placement).fractions, placement)
        assert found == pytest.approx(by_hand(counts, placement), rel=1e-4)
        assert found.total == pytest.approx(sum(by_hand(counts, placement)), rel=1e-4)


def test_one_rank_exchanges_nothing() -> None:
    placement = Placement.contiguous(3, 1)
    found = MODEL.step_seconds(np.array([[1.0, 2.0, 0.0]]), np.ones((3, 1)), placement)
    assert found == pytest.approx((3e-6 + 2e-4, 0.0, 0.0))


def test_copies_take_their_states_over_the_link() -> None:
    near, far = 1e-6 + 35000 / 1e9, 1e-5 + 35000 / SHARED
    assert MODEL.copy_seconds([(0, 0, 1), (1, 1, 2)]) == pytest.approx(near + far)
    assert MODEL.copy_seconds([(0, 0, 1)], weights_only=True) == pytest.approx(1e-6 + 5000 / 1e9)


def test_plans_say_what_they_cost() -> None:
    placement = Placement.contiguous(4, 4, 3)
    counts = np.full((4, 4), 10**7)
    counts[:, 0] *= 10
    found = plan(counts, placement, cost_model=MODEL)
    assert found.ops and found.pays
    assert found.seconds_before is not None and found.seconds_after is not None and found.adjust_seconds is not None
    assert found.seconds_before == pytest.approx(by_hand(counts, placement), rel=1e-4)
    assert found.seconds_after == pytest.approx(by_hand(counts, found.after), rel=1e-4)
    assert found.adjust_seconds == pytest.approx(MODEL.copy_seconds(found.copies))
    assert found.bytes_moved == 35000 * len(found.copies)
    assert (found.seconds_before.total - found.seconds_after.total) * MODEL.horizon > found.adjust_seconds


def test_constants_of_feed_forward_experts() -> None:
    model = PlacementCostModel.for_experts(1024, 4096, "4xH100-80GB", matrices=2)
    weights = 2 * 1024 * 4096
    assert (model.token_bytes, model.weight_bytes, model.state_bytes) == (2048, 2 * weights, 14 * weights)
    assert 6 * weights / 989.4e12 < model.token_seconds < 12 * weights / 989.4e12  # between half and full peak


@pytest.mark.parametrize(
    ("name", "value"),
    [("token_seconds", -1.0), ("state_bytes", float("nan")), ("sync_overlap", 1.5), ("horizon", 0.0)],
)
def test_constants_out_of_range_are_refused(name: str, value: float) -> None:
    constants = {"token_seconds": 1.0, "token_bytes": 1.0, "weight_bytes": 1.0, "state_bytes": 1.0, name: value}
    with pytest.raises(ValueError, match=f"{name}=.*expected"):
        PlacementCostModel(**constants, topology=Topology(2, NEAR, FAR))


def test_clusters_without_links_are_refused() -> None:
    with pytest.raises(ValueError, match="has no topology"):
        PlacementCostModel.for_experts(64, 64, ClusterSpec(4, 4, device="H100-80GB"))
