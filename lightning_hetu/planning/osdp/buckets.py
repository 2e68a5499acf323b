"""Replicated operators whose gradients are reduced together, as DistributedDataParallel does with its buckets.

An all-reduce of one operator costs latency, and on the host the work of starting it. What is replicated waits for
nothing in forward, so its gradients may as well travel together; they need a buffer of the size of a bucket then.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from lightning_hetu.planning.osdp.costs import CollectiveCount
from lightning_hetu.planning.osdp.operator import Operator
from lightning_hetu.planning.osdp.plan import OperatorPlan, OSDPPlan

BUCKET_BYTES = 25 * 2**20
"""Size from which an all-reduce is efficient: DistributedDataParallel's ``bucket_cap_mb``."""


def with_buckets(
    plan: OSDPPlan,
    operators: Collection[Operator],
    joinable: Collection[str],
    dtypes: Callable[[Operator], tuple[int, int]],
    bucket_bytes: int,
) -> OSDPPlan:
    """The plan with the gradients of replicated operators reduced in buckets.

    Buckets are filled from the last operator to the first one, the order in which gradients appear, so that the first
    bucket is full, and reduced, as early as possible.

    Args:
        plan: A plan without buckets.
        operators: Its operators.
        joinable: Names of the operators that may join others: those that run in every step and get gradients.
        dtypes: Bytes per gathered and per reduced element of an operator.
        bucket_bytes: Most bytes of gradients in a bucket; a larger operator is one of its own.
    """
    known = {operator.name: operator for operator in operators}
    # One inside of another cannot be in the same bucket, so several may be open at a time.
    open_: dict[tuple[int, int, int], list[list[OperatorPlan]]] = {}
    filled: list[list[OperatorPlan]] = []
    for row in reversed(plan.operators):
        operator = known[row.name]
        if row.parts != (("dp", 1),) or row.tied or row.name not in joinable or not operator.trained:
            continue
        key = operator.dtype_bytes, *dtypes(operator)
        buckets = open_.setdefault(key, [])
        bucket = next((b for b in buckets if not any(_nested(row.name, other.name) for other in b)), None)
        if bucket is None:
            buckets.append([row])
            continue
        if key[2] * (operator.parameters + sum(known[other.name].parameters for other in bucket)) > bucket_bytes:
            filled.append(bucket[:])
            bucket.clear()
        bucket.append(row)
    changed: dict[str, OperatorPlan] = {}
    for bucket in (*filled, *(bucket for buckets in open_.values() for bucket in buckets)):
        if len(bucket) > 1:
            first, *others = bucket[::-1]
            calls = _together([count for row in bucket for count in row.collectives])
            changed[first.name] = replace(first, bucket=first.name, collectives=calls)
            changed |= {row.name: replace(row, bucket=first.name, collectives=()) for row in others}
    return replace(plan, operators=tuple(changed.get(row.name, row) for row in plan.operators))


def largest_replicated(plan: OSDPPlan) -> int:
    """Bytes of gradients of the largest replicated operator; its own reduction needs a buffer of that size anyway."""
    counts = (row.collectives for row in plan.operators if row.parts == (("dp", 1),))
    return max((count.bytes // count.calls for row in counts for count in row), default=0)


def _nested(one: str, other: str) -> bool:
    return one.startswith(f"{other}.") or other.startswith(f"{one}.")


def _together(counts: list[CollectiveCount]) -> tuple[CollectiveCount, ...]:
    """The all-reduces of all, as one each time."""
    if not counts:
        return ()
    return (counts[0]._replace(bytes=sum(count.bytes for count in counts)),)
