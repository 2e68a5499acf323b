"""Replicated operators share all-reduces: who may, how many bytes, and what plans and prices make of it."""

from __future__ import annotations

import pytest

from lightning_hetu.planning import HybridPlan, LayerStrategy
from lightning_hetu.planning.osdp import CallOverhead, HostLink, Operator, OperatorCosts, OperatorPlan, OSDPPlan, Ring
from lightning_hetu.planning.osdp.buckets import largest_replicated, with_buckets
from lightning_hetu.planning.osdp.costs import CollectiveCount

RING = Ring(1e-9, latency=1e-4)


def joined(sizes: dict[str, int], cap: int, modes: dict[str, str] | None = None, **changes: Operator) -> OSDPPlan:
    """Operators of so many parameters, all replicated but those with another mode, in buckets of ``cap`` bytes."""
    costs = OperatorCosts(4, RING)
    operators = [changes.get(name, Operator(name, size)) for name, size in sizes.items()]
    rows = []
    for operator in operators:
        parts = (((modes or {}).get(operator.name, "dp"), 1),)
        rows.append(OperatorPlan(operator.name, parts, collectives=costs.collectives(operator, parts)))
    return with_buckets(OSDPPlan(4, tuple(rows)), operators, set(sizes), costs.dtypes, cap)


def buckets(plan: OSDPPlan) -> list[list[str]]:
    found: dict[str, list[str]] = {}
    for row in plan.operators:
        if row.bucket:
            found.setdefault(row.bucket, []).append(row.name)
    return list(found.values())


def test_buckets_are_filled_from_the_end() -> None:
    """The last gradients come first; the bytes and calls are those of the buckets."""
    plan = joined({"a": 10, "b": 20, "c": 30, "d": 40, "e": 500, "f": 5}, 4 * 70)
    assert buckets(plan) == [["a", "b"], ["c", "d"]]  # e is larger than a bucket, and f was behind it
    assert plan.collectives == (CollectiveCount("all_reduce", 4, 4, 4 * 605),)
    assert plan["a"].collectives == (CollectiveCount("all_reduce", 4, 1, 4 * 30),) and not plan["b"].collectives
    assert plan.fingerprint != joined({"a": 10, "b": 20, "c": 30, "d": 40, "e": 500, "f": 5}, 1).fingerprint
    assert OSDPPlan.from_json(plan.to_json()) == plan


def test_who_shares_a_bucket() -> None:
    """Replicated and trained ones in one dtype; what lies between does not matter, what lies inside does."""
    sizes = dict.fromkeys(["a", "b", "b.in", "c", "d"], 10)
    assert buckets(joined(sizes, 10**6, {"c": "z2"})) == [["a", "b.in", "d"]]  # b is around b.in
    frozen = Operator("d", 10, trained=False)
    assert buckets(joined(sizes, 10**6, d=frozen)) == [["a", "b.in", "c"]]
    blocks = dict.fromkeys(["x", "x.in", "y", "y.in"], 10)
    assert buckets(joined(blocks, 10**6)) == [["x", "y"], ["x.in", "y.in"]]
    half = Operator("a", 10, dtype_bytes=2)
    assert buckets(joined({"a": 10, "b": 10, "c": 10}, 10**6, a=half)) == [["b", "c"]]
    assert buckets(joined({"a": 10, "b": 10}, 10)) == []
    assert largest_replicated(joined({"a": 10, "b": 30}, 10, {"b": "zdp"})) == 40


def test_prices_of_buckets() -> None:
    """Operators pay their share of one bucket's all-reduce; slices and large ones pay for their own."""
    operator = Operator("a", 1000, max_slices=2, cuts=("output",))
    alone, shared = OperatorCosts(4, RING), OperatorCosts(4, RING, bucket_bytes=16_000)
    before, after = ({o.parts: o.seconds for o in costs.options(operator)} for costs in (alone, shared))
    assert 4 * after[("dp", 1),] == pytest.approx(RING.seconds("all_reduce", 4, 16_000))
    assert before[("dp", 1),] == pytest.approx(RING.seconds("all_reduce", 4, 4000))
    others = [parts for parts in before if parts != (("dp", 1),)]
    assert len(others) > 2 and all(after[parts] == before[parts] for parts in others)
    large = Operator("b", 10_000)
    assert shared.options(large) == alone.options(large)


def test_overhead_of_calls_is_added_once_per_call() -> None:
    link = CallOverhead(HostLink(RING, 1e-10), 0.5)
    assert link.seconds("all_gather", 4, 100) == 0.5 + RING.seconds("all_gather", 4, 100)
    assert link.seconds("all_gather", 1, 100) == link.seconds("all_gather", 4, 0) == 0
    assert link.host_seconds_per_byte == 1e-10


def test_plans_of_the_other_kind_are_named() -> None:
    plan = joined({"a": 10}, 10)
    with pytest.raises(ValueError, match="it is a plan of operators, of hetu_osdp: expected a hybrid-parallel plan"):
        HybridPlan.from_dict(plan.to_dict())
    other = HybridPlan.uniform(LayerStrategy(dp=2), num_layers=1, global_batch_size=2)
    with pytest.raises(ValueError, match="it is a hybrid-parallel plan, of hetu_auto: expected a plan of operators"):
        OSDPPlan.from_dict(other.to_dict())
