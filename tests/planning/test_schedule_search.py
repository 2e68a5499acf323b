"""Interleaved 1F1B and zero bubble: their order is torch's, their prices are the simulation's, the search gains."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
    cluster_preset,
    evaluate,
    memory_breakdown,
    save_picture,
    search,
    simulate,
    simulate_pipeline,
    time_breakdown,
)
from lightning_hetu.planning.breakdown import breakdown
from lightning_hetu.planning.cost_model import CATEGORIES, Setting, optimizer_phase, stage_report
from lightning_hetu.planning.plan import Schedule
from lightning_hetu.planning.schedule_cost import WAITING_SHARE, ScheduleCostModel, for_schedule, runs_whole
from lightning_hetu.planning.schedule_search import WORTHWHILE_GAIN
from lightning_hetu.planning.schedules import Action, action_lists, holdings, most_in_flight

sys.path.insert(0, str(Path(__file__).parent))
from helpers import MIB, random_cluster, random_model  # noqa: E402

SHAPES = [(ranks, ranks * groups, chunks) for ranks in (2, 3, 4, 8) for groups in (1, 2, 5) for chunks in (1, 2, 3)]
PLAYED: tuple[tuple[Schedule, int], ...] = (("interleaved_1f1b", 2), ("interleaved_1f1b", 4), ("zero_bubble", 1))
LIGHT = LayerProfile(
    "block",
    parameter_bytes=4096,
    forward_time=((1, 1e-3),),
    activation_bytes={1: 8 * MIB},
    boundary_bytes=MIB / 4,
)
NOTHING = LayerProfile("ends", parameter_bytes=4096)


def light_model(num_layers: int = 16, **changes: Any) -> ModelProfile:
    """Blocks of equal time with hardly any parameters, between ends that cost nothing."""
    return ModelProfile((replace(LIGHT, **changes),), (0,) * num_layers, NOTHING, NOTHING)


def cluster(num_devices: int = 8, bandwidth: float = 1e3, **kwargs: Any) -> ClusterSpec:
    return ClusterSpec.from_bandwidth(num_devices, gigabytes_per_second=bandwidth, latency=0, **kwargs)


def played_plan(schedule: Schedule, virtual: int, ranks: int = 4, strategy: str = "dp2", **kwargs: Any) -> HybridPlan:
    options = {"num_layers": 16, "global_batch_size": 64, "num_microbatches": 8, **kwargs}
    return HybridPlan.uniform(strategy, stages=ranks * virtual, schedule=schedule, virtual_stages=virtual, **options)


def random_plan(rng: random.Random) -> tuple[HybridPlan, ModelProfile, ClusterSpec]:
    """A plan of a played schedule with layers of any kind."""
    schedule: Schedule = rng.choice(("interleaved_1f1b", "zero_bubble"))
    ranks = rng.choice((2, 4))
    virtual = rng.choice((2, 3) if schedule == "interleaved_1f1b" else (1, 2, 3))
    kinds = ("ddp", "zero2", "zero3") if schedule == "interleaved_1f1b" else ("ddp", "zero2")
    names = [f"dp{8 // ranks}-{rng.choice(kinds)}{rng.choice(('', '', '-recompute'))}" for _ in range(12)]
    batch = {"num_layers": 12, "global_batch_size": 64, "num_microbatches": ranks * rng.choice((1, 2, 4))}
    plan = played_plan(schedule, virtual, ranks, f"dp{8 // ranks}", **batch)
    plan = replace(plan, layers=tuple(LayerStrategy.parse(name) for name in names))
    return plan, random_model(rng, 12), random_cluster(rng, 8)


# ---- order ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "zero_bubble"])
def test_action_lists_are_those_of_torch(schedule: Schedule) -> None:
    """For many shapes, every rank does what the schedule class of the executor lists, in that order."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    names = {"interleaved_1f1b": "ScheduleInterleaved1F1B", "zero_bubble": "ScheduleInterleavedZeroBubble"}
    kind = schedules._ComputationType
    kinds = {
        kind.FORWARD: "forward",
        kind.FULL_BACKWARD: "backward",
        kind.BACKWARD_INPUT: "backward_input",
        kind.BACKWARD_WEIGHT: "backward_weight",
    }
    for ranks, microbatches, chunks in SHAPES:
        if schedule == "interleaved_1f1b" and chunks == 1:
            continue  # Plans have at least two.
        rounds = max(1, microbatches // ranks)
        stand_in = SimpleNamespace(
            pp_group_size=ranks,
            n_local_stages=chunks,
            _n_microbatches=microbatches,
            number_of_rounds=rounds,
            microbatches_per_round=microbatches // rounds,
        )
        ours = action_lists(schedule, ranks, microbatches, chunks)
        for rank, order in enumerate(ours):
            listed = getattr(schedules, names[schedule])._calculate_single_rank_operations(stand_in, rank)
            theirs = [
                Action(kinds[a.computation_type], a.microbatch_index, a.stage_index // ranks)  # type: ignore[arg-type]
                for a in listed
                if a is not None
            ]
            assert list(order) == theirs


def test_what_ranks_hold_repeats_itself() -> None:
    """The fullest moments of a long step are those of four groups of microbatches."""
    for schedule, ranks, chunks in (("interleaved_1f1b", 4, 2), ("interleaved_1f1b", 3, 4), ("zero_bubble", 4, 2)):
        short, long = (action_lists(schedule, ranks, ranks * groups, chunks) for groups in (4, 9))  # type: ignore[arg-type]
        for rank in range(ranks):
            for whole in (False, True):
                flags = (whole,) * chunks
                assert set(holdings(short[rank], flags)) == set(holdings(long[rank], flags))
    assert most_in_flight("interleaved_1f1b", 4, 8, 2) == (8, 8, 7, 5, 4, 4, 3, 1)
    moments = holdings(action_lists("interleaved_1f1b", 4, 8, 2)[0], (False, False))
    assert max(sum(moment.held) for moment in moments) == 11  # Less than 8 + 4.
    assert most_in_flight("zero_bubble", 4, 8, 1) == (4, 4, 4, 4)


# ---- prices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "virtual"), PLAYED)
def test_uniform_plans_take_what_the_papers_say(schedule: Schedule, virtual: int) -> None:
    """Equal stages have the published bubble, apart from the first rank of zero bubble, which does not split."""
    profile, devices = light_model(boundary_bytes=0.0), cluster()
    plan = played_plan(schedule, virtual)
    time = evaluate(plan, profile, devices).iteration_time
    forward = 4 * 4e-3 / virtual  # four samples of each of a rank's blocks, in one of its stages
    stages = [forward] * len(plan.stages), [2 * forward] * len(plan.stages)
    weights = [0.0, *[forward] * (len(plan.stages) - 1)]
    found = simulate_pipeline(
        *stages, num_microbatches=8, schedule=schedule, num_chunks=virtual, weight_seconds=weights
    )
    assert time == pytest.approx(found.iteration_time, rel=1e-6)
    if schedule == "interleaved_1f1b":
        assert time == pytest.approx(3 * forward * (8 * virtual + 3), rel=1e-6)
    else:
        plain = evaluate(replace(plan, schedule="1f1b"), profile, devices).iteration_time
        assert 3 * forward * 8 + 3 * forward <= time < plain


@pytest.mark.parametrize("seed", range(6))
def test_predictions_are_simulations(seed: int) -> None:
    """The predicted step is the simulated one, by rows and by stages, whatever the layers and the optimizer cost."""
    plan, profile, devices = random_plan(random.Random(seed))
    for constants in (HetuConstants(), HetuConstants(optimizer_seconds_per_byte=1e-10)):
        predicted = evaluate(plan, profile, devices, constants=constants)
        for detail in ("row", "stage"):
            found = simulate(plan, profile, devices, constants=constants, detail=detail)  # type: ignore[arg-type]
            assert found.iteration_time == pytest.approx(predicted.iteration_time, rel=1e-12)
            assert found.predicted_time == predicted.iteration_time
    assert len(predicted.stage_times) == len(predicted.stage_memory) == len(plan.stages)
    ranks = plan.pipeline_parallel_size
    for stage in range(len(plan.stages)):
        assert predicted.stage_memory[stage] == predicted.stage_memory[stage % ranks]
        memory = memory_breakdown(plan, profile, devices, stage, constants=constants)
        assert sum(memory.values()) == predicted.stage_memory[stage]
        seconds = time_breakdown(plan, profile, devices, stage, constants=constants)
        every = sum(value for name, value in seconds.items() if not name.endswith("_per_step"))
        assert every == pytest.approx(predicted.stage_times[stage])


@pytest.mark.parametrize("seed", range(6))
def test_peaks_hold_what_the_simulation_holds(seed: int) -> None:
    """On every rank, states and the simulated activations fit into the predicted peak."""
    plan, profile, devices = random_plan(random.Random(seed))
    predicted = evaluate(plan, profile, devices)
    found = simulate(plan, profile, devices)
    model = HetuCostModel(profile, devices)
    names = [CATEGORIES.index(name) for name in ("parameters", "optimizer")]
    for rank in range(plan.pipeline_parallel_size):
        states = 0
        for stage in plan.stages_of_rank(rank):
            states += int(optimizer_phase(stage_report(model, plan, stage).costs)[names].sum())
        assert states + found.peak_activation_bytes[rank] <= predicted.stage_memory[rank]


@pytest.mark.parametrize(("schedule", "virtual"), [("interleaved_1f1b", 2), ("interleaved_1f1b", 4)])
def test_activations_of_interleaved_stages(schedule: Schedule, virtual: int) -> None:
    """Where activations are all there is, the predicted ones are the most that are there at any time."""
    plan, profile = played_plan(schedule, virtual), light_model(boundary_bytes=0.0)
    found = simulate(plan, profile, cluster())
    for rank in range(4):
        activations = memory_breakdown(plan, profile, cluster(), rank)["activations"]
        assert activations == pytest.approx(found.peak_activation_bytes[rank], rel=1e-6)
    # The first rank holds 1 + (P - 1) / (P v) times what it does under 1F1B.
    plain = memory_breakdown(replace(plan, schedule="1f1b", virtual_stages=1, stages=(4,) * 4), profile, cluster())
    ratio = memory_breakdown(plan, profile, cluster())["activations"] / plain["activations"]
    assert ratio == pytest.approx(1 + 3 / (4 * virtual), rel=1e-3)
    # And everything that it sends: outputs of all its stages, gradients of all but the first one's inputs.
    sent = memory_breakdown(plan, light_model(), cluster())["activations"]
    sent -= memory_breakdown(plan, profile, cluster())["activations"]
    assert sent == pytest.approx((2 * virtual - 1) * 8 * 4 * MIB / 4, rel=1e-6)


def test_gradients_wait_for_the_second_part_of_backward() -> None:
    """Rank s keeps s microbatches between the parts, with their gradients, and one more during a second part.

    Stages that run backward whole keep none.
    """
    plan, profile = played_plan("zero_bubble", 1), light_model(boundary_bytes=0.0)
    kept = 4 * 4 * 8 * MIB  # four blocks, four samples
    for rank in range(4):
        activations = memory_breakdown(plan, profile, cluster(), rank)["activations"]
        assert activations == pytest.approx((4 + WAITING_SHARE * (rank + 1 if rank else 0)) * kept, rel=1e-3)
    recompute = replace(plan, layers=(*plan.layers[:-1], replace(plan.layers[-1], recompute=True)))
    model, setting = ScheduleCostModel(HetuCostModel(profile, cluster())), Setting.of(plan)
    for chosen, expected in ((plan, [True, False, False, False]), (recompute, [True, False, False, True])):
        rows = [row for _, row in chosen.rows()]
        assert [runs_whole(model, setting, rows, stage) for stage in range(4)] == expected
    # The last rank then lets go of a microbatch before the next one comes.
    last = memory_breakdown(recompute, profile, cluster(), 3)
    assert last["activations"] == pytest.approx(3 / 4 * kept, rel=1e-2)
    # A reduction that used to run beside the backward is paid in full.
    heavy = light_model(parameter_bytes=64 * MIB)
    devices = cluster(bandwidth=10, overlap_slowdown=1.1)
    zero2 = played_plan("zero_bubble", 1, strategy="dp2-zero2")
    split, whole = (
        time_breakdown(item, heavy, devices, 2)["gradient_reduce"] for item in (zero2, replace(zero2, schedule="1f1b"))
    )
    assert split == pytest.approx(4 * devices.seconds("reduce_scatter", 2, 64 * MIB)) and whole < split
    # All full gradients of a stage are there until its second part ends, not only those of a block or two.
    extra = memory_breakdown(zero2, heavy, devices, 2)["transient"]
    assert extra >= 4 * 64 * MIB > memory_breakdown(replace(zero2, schedule="1f1b"), heavy, devices, 2)["transient"] / 2


def test_the_way_back_to_the_first_rank_stays_on_its_node() -> None:
    """From the last rank to the first one of a single node, activations do not take the network."""
    plan, profile = played_plan("interleaved_1f1b", 2, ranks=8, strategy="dp1"), light_model()
    found = simulate(plan, profile, cluster_preset("8xA100-80GB"))
    seconds = {round((t.end - t.start) * 1e9) for t in found.transfers}
    assert len(seconds) == 1 and len(found.transfers) == 2 * 15 * 8


def test_shared_cores_leave_nothing_to_gain() -> None:
    """Where processes share cores, another schedule does not make their work less."""
    profile, devices = light_model(boundary_bytes=0.0), cluster(compute_slots=2.0)
    plain = evaluate(played_plan("1f1b", 1), profile, devices).iteration_time
    work = 8 * 64 / 8 * 16 * 3e-3 / 2  # eight microbatches of all blocks on two cores
    assert plain == pytest.approx(work, rel=1e-6)
    for schedule, virtual in PLAYED:
        assert evaluate(played_plan(schedule, virtual), profile, devices).iteration_time >= work * (1 - 1e-6)


def test_cost_models_without_such_prices_say_so() -> None:
    """The formulas of Galvatron know neither schedule."""
    with pytest.raises(ValueError, match="plan.schedule='zero_bubble': cost model 'galvatron3' has no prices for it"):
        for_schedule(SimpleNamespace(name="galvatron3"), "zero_bubble")  # type: ignore[arg-type]


# ---- search ---------------------------------------------------------------------------------------------------------


def check_against_1f1b(seed: int, num_layers: int, num_devices: int) -> Schedule:
    """Neither slower nor larger than promised; says which schedule was found."""
    rng = random.Random(seed)
    profile = random_model(rng, num_layers, split_vocab=rng.random() < 0.8)
    devices = random_cluster(rng, num_devices)
    options = {"global_batch_size": 16, "alternatives": False}
    if rng.random() < 0.7:
        options["pipeline_parallel_size"] = rng.choice([p for p in (2, 4, 8) if p <= min(num_layers, num_devices)])
    with pytest.raises(NoFeasiblePlanError) as error:
        search(profile, devices, memory_budget=1, schedule="1f1b", **options)
    budget = int(error.value.smallest_feasible_budget * rng.choice((1, 1.2, 2, 10)))
    plain = search(profile, devices, memory_budget=budget, schedule="1f1b", **options)
    plan = search(profile, devices, memory_budget=budget, schedule="any", **options)
    assert plan.prediction is not None and plain.prediction is not None
    assert max(plan.prediction.stage_memory) <= budget
    assert plan.prediction == evaluate(plan, profile, devices, memory_budget=budget)
    if plan.schedule == "1f1b":
        assert plan == plain
    else:
        assert plan.prediction.iteration_time < plain.prediction.iteration_time * (1 - WORTHWHILE_GAIN)
        assert plan.num_microbatches % plan.pipeline_parallel_size == 0
    return plan.schedule


@pytest.mark.parametrize("seed", range(8))
def test_never_slower_than_1f1b_and_within_the_budget(seed: int) -> None:
    """Another schedule is chosen only if it gains enough, with its exact price and in the same memory."""
    check_against_1f1b(seed, 8, 4)


@pytest.mark.slow
def test_many_random_models() -> None:
    """The same for many more models; each schedule wins somewhere."""
    found = {check_against_1f1b(seed, 12 if seed % 2 else 16, 8 if seed % 3 else 4) for seed in range(100, 160)}
    assert found == {"1f1b", "interleaved_1f1b", "zero_bubble"}


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "zero_bubble", "any"])
def test_deep_pipelines_lose_most_of_their_bubble(schedule: str) -> None:
    """Eight ranks and eight microbatches: 1F1B waits for 7/15 of the step, v stages per rank for 7 / (8 v + 7)."""
    profile, devices = light_model(32), cluster(bandwidth=50)
    options = {"memory_budget": "4GiB", "global_batch_size": 8, "pipeline_parallel_size": 8, "num_microbatches": 8}
    times = {}
    for name in ("1f1b", schedule):
        plan = search(profile, devices, schedule=name, **options)
        assert plan.prediction is not None
        times[name] = plan.prediction.iteration_time
    work = 8 * 4 * 3e-3  # of a rank
    assert times["1f1b"] == pytest.approx(work * (1 + 7 / 8), rel=0.02)
    found = simulate(plan, profile, devices)
    if plan.schedule == "interleaved_1f1b":
        assert plan.virtual_stages == 4 and plan.stages == (1,) * 32
        assert times[schedule] == pytest.approx(work * (1 + 7 / (4 * 8)), rel=0.02)
        assert found.bubble_fraction == pytest.approx(7 / (4 * 8 + 7), abs=0.02)
    assert times[schedule] < times["1f1b"] * 0.75
    if schedule == "any":
        assert plan.schedule != "1f1b"
        rejected = {item.description.split(":")[0]: item for item in plan.rejected}
        other = {"interleaved_1f1b", "zero_bubble"} - {plan.schedule}
        assert {"1f1b", *other} <= set(rejected)
        assert rejected["1f1b"].iteration_time == pytest.approx(times["1f1b"])
        # Not asked for, it is only told.
        plain = search(profile, devices, **options)
        assert plain.schedule == "1f1b"
        told = {item.description.split(":")[0]: item.reason for item in plain.rejected}
        assert told[plan.schedule].startswith("faster by") and "schedule='any'" in told[plan.schedule]


def test_pinned_schedules_are_obeyed() -> None:
    """A pinned schedule is found or refused with a budget that is enough; pins of other fields hold as well."""
    profile, devices = light_model(8), cluster(4)
    for schedule in ("interleaved_1f1b", "zero_bubble", "gpipe", "1f1b"):
        options: dict[str, Any] = {"schedule": schedule, "global_batch_size": 16}
        plan = search(profile, devices, memory_budget="1TiB", **options)
        assert plan.schedule == schedule
        with pytest.raises(NoFeasiblePlanError) as error:
            search(profile, devices, memory_budget=1, **options)
        budget = error.value.smallest_feasible_budget
        plan = search(profile, devices, memory_budget=budget, **options)
        assert plan.prediction is not None and max(plan.prediction.stage_memory) <= budget
        assert plan.schedule == schedule and budget > 1
    plan = search(profile, devices, memory_budget="1TiB", schedule="interleaved_1f1b", stages=2, tp=1, dp_type="zero3")
    assert plan.pipeline_parallel_size == 2 and plan.virtual_stages > 1 and plan.layers[0].dp_type == "zero3"
    given = search(
        profile, devices, memory_budget="1TiB", schedule="zero_bubble", global_batch_size=16, stages=[5, 3], tp=1
    )
    assert given.stages == (5, 3)


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"stages": [4, 4], "schedule": "interleaved_1f1b"}, "stages=.4, 4.: expected a number, that of ranks"),
        ({"schedule": "dualpipe"}, "schedule='dualpipe': expected one of 1f1b, gpipe, interleaved_1f1b, zero_bubble"),
        ({"schedule": "zero_bubble", "pipeline_parallel_size": 1}, "no plan divides it over 4 devices with .*zero_bub"),
        ({"schedule": "zero_bubble", "layers": "dp2-zero3", "pipeline_parallel_size": 2}, "no plan divides it"),
        ({"schedule": "interleaved_1f1b", "num_microbatches": 3, "stages": 2}, "no plan divides it"),
    ],
)
def test_impossible_schedules_are_one_line_errors(pins: dict[str, Any], message: str) -> None:
    """What no plan of a schedule can have is refused."""
    with pytest.raises(ValueError, match=message) as error:
        search(light_model(8), cluster(4), memory_budget="1TiB", global_batch_size=12, **pins)
    assert "\n" not in str(error.value)


def test_models_that_run_their_own_forward_get_no_such_schedule() -> None:
    """A profile says which schedules its model runs; files from before it did have all of them."""
    profile = replace(light_model(32), schedules=("1f1b", "gpipe"))
    options: dict[str, Any] = {"memory_budget": "4GiB", "global_batch_size": 8, "pipeline_parallel_size": 8}
    assert search(profile, cluster(), schedule="any", **options).schedule == "1f1b"
    with pytest.raises(ValueError, match="schedule='zero_bubble': .* expected 1f1b, gpipe"):
        search(profile, cluster(), schedule="zero_bubble", **options)
    assert ModelProfile.from_dict(profile.to_dict()) == profile
    older = {key: value for key, value in profile.to_dict().items() if key != "schedules"}
    assert ModelProfile.from_dict(older).schedules == ("1f1b", "gpipe", "interleaved_1f1b", "zero_bubble")


def test_plans_are_shown(tmp_path: Path) -> None:
    """Table and picture of a plan with several stages per rank."""
    profile = light_model(32)
    plan = search(profile, cluster(), memory_budget="4GiB", global_batch_size=8, schedule="interleaved_1f1b", stages=8)
    text = plan.explain()
    assert "schedule interleaved_1f1b" in text and f"{plan.virtual_stages} per rank" in text
    assert "peak of rank 7" in text and "balance of the ranks" in text
    tables = breakdown(plan, profile, cluster())
    assert all(f"stage {stage}" in tables for stage in (0, 3, 28, 31))  # the first and the last ones of many
    assert "stage 31" in save_picture(plan, tmp_path / "plan.svg").read_text(encoding="utf-8")
    assert HybridPlan.from_json(plan.to_json()) == plan
