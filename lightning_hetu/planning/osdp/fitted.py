"""OSDP under a memory limit that the played step keeps, not only the sum of its parts.

The search of OSDP (arXiv 2209.13258, and ``solver`` here) needs memory that adds up over operators. Over a step it does
so at every single point, but the peak does not. So ``staircase`` makes plans from the fastest to the smallest by what
operators hold at all points, and the search by sums makes more; their timelines decide which ones fit, and the fastest
of those is taken. Where there are too many plans to play them all, bisection visits some. The order of its plans is the
same for every limit, and plans further on are never faster; therefore a larger limit never gives a slower plan: where
the paths of two limits part, the larger one has a plan that fits, and all that the smaller one still visits are slower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lightning_hetu.planning.osdp.buckets import BUCKET_BYTES, largest_replicated, with_buckets
from lightning_hetu.planning.osdp.costs import MemoryConstants, Option, Part
from lightning_hetu.planning.osdp.fsdp2 import Runtime
from lightning_hetu.planning.osdp.operator import Operator
from lightning_hetu.planning.osdp.plan import OSDPPlan
from lightning_hetu.planning.osdp.problem import OSDPInfeasibleError, Problem
from lightning_hetu.planning.osdp.solver import Item, Proof, Solution, solve_knapsack
from lightning_hetu.planning.osdp.staircase import Choices, descend
from lightning_hetu.planning.osdp.timeline import ROOT, StepProfile, StepSettings, play_owners, play_step
from lightning_hetu.planning.units import format_bytes

_LEVELS = 48
"""Levels of the peak for which plans are made; between two of them are those on the way."""
_PLAYED = 3000
"""Operators times plans up to which all are played: half a second."""
_OPTIONS = 8
"""Options of an operator that are looked at on the way down, besides those that leave it whole."""
_DEPTH = 10
"""Halvings of the limit of the sum."""
_PROVEN = 1e-9
"""Gaps below this are rounding."""
_NOTHING_BUT_KEPT = MemoryConstants(0.0, 0.0, 0.0, gradients_replace_gathered=False)


@dataclass(frozen=True)
class FittedProblem:
    """A problem whose memory is that of the timeline.

    Args:
        problem: The problem with additive memory. Its ``base`` is on top of that of the profile.
        profile: What the model does in a step.
        runtime: What devices and process groups do.
    """

    problem: Problem
    profile: StepProfile
    runtime: Runtime

    def __post_init__(self) -> None:
        if {op.name for op in self.problem.operators} != {op.name for op in self.profile.operators}:
            raise ValueError("profile.operators: expected those that are planned.")

    @property
    def compute_seconds(self) -> float:
        """Seconds of forward and backward of all micro-steps per sample."""
        return self.problem.compute_seconds

    def _settings(self, batch_size: int) -> StepSettings:
        costs = self.problem.costs
        return StepSettings(
            costs.world_size,
            costs.micro_steps,
            costs.accumulation,
            costs.gather_bytes,
            costs.reduce_bytes,
            costs.optimizer_values,
            batch_size,
            self.problem.base,
            self.runtime,
        )

    def largest_multiple(self, limit: int, multiple: int) -> int:
        """How many times ``multiple`` samples surely fit; may be 0."""

        def fits(count: int) -> bool:
            return any(plan.peak_memory <= limit for plan in self._small_plans(count * multiple, 1.0, limit))

        if not fits(1):
            return 0
        least, most = 1, 2
        while most < 2**31 and fits(most):
            least, most = most, 2 * most
        while most - least > 1:
            middle = (least + most) // 2
            least, most = (middle, most) if fits(middle) else (least, middle)
        return least

    def solve(self, limit: int | None, batch_size: int, time_limit: float, tolerance: float) -> OSDPPlan:
        """The best plan for a batch size; see :func:`lightning_hetu.planning.osdp.solve`.

        Raises:
            OSDPInfeasibleError: If no plan fits.
        """
        share = time_limit / (_DEPTH + 4)
        fastest = self._played(self.problem.solve(None, batch_size, share, tolerance), limit)
        if limit is None or fastest.peak_memory <= limit:
            return replace(fastest, memory_limit=limit)
        tried = [*self._small_plans(batch_size, share, limit), *self._descent(limit, batch_size)]
        low = self.problem.least() + self.problem.fixed(batch_size)
        high = max(replace(fastest, points=()).peak_memory, low)
        for _ in range(_DEPTH):
            middle = (low + high) // 2
            tried.append(self._played(self.problem.solve(middle, batch_size, share, tolerance), limit))
            low, high = (middle, high) if tried[-1].peak_memory <= limit else (low, middle)
        fitting = [plan for plan in tried if plan.peak_memory <= limit]
        if not fitting:
            raise self._infeasible(limit, min(tried, key=lambda plan: plan.peak_memory))
        best = min(fitting, key=lambda plan: (plan.communication_seconds, plan.peak_memory))
        hurried = any(plan.proof == "time limit" for plan in tried)
        gap = self._gap(best, limit, batch_size, share)
        proof: Proof = "complete" if gap < _PROVEN else "time limit" if hurried else "bounded"
        price = _price_of_memory(best, [fastest, *tried], limit)
        return replace(best, memory_limit=limit, gap=gap, proof=proof, shadow_price=price)

    def _descent(self, limit: int, batch_size: int) -> Iterator[OSDPPlan]:
        """Plans along the staircase: all of them, or those that bisection visits if there are many."""
        plans = descend(self._choices(batch_size), _LEVELS)

        def played(number: int) -> OSDPPlan:
            return self._played(self._unplayed(plans[number][0], batch_size), limit)

        if len(plans) * len(self.problem.operators) <= _PLAYED:
            yield from (played(number) for number in range(len(plans)))
            return
        first, last = 0, len(plans) - 1
        yield played(last)
        while first < last:
            middle = (first + last) // 2
            plan = played(middle)
            yield plan
            first, last = (first, middle) if plan.peak_memory <= limit else (middle + 1, last)

    def _choices(self, batch_size: int) -> Choices:
        """What the options hold at every point, from steps in which all operators have options of one number."""
        units = self.problem.units
        rows = [_worth_a_look(row) for row in self.problem.options]
        first_of = {op.tied: op.name for op in reversed(self.problem.operators) if op.tied}
        unit_of = {op.name: first_of.get(op.tied, op.name) for op in self.problem.operators}
        members: dict[str, list[int]] = {}
        for number, operator in enumerate(self.profile.operators):
            members.setdefault(unit_of[operator.name], []).append(number)
        settings, tables = self._settings(batch_size), []
        for number in range(max(map(len, rows))):
            parts = {
                unit.name: all_of_it[row[min(number, len(row) - 1)]].parts
                for unit, row, all_of_it in zip(units, rows, self.problem.options, strict=True)
            }
            owned = play_owners(self.profile, {name: parts[unit] for name, unit in unit_of.items()}, settings)
            tables.append(np.array(owned, dtype=float))
        memory = [
            np.array([tables[i][:, members[unit.name]].sum(axis=1) for i in range(len(row))])
            for unit, row in zip(units, rows, strict=True)
        ]
        seconds = [[options[i].seconds for i in row] for row, options in zip(rows, self.problem.options, strict=True)]
        return Choices.build(rows, seconds, memory, tables[0][:, -1])

    def _unplayed(self, options: Sequence[int], batch_size: int) -> OSDPPlan:
        return self.problem.plan(Solution(tuple(options), 0.0, 0.0, 0.0, "bounded"), None, batch_size)

    def _played(self, plan: OSDPPlan, limit: int | None) -> OSDPPlan:
        """The plan with its memory; its buckets are as large as the limit allows."""
        settings, costs = self._settings(plan.batch_size), self.problem.costs
        for size in (BUCKET_BYTES, largest_replicated(plan)):
            joined = with_buckets(plan, self.problem.operators, self._joinable, costs.dtypes, size)
            buckets = {row.name: row.bucket for row in joined.operators if row.bucket}
            timeline = play_step(self.profile, _parts(plan), settings, buckets)
            if not buckets or limit is None or timeline.peak <= limit:
                break
        return replace(joined, points=timeline.compact())

    @cached_property
    def _joinable(self) -> frozenset[str]:
        """Operators that run once, and get a gradient for each of their parameters."""
        units = self.profile.operators
        return frozenset(unit.name for unit in units if unit.name in self._called - {ROOT} and self._all_trained(unit))

    @cached_property
    def _called(self) -> frozenset[str]:
        return frozenset(moment.unit for moment in self.profile.moments if moment.kind == "enter")

    @cached_property
    def _trained(self) -> frozenset[tuple[str, int]]:
        return frozenset((m.unit, m.parameter) for m in self.profile.moments if m.kind == "gradient")

    def _all_trained(self, unit: Operator) -> bool:
        """Whether each of its parameters gets a gradient."""
        return all((unit.name, index) in self._trained for index in range(len(unit.shapes) or 1))

    def _small_plans(self, batch_size: int, time_limit: float, limit: int) -> Iterator[OSDPPlan]:
        """Plans with little memory, the same for every limit: that of the smallest sum, and those of one mode."""
        least = self.problem.least() + self.problem.fixed(batch_size)
        yield self._played(self.problem.solve(least, batch_size, time_limit, 0.0), limit)
        for mode in self.problem.costs.modes:
            for wanted in (min, max):
                options = [_uniform(row, mode, wanted) for row in self.problem.options]
                yield self._played(self._unplayed(options, batch_size), limit)

    def _gap(self, plan: OSDPPlan, limit: int, batch_size: int, time_limit: float) -> float:
        """How much faster any plan can be.

        When the first forward ends, every plan has its states, what it keeps gathered, and the activations.
        """
        costs = replace(self.problem.costs, constants=_NOTHING_BUT_KEPT)
        least = Problem.build(self.problem.operators, costs, 0)
        items = []
        for unit, row in zip(least.units, least.options, strict=True):
            sure = self._all_trained(unit)
            sizes = [
                option.parameters
                + sure * (option.optimizer + self.runtime.stale_gradients * option.parameters)
                + (unit.name in self._called) * option.gathered
                for option in row
            ]
            columns = [(option.seconds, size, 0, 0) for option, size in zip(row, sizes, strict=True)]
            items.append(Item(*zip(*columns, strict=True)))
        room = limit - self.problem.base - self.profile.base
        room -= math.floor(self.profile.batch.of(batch_size) + self.profile.activations_kept(batch_size))
        bound = solve_knapsack(items, room, time_limit=time_limit).bound
        seconds = plan.communication_seconds
        return max(1 - bound / seconds, 0.0) if seconds else 0.0

    def _infeasible(self, limit: int, plan: OSDPPlan) -> OSDPInfeasibleError:
        """The error that says what the limit lacks, and what would help."""
        batch_size, smallest = plan.batch_size, plan.peak_memory
        largest = max(plan.operators, key=lambda operator: operator.transient).name
        helps = []
        for slices, problem in self.problem.with_slices(largest):
            needed = self._other(problem)._least(batch_size)
            if needed < smallest:
                helps = [f"split {largest!r} into {slices} slices ({format_bytes(needed)})"]
            if needed <= limit:
                break
        if "off" not in self.problem.costs.modes:
            needed = self._other(self.problem.with_offload())._least(batch_size)
            helps += [f"allow mode 'off' ({format_bytes(needed)})"] if needed < smallest else []
        if activations := plan.memory["activations"]:
            helps.append(f"recompute activations (at best {format_bytes(smallest - activations)})")
        return OSDPInfeasibleError(limit, plan.memory, largest, helps)

    def _other(self, problem: Problem) -> FittedProblem:
        return FittedProblem(problem, replace(self.profile, operators=problem.operators), self.runtime)

    def _least(self, batch_size: int) -> int:
        return min(plan.peak_memory for plan in self._small_plans(batch_size, 1.0, 0))


def _price_of_memory(best: OSDPPlan, others: Sequence[OSDPPlan], limit: int) -> float:
    """Seconds saved per byte on the way to the plan that saves most for what it needs beyond the limit."""
    saved = ((best.communication_seconds - plan.communication_seconds, plan.peak_memory - limit) for plan in others)
    return max((seconds / size for seconds, size in saved if size > 0 and seconds > 0), default=0.0)


def _worth_a_look(options: Sequence[Option]) -> list[int]:
    """Numbers of the options that are whole, and of those that no other one beats in seconds and in bytes."""
    order = sorted(range(len(options)), key=lambda i: (options[i].seconds, options[i].memory + options[i].transient))
    kept: list[int] = []
    least = math.inf
    for i in order:
        size = options[i].memory + options[i].transient
        if size < least:
            kept.append(i)
            least = size
    if len(kept) > _OPTIONS:
        kept = [kept[i] for i in sorted({round(j * (len(kept) - 1) / (_OPTIONS - 1)) for j in range(_OPTIONS)})]
    whole = [i for i, option in enumerate(options) if sum(count for _, count in option.parts) == 1]
    return sorted({*kept, *whole})


def _uniform(row: Sequence[Option], mode: str, wanted: Callable[..., int]) -> int:
    """The option with fewest, or most, slices that are all in one mode."""
    alike = [index for index, option in enumerate(row) if {part[0] for part in option.parts} == {mode}]
    # An operator that cannot have the mode has what needs least.
    alike = alike or [min(range(len(row)), key=lambda index: row[index].memory + row[index].transient)]
    return wanted(alike, key=lambda index: sum(count for _, count in row[index].parts))


def _parts(plan: OSDPPlan) -> dict[str, tuple[Part, ...]]:
    return {operator.name: operator.parts for operator in plan.operators}
