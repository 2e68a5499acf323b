"""The simulated step agrees with what can be written down by hand, and with the prices of the cost model."""

from __future__ import annotations

import itertools
import json
import random
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from lightning_hetu.planning import (
    ClusterSpec,
    HetuConstants,
    HetuCostModel,
    HybridPlan,
    LayerProfile,
    LayerStrategy,
    ModelProfile,
    NoFeasiblePlanError,
    evaluate,
    layer_strategies,
    search,
    time_breakdown,
)
from lightning_hetu.planning.cost_model import CATEGORIES, Setting, stage_report
from lightning_hetu.planning.plan import Schedule
from lightning_hetu.planning.schedules import Action, PipelineSchedule, action_lists
from lightning_hetu.planning.simulate import simulate, simulate_pipeline
from lightning_hetu.planning.timeline import Event, Simulation

sys.path.insert(0, str(Path(__file__).parent))
from helpers import MIB, random_cluster, random_model  # noqa: E402

SCHEDULES: tuple[tuple[PipelineSchedule, int], ...] = (
    ("1f1b", 1),
    ("gpipe", 1),
    ("zero_bubble", 1),
    ("zero_bubble", 2),
    ("interleaved_1f1b", 1),
    ("interleaved_1f1b", 3),
)
BLOCK = LayerProfile(
    "block",
    parameter_bytes=8 * MIB,
    tp_parameter_bytes=6 * MIB,
    forward_time=((1, 2e-3), (8, 9e-3)),
    activation_bytes={1: 5 * MIB, 2: 3 * MIB},
    boundary_bytes=MIB,
    tp_degrees=(1, 2),
)
ENDS = LayerProfile("ends", 4 * MIB, forward_time=((1, 1e-3),), activation_bytes={1: 2 * MIB}, boundary_bytes=MIB)
MIXED = ["dp4-zero3-recompute", "dp2-tp2-zero2", "dp4-ddp", "dp2-tp2-zero3"]


def cluster(num_devices: int = 8, **kwargs: object) -> ClusterSpec:
    return ClusterSpec.from_bandwidth(num_devices, gigabytes_per_second=4, latency=1e-5, **kwargs)  # type: ignore[arg-type]


def mixed_plan(**changes: object) -> tuple[HybridPlan, ModelProfile]:
    """Two stages of two blocks in which every kind of communication occurs."""
    profile = ModelProfile((BLOCK,), (0,) * 4, ENDS, ENDS)
    plan = HybridPlan.uniform("dp4", num_layers=4, global_batch_size=32, num_microbatches=4, stages=2)
    layers = tuple(HybridPlan.uniform(text, num_layers=1, global_batch_size=8).layers[0] for text in MIXED)
    zero2 = replace(plan.head, dp_type="zero2")
    return replace(plan, layers=layers, embedding=zero2, head=zero2, **changes), profile  # type: ignore[arg-type]


# ---- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(1, 3), (2, 2), (4, 4), (4, 8), (4, 32), (8, 16)])
def test_equal_stages_take_what_the_papers_say(num_stages: int, num_microbatches: int) -> None:
    """Each schedule's published bubble, for stages of forward 1 and backward 2."""
    one, two = [1.0] * num_stages, [2.0] * num_stages
    for name in ("1f1b", "gpipe"):
        found = simulate_pipeline(one, two, num_microbatches=num_microbatches, schedule=name)  # type: ignore[arg-type]
        assert found.iteration_time == pytest.approx((num_microbatches + num_stages - 1) * 3)
        assert found.bubble_fraction == pytest.approx((num_stages - 1) / (num_microbatches + num_stages - 1))
        held = [num_microbatches if name == "gpipe" else num_stages - stage for stage in range(num_stages)]
        assert found.peak_in_flight == tuple(held)
    # Of the bubble (P - 1)(F + B + W) only (P - 1)(F + B - W) is left, with no more microbatches in flight.
    split = simulate_pipeline(
        one, two, num_microbatches=num_microbatches, schedule="zero_bubble", weight_seconds=[1.0] * num_stages
    )
    assert split.iteration_time == pytest.approx(3 * num_microbatches + num_stages - 1)
    assert max(split.peak_in_flight) == num_stages
    # Chunks divide the bubble.
    for chunks in (2, 3):
        found = simulate_pipeline(
            one * chunks,
            two * chunks,
            num_microbatches=num_microbatches,
            schedule="interleaved_1f1b",
            num_chunks=chunks,
        )
        assert found.iteration_time == pytest.approx(3 * (num_microbatches * chunks + num_stages - 1))


def test_the_order_of_a_small_pipeline() -> None:
    """Actions of three stages and four microbatches, written out."""

    def text(schedule: PipelineSchedule, stages: int, microbatches: int, chunks: int = 1) -> list[str]:
        letters = {"forward": "F", "backward": "B", "backward_input": "I", "backward_weight": "W"}
        found = action_lists(schedule, stages, microbatches, chunks)
        suffix = ["", "'", '"']
        return [" ".join(f"{letters[a.kind]}{a.microbatch}{suffix[a.chunk]}" for a in order) for order in found]

    assert text("1f1b", 3, 4) == ["F0 F1 F2 B0 F3 B1 B2 B3", "F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3"]
    assert text("gpipe", 2, 2) == ["F0 F1 B0 B1"] * 2
    assert text("zero_bubble", 2, 4) == [
        "F0 F1 I0 W0 F2 I1 W1 F3 I2 W2 I3 W3",
        "F0 I0 F1 I1 W0 F2 I2 W1 F3 I3 W2 W3",
    ]
    assert text("zero_bubble", 2, 2, 2) == ["F0 F1 F0' F1' I0' W0' I1' W1' I0 W0 I1 W1"] + [
        "F0 F1 F0' I0' F1' I1' W0' I0 W1' I1 W0 W1"
    ]
    assert text("interleaved_1f1b", 2, 4, 2) == [
        "F0 F1 F0' F1' F2 B0' F3 B1' F2' B0 F3' B1 B2' B3' B2 B3",
        "F0 F1 F0' B0' F1' B1' F2 B0 F3 B1 F2' B2' F3' B3' B2 B3",
    ]


@pytest.mark.parametrize(("schedule", "chunks"), SCHEDULES)
def test_every_action_is_there_once_and_in_order(schedule: PipelineSchedule, chunks: int) -> None:
    """A stage runs each microbatch of each chunk forward and then backward, for many shapes."""
    for num_stages in (1, 2, 3, 5):
        for num_microbatches in (num_stages, 2 * num_stages, 4 * num_stages):
            for order in action_lists(schedule, num_stages, num_microbatches, chunks):
                kinds = ["forward"] + (
                    ["backward_input", "backward_weight"] if schedule == "zero_bubble" else ["backward"]
                )
                expected = {Action(k, m, c) for k in kinds for m in range(num_microbatches) for c in range(chunks)}  # type: ignore[arg-type]
                assert len(order) == len(expected) and set(order) == expected
                for action in expected:
                    later = kinds[kinds.index(action.kind) + 1 :]
                    assert all(order.index(action) < order.index(action._replace(kind=kind)) for kind in later)  # type: ignore[arg-type]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("schedule", "chunks"), SCHEDULES)
def test_random_times_equal_a_recursion(schedule: PipelineSchedule, chunks: int, overlap: bool) -> None:
    """Every action ends when a direct recursion over the rules says so."""
    rng = random.Random(f"{schedule} {chunks} {overlap}")
    for _ in range(12):
        stages = rng.choice((1, 2, 3, 4))
        virtual, microbatches = stages * chunks, stages * rng.choice((1, 2, 3))
        forward, backward, gather, reduce = ([rng.uniform(1, 4) for _ in range(virtual)] for _ in range(4))
        weight = [seconds * rng.random() for seconds in backward]
        sync = [rng.uniform(0, 3) for _ in range(stages)]
        # Shorter than any action, so that no transfer waits for another one on its way.
        p2p = [rng.uniform(0, 0.2) for _ in range(virtual - 1)]
        orders = action_lists(schedule, stages, microbatches, chunks)

        @cache
        def end(stage: int, index: int) -> float:
            if index < 0:
                return 0.0
            kind, microbatch, chunk = action = orders[stage][index]  # noqa: B023
            place = chunk * stages + stage  # noqa: B023
            same = [a for a in orders[stage] if (a.kind, a.chunk) == (kind, chunk)]  # noqa: B023
            seconds = {
                "forward": forward[place] + gather[place] * (action == same[0]),  # noqa: B023
                "backward": backward[place] + reduce[place] * (action == same[-1]),  # noqa: B023
                "backward_input": backward[place] - weight[place],  # noqa: B023
                "backward_weight": weight[place] + reduce[place] * (action == same[-1]),  # noqa: B023
            }[kind]
            start = end(stage, index - 1)
            other = place - 1 if kind == "forward" else place + 1
            if 0 <= other < virtual and kind != "backward_weight":  # noqa: B023
                wanted = Action(kind, microbatch, other // stages)  # noqa: B023
                arrival = end(other % stages, orders[other % stages].index(wanted))  # noqa: B023
                lag = p2p[min(place, other)]  # noqa: B023
                start = max(start, arrival + lag) if overlap else max(start, arrival) + lag
            return start + seconds

        found = simulate_pipeline(
            forward,
            backward,
            num_microbatches=microbatches,
            schedule=schedule,
            p2p_seconds=p2p,
            gather_seconds=gather,
            reduce_seconds=reduce,
            sync_seconds=sync,
            weight_seconds=weight,
            num_chunks=chunks,
            overlap_p2p=overlap,
        )
        for stage, order in enumerate(orders):
            for index, done in enumerate(found.actions[stage][:-1]):
                assert done.action == order[index]
                assert done.end == pytest.approx(end(stage, index))
            assert found.finish_times[stage] == pytest.approx(end(stage, len(order) - 1) + sync[stage])
        assert found.iteration_time == max(found.finish_times)


def test_transfers_share_a_link() -> None:
    """Transfers that are slower than the stages queue up; waiting for them costs the receiver its time."""
    times = {"num_microbatches": 4, "schedule": "gpipe", "p2p_seconds": [5.0]}
    beside = simulate_pipeline([1.0, 1.0], [0.0, 0.0], overlap_p2p=True, **times)  # type: ignore[arg-type]
    # The first forward, four transfers one after another, the last forward, and the same number on the way back.
    assert beside.iteration_time == pytest.approx(1 + 4 * 5 + 1 + 4 * 5)
    waiting = simulate_pipeline([1.0, 1.0], [0.0, 0.0], **times)  # type: ignore[arg-type]
    assert waiting.iteration_time == pytest.approx(1 + 4 * (5 + 1) + 4 * 5)
    assert waiting.busy_seconds == pytest.approx((4 * (1 + 5), 4 * (1 + 5)))
    assert beside.busy_seconds == pytest.approx((4, 4))


def longest_path(f: list[float], b: list[float], m: int, gather: list[float], reduce: list[float]) -> float:
    """1F1B in closed form: the longest path through its graph of actions.

    A path runs down the stages with the first microbatch and, ``w`` forwards on, turns at stage ``t``; alternates at
    stage ``s``; and turns at ``u`` to run up with the last microbatch. ``w`` forwards are one stage's warm-up.
    """
    size = len(f)
    warmup = [min(size - 1 - stage, m - 1) for stage in range(size)]

    def turn(direction: list[float], once: list[float], last: int) -> float:
        """Down to stage ``last``, with the warm-up steps at the best stage on the way."""
        via = [sum(once[: stage + 1]) + warmup[last] * max(direction[stage : last + 1]) for stage in range(last + 1)]
        return sum(direction[: last + 1]) + (max(via) if warmup[last] else via[-1])

    best = 0.0
    for s in range(size):
        fill = max(turn(f, gather, t) + sum(b[s + 1 : t + 1]) for t in range(s, size))
        drain = max(turn(b, reduce, u) + sum(f[s + 1 : u + 1]) for u in range(s, size))
        best = max(best, fill + (m - 1 - warmup[s]) * (f[s] + b[s]) + drain)
    return best


def test_one_forward_one_backward_equals_its_longest_path() -> None:
    """On random stages the simulation is the closed form, which the textbook formula bounds from above."""
    rng = random.Random(0)
    for _ in range(200):
        size = rng.choice((1, 2, 3, 4, 8))
        m = size + rng.choice((0, 1, 2, size, 3 * size))
        f, b, gather, reduce = ([rng.uniform(0.1, 2) for _ in range(size)] for _ in range(4))
        found = simulate_pipeline(f, b, num_microbatches=m, gather_seconds=gather, reduce_seconds=reduce)
        assert found.iteration_time == pytest.approx(longest_path(f, b, m, gather, reduce), rel=1e-12)
        plain = simulate_pipeline(f, b, num_microbatches=m).iteration_time
        total = [x + y for x, y in zip(f, b, strict=True)]
        assert plain == pytest.approx(longest_path(f, b, m, [0.0] * size, [0.0] * size), rel=1e-12)
        assert m * max(total) <= plain * (1 + 1e-12)
        assert plain <= ((m - 1) * max(total) + sum(total)) * (1 + 1e-12)


def test_activations_of_times_alone() -> None:
    """What a stage holds follows the microbatches in flight."""
    found = simulate_pipeline([1.0] * 4, [2.0] * 4, num_microbatches=8, activation_bytes=[10, 20, 30, 40])
    assert found.peak_activation_bytes == (40, 60, 60, 40)
    last = found.activation_bytes(3)
    assert last[0] == (0.0, 0.0) and [size for _, size in last[1:]] == [40, 0] * 8
    assert [time for time, _ in last[1:3]] == [3.0, 6.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "2f2b"}, "schedule='2f2b'"),
        ({"num_microbatches": 0}, "num_microbatches=0"),
        ({"backward_seconds": [1.0]}, "backward_seconds has 1 entries: expected 2"),
        ({"forward_seconds": [1.0, -1.0]}, r"forward_seconds\[1\]=-1"),
        ({"forward_seconds": [1.0, float("nan")]}, r"forward_seconds\[1\]=nan"),
        ({"forward_seconds": []}, "forward_seconds has 0 entries"),
        ({"p2p_seconds": [1.0, 1.0]}, "p2p_seconds has 2 entries: expected 1"),
        ({"weight_seconds": [1.0, 3.0]}, r"weight_seconds\[1\]=3.0"),
        ({"num_chunks": 3}, "num_chunks=3"),
        ({"num_chunks": 2}, "num_chunks=2: expected 1"),
        ({"schedule": "interleaved_1f1b"}, "num_microbatches=3: expected a multiple of 2"),
    ],
)
def test_times_that_do_not_fit_are_named(changes: dict[str, object], message: str) -> None:
    """Errors name the argument and its value."""
    arguments: dict[str, object] = {
        "forward_seconds": [1.0, 1.0],
        "backward_seconds": [2.0, 2.0],
        "num_microbatches": 3,
    }
    with pytest.raises(ValueError, match=message):
        simulate_pipeline(**{**arguments, **changes})  # type: ignore[arg-type]


# ---- plans ----------------------------------------------------------------------------------------------------------


def check_prices(plan: HybridPlan, profile: ModelProfile, devices: ClusterSpec, constants: HetuConstants) -> Simulation:
    """Every stage is busy for exactly what the cost model charges, and events fit into the step."""
    found = simulate(plan, profile, devices, constants=constants)
    model = HetuCostModel(profile, devices, constants)
    for stage in range(plan.pipeline_parallel_size):
        report = stage_report(model, plan, stage)
        price = plan.num_microbatches * report.seconds + report.sync
        assert found.busy_seconds[stage] == pytest.approx(price, rel=1e-9)
    coarse = simulate(plan, profile, devices, constants=constants, detail="stage")
    assert coarse.finish_times == pytest.approx(found.finish_times, rel=1e-12)
    assert coarse.peak_activation_bytes == pytest.approx(found.peak_activation_bytes, rel=1e-12)
    assert coarse.peak_in_flight == found.peak_in_flight
    check_events(found)
    check_events(coarse)
    return found


def check_events(found: Simulation) -> None:
    """No stream of a stage does two things at once, or anything outside of the step."""
    streams: dict[tuple[int, str], list[Event]] = {}
    for event in found.events:
        assert 0 <= event.start < event.end <= found.iteration_time * (1 + 1e-12)
        streams.setdefault((event.stage, event.stream), []).append(event)
    for events in streams.values():
        for before, after in zip(events[:-1], events[1:], strict=True):
            assert before.end <= after.start + 1e-9 * found.iteration_time


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("slowdown", [None, 1.0, 1.3])
@pytest.mark.parametrize("overlap_gathers", [True, False])
def test_busy_seconds_are_the_prices_of_the_cost_model(
    schedule: str, slowdown: float | None, overlap_gathers: bool
) -> None:
    """For all kinds of rows and all ways to overlap."""
    plan, profile = mixed_plan(schedule=schedule)
    constants = HetuConstants(overlap_gathers=overlap_gathers, optimizer_seconds_per_byte=1e-11)
    devices = cluster(overlap_slowdown=slowdown, layer_overhead=1e-4)
    check_prices(plan, profile, devices, constants)
    late = replace(constants, reduce_every_microbatch=False)
    check_prices(plan, profile, devices, late)


def test_a_single_stage_is_the_closed_form() -> None:
    """Nobody waits, so the step is exactly what the cost model predicts, and nothing is idle."""
    rng = random.Random(1)
    for _ in range(6):
        profile, devices = random_model(rng, 4), random_cluster(rng, 4)
        microbatches = rng.choice((1, 2, 4))
        plan = HybridPlan.uniform(
            "dp4-" + rng.choice(("ddp", "zero2", "zero3")),
            num_layers=4,
            global_batch_size=16,
            num_microbatches=microbatches,
        )
        found = check_prices(plan, profile, devices, HetuConstants())
        assert found.iteration_time == pytest.approx(evaluate(plan, profile, devices).iteration_time, rel=1e-9)
        assert found.predicted_time == evaluate(plan, profile, devices).iteration_time
        assert found.bubble_fraction == pytest.approx(0.0, abs=1e-9)
        assert not found.transfers


def random_plan(rng: random.Random, schedule: Schedule) -> tuple[HybridPlan, ModelProfile, ClusterSpec]:
    """Any cut, any strategy in every row, and so stages of very different ratios of forward to backward."""
    stages = rng.choice((2, 4, 8))
    size = rng.choice((1, 2, 4))
    layers = rng.randint(stages, 12)
    profile, devices = random_model(rng, layers), random_cluster(rng, stages * size)
    ends = sorted(rng.sample(range(1, layers), stages - 1))
    microbatches = rng.choice([count for count in (2, 4, 8, 16) if schedule == "gpipe" or count >= stages])

    def strategy(layer: LayerProfile, recompute: tuple[bool, ...]) -> LayerStrategy:
        options = layer_strategies(size, tp_degrees=layer.tp_degrees, recompute=recompute)
        return rng.choice([option for option in options if 4 % option.dp == 0])

    plan = HybridPlan(
        world_size=stages * size,
        global_batch_size=4 * microbatches,
        num_microbatches=microbatches,
        stages=tuple(b - a for a, b in itertools.pairwise([0, *ends, layers])),
        layers=tuple(strategy(profile.block(i), (False, True)) for i in range(layers)),
        embedding=strategy(profile.embedding, (False,)),
        head=strategy(profile.head, (False,)),
        schedule=schedule,
    )
    return plan, profile, devices


def closed_form_error(
    plan: HybridPlan, profile: ModelProfile, devices: ClusterSpec, constants: HetuConstants | None = None
) -> float:
    """By how much the predicted time is longer than the simulated one, as a share of it."""
    found = simulate(plan, profile, devices, constants=constants, detail="stage")
    assert found.predicted_time == evaluate(plan, profile, devices, constants=constants).iteration_time
    return found.predicted_time / found.iteration_time - 1


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("first", range(0, 80, 20))
def test_the_prediction_is_the_simulated_time(schedule: Schedule, first: int) -> None:
    """Of random plans, but for rounding; where the optimizer takes time, within 3 percent."""
    for seed in range(first, first + 20):
        rng = random.Random(f"{schedule} {seed}")
        plan, profile, devices = random_plan(rng, schedule)
        devices = replace(devices, layer_overhead=rng.choice((0.0, 1e-4)))
        constants = HetuConstants(reduce_every_microbatch=rng.random() < 0.7, overlap_gathers=rng.random() < 0.7)
        assert abs(closed_form_error(plan, profile, devices, constants)) < 1e-9
        constants = replace(constants, optimizer_seconds_per_byte=2e-11)
        assert -1e-9 < closed_form_error(plan, profile, devices, constants) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("first", range(0, 500, 50))
def test_the_prediction_of_plans_that_are_found_is_the_simulated_time(schedule: Schedule, first: int) -> None:
    """A search picks what the closed form makes look fast, so its errors would gather here."""
    for seed in range(first, first + 50):
        rng = random.Random(seed)
        stages = rng.choice((2, 4, 8))
        profile, devices = (
            random_model(rng, rng.randint(stages, 12)),
            random_cluster(rng, max(stages, rng.choice((4, 8)))),
        )
        options = {
            "global_batch_size": 16,
            "alternatives": False,
            "pipeline_parallel_size": stages,
            "schedule": schedule,
        }
        budget: int | str = "1TiB"
        if rng.random() < 0.5:
            with pytest.raises(NoFeasiblePlanError) as error:
                search(profile, devices, memory_budget=1, **options)
            budget = int(error.value.smallest_feasible_budget * rng.choice((1, 1.1, 1.5)))
        plan = search(profile, devices, memory_budget=budget, **options)
        assert abs(closed_form_error(plan, profile, devices)) < 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_plans_that_the_search_finds(seed: int) -> None:
    """A pipelined plan takes the longest path of its stages' prices, and at least its slowest stage."""
    rng = random.Random(seed)
    profile, devices = random_model(rng, 8), random_cluster(rng, 4)
    for stages in (2, 4):
        plan = search(
            profile,
            devices,
            memory_budget="1TiB",
            global_batch_size=16,
            alternatives=False,
            pipeline_parallel_size=stages,
            schedule="1f1b",
        )
        found = check_prices(plan, profile, devices, HetuConstants())
        assert found.predicted_time == evaluate(plan, profile, devices).iteration_time
        f, b, gather, reduce = stage_times(found)
        assert found.iteration_time == pytest.approx(longest_path(f, b, plan.num_microbatches, gather, reduce))
        assert found.iteration_time == pytest.approx(found.predicted_time, rel=1e-9)


def stage_times(found: Simulation) -> tuple[list[float], list[float], list[float], list[float]]:
    """Forward, backward, first forward's and last backward's extra seconds of each stage, transfers included."""
    columns = []
    for actions in found.actions:
        forwards = [done.end - done.start for done in actions if done.action and done.action.kind == "forward"]
        backwards = [done.end - done.start for done in actions if done.action and done.action.kind == "backward"]
        columns.append((forwards[-1], backwards[0], forwards[0] - forwards[-1], backwards[-1] - backwards[0]))
    f, b, gather, reduce = (list(column) for column in zip(*columns, strict=True))
    return f, b, gather, reduce


def test_once_per_step_work_delays_the_stages_around_it() -> None:
    """Gathers of ``zero2`` delay the first microbatch on its way down, reductions of ``ddp`` the last on its way up."""
    profile = ModelProfile((BLOCK,), (0,) * 4, ENDS, ENDS)
    devices = cluster(overlap_slowdown=None)
    for text in ("dp2-zero2", "dp2-ddp"):
        plan = HybridPlan.uniform(text, num_layers=4, global_batch_size=64, num_microbatches=8, stages=4)
        found = simulate(plan, profile, devices)
        # Only reductions that are paid once per step count; those of ``zero2`` are in every microbatch.
        syncs = [stage_report(HetuCostModel(profile, devices), plan, stage).sync for stage in range(4)]
        f, b, gather, reduce = stage_times(found)
        assert [x + y for x, y in zip(gather, reduce, strict=True)] == pytest.approx(syncs)
        assert min(syncs) > 0 and (max(gather) < 1e-12 or max(reduce) < 1e-12)
        none = [0.0] * 4
        assert found.iteration_time == pytest.approx(longest_path(f, b, 8, none, none) + sum(syncs))


def test_events_of_a_mixed_plan() -> None:
    """What happens once happens once, transfers are seen on both sides, and backward follows forward."""
    plan, profile = mixed_plan()
    found = simulate(plan, profile, cluster(overlap_slowdown=1.2))
    events = found.events

    def microbatches(row: int, what: str, kind: str) -> list[int | None]:
        named = [e for e in events if e.row == row and e.kind == kind and what in e.name]
        return [event.microbatch for event in named]

    every = [0, 1, 2, 3]
    # Rows: embedding zero2, block 0 zero3 recompute, block 1 tp zero2, block 2 ddp, block 3 tp zero3, head zero2.
    assert microbatches(0, "gather", "forward") == [0] and microbatches(0, "gather", "backward") == []
    assert microbatches(1, "gather", "forward") == every == microbatches(1, "gather", "backward")
    assert microbatches(2, "gather", "forward") == [0] and microbatches(3, "gather", "forward") == []
    assert microbatches(1, "reduce", "backward") == every and microbatches(3, "reduce", "backward") == [3]
    assert microbatches(1, "recompute", "backward") == every and microbatches(2, "recompute", "backward") == []
    assert microbatches(2, "all-reduce", "forward") == every == microbatches(2, "all-reduce", "backward")
    reduces = [e for e in events if e.row == 2 and "all-reduce" in e.name and e.microbatch == 0]
    assert reduces[0].end - reduces[0].start == pytest.approx(reduces[1].end - reduces[1].start)  # Two in each.
    # dp4 to dp2 gathers in forward, dp2 to dp4 in backward; that between the stages belongs to the transfer.
    assert microbatches(2, "relayout", "forward") == every and microbatches(2, "relayout", "backward") == []
    assert microbatches(5, "relayout", "backward") == every and microbatches(5, "relayout", "forward") == []
    sent = [(e.start, e.end, e.kind, e.microbatch) for e in events if e.stream == "send"]
    received = [(e.start, e.end, e.kind, e.microbatch) for e in events if e.stream == "receive"]
    assert sorted(sent) == sorted(received) and len(sent) == 2 * 4
    for microbatch in every:
        for row in range(6):
            spans = [
                [e for e in events if e.row == row and e.microbatch == microbatch and e.kind == kind]
                for kind in ("forward", "backward")
            ]
            assert max(e.end for e in spans[0]) <= min(e.start for e in spans[1])
    assert found == simulate(plan, profile, cluster(overlap_slowdown=1.2))


def test_overlapped_communication_slows_both_sides_down() -> None:
    """The shorter side is stretched by the slowdown, the longer one ends when the price says so."""
    profile = ModelProfile((BLOCK,), (0, 0), ENDS, ENDS)
    plan = HybridPlan.uniform("dp2-zero3", num_layers=2, global_batch_size=4)
    alone = simulate(plan, profile, cluster(2, overlap_slowdown=None)).events
    beside = simulate(plan, profile, cluster(2, overlap_slowdown=1.3)).events

    def span(events: tuple[Event, ...], name: str) -> float:
        (event,) = (e for e in events if e.row == 1 and e.name == f"block 0 {name}" and e.kind == "forward")
        return event.end - event.start

    gather, forward = span(alone, "gather"), span(alone, "forward")
    short, long = sorted((gather, forward))
    total = short * 1.3 + long - short
    assert sorted((span(beside, "gather"), span(beside, "forward"))) == pytest.approx([short * 1.3, total])


def test_transfers_of_a_stage_of_one_block_are_told_apart() -> None:
    """Activations have the size of the stage's input, gradients that of its output, gathered where they arrive."""
    thin, thick = replace(BLOCK, name="thin"), replace(BLOCK, name="thick", boundary_bytes=5 * MIB)
    profile = ModelProfile((thin, thick), (0, 0, 1, 0), ENDS, ENDS)
    devices = cluster()
    plan = HybridPlan.uniform("dp2", num_layers=4, global_batch_size=16, num_microbatches=4, stages=4)
    found = simulate(
        replace(plan, layers=(plan.layers[0], replace(plan.layers[0], dp=1, tp=2), *plan.layers[2:])), profile, devices
    )
    spans = {(t.sender, t.receiver): t.end - t.start for t in found.transfers}
    small, large = (devices.seconds("p2p", 2, 2 * size * MIB) for size in (1, 5))
    assert spans[2, 3] == pytest.approx(small) and spans[3, 2] == pytest.approx(small)
    assert spans[1, 2] == pytest.approx(large)
    # Stage 1 has one batch shard: it gathers both what it computes with and the gradients that it gets back.
    assert spans[0, 1] == pytest.approx(small + devices.seconds("all_gather", 2, 4 * MIB))
    assert spans[2, 1] == pytest.approx(large + devices.seconds("all_gather", 2, 20 * MIB))


def test_activations_of_a_plan() -> None:
    """The peak is what the cost model holds after forward: all microbatches in flight, inputs of recomputed rows."""
    block = replace(BLOCK, parameter_bytes=MIB, tp_parameter_bytes=MIB)
    profile = ModelProfile((block,), (0,) * 4, ENDS, ENDS)
    model = HetuCostModel(profile, cluster())
    which = CATEGORIES.index("activations")
    for text in ("dp2-zero3", "dp2-zero3-recompute"):
        plan = HybridPlan.uniform(text, num_layers=4, global_batch_size=64, num_microbatches=8, stages=4)
        for schedule in ("1f1b", "gpipe"):
            chosen = replace(plan, schedule=schedule)  # type: ignore[arg-type]
            found = simulate(chosen, profile, cluster())
            for stage in range(4):
                held = sum(cost.memory.held[which] for cost in stage_report(model, chosen, stage).costs)
                held += model.stage_base(stage, Setting.of(chosen))[which]
                assert found.peak_activation_bytes[stage] == pytest.approx(held)
                timeline = found.activation_bytes(stage)
                times, sizes = zip(*timeline, strict=True)
                assert list(times) == sorted(times) and sizes[0] == 0
                assert sizes[-1] == pytest.approx(0) and min(sizes) > -1e-6


def test_unknown_parts_of_a_price_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that this module has no place for is spread over both directions, or put at the end of the step."""
    original = HetuCostModel.row_cost

    def row_cost(self: HetuCostModel, *args: object) -> object:
        cost = original(self, *args)  # type: ignore[arg-type]
        parts = {**cost.parts, "novel": 1e-3, "novel_per_step": 2e-3}
        return replace(cost, seconds=cost.seconds + 1e-3, sync=cost.sync + 2e-3, parts=parts)

    monkeypatch.setattr(HetuCostModel, "row_cost", row_cost)
    plan, profile = mixed_plan()
    found = check_prices(plan, profile, cluster(), HetuConstants())
    names = {event.name for event in found.events}
    assert {"head other", "head novel"} <= names


def test_the_chrome_trace_names_everything(tmp_path: Path) -> None:
    """A process per stage, a thread per stream, complete events in microseconds, counters of activations."""
    plan, profile = mixed_plan()
    found = simulate(plan, profile, cluster())
    trace = json.loads(found.save_chrome_trace(tmp_path / "deep" / "trace.json").read_text(encoding="utf-8"))
    entries = trace["traceEvents"]
    names = {(e["pid"], e["args"]["name"]) for e in entries if e["ph"] == "M" and e["name"] == "process_name"}
    assert names == {(0, "stage 0"), (1, "stage 1")}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in entries if e["name"] == "thread_name"}
    complete = [e for e in entries if e["ph"] == "X"]
    assert len(complete) == len(found.events)
    for entry, event in zip(complete, found.events, strict=True):
        assert threads[entry["pid"], entry["tid"]] == event.stream.replace("_", " ")
        assert entry["name"] == event.name and entry["pid"] == event.stage
        assert entry["ts"] == pytest.approx(event.start * 1e6)
        assert entry["dur"] == pytest.approx((event.end - event.start) * 1e6)
        assert entry["args"].get("microbatch") == event.microbatch
    counters = [e["args"]["bytes"] for e in entries if e["ph"] == "C" and e["pid"] == 1]
    assert max(counters) == pytest.approx(found.peak_activation_bytes[1])


def test_the_summary_is_a_table() -> None:
    """One line per stage, at most 110 columns, with the prediction of the cost model for comparison."""
    plan, profile = mixed_plan()
    lines = simulate(plan, profile, cluster()).summary().splitlines()
    assert lines[0].startswith("simulated step ") and "4 microbatches" in lines[0]
    assert lines[1].startswith("predicted by the cost model ")
    assert [line.split(" | ")[0].strip() for line in lines[3:]] == ["stage", "------+" + lines[4][7:], "0", "1"]
    assert max(map(len, lines)) <= 110
    wide = simulate_pipeline([123.4567] * 64, [1234.567] * 64, num_microbatches=64, activation_bytes=[1e13] * 64)
    assert max(map(len, wide.summary().splitlines())) <= 110


def test_a_pipeline_of_64_stages() -> None:
    """1,024 devices, 256 microbatches and 96 blocks: all actions are there, in the memory of the schedule."""
    profile = ModelProfile((BLOCK,), (0,) * 96, ENDS, ENDS)
    plan = HybridPlan.uniform("dp16-zero3", num_layers=96, global_batch_size=4096, num_microbatches=256, stages=64)
    found = simulate(plan, profile, cluster(1024), detail="stage")
    assert sum(len(stage) for stage in found.actions) == 64 * (2 * 256 + 1)
    assert found.peak_in_flight == tuple(range(64, 0, -1))
    breakdown = time_breakdown(plan, profile, cluster(1024), stage=63)
    price = sum(seconds for name, seconds in breakdown.items() if not name.endswith("_per_step"))
    assert found.busy_seconds[63] == pytest.approx(256 * price)


def test_plans_of_another_model_are_refused() -> None:
    """The errors are those of the cost model."""
    plan, profile = mixed_plan()
    with pytest.raises(ValueError, match="plan has 4 blocks, but the profile has 3"):
        simulate(plan, replace(profile, layers=(0, 0, 0)), cluster())
    with pytest.raises(ValueError, match="plan.world_size=8, but the cluster has 4"):
        simulate(plan, profile, cluster(4))
    with pytest.raises(ValueError, match="detail='cell'"):
        simulate(plan, profile, cluster(), detail="cell")  # type: ignore[arg-type]
