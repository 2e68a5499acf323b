"""Data parallelism decided per operator inside of hybrid plans: as text, in the search, and what it costs."""

from __future__ import annotations

import itertools
import json
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
    HybridPlan,
    LayerProfile,
    LayerStrategy,
    ModelProfile,
    NoFeasiblePlanError,
    Pins,
    diff,
    evaluate,
    layer_strategies,
    memory_breakdown,
    search,
    simulate,
    time_breakdown,
    write_galvatron_plan,
)
from lightning_hetu.planning.cost_model import Setting
from lightning_hetu.planning.enumeration import operator_choices, with_sharded_operators
from lightning_hetu.planning.explain import describe
from lightning_hetu.planning.picture import svg

sys.path.insert(0, str(Path(__file__).parent))
from helpers import MIB, random_cluster, random_layer, random_model  # noqa: E402

OPERATORS = {"attention.query": 2 * MIB, "attention.out": 2 * MIB, "mlp.up": 8 * MIB, "mlp.down": 8 * MIB}
BLOCK = LayerProfile(
    "block",
    parameter_bytes=21 * MIB,
    tp_parameter_bytes=20 * MIB,
    forward_time=((1, 1e-3), (4, 3e-3)),
    activation_bytes={1: 4 * MIB, 2: 3 * MIB},
    boundary_bytes=MIB // 4,
    backward_gradients={1: 8 * MIB},
    tp_degrees=(1, 2),
    operators=OPERATORS,
)
PROFILE = ModelProfile((BLOCK,), (0,) * 4, replace(BLOCK, name="embedding"), replace(BLOCK, name="head"))
CLUSTER = ClusterSpec.from_bandwidth(4, gigabytes_per_second=10, latency=1e-5, overlap_slowdown=None)
TEXT = "dp2-tp2-zero2-sharded(attention.query,mlp.Up2)-sequence-recompute"


def flat(strategy: str, microbatches: int = 2) -> HybridPlan:
    """All blocks in one stage of four devices."""
    return HybridPlan.uniform(
        strategy,
        num_layers=4,
        global_batch_size=8,
        num_microbatches=microbatches,
        embedding="dp4-zero3",
        head="dp4-zero3",
    )


def peak(strategy: str, microbatches: int = 2, **constants: Any) -> int:
    plan = flat(strategy, microbatches)
    return evaluate(plan, PROFILE, CLUSTER, constants=HetuConstants(**constants)).stage_memory[0]


# ---- text -----------------------------------------------------------------------------------------------------------


def test_text_is_read_back(tmp_path: Path) -> None:
    """Names keep their case, may hold other words of the text, and stand in alphabetical order."""
    strategy = LayerStrategy.parse(TEXT)
    assert strategy.sharded == ("attention.query", "mlp.Up2") and strategy.sequence_parallel and strategy.recompute
    assert str(strategy) == TEXT
    assert LayerStrategy.parse(strategy.to_dict()) == strategy
    assert json.loads(json.dumps(strategy.to_dict())) == strategy.to_dict()
    odd = LayerStrategy(dp=2, sharded=("z-recompute.0", "b", "dp2-zero3"))
    assert odd.sharded == ("b", "dp2-zero3", "z-recompute.0")
    assert LayerStrategy.parse(str(odd)) == odd
    assert LayerStrategy.parse("DP2-ZERO2-Sharded(Q, k)") == LayerStrategy(dp=2, dp_type="zero2", sharded=("Q", "k"))
    assert str(LayerStrategy.parse("dp4-zero2")) == "dp4-zero2" and LayerStrategy.parse("sp2-sharded(a)").sp == 2
    plan = flat("dp4-zero2-sharded(mlp.up)-recompute")
    assert plan.head.sharded == () and HybridPlan.from_json(plan.to_json()) == plan
    assert HybridPlan.load(plan.save(tmp_path / "plan.json")) == plan


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("dp4-zero3-sharded(a)", r"sharded=\['a'\] with dp_type='zero3'"),
        ("tp4-sharded(a)", r"sharded=\['a'\] with dp=1: weights have one copy only"),
        ("dp4-sharded(a)-sharded(b)", "sharded is given twice"),
        ("dp4-sharded(a,a)", "each operator at most once"),
        ("dp4-sharded()", "expected a list of names"),
        ("dp4-sharded", "unknown part 'sharded', expected dpN"),
        ("dp4-sharded(a", "unknown part"),
        ({"dp": 4, "sharded": "up"}, "sharded='up': expected a list of names"),
        ({"dp": 4, "sharded": ["a b"]}, "expected a list of names"),
        ({"dp": 4, "sharded": [1]}, "expected a list of names"),
    ],
)
def test_malformed_operators_are_one_line_errors(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        LayerStrategy.parse(value)
    assert "\n" not in str(error.value)


def test_plans_say_what_is_sharded() -> None:
    """Tables and pictures count the operators, one line names them, and a diff tells plans apart."""
    plan = flat("dp4-zero2-sharded(attention.query,mlp.down,mlp.up)-recompute")
    plan = replace(plan, layers=(*plan.layers[:3], LayerStrategy.parse("dp4-sharded(mlp.up)")))
    assert describe(plan.layers[0]) == "dp4 zero2 recompute, 3 operators zero3"
    assert describe(plan.layers[3]) == "dp4 ddp, 1 operator zero3"
    text = replace(plan, prediction=evaluate(plan, PROFILE, CLUSTER, memory_budget="1GiB")).explain()
    assert (
        "blocks 0-2    | 0     | dp4 zero2 recompute, 3" in text and "\n              |       | operators zero3" in text
    )
    assert "zero3 in 3 blocks: attention.query, mlp.down, mlp.up\nzero3 in 1 block: mlp.up\n" in text
    assert max(map(len, text.splitlines())) <= 110
    assert "dp4 zero2 recompute, 3 operators zero3" in svg(plan)
    assert diff(flat("dp4-zero2"), flat("dp4-zero2-sharded(mlp.up)")) == (
        "replanned zero3_operators=0 -> zero3_operators=1"
    )
    assert "mlp.up" in diff(flat("dp4-sharded(mlp.down)"), flat("dp4-sharded(mlp.up)"))


def test_what_cannot_have_them(tmp_path: Path) -> None:
    """Split backwards, the files of Galvatron, and profiles that do not know an operator."""
    options = {"num_layers": 4, "global_batch_size": 8, "num_microbatches": 4, "stages": 2}
    with pytest.raises(ValueError, match=r"plan.layers\[0\]=dp2-ddp-sharded\(a\): schedule='zero_bubble' splits"):
        HybridPlan.uniform("dp2-sharded(a)", schedule="zero_bubble", **options)
    plan = HybridPlan.uniform("dp2-sharded(a)", **options)
    with pytest.raises(ValueError, match="the format cannot say that"):
        write_galvatron_plan(plan, tmp_path / "plan.json")
    with pytest.raises(ValueError, match="layer 'block' has no operator 'a', expected among attention.query, "):
        evaluate(plan, PROFILE, CLUSTER)
    bare = replace(PROFILE, layer_types=(replace(BLOCK, operators={}),))
    with pytest.raises(ValueError, match="none known; profile the model again"):
        evaluate(plan, bare, CLUSTER)


def test_profiles_of_operators(tmp_path: Path) -> None:
    """They are stored in the order of calls; older files without them load; more than the layer has is refused."""
    assert list(ModelProfile.load(PROFILE.save(tmp_path / "p.json")).layer_types[0].operators) == list(OPERATORS)
    data = PROFILE.to_dict()
    for layer in (*data["layer_types"], data["embedding"], data["head"]):
        del layer["operators"]
    assert dict(ModelProfile.from_dict(data).layer_types[0].operators) == {}
    for operators in ({"a": 22 * MIB}, {"a": 0}):
        with pytest.raises(ValueError, match="operators=.* must be positive and add up to no more than"):
            replace(BLOCK, operators=operators)


# ---- search ---------------------------------------------------------------------------------------------------------


def test_choices_of_operators() -> None:
    """The largest ones, in a few numbers; nothing that is the same as something else."""
    assert operator_choices(OPERATORS, 21 * MIB, 4) == (
        ("mlp.up",),
        ("mlp.up", "mlp.down"),
        ("mlp.up", "mlp.down", "attention.query", "attention.out"),
    )
    assert operator_choices({"one": 5}, 5, 4) == () and operator_choices({}, 5, 4) == ()
    assert operator_choices({"one": 4}, 5, 4) == (("one",),)
    few = layer_strategies(4, tp_degrees=(1, 2, 4))
    found = with_sharded_operators(few, OPERATORS, 21 * MIB, 4)
    assert len(set(found)) == len(found) and found[: len(few)] == few
    added = found[len(few) :]
    assert {(s.dp, s.dp_type) for s in added} == {(4, "ddp"), (4, "zero2"), (2, "ddp"), (2, "zero2")}
    assert len(added) == 4 * 2 * 3  # types and degrees, recomputation, choices
    many = with_sharded_operators(few, OPERATORS, 21 * MIB, 96)[len(few) :]
    assert len(many) == 2 * 2 and {s.dp_type for s in many} == {"zero2"}
    copies = [s for s in few if s.dp_type == "ddp"]
    assert {s.dp_type for s in with_sharded_operators(copies, OPERATORS, 21 * MIB, 96)[len(copies) :]} == {"ddp"}


def test_a_mixed_plan_is_faster_between_zero2_and_zero3() -> None:
    """Where zero2 does not fit in all blocks and zero3 leaves memory, operators make the difference."""
    options: dict[str, Any] = {"global_batch_size": 8, "pipeline_parallel_size": 1, "tp": 1, "recompute": False}
    options |= {"num_microbatches": 2, "embedding": "dp4-zero3", "head": "dp4-zero3", "alternatives": False}
    low, high = peak("dp4-zero3"), peak("dp4-zero2")
    budget = low + (high - low) * 3 // 8
    plans = {
        mode: search(PROFILE, CLUSTER, memory_budget=budget, dp_mode=mode, **options) for mode in ("layer", "osdp")
    }
    times = {mode: plan.prediction.iteration_time for mode, plan in plans.items() if plan.prediction is not None}
    assert any(layer.sharded for layer in plans["osdp"].layers)
    assert not any(layer.sharded for layer in plans["layer"].layers)
    assert times["osdp"] < times["layer"] * 0.999
    assert search(PROFILE, CLUSTER, memory_budget=budget, **options) == plans["layer"], "the default"
    pinned = search(PROFILE, CLUSTER, memory_budget=budget, layers=list(map(str, plans["osdp"].layers)), **options)
    assert pinned.prediction == plans["osdp"].prediction
    only = search(PROFILE, CLUSTER, memory_budget=budget, dp_mode="osdp", dp_type=["ddp", "zero3"], **options)
    assert {layer.dp_type for layer in only.layers} <= {"ddp", "zero3"}
    with pytest.raises(ValueError, match="dp_mode='unit': expected one of layer, osdp"):
        search(PROFILE, CLUSTER, memory_budget=budget, dp_mode="unit", **options)


def with_operators(rng: random.Random, layer: LayerProfile) -> LayerProfile:
    cuts = sorted(rng.randint(1, layer.parameter_bytes) for _ in range(rng.randint(1, 6)))
    sizes = [after - before for before, after in itertools.pairwise([0, *cuts])]
    return replace(layer, operators={f"{i}.part": size for i, size in enumerate(sizes) if size})


def random_profile(rng: random.Random, num_layers: int) -> ModelProfile:
    profile = random_model(rng, num_layers)
    return replace(profile, layer_types=tuple(with_operators(rng, layer) for layer in profile.layer_types))


def seconds(profile: ModelProfile, cluster: ClusterSpec, budget: int, mode: str) -> float:
    options: dict[str, Any] = {"global_batch_size": 8, "alternatives": False, "dp_mode": mode}
    try:
        plan = search(profile, cluster, memory_budget=budget, **options)
    except NoFeasiblePlanError:
        return float("inf")
    assert plan.prediction is not None and max(plan.prediction.stage_memory) <= budget
    return plan.prediction.iteration_time


@pytest.mark.parametrize("seed", [3, 5, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 12))])
def test_never_slower_and_monotone(seed: int) -> None:
    """At 12 budgets: no slower than one type per layer, and no slower than with less memory."""
    rng = random.Random(seed)
    profile, cluster = random_profile(rng, 3), random_cluster(rng, 4)
    with pytest.raises(NoFeasiblePlanError) as error:
        search(profile, cluster, memory_budget=1, global_batch_size=8, dp_mode="osdp")
    least = error.value.smallest_feasible_budget
    budgets = [least + (least * step) // 8 for step in range(12)]
    layer = [seconds(profile, cluster, budget, "layer") for budget in budgets]
    osdp = [seconds(profile, cluster, budget, "osdp") for budget in budgets]
    assert all(fine <= coarse * (1 + 1e-9) for fine, coarse in zip(osdp, layer, strict=True))
    assert all(more <= less * (1 + 1e-9) for less, more in itertools.pairwise(osdp))
    assert any(fine < coarse * (1 - 1e-6) for fine, coarse in zip(osdp, layer, strict=True))


@pytest.mark.parametrize("seed", [0, 2, pytest.param(1, marks=pytest.mark.slow)])
def test_two_devices_equal_every_plan(seed: int) -> None:
    """Time and least budget are those of trying every plan."""
    rng = random.Random(seed)
    profile, cluster = random_profile(rng, 1 + seed % 2), random_cluster(rng, 2)
    profile = replace(
        profile, embedding=random_layer(rng, "e", (1,)), head=random_layer(rng, "h", (1,)), pipeline=False
    )
    found = []
    for microbatches in (1, 2):
        rows = []
        for layer in (profile.embedding, *(profile.block(i) for i in range(profile.num_layers)), profile.head):
            block = layer.name not in "eh"
            options = layer_strategies(2, tp_degrees=layer.tp_degrees, recompute=(False, True) if block else (False,))
            rows.append(with_sharded_operators(options, layer.operators, layer.parameter_bytes, 2))
        for choice in itertools.product(*rows):
            plan = HybridPlan(2, 4, microbatches, (profile.num_layers,), choice[1:-1], choice[0], choice[-1])
            prediction = evaluate(plan, profile, cluster)
            found.append((max(prediction.stage_memory), prediction.iteration_time))
    peaks = sorted(size for size, _ in found)
    for budget in (peaks[0], peaks[len(peaks) // 10], peaks[len(peaks) // 3]):
        best = min(time for size, time in found if size <= budget)
        pins: dict[str, Any] = {"num_microbatches": None, "alternatives": False, "dp_mode": "osdp"}
        times = []
        for count in (1, 2):
            pins["num_microbatches"] = count
            try:
                plan = search(profile, cluster, memory_budget=budget, global_batch_size=4, **pins)
            except NoFeasiblePlanError:
                continue
            assert plan.prediction is not None
            times.append(plan.prediction.iteration_time)
        assert min(times) == pytest.approx(best, rel=1e-9)


def test_other_cost_models_have_no_operators() -> None:
    """The prices of Galvatron are of whole layers."""

    model: Any = SimpleNamespace(name="galvatron3", num_layers=2)
    with pytest.raises(ValueError, match="dp_mode='osdp': cost model 'galvatron3' has no prices of operators"):
        Pins(dp_mode="osdp").options(model, 1, Setting(4, 4, 1, (2,)))


# ---- cost -----------------------------------------------------------------------------------------------------------


def test_each_operator_is_a_message_of_its_own() -> None:
    """Seconds of the gathers and reductions are those of the groups, one by one."""
    parts = time_breakdown(flat("dp4-zero2-sharded(mlp.down,mlp.up)"), PROFILE, CLUSTER)
    rest, ends = 5 * MIB, 2 * CLUSTER.seconds("all_gather", 4, 21 * MIB)
    operator = CLUSTER.seconds("all_gather", 4, 8 * MIB)
    assert parts["parameter_gather"] == pytest.approx(4 * 2 * 2 * operator + 2 * ends)
    assert parts["parameter_gather_per_step"] == pytest.approx(4 * CLUSTER.seconds("all_gather", 4, rest))
    sizes = [rest, 8 * MIB, 8 * MIB]
    reduced = 4 * sum(CLUSTER.seconds("reduce_scatter", 4, size) for size in sizes)
    reduced += 2 * CLUSTER.seconds("reduce_scatter", 4, 21 * MIB)
    assert parts["gradient_reduce"] == pytest.approx(reduced)
    parts = time_breakdown(flat("dp4-ddp-sharded(mlp.down,mlp.up)"), PROFILE, CLUSTER)
    assert parts["gradient_reduce_per_step"] == pytest.approx(4 * CLUSTER.seconds("all_reduce", 4, rest))
    assert parts["gradient_reduce"] == pytest.approx(reduced - 4 * CLUSTER.seconds("reduce_scatter", 4, rest))


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("recompute", ["", "-recompute"])
def test_memory_lies_between_the_types(microbatches: int, recompute: str) -> None:
    """More operators in zero3 take less; copies are kept of the rest only, buffers are those of the largest group."""
    names = ["mlp.up", "mlp.down", "attention.query", "attention.out"]
    for kind in ("ddp", "zero2"):
        sizes = [peak(f"dp4-{kind}{recompute}", microbatches)]
        for count in range(1, 5):
            sizes.append(peak(f"dp4-{kind}-sharded({','.join(names[:count])}){recompute}", microbatches))
        assert sizes == sorted(sizes, reverse=True) and sizes[1] < sizes[0]
    plan = flat(f"dp4-zero2-sharded(mlp.up,mlp.down){recompute}", microbatches)
    parts = memory_breakdown(plan, PROFILE, CLUSTER)
    assert parts["gathered"] <= 4 * 5 * MIB
    assert parts["parameters"] == 6 * 21 * MIB // 4


def test_operators_of_a_tensor_parallel_layer() -> None:
    """Groups shrink as the layer does."""
    plan = replace(flat("dp4-zero3"), layers=(LayerStrategy.parse("dp2-tp2-zero2-sharded(mlp.up)"),) * 4)
    scale = (MIB + 10 * MIB) / (21 * MIB)
    parts = time_breakdown(plan, PROFILE, CLUSTER)
    ends = 4 * CLUSTER.seconds("all_gather", 4, 21 * MIB)
    gather = CLUSTER.seconds("all_gather", 2, 8 * MIB * scale, stride=2)
    assert parts["parameter_gather"] == pytest.approx(4 * 2 * gather + ends)


@pytest.mark.parametrize("slowdown", [None, 1.3])
def test_simulated_steps_take_the_predicted_time(slowdown: float | None) -> None:
    """Also where communication runs beside computation, over several stages."""
    cluster = ClusterSpec.from_bandwidth(4, gigabytes_per_second=20, overlap_slowdown=slowdown)
    texts = ("dp2-zero2-sharded(mlp.up)", "dp2-ddp-sharded(mlp.down,mlp.up)-recompute", "dp2-zero3", "tp2")
    plan = HybridPlan(
        4, 16, 4, (2, 2), tuple(map(LayerStrategy.parse, texts)), *map(LayerStrategy.parse, ("dp2", "dp2-zero2"))
    )
    assert simulate(plan, PROFILE, cluster).iteration_time == pytest.approx(
        evaluate(plan, PROFILE, cluster).iteration_time, rel=1e-9
    )


def test_other_schedules_have_operators_or_do_without() -> None:
    """Interleaved plans keep them; with split backwards none are left."""
    options: dict[str, Any] = {"global_batch_size": 16, "dp_mode": "osdp", "tp": 1, "alternatives": False}
    options |= {"pipeline_parallel_size": 2, "num_microbatches": 4, "recompute": False}
    profile = replace(PROFILE, layers=(0,) * 8)
    least = {}
    for schedule in ("1f1b", "interleaved_1f1b", "zero_bubble"):
        with pytest.raises(NoFeasiblePlanError) as error:
            search(profile, CLUSTER, memory_budget=1, schedule=schedule, **options)
        least[schedule] = error.value.smallest_feasible_budget
        plan = search(profile, CLUSTER, memory_budget=least[schedule], schedule=schedule, **options)
        assert plan.schedule == schedule
        assert any(layer.sharded for layer in plan.layers) == (schedule != "zero_bubble")
    assert least["1f1b"] < least["zero_bubble"]
