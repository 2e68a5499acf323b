"""Cuts into stages: the balanced ones, the search between them, and the best of all of them."""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from lightning_hetu.planning import (
    ClusterSpec,
    LayerProfile,
    ModelProfile,
    NoFeasiblePlanError,
    balance_degree,
    balanced_cut,
    search,
)
from lightning_hetu.planning.partition import all_cuts, count_cuts, neighbors
from lightning_hetu.planning.partition_search import PartitionSearch
from lightning_hetu.planning.search import build_cost_model
from lightning_hetu.planning.search_space import Pins

sys.path.insert(0, str(Path(__file__).parent))
from helpers import MIB, random_cluster, random_model  # noqa: E402


def test_the_balance_degree_is_the_papers() -> None:
    assert balance_degree([1.0, 1.0, 1.0, 1.0]) == 0.75
    assert balance_degree([3.0, 0.0, 0.0]) == 0.0
    assert balance_degree([2.0, 1.0, 1.0]) == 0.5
    assert balance_degree([0.0, 0.0]) == 0.5
    with pytest.raises(ValueError, match=r"loads=\[-1.0\]: expected one load of at least 0"):
        balance_degree([-1.0])


def test_all_cuts_are_counted() -> None:
    assert list(all_cuts(4, 2)) == [(1, 3), (2, 2), (3, 1)]
    assert list(all_cuts(3, 1)) == [(3,)]
    for layers, stages in ((6, 3), (9, 4), (5, 5)):
        cuts = list(all_cuts(layers, stages))
        assert len(set(cuts)) == len(cuts) == count_cuts(layers, stages)
        assert all(sum(cut) == layers and min(cut) >= 1 for cut in cuts)


def test_neighbors_move_one_block_out_of_a_stage() -> None:
    assert list(neighbors((2, 3, 1), 1)) == [(3, 2, 1), (2, 2, 2)]
    assert list(neighbors((2, 3, 1), 0)) == [(1, 4, 1), (1, 3, 2)]
    assert list(neighbors((2, 3, 1), 2)) == []


@pytest.mark.parametrize("seed", range(20))
def test_the_balanced_cut_is_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    stages, blocks = int(rng.integers(1, 5)), int(rng.integers(5, 9))
    loads, extra = rng.random((stages, blocks)), rng.random(stages)

    def of(cut: tuple[int, ...]) -> tuple[float, float]:
        ends = [0, *itertools.accumulate(cut)]
        sums = [extra[i] + loads[i, a:b].sum() for i, (a, b) in enumerate(itertools.pairwise(ends))]
        return max(sums), sum(value**2 for value in sums)

    best = min(all_cuts(blocks, stages), key=of)
    assert of(balanced_cut(loads, extra)) == pytest.approx(of(best))


@pytest.mark.parametrize(
    ("loads", "extra", "message"),
    [
        ([[1.0], [1.0]], None, r"loads\[2, 1\]: expected \[stages, blocks\]"),
        ([1.0, 2.0], None, r"loads\[2\]: expected \[stages, blocks\]"),
        ([[1.0, 2.0]], [1.0, 2.0], r"extra\[2\]: expected one number for each of 1 stages"),
    ],
)
def test_wrong_loads_are_named(loads: list[float], extra: list[float] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        balanced_cut(loads, extra)


# ---- two kinds of layers --------------------------------------------------------------------------------------------


def two_types(order: tuple[int, ...]) -> ModelProfile:
    """Blocks that are heavy in time, and blocks that are heavy in memory."""
    heavy = LayerProfile(
        "heavy",
        parameter_bytes=300 * MIB,
        forward_time=((1, 0.010), (8, 0.080)),
        activation_bytes={1: 150 * MIB},
        boundary_bytes=4 * MIB,
    )
    light = LayerProfile(
        "light",
        parameter_bytes=40 * MIB,
        forward_time=((1, 0.003), (8, 0.024)),
        activation_bytes={1: 400 * MIB},
        boundary_bytes=4 * MIB,
    )
    ends = LayerProfile("ends", parameter_bytes=100 * MIB, forward_time=((1, 0.001),), boundary_bytes=4 * MIB)
    return ModelProfile((heavy, light), order, ends, ends)


HEAVY_FIRST = (0,) * 8 + (1,) * 8


@pytest.mark.parametrize("order", [HEAVY_FIRST, HEAVY_FIRST[::-1]], ids=["heavy first", "light first"])
@pytest.mark.parametrize("limit", [64, 0], ids=["every cut", "queue"])
@pytest.mark.parametrize("room", [1.0, 1.3, 2.0])
def test_the_cut_lies_between_the_balanced_ones(order: tuple[int, ...], limit: int, room: float) -> None:
    """Galvatron-BMW: of a time balance between those of the two extremes, and at most their time."""
    profile, cluster = two_types(order), ClusterSpec.from_bandwidth(4, gigabytes_per_second=10)
    model = build_cost_model(profile, cluster)
    pins = Pins.parse({"pipeline_parallel_size": 4, "num_microbatches": 8}, 16)
    cuts = PartitionSearch(model, next(iter(pins.settings(model, 16))), pins, exhaustive_limit=limit)
    budget = int(cuts.least_peak() * room)
    found, starts = cuts.best(budget), cuts.starts()
    assert found is not None

    def balance(cut: tuple[int, ...]) -> float:
        ends = [0, *itertools.accumulate(cut)]
        times = [sum(profile.block(i).forward_seconds(2) for i in range(a, b)) for a, b in itertools.pairwise(ends)]
        times[0] += profile.embedding.forward_seconds(2)
        times[-1] += profile.head.forward_seconds(2)
        return balance_degree(times)

    chosen = balance(found.setting.stages)
    assert balance(starts["memory"]) <= chosen + 1e-9 <= balance(starts["time"]) + 2e-9
    for name, cut in starts.items():
        other = cuts.cut(cut).best(budget)
        assert other is None or found.time <= other.time * (1 + 1e-9), name
    plan = search(
        profile, cluster, memory_budget=budget, global_batch_size=16, pipeline_parallel_size=4, num_microbatches=8
    )
    assert plan.prediction is not None and plan.prediction.iteration_time <= found.time * (1 + 1e-9)


# ---- against all cuts -----------------------------------------------------------------------------------------------


def queue_and_all(seed: int) -> tuple[float, float] | None:
    """Step times of the queue's plan and of the best over all cuts, for a random small instance."""
    rng = random.Random(seed)
    devices = rng.choice((2, 4, 4, 8))
    stages = rng.choice([count for count in (2, 4, 8) if count <= devices])
    layers = rng.randint(stages + 1, 10)
    model = build_cost_model(random_model(rng, layers), random_cluster(rng, devices))
    pins = Pins.parse({"pipeline_parallel_size": stages}, layers)
    settings = [s for s in pins.settings(model, rng.choice((8, 16))) if s.num_microbatches <= 8]
    if not settings:
        return None
    setting = rng.choice(settings)
    everything = PartitionSearch(model, setting, pins, exhaustive_limit=10**9)
    if not everything.variants:
        return None
    least = everything.least_peak()
    capacity = int(least * rng.choice((1, 1.05, 1.2, 1.5, 3)))
    queue = PartitionSearch(model, setting, pins, exhaustive_limit=0)
    assert queue.least_peak() == least
    best, found = everything.best(capacity), queue.best(capacity)
    assert best is not None
    return (np.inf if found is None else found.time), best.time


def check_queue(seeds: range) -> None:
    results = [times for times in map(queue_and_all, seeds) if times is not None]
    ratios = np.array([found / best for found, best in results])
    assert len(results) > 0.8 * len(seeds)
    assert (ratios < 1 + 1e-9).mean() >= 0.95


def test_the_queue_finds_the_best_cut() -> None:
    check_queue(range(30))


@pytest.mark.slow
def test_the_queue_finds_the_best_cut_of_many() -> None:
    check_queue(range(300))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 200, 25))
def test_the_search_equals_every_cut(first: int) -> None:
    """The cut that ``search`` chooses against a search of its own for every cut, on small instances."""
    equal = 0
    for seed in range(first, first + 25):
        rng = random.Random(1000 + seed)
        devices = rng.choice((2, 4))
        profile, cluster = random_model(rng, rng.randint(devices, 7)), random_cluster(rng, devices)
        pins = {"pipeline_parallel_size": devices}
        try:
            budget = 1
            search(profile, cluster, memory_budget=budget, global_batch_size=8, alternatives=False, **pins)
        except NoFeasiblePlanError as error:
            budget = int(error.smallest_feasible_budget * rng.choice((1.0, 1.2, 2.0)))
        options = {"memory_budget": budget, "global_batch_size": 8, "alternatives": False}
        plan = search(profile, cluster, **options, **pins)
        times = []
        for cut in all_cuts(profile.num_layers, devices):
            try:
                times.append(search(profile, cluster, **options, stages=cut).prediction.iteration_time)
            except NoFeasiblePlanError:
                continue
        assert plan.prediction.iteration_time <= min(times) * 1.03
        equal += plan.prediction.iteration_time <= min(times) * (1 + 1e-9)
    assert equal >= 24


def test_a_number_of_stages_leaves_the_cut_free() -> None:
    profile, cluster = two_types(HEAVY_FIRST), ClusterSpec.from_bandwidth(2, gigabytes_per_second=10)
    options = {"memory_budget": "40GiB", "global_batch_size": 8, "num_microbatches": 4, "schedule": "1f1b"}
    assert search(profile, cluster, stages=2, **options).stages == (5, 11)
    assert search(profile, cluster, stages=[8, 8], **options).stages == (8, 8)


@pytest.mark.slow
@pytest.mark.parametrize("bandwidth", [3, 20])
@pytest.mark.parametrize("order", [(0,) * 24, HEAVY_FIRST * 2], ids=["one type", "two types"])
def test_more_memory_is_never_slower_and_no_space_is_faster(order: tuple[int, ...], bandwidth: int) -> None:
    """With the cut free, and too many cuts to look at all of them."""
    profile, cluster = two_types(order), ClusterSpec.from_bandwidth(8, gigabytes_per_second=bandwidth)
    spaces: dict[str, dict[str, object]] = {
        "data parallel": {"pipeline_parallel_size": 1, "dp_type": "ddp"},
        "sharded data parallel": {"pipeline_parallel_size": 1, "dp_type": "zero3"},
        "pipeline": {"pipeline_parallel_size": 8},
        "two stages": {"pipeline_parallel_size": 2},
        "even stages": {"stages": [len(order) // 4] * 4},
    }
    before = np.inf
    for mebibytes in (1500, 2000, 2500, 3000, 4000, 6000, 9000, 15000):
        options = {"memory_budget": mebibytes * MIB, "global_batch_size": 32, "alternatives": False}
        try:
            found = search(profile, cluster, **options).prediction
        except NoFeasiblePlanError:
            assert before == np.inf
            continue
        assert found is not None and found.iteration_time <= before * (1 + 1e-9)
        before = found.iteration_time
        for name, pins in spaces.items():
            try:
                other = search(profile, cluster, **options, **pins).prediction
            except NoFeasiblePlanError:
                continue
            assert other is not None and before <= other.iteration_time * (1 + 1e-9), name
    assert before < np.inf
