"""OSDP for one model: its operators with their options, what fits, and what to say where nothing does."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_hetu.planning.errors import NoFeasiblePlanError
from lightning_hetu.planning.osdp.costs import OperatorCosts, Option
from lightning_hetu.planning.osdp.links import HostLink
from lightning_hetu.planning.osdp.operator import Operator
from lightning_hetu.planning.osdp.overlap import SliceStep, overlapped_seconds
from lightning_hetu.planning.osdp.plan import OperatorPlan, OSDPPlan
from lightning_hetu.planning.osdp.solver import Item, Solution, least_memory, solve_knapsack
from lightning_hetu.planning.units import format_bytes

# Slices that the error for infeasible limits tries on the largest operator.
_TRIED_SLICES = (2, 4, 8, 16, 32)
_DIGITS = "0123456789"


class OSDPInfeasibleError(NoFeasiblePlanError):
    """No choice of modes fits the memory limit.

    Args:
        memory_limit: Bytes per rank that the search was given.
        smallest: Bytes per rank by category of the plan that needs fewest.
        largest_operator: Name of the operator whose buffers are the largest in that plan.
        suggestions: What would help, each with the bytes that would be needed then.

    Attributes:
        memory_limit: As above.
        smallest: As above.
        smallest_feasible_limit: Fewest bytes per rank with which there is a plan.
        largest_operator: As above.
        suggestions: As above.
    """

    def __init__(
        self, memory_limit: int, smallest: Mapping[str, int], largest_operator: str, suggestions: Sequence[str]
    ) -> None:
        total = sum(smallest.values())
        super().__init__(memory_limit, total)
        self.memory_limit = memory_limit
        self.smallest = dict(smallest)
        self.smallest_feasible_limit = total
        self.largest_operator = largest_operator
        self.suggestions = tuple(suggestions)
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in smallest.items() if size)
        helps = f" What would help: {'; '.join(suggestions)}." if suggestions else ""
        self.args = (
            f"memory_limit={memory_limit} ({format_bytes(memory_limit)} per rank): no plan fits; the smallest feasible"
            f" memory_limit is {total} ({format_bytes(total)}: {parts}); the operator with the largest buffers is"
            f" {largest_operator!r}.{helps}",
        )

    def __reduce__(self) -> tuple[type[OSDPInfeasibleError], tuple[Any, ...]]:
        return type(self), (self.memory_limit, self.smallest, self.largest_operator, self.suggestions)


def _natural(name: str) -> tuple[list[tuple[bool, int, str]], str]:
    """Sort key by which ``layer.9`` is in front of ``layer.10``."""
    pieces = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(piece[0] in _DIGITS, int(piece) if piece[0] in _DIGITS else 0, piece) for piece in pieces], name


@dataclass(frozen=True)
class Problem:
    """Operators, tied ones as one unit, with their options; units are in the order of names."""

    operators: tuple[Operator, ...]
    costs: OperatorCosts
    base: int
    units: tuple[Operator, ...] = ()
    options: tuple[tuple[Option, ...], ...] = ()
    items: tuple[Item, ...] = field(default=(), repr=False)

    @classmethod
    def build(cls, operators: Iterable[Operator], costs: OperatorCosts, base: int) -> Problem:
        """Works out the options of all operators.

        Args:
            operators: The operators in the order of the model.
            costs: What options cost.
            base: Bytes of all that the operators do not list.

        Raises:
            ValueError: If names occur twice, or tied operators contradict each other.
        """
        operators = tuple(operators)
        if isinstance(base, bool) or not isinstance(base, int) or base < 0:
            raise ValueError(f"base_memory={base!r}: expected an integer of at least 0.")
        names = [operator.name for operator in operators]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"operators: name {twice!r} occurs {names.count(twice)} times, expected once.")
        units = tuple(_units(operators))
        known: dict[tuple[Operator, tuple[int, int]], tuple[Option, ...]] = {}
        options = []
        for unit in units:
            # All that the costs depend on; names and activations differ between operators with the same options.
            like = replace(
                unit, name="-", kind="", tied="", activation_bytes=0.0, forward_seconds=0, backward_seconds=0
            )
            key = like, costs.dtypes(unit)
            if key not in known:
                known[key] = costs.options(unit)
            options.append(known[key])
        made = {id(row): _item(row) for row in known.values()}
        return cls(operators, costs, base, units, tuple(options), tuple(made[id(row)] for row in options))

    @property
    def compute_seconds(self) -> float:
        """Seconds of forward and backward of all micro-steps per sample."""
        return self.costs.micro_steps * math.fsum(op.forward_seconds + op.backward_seconds for op in self.operators)

    @property
    def activation_bytes(self) -> float:
        """Bytes of activations per sample."""
        return math.fsum(op.activation_bytes for op in self.operators)

    def fixed(self, batch_size: int) -> int:
        """Bytes that do not depend on the plan."""
        return self.base + math.ceil(self.activation_bytes * batch_size)

    def least(self) -> int:
        """Fewest bytes of states, gathered copies and buffers."""
        return least_memory(self.items)[0]

    def largest_multiple(self, limit: int, multiple: int) -> int:
        """How many times ``multiple`` samples fit; may be 0."""
        room = limit - self.base - self.least()
        each = self.activation_bytes * multiple
        if each <= 0:
            return 0 if room < 0 else 2**31
        count = max(int(room / each) + 1, 0)
        while count and self.fixed(count * multiple) - self.base > room:
            count -= 1
        return count

    def solve(self, limit: int | None, batch_size: int, time_limit: float, tolerance: float) -> OSDPPlan:
        """The best plan for a batch size; see :func:`lightning_hetu.planning.osdp.solve`."""
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}: expected an integer of at least 1.")
        room = None if limit is None else limit - self.fixed(batch_size)
        if limit is not None and room is not None and self.least() > room:
            raise self.infeasible(limit, batch_size)
        solution = solve_knapsack(self.items, room, time_limit=time_limit, tolerance=tolerance)
        return self.plan(solution, limit, batch_size)

    def plan(self, solution: Solution, limit: int | None, batch_size: int) -> OSDPPlan:
        """The plan that a solution stands for."""
        chosen = {
            unit.name: (unit, row[index])
            for unit, row, index in zip(self.units, self.options, solution.options, strict=True)
        }
        first_of = {op.tied: op.name for op in reversed(self.operators) if op.tied}
        rows, steps = [], []
        for op in self.operators:
            unit, option = chosen[first_of.get(op.tied, op.name)]
            row = OperatorPlan(op.name, option.parts, kind=op.kind, tied=op.tied, count=op.parameters)
            if unit.name == op.name:
                cut = unit.cuts[0] if row.slices > 1 else ""
                collectives = self.costs.collectives(unit, option.parts)
                row = replace(row, cut=cut, collectives=collectives, **_without(option, "parts", "groups"))
                steps += self.slice_steps(unit, option, batch_size)
            rows.append(row)
        micro_steps, accumulation = self.costs.micro_steps, self.costs.accumulation
        return OSDPPlan(
            self.costs.world_size,
            tuple(rows),
            micro_steps=micro_steps,
            accumulation=accumulation,
            batch_size=batch_size,
            memory_limit=limit,
            activations=self.fixed(batch_size) - self.base,
            base=self.base,
            compute_seconds=self.compute_seconds * batch_size,
            overlapped_seconds=overlapped_seconds(steps, micro_steps, accumulation),
            gap=solution.gap,
            proof=solution.proof,
            shadow_price=solution.shadow_price,
        )

    def slice_steps(self, unit: Operator, option: Option, batch_size: int) -> list[SliceStep]:
        """The slices of one unit as the estimate with overlap needs them."""
        modes = [mode for mode, count in option.parts for _ in range(count)]
        extra = (len(modes) - 1) * unit.split_seconds
        compute = [t * batch_size + extra / 2 for t in (unit.forward_seconds, unit.backward_seconds)]
        forward, backward = (seconds / len(modes) for seconds in compute)
        return [
            SliceStep(
                forward,
                backward,
                self.costs.slice_seconds(unit, size, mode),
                kept=mode == "z2" and self.costs.accumulation == "hold",
            )
            for mode, size in zip(modes, self.costs.sizes(unit, len(modes)), strict=True)
        ]

    def infeasible(self, limit: int, batch_size: int) -> OSDPInfeasibleError:
        """The error that says what the limit lacks, and what would help."""
        plan = self.plan(solve_knapsack(self.items, self.least(), time_limit=1.0), None, batch_size)
        largest = max(plan.operators, key=lambda op: op.transient).name
        smallest = plan.peak_memory
        fixed = self.fixed(batch_size)
        helps = []
        for slices, problem in self.with_slices(largest):
            needed = problem.least() + fixed
            if needed < smallest:
                text = f"split {largest!r} into {slices} slices ({format_bytes(needed)})"
                helps = [text]
            if needed <= limit:
                break
        if "off" not in self.costs.modes:
            needed = self.with_offload().least() + fixed
            helps += [f"allow mode 'off' ({format_bytes(needed)})"] if needed < smallest else []
        if plan.activations:
            helps.append(f"recompute activations (at best {format_bytes(smallest - plan.activations)})")
        return OSDPInfeasibleError(limit, plan.memory, largest, helps)

    def with_offload(self) -> Problem:
        """The same problem with the host's memory, as if copies to it took no time."""
        costs = replace(self.costs, comm=HostLink(self.costs.comm, 0.0), modes=(*self.costs.modes, "off"))
        return Problem.build(self.operators, costs, self.base)

    def with_slices(self, name: str) -> Iterable[tuple[int, Problem]]:
        """The same problem with more slices of one operator, if it can be cut."""
        operator = next(op for op in self.operators if op.name == name)
        for slices in _TRIED_SLICES:
            if slices <= operator.max_slices or operator.tied:
                continue
            try:
                split = replace(operator, max_slices=slices, cuts=operator.cuts or ("output",))
            except ValueError:  # too small for so many slices
                return
            others = (split if op.name == name else op for op in self.operators)
            yield slices, Problem.build(others, self.costs, self.base)


def _without(option: Option, *names: str) -> dict[str, Any]:
    return {name: value for name, value in option._asdict().items() if name not in names}


def _item(options: Sequence[Option]) -> Item:
    """The columns of the knapsack's item."""
    columns = [(option.seconds, option.memory, option.transient, option.groups) for option in options]
    return Item(*zip(*columns, strict=True))


def _units(operators: Sequence[Operator]) -> list[Operator]:
    """Operators in the order of names, and of tied ones the first in the model with the parameters of all."""
    groups: dict[tuple[str, str], list[Operator]] = {}
    for operator in operators:
        groups.setdefault(("tied", operator.tied) if operator.tied else ("", operator.name), []).append(operator)
    units = [_merge(group) if len(group) > 1 else group[0] for group in groups.values()]
    return sorted(units, key=lambda unit: _natural(unit.name))


def _merge(group: Sequence[Operator]) -> Operator:
    first = group[0]
    for name in ("dtype_bytes", "trained"):
        if len({getattr(op, name) for op in group}) > 1:
            values = ", ".join(f"{op.name!r} {getattr(op, name)}" for op in group)
            raise ValueError(f"operators tied as {first.tied!r}: {name} of {values}: expected the same value.")
    known = all(op.shapes or not op.parameters for op in group)
    return replace(
        first,
        parameters=sum(op.parameters for op in group),
        shapes=tuple(shape for op in group for shape in op.shapes) if known else (),
        excluded=tuple(sorted({mode for op in group for mode in op.excluded})),
        forward_seconds=math.fsum(op.forward_seconds for op in group),
        backward_seconds=math.fsum(op.backward_seconds for op in group),
    )
