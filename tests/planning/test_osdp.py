"""OSDP's plans are the best ones, fit, survive JSON, and can be read."""

from __future__ import annotations

import itertools
import json
import math
import pickle
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_hetu.planning import ClusterSpec, NoFeasiblePlanError
from lightning_hetu.planning.osdp import (
    Operator,
    OperatorCosts,
    OperatorPlan,
    OSDPInfeasibleError,
    OSDPPlan,
    Ring,
    solve,
    solve_batch,
)

RING = Ring(1e-10, 1e-5, 1e-10)
SETTINGS: dict[str, Any] = {"world_size": 4, "comm": RING, "gather_bytes": 2, "reduce_bytes": 4}


def transformer(layers: int, *, slices: int = 1, width: int = 256) -> list[Operator]:
    """Embedding and head that are tied, and layers of two linears each."""
    end = Operator("embed", shapes=((1000, width),), kind="embedding", tied="embedding", activation_bytes=4096)
    model = [end]
    for i in range(layers):
        for name, shape in (("up", (4 * width, width)), ("down", (width, 4 * width))):
            model.append(
                Operator(
                    f"layers.{i}.{name}",
                    shapes=(shape, shape[:1]),
                    kind=f"mlp.{name}",
                    cuts=("output",),
                    max_slices=slices,
                    forward_seconds=1e-4,
                    backward_seconds=2e-4,
                    activation_bytes=50_000,
                )
            )
    return [*model, Operator("head", 0, kind="head", tied="embedding", forward_seconds=1e-4)]


def least_limit(operators: list[Operator], **settings: Any) -> int:
    with pytest.raises(OSDPInfeasibleError) as error:
        solve(operators, 1, **{**SETTINGS, **settings})
    return error.value.smallest_feasible_limit


def random_operators(rng: random.Random) -> list[Operator]:
    out = []
    for i in range(rng.randint(1, 4)):
        slices = rng.choice((1, 1, 2))
        parameters = rng.choice((0, 7, 1000, 1000, 10**5)) if slices == 1 else 10**4
        cuts = ("output",) if slices > 1 else ()
        trained = rng.random() < 0.8
        out.append(Operator(f"w{i}", parameters, trained=trained, cuts=cuts, max_slices=slices))
    return out


def test_random_models_equal_every_choice() -> None:
    """For all modes and accumulation policies, communication is that of the best of all choices that fit."""
    rng = random.Random(1)
    for _ in range(60):
        operators = random_operators(rng)
        settings = {
            **SETTINGS,
            "micro_steps": rng.choice((1, 3)),
            "accumulation": rng.choice(("last", "every", "hold")),
        }
        modes = rng.sample(("dp", "z2", "zdp-2", "zdp", "off"), rng.randint(1, 3))
        costs = OperatorCosts(modes=tuple(modes), **settings)
        choices = [
            (math.fsum(o.seconds for o in row), sum(o.memory for o in row) + max(o.transient for o in row))
            for row in itertools.product(*map(costs.options, operators))
        ]
        least, most = min(m for _, m in choices), max(m for _, m in choices)
        limit = 5000 + rng.choice((least, most, rng.randint(least, most)))
        plan = solve(operators, limit, modes=modes, base_memory=5000, **settings)
        assert plan.peak_memory <= limit and plan.proof == "complete"
        expected = min(t for t, m in choices if m + 5000 <= limit)
        assert plan.communication_seconds == pytest.approx(expected, rel=1e-12, abs=1e-15)
        assert least + 5000 == least_limit(operators, modes=modes, base_memory=5000, **settings)


def test_smallest_limit_shards_everything() -> None:
    """At the smallest feasible limit all is sharded in the most slices; without a limit all is as fast as can be."""
    operators = transformer(3, slices=4)[1:-1]
    least = least_limit(operators)
    plan = solve(operators, least, **SETTINGS)
    assert plan.peak_memory == least
    assert {op.parts for op in plan.operators} == {(("zdp", 4),)}
    for limit in (None, math.inf):
        plan = solve(operators, limit, **SETTINGS)
        costs = OperatorCosts(**SETTINGS)
        fastest = [min(o.seconds for o in costs.options(op)) for op in operators]
        assert [op.seconds for op in plan.operators] == fastest
        assert plan.memory_limit is None and plan.shadow_price == 0


def test_more_memory_is_never_slower() -> None:
    """Times descend with the limit, from all sharded to all gathered once."""
    operators = transformer(4, slices=2)
    least = least_limit(operators)
    most = solve(operators, None, **SETTINGS).peak_memory
    plans = [solve(operators, least + (most - least) * i // 20, **SETTINGS) for i in range(21)]
    assert all(plan.proof == "complete" for plan in plans)
    seconds = [plan.seconds for plan in plans]
    assert all(after <= before for before, after in itertools.pairwise(seconds))
    assert len(set(seconds)) > 10


def test_order_of_operators_does_not_matter() -> None:
    """Each operator has the same mode, and of equal ones the lowest numbers keep more."""
    operators = transformer(12)
    least = least_limit(operators)
    limit = least + (solve(operators, None, **SETTINGS).peak_memory - least) // 2
    plan = solve(operators, limit, **SETTINGS)
    shuffled = random.Random(2).sample(operators[1:-1], len(operators) - 2)
    other = solve([operators[0], *shuffled, operators[-1]], limit, **SETTINGS)
    assert {op.name: op.parts for op in other.operators} == {op.name: op.parts for op in plan.operators}
    for name in ("up", "down"):
        modes = [plan[f"layers.{i}.{name}"].mode for i in range(12)]
        assert modes == sorted(modes)  # z2 in front of zdp
    assert len({op.mode for op in plan.operators}) == 2


def test_one_rank_communicates_nothing() -> None:
    """Nothing is sent, and of plans that all take no time the smallest is taken."""
    operators = [Operator("w²", 1000), Operator("v", 10, cuts=("output",), max_slices=2)]
    plan = solve(operators, None, world_size=1, comm=RING)
    assert (plan.communication_seconds, plan.collectives, plan.gap) == (0, (), 0)
    assert plan.peak_memory == least_limit(operators, world_size=1, comm=RING, gather_bytes=None, reduce_bytes=None)


def test_accumulation_makes_replicas_worthwhile() -> None:
    """With one reduction for many gathers, replicas win; with gathers that are held, they do not."""
    operators = transformer(2)
    assert {op.mode for op in solve(operators, None, micro_steps=8, **SETTINGS).operators} == {"dp"}
    held = solve(operators, None, micro_steps=8, accumulation="hold", **SETTINGS)
    assert {op.mode for op in held.operators} == {"z2"}


def test_tied_operators_have_one_mode() -> None:
    """Shared parameters cost once, at the first operator, and both have its mode."""
    operators = transformer(1)
    for limit in (least_limit(operators), None):
        plan = solve(operators, limit, **SETTINGS)
        assert plan["head"].parts == plan["embed"].parts
        assert plan["head"].memory == 0 and plan["embed"].memory > 0
    with pytest.raises(ValueError, match="tied as 'embedding': trained of 'embed' True, 'head' False"):
        solve([*operators[:-1], replace(operators[-1], trained=False)], None, **SETTINGS)


def test_memory_is_the_sum_of_its_categories() -> None:
    """States of all operators, the largest buffer, activations of the batch, and the base."""
    plan = solve(transformer(2), "1GiB", batch_size=3, base_memory=777, **SETTINGS)
    assert plan.memory["activations"] == 3 * (4096 + 4 * 50_000)
    assert plan.memory["base"] == 777
    assert plan.memory["transient"] == max(op.transient for op in plan.operators)
    assert sum(plan.memory.values()) == plan.peak_memory
    assert sum(op.memory for op in plan.operators) == sum(list(plan.memory.values())[:4])


def test_time_is_between_its_parts_and_their_sum() -> None:
    """With overlap, a step takes at least its computation and at most all one after another."""
    for micro_steps in (1, 3):
        plan = solve(transformer(3), None, batch_size=4, micro_steps=micro_steps, **SETTINGS)
        assert plan.compute_seconds == pytest.approx(micro_steps * 4 * (6 * 3e-4 + 1e-4))
        assert plan.compute_seconds < plan.overlapped_seconds < plan.seconds
        assert plan.samples_per_second == pytest.approx(4 * 4 * micro_steps / plan.seconds)


def test_collectives_add_up() -> None:
    """Calls of a plan for six operators are those that FSDP2 was counted to issue for six groups."""
    operators = [Operator(f"block.{i}", 10**6) for i in range(6)]
    counted = {
        ("dp", 1, "last"): {"all_reduce": 6},
        ("z2", 1, "last"): {"all_gather": 6, "reduce_scatter": 6},
        ("zdp", 1, "last"): {"all_gather": 12, "reduce_scatter": 6},
        ("dp", 4, "last"): {"all_reduce": 6},
        ("z2", 4, "last"): {"all_gather": 24, "reduce_scatter": 6},
        ("z2", 4, "hold"): {"all_gather": 6, "reduce_scatter": 6},
        ("zdp", 4, "last"): {"all_gather": 48, "reduce_scatter": 6},
    }
    for (mode, micro_steps, accumulation), calls in counted.items():
        plan = solve(operators, None, modes=[mode], micro_steps=micro_steps, accumulation=accumulation, **SETTINGS)  # type: ignore[arg-type]
        assert {c.op: c.calls for c in plan.collectives} == calls
        sizes = {"all_gather": 2, "reduce_scatter": 4, "all_reduce": 4}
        assert {c.op: c.bytes for c in plan.collectives} == {op: n * sizes[op] * 10**6 for op, n in calls.items()}


def test_infeasible_says_what_is_missing() -> None:
    """One line with the smallest limit by category, the largest operator, and what would help."""
    operators = [*transformer(2)[1:-1], Operator("lm_head", 10**6, activation_bytes=100.0)]
    with pytest.raises(OSDPInfeasibleError) as caught:
        solve(operators, "2MiB", **SETTINGS)
    error = caught.value
    assert isinstance(error, NoFeasiblePlanError) and isinstance(error, ValueError)
    assert "\n" not in str(error) and str(error).startswith("memory_limit=2097152 (2 MiB per rank): no plan fits")
    assert error.largest_operator == "lm_head"
    assert sum(error.smallest.values()) == error.smallest_feasible_limit == error.smallest_feasible_budget
    assert [text.split(" (")[0] for text in error.suggestions] == [
        "split 'lm_head' into 32 slices",
        "allow mode 'off'",
        "recompute activations",
    ]
    assert solve(operators, error.smallest_feasible_limit, **SETTINGS).peak_memory == error.smallest_feasible_limit
    with pytest.raises(OSDPInfeasibleError):
        solve(operators, error.smallest_feasible_limit - 1, **SETTINGS)
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) and copy.smallest == error.smallest


def test_suggested_slices_suffice() -> None:
    """The number of slices that the error names is enough where it says so."""
    operators = [Operator(f"w{i}", 10**5) for i in range(4)] + [Operator("wide", 10**6)]
    split = [*operators[:4], replace(operators[4], cuts=("output",), max_slices=4)]
    limit = least_limit(split)
    with pytest.raises(OSDPInfeasibleError, match="split 'wide' into 4 slices"):
        solve(operators, limit, **SETTINGS)
    assert solve(split, limit, **SETTINGS)["wide"].slices == 4


@pytest.mark.parametrize("seed", range(4))
def test_best_batch_is_that_of_every_batch(seed: int) -> None:
    """Samples per second are those of the best of all batch sizes that fit, up to the stated tolerance."""
    rng = random.Random(seed)
    operators = [
        Operator(f"w{i}", rng.randint(10**5, 10**6), forward_seconds=10 ** rng.uniform(-7, -4), activation_bytes=2e4)
        for i in range(6)
    ]
    limit = int(least_limit(operators) * 1.5)
    best = solve_batch(operators, limit, **SETTINGS)
    rates = []
    for batch in itertools.count(1):
        try:
            rates.append(solve(operators, limit, batch_size=batch, **SETTINGS).samples_per_second)
        except OSDPInfeasibleError:
            break
    assert len(rates) > 20
    assert max(rates) / (1 + 1e-4) <= best.samples_per_second <= max(rates)


def test_batch_arguments() -> None:
    """Multiples and the largest batch are kept; an infeasible first batch and a free step are refused."""
    operators = transformer(2)
    assert solve_batch(operators, None, max_batch_size=50, batch_multiple=8, **SETTINGS).batch_size == 48
    with pytest.raises(OSDPInfeasibleError):
        solve_batch(operators, 10**6, **SETTINGS)
    with pytest.raises(ValueError, match="max_batch_size=4: expected an integer of at least 8"):
        solve_batch(operators, None, max_batch_size=4, batch_multiple=8, **SETTINGS)
    with pytest.raises(ValueError, match="forward_seconds: all are 0"):
        solve_batch([Operator("w", 5)], None, world_size=1, comm=RING)


def test_time_limit_is_said_in_the_plan() -> None:
    """A plan that was cut short fits, has a gap, and its text says why."""
    rng = random.Random(3)
    operators = [Operator(f"w{i}", rng.randint(10**4, 10**6)) for i in range(60)]
    limit = int(least_limit(operators) * 1.2)
    plan = solve(operators, limit, time_limit=0, **SETTINGS)
    assert plan.proof == "time limit" and 0 < plan.gap < 0.05 and plan.peak_memory <= limit
    assert "the time limit was hit" in plan.explain()
    best = solve(operators, limit, **SETTINGS)
    assert plan.communication_seconds * (1 - plan.gap) <= best.communication_seconds <= plan.communication_seconds


def mixed_plan() -> OSDPPlan:
    operators = transformer(6, slices=4, width=512)
    least = least_limit(operators)
    return solve(operators, least + 3_900_000, micro_steps=2, accumulation="every", **SETTINGS)


def test_a_plan_survives_json(tmp_path: Path) -> None:
    """Everything is read back, from text and from a file."""
    plan = mixed_plan()
    assert any(len(op.parts) == 2 for op in plan.operators)
    assert OSDPPlan.from_json(plan.to_json()) == plan
    assert OSDPPlan.load(plan.save(tmp_path / "deep" / "plan.json")) == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "plan.version=2: this release reads version 1"),
        ({"world_size": 0}, "plan.world_size=0"),
        ({"proof": "hope"}, "plan.proof='hope'"),
        ({"accumulation": "never"}, "plan.accumulation='never'"),
        ({"speed": 3}, "malformed"),
        ({"operators": [{"name": "w"}]}, "malformed"),
        ({"operators": [{"name": "w", "parts": [["dp", 0]]}]}, "at least one slice"),
        ({"operators": [{"name": "w", "parts": [["dp", 1]]}] * 2}, "'w' occurs 2 times"),
    ],
)
def test_malformed_plans_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """Errors name the field; those of a file name the file."""
    data = {**mixed_plan().to_dict(), **change}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        OSDPPlan.from_dict(data)
    with pytest.raises(ValueError, match=f"plan.json.*{message}"):
        OSDPPlan.load(path)


def test_fingerprint_is_of_decisions() -> None:
    """Predictions do not change it; modes, slices and ranks do. It does not change between releases by accident."""
    plan = OSDPPlan(2, (OperatorPlan("a", (("dp", 1),)), OperatorPlan("b", (("zdp", 3), ("z2", 1)), cut="output")))
    assert plan.fingerprint == replace(plan, shadow_price=1.0, gap=0.5, compute_seconds=3.0).fingerprint
    assert plan.fingerprint == OSDPPlan.from_json(plan.to_json()).fingerprint
    changed = [replace(plan, world_size=4), replace(plan, operators=plan.operators[::-1])]
    changed.append(replace(plan, operators=(plan.operators[0], replace(plan.operators[1], parts=(("zdp", 4),)))))
    assert len({plan.fingerprint, *(other.fingerprint for other in changed)}) == 4
    assert plan.fingerprint.startswith("1cac0e1853fde343")


def test_explain_has_a_line_per_kind() -> None:
    """Operators of one kind and mode share a line of at most 110 columns."""
    plan = mixed_plan()
    text = plan.explain()
    assert max(map(len, text.splitlines())) <= 110
    rows = [line for line in text.splitlines() if line.startswith(("mlp.", "layers."))]
    counts = [int(line.split("|")[1]) for line in rows]
    assert sum(counts) == 12 and len(rows) < 8
    for word in ("proven best", "1 MiB more saves about", "reduce_scatter", "activations", "4 ranks"):
        assert word in text
    long = Operator("model.decoder." + "x" * 60, 1000, kind="y" * 80)
    assert max(map(len, solve([long, replace(long, name="b")], None, **SETTINGS).explain().splitlines())) <= 110
    assert "no limit" in solve([], None, **SETTINGS).explain()


def test_a_cluster_spec_is_enough() -> None:
    """A cluster's tables stand in for the ring."""
    cluster = ClusterSpec.from_bandwidth(4, gigabytes_per_second=10, latency=1e-5)
    operators = transformer(4)
    limit = least_limit(operators) + 10**6
    plan = solve(operators, limit, **{**SETTINGS, "comm": cluster})
    assert plan.fingerprint == solve(operators, limit, **SETTINGS).fingerprint


def test_arguments_are_checked() -> None:
    """Errors name the argument, and what is allowed."""
    operator = Operator("w", 5)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"memory_limit": "much"}, "memory_limit='much'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"base_memory": -1}, "base_memory=-1"),
        ({"time_limit": -1}, "time_limit=-1"),
        ({"operators": [operator, operator]}, "name 'w' occurs 2 times"),
        ({"modes": ["fsdp"]}, "mode 'fsdp'"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            solve(**{"operators": [operator], "memory_limit": 10**6, **SETTINGS, **change})
