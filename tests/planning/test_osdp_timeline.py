"""The played step allocates and frees what FSDP2 does, and plans keep limits by it."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest

from lightning_hetu.planning.osdp import (
    Operator,
    OperatorCosts,
    OSDPInfeasibleError,
    OSDPPlan,
    Ring,
    solve,
    solve_batch,
)
from lightning_hetu.planning.osdp.fitted import FittedProblem
from lightning_hetu.planning.osdp.fsdp2 import GLOO, NCCL, Runtime
from lightning_hetu.planning.osdp.problem import Problem
from lightning_hetu.planning.osdp.timeline import (
    CATEGORIES,
    ROOT,
    Bytes,
    Moment,
    StepProfile,
    StepSettings,
    Timeline,
    play_step,
)

N = 4
RING = Ring(1e-10, 1e-6)
SETTINGS: dict[str, Any] = {"world_size": N, "comm": RING}
# Nothing but what FSDP2 itself allocates.
BARE = Runtime(
    gather_copies=0, reduce_scatter_copies=0, pads_gradients=False, casts_copy=False, optimizer_each=0,
    optimizer_before=0, stale_gradients=False,
)  # fmt: skip


def chain(*rows: int, columns: int = 100, activation: float = 0.0, slices: int = 1) -> StepProfile:
    """Layers of one weight each that run one after another; the first one's input has no gradient."""
    operators, moments = [], [Moment("enter", ROOT, -1, Bytes(0, 0), Bytes(0, 0))]

    def add(kind: Any, unit: str, parameter: int, layers: int, extra: float = 0.0) -> None:
        alive = activation * layers
        moments.append(Moment(kind, unit, parameter, Bytes(0, alive), Bytes(0, alive + extra)))

    for i, size in enumerate(rows):
        cuts: Any = ("output",) if slices > 1 else ()
        operators.append(
            Operator(
                f"l{i}", shapes=((size, columns),), activation_bytes=activation, forward_seconds=1e-5,
                cuts=cuts, max_slices=slices,
            )
        )  # fmt: skip
        add("enter", f"l{i}", -1, i)
        add("leave", f"l{i}", -1, i + 1)
    add("leave", ROOT, -1, len(rows))
    add("output_gradient", ROOT, -1, len(rows))
    for i in reversed(range(len(rows))):
        add("output_gradient", f"l{i}", -1, i + 1)
        add("gradient", f"l{i}", 0, i + 1, activation)
        add("accumulated", f"l{i}", 0, i + 1)
        if i:
            add("input_gradient", f"l{i}", -1, i)
    add("end", ROOT, -1, 0)
    names = tuple(operator.name for operator in operators)
    return StepProfile(tuple(operators), tuple(moments), names)


def play(profile: StepProfile, mode: str | list[str], **settings: Any) -> Timeline:
    modes = [mode] * len(profile.operators) if isinstance(mode, str) else mode
    parts = {operator.name: ((one, 1),) for operator, one in zip(profile.operators, modes, strict=True)}
    return play_step(profile, parts, StepSettings(**{"world_size": N, "runtime": BARE, **settings}))


def at(timeline: Timeline, label: str) -> dict[str, int]:
    """Bytes by category around the first moment of that name."""
    point = next(point for point in timeline.points if point.label == label)
    return dict(zip(CATEGORIES, point.memory, strict=True))


P = 4 * 400 * 100
"""Bytes of a layer."""


@pytest.mark.parametrize(
    ("mode", "idle", "left"), [("zdp", 3 / 4, 0), ("zdp-2", 3 / 4, 1 / 2), ("z2", 3 / 4, 1), ("dp", 3, 1)]
)
def test_states_and_what_is_kept_when_forward_ends(mode: str, idle: float, left: float) -> None:
    """Parameters and Adam's moments all the time; and for each of six layers what its mode keeps gathered."""
    timeline = play(chain(*[400] * 6), mode)
    begin, end = at(timeline, "forward: begin"), at(timeline, "backward: output gradient the model")
    assert sum(begin.values()) == begin["parameters"] + begin["optimizer"] == 6 * idle * P
    assert end["gathered"] == 6 * left * P and end["transient"] == end["gradients"] == 0


def test_gathers_in_forward_keep_the_last_flat_buffer() -> None:
    """Two flat buffers while the next unit is gathered, and one with the gathered copy while it runs."""
    timeline = play(chain(*[400] * 4), "zdp")
    first, later = at(timeline, "forward: enter l0"), at(timeline, "forward: enter l2")
    assert first["gathered"] + first["transient"] == 2 * P
    assert later["gathered"] + later["transient"] == 2 * P
    last = at(timeline, "forward: leave the model")
    assert last["transient"] == P
    gloo = play(chain(*[400] * 4), "zdp", runtime=replace(BARE, gather_copies=1.0))
    assert at(gloo, "forward: enter l2")["transient"] == 3 * P


def test_backward_gathers_ahead_and_keeps_the_last_reduction() -> None:
    """Own copy, the one gathered ahead, own gradient; then the flat gradient beside the gradient, and its shard."""
    timeline = play(chain(*[400] * 6), "zdp")
    begins = at(timeline, "backward: output gradient l3")
    # The copy is made while the input of the last reduction is there; then the next gather takes the place of its own.
    assert (begins["gathered"], begins["transient"]) == (P, 2 * P)
    assert begins["gradients"] == 2 * P // N
    reduces = at(timeline, "backward: input gradient l3")
    # The most is just before the copy is freed, and the shards of two layers are there already.
    assert (reduces["gathered"], reduces["gradients"], reduces["transient"]) == (P, P + 2 * P // N, 2 * P)


def test_input_without_gradient_reduces_at_the_end() -> None:
    """The first layer has its gradient and its copy until autograd is done."""
    timeline = play(chain(*[400] * 3), "zdp")
    assert at(timeline, "backward: end the model")["gradients"] >= P
    assert at(timeline, "optimizer: step")["gradients"] == 3 * P // N


@pytest.mark.parametrize(("accumulation", "gradients"), [("last", 1.0), ("hold", 1.0), ("every", 1 / N)])
def test_gradients_between_micro_steps(accumulation: str, gradients: float) -> None:
    """Whole ones unless every micro-step reduces; parameters stay gathered only if held."""
    timeline = play(chain(*[400] * 3), "z2", micro_steps=4, accumulation=accumulation)
    second = [point for point in timeline.points if point.label == "forward: enter l0"][1]
    memory = dict(zip(CATEGORIES, second.memory, strict=True))
    assert memory["gradients"] == 3 * gradients * P
    assert memory["gathered"] == (3 * P if accumulation == "hold" else P)
    many = play(chain(*[400] * 3), "z2", micro_steps=100, accumulation=accumulation)
    assert many.peak == play(chain(*[400] * 3), "z2", micro_steps=3, accumulation=accumulation).peak


def test_gradients_in_another_dtype_are_converted() -> None:
    """Gathered in two bytes and reduced in four: gradients that wait are kept in four."""
    settings = {"gather_bytes": 2, "reduce_bytes": 4}
    timeline = play(chain(*[400] * 3), "zdp", micro_steps=2, **settings)
    second = [point for point in timeline.points if point.label == "forward: enter l0"][1]
    assert dict(zip(CATEGORIES, second.memory, strict=True))["gradients"] == 3 * P
    # A replica also holds the buffer of its all-reduce until backward ends, but here it is the gradient.
    assert at(play(chain(*[400] * 3), "dp", **settings), "optimizer: step")["gradients"] == 3 * P


def test_stale_gradients_and_the_optimizer() -> None:
    """The gradients of the step before are there in the first forward; the optimizer has copies of what it updates."""
    stale = play(chain(*[400] * 3), "zdp", runtime=replace(BARE, stale_gradients=True))
    assert at(stale, "forward: enter l1")["gradients"] == 3 * P // N
    assert at(stale, "backward: output gradient the model")["gradients"] == 0
    adam = play(chain(400, 200, 100), "zdp", runtime=replace(BARE, optimizer_each=2, optimizer_before=1))
    assert at(adam, "optimizer: step")["transient"] == 2 * P // N
    foreach = play(chain(*[400] * 3), "zdp", runtime=replace(BARE, optimizer_all=1))
    assert at(foreach, "optimizer: step")["transient"] == 3 * P // N


def test_offloaded_states_count_on_the_host_only() -> None:
    """On a device nothing of them is there, but copies on their way; on the CPU it is all one memory."""
    device = play(chain(*[400] * 3), "off", runtime=replace(BARE, host_counts=False))
    assert at(device, "forward: begin") == dict.fromkeys(CATEGORIES, 0)
    assert at(device, "optimizer: step") == dict.fromkeys(CATEGORIES, 0)
    assert at(device, "forward: enter l0")["transient"] >= P
    assert play(chain(*[400] * 3), "off").peak == play(chain(*[400] * 3), "zdp").peak


def test_uneven_shards_are_padded() -> None:
    """The first rank has a row more than its share, and collectives move padded rows."""
    timeline = play(chain(5, 400), "zdp")
    begin = at(timeline, "forward: begin")
    assert begin["parameters"] == 4 * 100 * (2 + 100)
    assert at(timeline, "forward: enter l0")["gathered"] == 4 * 100 * 8


def test_slices_need_less_than_the_whole() -> None:
    """Buffers are those of a slice; parameters add up to the same."""
    profile = chain(*[400] * 4, slices=4)
    settings = StepSettings(N, runtime=BARE)
    whole, cut = (
        play_step(profile, {operator.name: (("zdp", slices),) for operator in profile.operators}, settings)
        for slices in (1, 4)
    )
    assert at(cut, "forward: begin") == at(whole, "forward: begin")
    assert at(cut, "forward: enter l2")["transient"] + at(cut, "forward: enter l2")["gathered"] == 2 * P // 4
    mixed = play_step(profile, {operator.name: (("zdp", 3), ("z2", 1)) for operator in profile.operators}, settings)
    assert at(mixed, "backward: output gradient the model")["gathered"] == 4 * P // 4


def test_compact_keeps_the_peak() -> None:
    """Few points, the highest among them, in order."""
    timeline = play(chain(*[400] * 60, activation=1e5), "z2")
    few = timeline.compact(50)
    assert len(few) == 50 and max(few, key=lambda point: point.total) == timeline.peak_point
    places = [timeline.points.index(point) for point in few]
    assert places == sorted(places)


def test_unknown_operators_are_refused() -> None:
    with pytest.raises(ValueError, match="operator 'l1' is in the plan or in the profile only"):
        play_step(chain(400, 400), {"l0": (("zdp", 1),)}, StepSettings(N))
    with pytest.raises(ValueError, match="runtime.gather_copies=-1"):
        Runtime(gather_copies=-1)


def fitted(profile: StepProfile, runtime: Runtime, **settings: Any) -> FittedProblem:
    costs = OperatorCosts(N, RING, ("dp", "z2", "zdp"), **settings)
    return FittedProblem(Problem.build(profile.operators, costs, 0), profile, runtime)


@pytest.mark.parametrize(("micro_steps", "runtime"), [(1, GLOO), (4, GLOO), (1, NCCL)])
def test_plans_are_close_to_the_best_of_all(micro_steps: int, runtime: Runtime) -> None:
    """They fit by the timeline, need little more time than the best that fits, and their gap is none too small."""
    rng = random.Random(micro_steps)
    profile = chain(*(rng.randint(50, 900) for _ in range(5)), activation=3e4)
    problem = fitted(profile, runtime, micro_steps=micro_steps)
    every = []
    for options in itertools.product(range(3), repeat=5):
        plan = problem._played(problem._unplayed(options, 2), 0)
        every.append((plan.communication_seconds, plan.peak_memory))
    low, high = min(peak for _, peak in every), max(peak for _, peak in every)
    slower = []
    for number in range(13):
        limit = low + (high - low) * (number + 1) // 13
        best = min(seconds for seconds, peak in every if peak <= limit)
        plan = problem.solve(limit, 2, 4.0, 0.0)
        assert plan.peak_memory <= limit
        assert plan.communication_seconds * (1 - plan.gap) <= best * (1 + 1e-9)
        slower.append(plan.communication_seconds / best - 1)
    assert max(slower) < 0.1 and sum(slower) / len(slower) < 0.02


@pytest.mark.parametrize("layers", [7, 20])
def test_more_memory_is_never_slower(layers: int) -> None:
    """From the smallest limit, which the error names, to that of the fastest plan."""
    rng = random.Random(layers)
    profile = chain(*(rng.choice((300, 301, 900)) for _ in range(layers)), activation=2e4, slices=2)
    arguments = {**SETTINGS, "batch_size": 2, "profile": profile}
    with pytest.raises(OSDPInfeasibleError) as caught:
        solve(profile.operators, 1, **arguments)
    low = caught.value.smallest_feasible_limit
    assert sum(caught.value.smallest.values()) == low
    with pytest.raises(OSDPInfeasibleError):
        solve(profile.operators, low - 1, **arguments)
    fastest = solve(profile.operators, None, **arguments)
    high, before = fastest.peak_memory, float("inf")
    for number in range(5):
        limit = low + (high - low) * number // 4
        plan = solve(profile.operators, limit, **arguments)
        assert plan.peak_memory <= limit
        assert plan.communication_seconds <= before * (1 + 1e-9)
        before = plan.communication_seconds
        # A faster plan has its price, and none is told where there is no faster one.
        assert (plan.shadow_price > 0) == (plan.communication_seconds > fastest.communication_seconds)
        assert (plan.proof == "complete") == (plan.gap < 1e-9)
    assert plan.peak_memory == high and plan.proof == "complete"


def test_plans_have_their_timeline() -> None:
    """Peak and categories are those of its points, also out of JSON; the text says where the peak is."""
    profile = chain(*[400] * 5, activation=1e5)
    plan = solve(profile.operators, None, batch_size=3, profile=profile, base_memory=1000, **SETTINGS)
    assert plan.peak_point is not None and plan.peak_memory == plan.peak_point.total
    assert tuple(plan.memory) == CATEGORIES and plan.memory["base"] == 1000
    modes = [operator.mode for operator in plan.operators]
    assert plan.peak_memory == play(profile, modes, batch_size=3, runtime=GLOO, base=1000).peak
    assert OSDPPlan.from_json(plan.to_json()) == plan
    assert f"({plan.peak_point.label})" in plan.explain()
    with pytest.raises(ValueError, match="plan.points"):
        OSDPPlan.from_dict({**plan.to_dict(), "points": [["forward: begin", 1]]})


def test_operators_have_dtypes_of_their_own() -> None:
    """What one operator gathers in two bytes is counted so in time and memory."""
    profile = chain(*[400] * 3)
    half = replace(profile, dtypes={"l1": (2, 4)})
    full, mixed = (solve(found.operators, None, modes=("z2",), profile=found, **SETTINGS) for found in (profile, half))
    gathered = {c.op: c.bytes for c in mixed.collectives}
    assert gathered == {"all_gather": 2 * P + P // 2, "reduce_scatter": 3 * P}
    assert mixed.communication_seconds < full.communication_seconds and mixed.peak_memory < full.peak_memory


def test_largest_batch_fits() -> None:
    """Batches are searched by the timeline as well."""
    profile = chain(*[400] * 4, activation=2e5)
    least = solve(profile.operators, None, modes=("zdp",), profile=profile, **SETTINGS).peak_memory
    plan = solve_batch(profile.operators, least + 10**7, profile=profile, **SETTINGS)
    assert plan.batch_size > 5 and plan.peak_memory <= least + 10**7
