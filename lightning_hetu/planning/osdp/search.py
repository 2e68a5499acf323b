"""The search for the best OSDP plan, for a batch size that is given or searched as well."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypedDict, Unpack

from lightning_hetu.planning.osdp.buckets import BUCKET_BYTES
from lightning_hetu.planning.osdp.costs import (
    Accumulation,
    MemoryConstants,
    OperatorCosts,
)
from lightning_hetu.planning.osdp.fitted import FittedProblem
from lightning_hetu.planning.osdp.fsdp2 import GLOO, Runtime
from lightning_hetu.planning.osdp.links import CollectiveSeconds
from lightning_hetu.planning.osdp.operator import Operator
from lightning_hetu.planning.osdp.plan import OSDPPlan
from lightning_hetu.planning.osdp.problem import Problem
from lightning_hetu.planning.osdp.timeline import StepProfile
from lightning_hetu.planning.units import parse_bytes

# Batch sizes that promise less than this over the best one are not looked at.
_RATE_TOLERANCE = 1e-4


class CostArguments(TypedDict, total=False):
    """What :func:`solve` passes on to :class:`OperatorCosts`, where it is described."""

    micro_steps: int
    accumulation: Accumulation
    gather_bytes: int | None
    reduce_bytes: int | None
    optimizer_values: float
    constants: MemoryConstants


def solve(
    operators: Iterable[Operator],
    memory_limit: int | float | str | None,
    *,
    modes: Sequence[str] = ("dp", "z2", "zdp"),
    world_size: int,
    comm: CollectiveSeconds,
    batch_size: int = 1,
    base_memory: int = 0,
    time_limit: float = 4.0,
    tolerance: float = 0.0,
    profile: StepProfile | None = None,
    runtime: Runtime = GLOO,
    **costs: Unpack[CostArguments],
) -> OSDPPlan:
    """Finds the modes with the least communication that fit the memory limit.

    Of equally fast plans the one with less memory is taken, then the one with fewer gather groups, then the first one
    in a fixed order of operators' costs and modes. Of operators with equal costs, the first names, with numbers in
    them compared as numbers, get the modes that keep more. The order of ``operators`` does not matter for that.

    Args:
        operators: The operators in the order of the model.
        memory_limit: Bytes per rank, as a number or as text such as ``"20GiB"``; ``None`` or infinity for no limit.
        modes: Allowed modes; see :class:`OperatorCosts`.
        world_size: Data-parallel ranks.
        comm: What knows how long collectives take: :class:`Ring`, a ``ClusterSpec``, or anything with such a
            ``seconds(op, ranks, bytes)``. Mode ``off`` needs its ``host_seconds_per_byte``; see :class:`HostLink`.
        batch_size: Samples per rank and micro-step.
        base_memory: Bytes per rank of all that the operators do not list.
        time_limit: Seconds of search after which the best plan so far is returned with a certified gap.
        tolerance: Gap at which the search may end before it has proven the best plan.
        profile: What the model does in a step, of the same operators. With it the memory of plans is that of the
            played step (see ``timeline``), and the limit is kept by its peak.
        runtime: Where devices and process groups differ in memory; counts with a profile only.
        **costs: ``micro_steps``, ``accumulation``, ``gather_bytes``, ``reduce_bytes``, ``optimizer_values`` and
            ``constants`` of :class:`OperatorCosts`.

    Raises:
        OSDPInfeasibleError: If nothing fits.
        ValueError: If an argument is out of range, or names of operators are not unique.
    """
    problem = _problem(operators, OperatorCosts(world_size, comm, tuple(modes), **costs), base_memory, profile, runtime)
    return problem.solve(_parse_limit(memory_limit), batch_size, time_limit, tolerance)


def solve_batch(
    operators: Iterable[Operator],
    memory_limit: int | float | str | None,
    *,
    modes: Sequence[str] = ("dp", "z2", "zdp"),
    world_size: int,
    comm: CollectiveSeconds,
    max_batch_size: int = 4096,
    batch_multiple: int = 1,
    base_memory: int = 0,
    time_limit: float = 4.0,
    tolerance: float = 0.0,
    profile: StepProfile | None = None,
    runtime: Runtime = GLOO,
    **costs: Unpack[CostArguments],
) -> OSDPPlan:
    """Finds the batch size per rank with the most samples per second, and the best plan for it.

    Larger batches leave less memory for gathered operators, but share the communication of a step. Every batch size
    that could be better by more than a ten-thousandth is looked at: of an interval, the communication of its smallest
    batch and the computation of its largest one are a bound. The smaller one of equally good batch sizes is taken.

    Args:
        operators: See :func:`solve`; activations and computation grow linearly with the batch.
        memory_limit: See :func:`solve`.
        modes: See :func:`solve`.
        world_size: See :func:`solve`.
        comm: See :func:`solve`.
        max_batch_size: Largest batch size per rank and micro-step.
        batch_multiple: Batch sizes are multiples of it.
        base_memory: See :func:`solve`.
        time_limit: Seconds of search for one batch size.
        tolerance: See :func:`solve`.
        profile: See :func:`solve`.
        runtime: See :func:`solve`.
        **costs: See :func:`solve`.

    Raises:
        OSDPInfeasibleError: If the smallest batch size does not fit.
        ValueError: If an argument is out of range, or a step costs nothing, so that all batches are equally good.
    """
    for name, value in (("batch_multiple", batch_multiple), ("max_batch_size", max_batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < batch_multiple or value < 1:
            raise ValueError(f"{name}={value!r}: expected an integer of at least {max(batch_multiple, 1)}.")
    problem = _problem(operators, OperatorCosts(world_size, comm, tuple(modes), **costs), base_memory, profile, runtime)
    limit = _parse_limit(memory_limit)
    largest = max_batch_size // batch_multiple
    if limit is not None:
        largest = min(largest, problem.largest_multiple(limit, batch_multiple))
    plans: dict[int, OSDPPlan] = {}

    def plan_for(multiple: int) -> OSDPPlan:
        if multiple not in plans:
            plans[multiple] = problem.solve(limit, multiple * batch_multiple, time_limit, tolerance)
        return plans[multiple]

    def rate(plan: OSDPPlan) -> float:
        if not plan.seconds:
            raise ValueError("forward_seconds: all are 0 and so is communication; expected a step that takes time.")
        return plan.batch_size / plan.seconds

    compute = problem.compute_seconds * batch_multiple
    plan_for(1)
    best = max(rate(plan_for(max(largest, 1))), rate(plans[1]))
    heap: list[tuple[float, int, int]] = []

    def push(first: int, last: int) -> None:
        inside = last - 1
        if inside > first:
            least = plans[first].communication_seconds * (1 - plans[first].gap) + inside * compute
            bound = inside * batch_multiple / least if least else math.inf
            heapq.heappush(heap, (-bound, first, last))

    push(1, largest)
    while heap and -heap[0][0] > best * (1 + _RATE_TOLERANCE):
        _, first, last = heapq.heappop(heap)
        middle = (first + last) // 2
        best = max(best, rate(plan_for(middle)))
        push(first, middle)
        push(middle, last)
    return max((plans[multiple] for multiple in sorted(plans)), key=rate)


def _problem(
    operators: Iterable[Operator], costs: OperatorCosts, base: int, profile: StepProfile | None, runtime: Runtime
) -> Problem | FittedProblem:
    if profile is None:
        return Problem.build(operators, costs, base)
    dtypes = {**profile.dtypes, **costs.operator_dtypes}
    costs = replace(costs, operator_dtypes=dtypes)
    # No bucket is larger than all gradients together.
    everything = sum(costs.dtypes(operator)[1] * operator.parameters for operator in profile.operators)
    costs = replace(costs, bucket_bytes=max(min(BUCKET_BYTES, everything), 1))
    return FittedProblem(Problem.build(operators, costs, base), profile, runtime)


def _parse_limit(value: int | float | str | None) -> int | None:
    if value is None or value == math.inf:
        return None
    return parse_bytes(value, name="memory_limit")
