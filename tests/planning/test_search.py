"""The search finds what trying every plan finds, and keeps the promises of its documentation."""

from __future__ import annotations

import pickle
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_hetu.planning import (
    ClusterSpec,
    HybridPlan,
    LayerProfile,
    LayerStrategy,
    ModelProfile,
    NoFeasiblePlanError,
    evaluate,
    memory_breakdown,
    search,
    time_breakdown,
)

sys.path.insert(0, str(Path(__file__).parent))
from helpers import MIB, every_plan, random_cluster, random_model  # noqa: E402

CLUSTER = ClusterSpec.from_bandwidth(8, gigabytes_per_second=100)


def transformer(num_layers: int = 32, **kwargs: object) -> ModelProfile:
    """Something like a 7B transformer."""
    width, length = 4096, 2048
    block = LayerProfile(
        "block",
        parameter_bytes=12 * width * width * 4,
        tp_parameter_bytes=12 * width * width * 4,
        forward_time=((1, 0.004), (8, 0.032)),
        activation_bytes={1: 500 * MIB, 2: 270 * MIB, 4: 137 * MIB, 8: 70 * MIB},
        boundary_bytes=length * width * 2,
        tp_degrees=(1, 2, 4, 8),
    )
    vocabulary = 32000 * width * 4
    embedding = LayerProfile("embedding", vocabulary, vocabulary, ((1, 2e-4),), tp_degrees=(1, 2, 4, 8))
    head = replace(embedding, name="head", forward_time=((1, 3e-3),), boundary_bytes=length * width * 2)
    return ModelProfile((block,), (0,) * num_layers, embedding, head, "bf16-mixed", **kwargs)  # type: ignore[arg-type]


def brute_force(profile: ModelProfile, cluster: ClusterSpec, batch: int) -> list[tuple[float, int]]:
    """Time and peak of every plan."""
    predictions = [evaluate(plan, profile, cluster) for plan in every_plan(profile, cluster.num_devices, batch)]
    return [(p.iteration_time, max(p.stage_memory)) for p in predictions]


def check_against_every_plan(seed: int, num_devices: int, num_layers: int, batch: int) -> None:
    rng = random.Random(seed)
    profile = random_model(rng, num_layers, split_vocab=rng.random() < 0.8, microbatches=rng.random() < 0.8)
    profile = replace(profile, pipeline=profile.microbatches)
    cluster = random_cluster(rng, num_devices)
    plans = brute_force(profile, cluster, batch)
    if not plans:
        with pytest.raises(ValueError, match="global_batch_size"):
            search(profile, cluster, memory_budget="1TiB", global_batch_size=batch)
        return
    peaks = sorted(peak for _, peak in plans)
    for budget in (peaks[0], peaks[len(peaks) // 20], peaks[len(peaks) // 4], peaks[-1]):
        best = min(time for time, peak in plans if peak <= budget)
        options = {"global_batch_size": batch, "alternatives": False, "schedule": "1f1b"}
        plan = search(profile, cluster, memory_budget=budget, **options)
        assert plan.prediction is not None
        assert plan.prediction.iteration_time == pytest.approx(best, rel=1e-9)
        assert max(plan.prediction.stage_memory) <= budget
        assert plan.prediction == evaluate(plan, profile, cluster, memory_budget=budget)
    with pytest.raises(NoFeasiblePlanError) as error:
        search(profile, cluster, memory_budget=peaks[0] - 1, global_batch_size=batch)
    assert error.value.smallest_feasible_budget == peaks[0]


@pytest.mark.parametrize("seed", range(9))
def test_two_devices_equal_every_plan(seed: int) -> None:
    """Time and the smallest feasible budget equal those over all plans of tiny models on two devices."""
    check_against_every_plan(seed, 2, 1 + seed % 3, 2 if seed % 3 == 2 else 4)


@pytest.mark.parametrize("seed", range(100, 104))
def test_four_devices_equal_every_plan(seed: int) -> None:
    """The same on four devices, where layouts and pipelines mix."""
    check_against_every_plan(seed, 4, 1 + seed % 2, 4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200, 240))
def test_many_random_models_equal_every_plan(seed: int) -> None:
    """The same on many more models, up to three blocks."""
    check_against_every_plan(seed, (2, 4)[seed % 2], 1 + seed % (3 if seed % 2 == 0 else 2), (4, 8)[seed % 3 == 0])


def test_more_memory_never_makes_the_plan_slower() -> None:
    """Predicted time falls, or stays, as the budget grows."""
    profile = transformer()
    times = []
    for gigabytes in (16, 18, 22, 28, 40, 80):
        plan = search(profile, CLUSTER, memory_budget=f"{gigabytes}GiB", global_batch_size=16, alternatives=False)
        assert plan.prediction is not None
        times.append(plan.prediction.iteration_time)
    assert times == sorted(times, reverse=True)
    assert times[-1] < times[0]


@pytest.mark.parametrize(
    "pins",
    [
        {"tp": 1, "max_tp": 1, "pipeline_parallel_size": 1, "dp_type": "zero3"},
        {"tp": 1, "max_tp": 1, "pipeline_parallel_size": 1, "dp_type": "zero2"},
        {"tp": 8},
        {"pipeline_parallel_size": 8},
        {"pipeline_parallel_size": 2, "tp": 2, "recompute": False},
        {"layers": "dp4-tp2-zero3"},
        {"recompute": True},
    ],
)
@pytest.mark.parametrize("budget", ["18GiB", "40GiB"])
def test_no_restricted_space_is_faster(pins: dict[str, object], budget: str) -> None:
    """Every space with a pin is part of the whole one, so its best plan is not faster."""
    profile = transformer()
    free = search(profile, CLUSTER, memory_budget=budget, global_batch_size=16, alternatives=False)
    try:
        pinned = search(profile, CLUSTER, memory_budget=budget, global_batch_size=16, alternatives=False, **pins)
    except NoFeasiblePlanError as error:
        assert error.smallest_feasible_budget > error.memory_budget
        return
    assert free.prediction is not None and pinned.prediction is not None
    assert free.prediction.iteration_time <= pinned.prediction.iteration_time * (1 + 1e-9)


def test_the_search_is_deterministic() -> None:
    """Two searches give the same plan, to the last digit."""
    plans = [search(transformer(), CLUSTER, memory_budget="24GiB", global_batch_size=16) for _ in range(2)]
    assert plans[0].to_json() == plans[1].to_json()


def test_of_equal_plans_the_simpler_one_wins() -> None:
    """Without any cost of communication or memory, one microbatch and one stage win."""
    layer = LayerProfile("block", 8, forward_time=((1, 1.0),))
    profile = ModelProfile((layer,), (0, 0, 0, 0), layer, layer)
    cluster = ClusterSpec.from_bandwidth(4, gigabytes_per_second=1e9, latency=0)
    plan = search(profile, cluster, memory_budget="1GiB", global_batch_size=4)
    assert (plan.num_microbatches, plan.pipeline_parallel_size) == (1, 1)


def test_pins_are_obeyed() -> None:
    """Every pinned field has the value that was given, free ones are filled in."""
    profile = transformer(8)
    plan = search(
        profile,
        CLUSTER,
        memory_budget="60GiB",
        global_batch_size=16,
        stages=[5, 3],
        num_microbatches=4,
        schedule="gpipe",
        layers=["dp2-tp2-zero3-recompute", *[None] * 6, LayerStrategy(dp=4, dp_type="zero2")],
        tp=(2, 4),
        recompute=False,
        embedding="dp4-zero2",
        head="tp4",
    )
    assert (plan.stages, plan.num_microbatches, plan.schedule) == ((5, 3), 4, "gpipe")
    assert str(plan.layers[0]) == "dp2-tp2-zero3-recompute"
    assert str(plan.layers[-1]) == "dp4-zero2"
    assert all(layer.tp in (2, 4) and not layer.recompute for layer in plan.layers[1:-1])
    assert (str(plan.embedding), str(plan.head)) == ("dp4-zero2", "tp4")


def test_type_and_degree_pins_hold_for_all_rows() -> None:
    """``dp_type`` and ``max_tp`` hold for embedding and head as well."""
    plan = search(
        transformer(8), CLUSTER, memory_budget="60GiB", global_batch_size=16, dp_type=["zero3"], max_tp=2, dp=[4, 8]
    )
    rows = [row for _, row in plan.rows()]
    assert {row.dp_type for row in rows} == {"zero3"}
    assert max(row.tp for row in rows) <= 2


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"pipeline": 2}, "pin 'pipeline' is unknown: expected one of pipeline_parallel_size, stages"),
        ({"stages": [1, 1]}, "stages=\\[1, 1\\] holds 2 blocks, but the model has 4"),
        ({"stages": [2, 2], "pipeline_parallel_size": 4}, "pipeline_parallel_size=4 contradicts"),
        ({"pipeline_parallel_size": 3}, "pipeline_parallel_size=3: expected a divisor of 8"),
        ({"num_microbatches": 0}, "num_microbatches=0: expected an integer of at least 1"),
        ({"schedule": "zero"}, "schedule='zero': expected one of 1f1b, gpipe"),
        ({"dp_type": "fsdp"}, "dp_type='fsdp': expected one of ddp, zero2, zero3"),
        ({"recompute": "yes"}, "recompute='yes': expected true or false"),
        ({"layers": ["dp8"]}, "layers: expected one strategy, or one entry per block \\(4\\), got 1"),
        ({"tp": "2"}, "tp='2': expected an integer"),
        ({"num_microbatches": 3}, "global_batch_size=16: no plan divides it .* num_microbatches=3"),
        ({"layers": "dp3-tp2"}, "layers\\[0\\]=dp3-tp2-ddp takes 6 devices of a stage"),
        ({"head": "dp4", "pipeline_parallel_size": 1}, "head=dp4-ddp takes 4 devices of a stage, but .* has 8"),
    ],
)
def test_wrong_pins_are_one_line_errors(pins: dict[str, object], message: str) -> None:
    """A pin that cannot be met is an error that names it, on one line."""
    with pytest.raises(ValueError, match=message) as error:
        search(transformer(4), CLUSTER, memory_budget="60GiB", global_batch_size=16, **pins)
    assert "\n" not in str(error.value)


def test_a_model_without_pipeline_support_gets_no_pipeline() -> None:
    """Such a model is planned with one stage and one microbatch, and pins to the contrary are refused."""
    profile = transformer(4, pipeline=False, microbatches=False)
    plan = search(profile, CLUSTER, memory_budget="60GiB", global_batch_size=16)
    assert (plan.pipeline_parallel_size, plan.num_microbatches) == (1, 1)
    for pin in ({"pipeline_parallel_size": 2}, {"num_microbatches": 2}):
        with pytest.raises(ValueError, match="expected 1"):
            search(profile, CLUSTER, memory_budget="60GiB", global_batch_size=16, **pin)


def test_the_smallest_feasible_budget_is_true() -> None:
    """A search with exactly the named budget succeeds, with one byte less it fails."""
    profile = transformer()
    for pins in ({}, {"pipeline_parallel_size": 2}, {"recompute": False}):
        with pytest.raises(NoFeasiblePlanError, match="memory_budget=1073741824") as error:
            search(profile, CLUSTER, memory_budget="1GiB", global_batch_size=16, **pins)
        least = error.value.smallest_feasible_budget
        assert str(least) in str(error.value) and "\n" not in str(error.value)
        plan = search(profile, CLUSTER, memory_budget=least, global_batch_size=16, **pins)
        assert plan.prediction is not None
        assert max(plan.prediction.stage_memory) <= least
        with pytest.raises(NoFeasiblePlanError):
            search(profile, CLUSTER, memory_budget=least - 1, global_batch_size=16, **pins)


def test_the_error_survives_pickling() -> None:
    """The error can be sent from another process."""
    error = pickle.loads(pickle.dumps(NoFeasiblePlanError(10, 20)))
    assert (error.memory_budget, error.smallest_feasible_budget) == (10, 20)


def test_without_a_batch_size_the_best_throughput_wins() -> None:
    """No single power-of-two batch size up to the chosen one has a better predicted throughput."""
    profile = transformer(8)
    best = search(profile, CLUSTER, memory_budget="20GiB", alternatives=False)
    assert best.prediction is not None
    throughput = best.global_batch_size / best.prediction.iteration_time
    for batch in (8, 16, 32):
        plan = search(profile, CLUSTER, memory_budget="20GiB", global_batch_size=batch, alternatives=False)
        assert plan.prediction is not None
        assert throughput >= batch / plan.prediction.iteration_time * 0.98
    with pytest.raises(NoFeasiblePlanError) as error:
        search(profile, CLUSTER, memory_budget="1GiB")
    search(profile, CLUSTER, memory_budget=error.value.smallest_feasible_budget, alternatives=False)


def test_breakdowns_add_up_to_the_prediction() -> None:
    """Categories of memory sum to the stage's peak, parts of time to the stage's time."""
    profile = transformer(8)
    plan = search(
        profile, CLUSTER, memory_budget="30GiB", global_batch_size=16, pipeline_parallel_size=2, schedule="1f1b"
    )
    assert plan.prediction is not None
    for stage in range(2):
        memory = memory_breakdown(plan, profile, CLUSTER, stage)
        assert set(memory) == {"parameters", "gradients", "optimizer", "activations", "gathered", "transient"}
        assert sum(memory.values()) == plan.prediction.stage_memory[stage]
        times = time_breakdown(plan, profile, CLUSTER, stage)
        per_microbatch = sum(seconds for name, seconds in times.items() if not name.endswith("_per_step"))
        assert per_microbatch == pytest.approx(plan.prediction.stage_times[stage])
    with pytest.raises(ValueError, match="stage=2: expected 0 to 1"):
        memory_breakdown(plan, profile, CLUSTER, 2)


def test_alternatives_are_true() -> None:
    """Feasible alternatives are slower than the plan, infeasible ones need more than the budget."""
    plan = search(transformer(), CLUSTER, memory_budget="24GiB", global_batch_size=16)
    assert plan.prediction is not None and plan.rejected
    for item in plan.rejected:
        assert item.memory is not None
        if item.iteration_time is None:
            assert item.memory > 24 * 2**30 and "out of memory" in item.reason
        else:
            assert item.iteration_time > plan.prediction.iteration_time and "slower by" in item.reason


def test_progress_is_reported_to_the_end() -> None:
    """The callback sees every setting once, the last one as complete."""
    seen: list[tuple[int, int]] = []
    search(
        transformer(4),
        CLUSTER,
        memory_budget="60GiB",
        global_batch_size=16,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total in seen} == {len(seen)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory_budget": "much"}, "memory_budget='much'"),
        ({"memory_budget": "1GiB", "global_batch_size": 0}, "global_batch_size=0"),
        ({"memory_budget": "1GiB", "cost_model": "best"}, "cost_model='best'"),
        ({"memory_budget": "1GiB", "cost_model": "galvatron3"}, "load_galvatron_profiles"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    """An argument that makes no sense is an error that names it."""
    with pytest.raises(ValueError, match=message):
        search(transformer(4), CLUSTER, **arguments)  # type: ignore[arg-type]


def test_a_plan_of_another_model_is_refused() -> None:
    """A prediction needs a plan with the profile's blocks and the cluster's devices."""
    plan = HybridPlan.uniform("dp8-zero3", num_layers=3, global_batch_size=8)
    with pytest.raises(ValueError, match="plan has 3 blocks, but the profile has 4"):
        evaluate(plan, transformer(4), CLUSTER)
    with pytest.raises(ValueError, match="world_size=8, but the cluster has 4"):
        evaluate(plan, transformer(3), ClusterSpec.from_bandwidth(4, gigabytes_per_second=1))
