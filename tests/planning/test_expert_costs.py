"""Experts that ranks share out: what a rank holds of them, and what it takes to reach those of others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_hetu.planning import ClusterSpec, HybridPlan, LayerProfile, ModelProfile, evaluate, search
from lightning_hetu.planning.profile import ExpertProfile
from lightning_hetu.planning.search import time_breakdown

MIB = 2**20
BANDWIDTH, LATENCY = 1e9, 1e-4
EXPERTS = ExpertProfile(parameter_bytes=24 * MIB, number=8, routed_bytes=1e5)


def model(experts: ExpertProfile | None, dense: int = 4 * MIB) -> ModelProfile:
    layer = LayerProfile("layer", parameter_bytes=dense, forward_time=((1, 1e-3),), experts=experts)
    nothing = LayerProfile("nothing", parameter_bytes=0)
    return ModelProfile((layer,), (0, 0), nothing, nothing, pipeline=False, microbatches=False, split_vocab=False)


def devices(count: int = 4) -> ClusterSpec:
    return ClusterSpec.from_bandwidth(count, gigabytes_per_second=BANDWIDTH / 1e9, latency=LATENCY)


def plan(strategy: str) -> HybridPlan:
    outside = strategy.removesuffix("-recompute")
    return HybridPlan.uniform(strategy, num_layers=2, global_batch_size=16, embedding=outside, head=outside)


def price(strategy: str, experts: ExpertProfile | None) -> tuple[float, dict[str, float]]:
    """Peak memory, and seconds by what takes them."""
    profile, cluster = model(experts), devices()
    peak = evaluate(plan(strategy), profile, cluster).stage_memory[0]
    return peak, time_breakdown(plan(strategy), profile, cluster, 0)


@pytest.mark.parametrize("strategy", ["dp4", "dp4-zero2", "dp4-zero3"])
@pytest.mark.parametrize(("number", "ranks"), [(8, 4), (6, 2), (5, 1)])
def test_a_rank_holds_its_share_whatever_the_dense_part_does(strategy: str, number: int, ranks: int) -> None:
    """Beside next to nothing: weights, gradients, two moments, and the temporary of Adam, in both layers."""
    share = EXPERTS.parameter_bytes / ranks
    profile = model(replace(EXPERTS, number=number), dense=4096)
    assert evaluate(plan(strategy), profile, devices()).stage_memory[0] == pytest.approx(2 * 4.25 * share, rel=1e-2)


def test_frozen_experts_have_weights_only() -> None:
    more = price("dp4", replace(EXPERTS, trainable_fraction=0.0))[0] - price("dp4", None)[0]
    assert more == 2 * EXPERTS.parameter_bytes / 4


def test_rows_travel_there_and_back_in_both_directions() -> None:
    """Four all-to-alls per layer, six where it is recomputed; each gives a rank's rows to the others."""
    message = EXPERTS.routed_bytes * 16 / 4
    once = 3 * (LATENCY + message / 4 / BANDWIDTH)
    assert price("dp4-zero3", EXPERTS)[1]["expert_exchange"] == pytest.approx(2 * 4 * once)
    assert price("dp4-zero3-recompute", EXPERTS)[1]["expert_exchange"] == pytest.approx(2 * 6 * once)
    assert price("dp4-zero3", None)[1]["expert_exchange"] == 0


def test_copies_of_experts_add_up_their_gradients_once_per_step() -> None:
    """Two ranks share six experts, so that two ranks hold each; four share eight, and nothing is to be added."""
    share = EXPERTS.parameter_bytes / 2
    seconds = price("dp4", replace(EXPERTS, number=6))[1]["expert_gradients_per_step"]
    assert seconds == pytest.approx(2 * 2 * (LATENCY + share / 2 / BANDWIDTH))
    assert price("dp4", EXPERTS)[1]["expert_gradients_per_step"] == 0


def test_more_devices_make_room_for_more_experts() -> None:
    """64 experts of 8 MiB and their moments, 2 GiB a layer: on 8 devices they fit where 4 are too few."""
    profile = model(ExpertProfile(64 * 8 * MIB, 64, 1e4))
    found = search(profile, devices(8), memory_budget="700MiB", global_batch_size=16)
    assert found.world_size == 8
    with pytest.raises(ValueError, match="memory_budget"):
        search(profile, devices(4), memory_budget="700MiB", global_batch_size=16)


def test_profiles_keep_them(tmp_path: Path) -> None:
    profile = model(EXPERTS)
    assert ModelProfile.load(profile.save(tmp_path / "model.json")) == profile


@pytest.mark.parametrize("wrong", [{"parameter_bytes": -1}, {"number": 0}, {"routed_bytes": -1.0}])
def test_impossible_experts_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        replace(EXPERTS, **wrong)
