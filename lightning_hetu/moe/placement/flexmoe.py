"""Ways to a better placement: one found step by step, and some to placements that are made from nothing.

Edits of what is there move few experts, but can end where no small edit helps; a new placement has nothing of that, but
moves most experts. Both are estimated with the same prices, and those that look best are returned.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from lightning_hetu.moe.placement.eplb import constructed
from lightning_hetu.moe.placement.even_search import EvenState
from lightning_hetu.moe.placement.exhaustive import MOST_SLOTS, exhaustive
from lightning_hetu.moe.placement.flow_search import MOST_RANKS, FlowState
from lightning_hetu.moe.placement.greedy import Effort, Prices, State, improve
from lightning_hetu.moe.placement.moves import Floats, Layout
from lightning_hetu.moe.placement.operations import Operation
from lightning_hetu.moe.placement.placement import FREE, Placement
from lightning_hetu.moe.placement.split import SplitName
from lightning_hetu.moe.placement.transition import num_missing, relabel, transition

_FEW_SLOTS = 32  # ranks times slots for which all moves are tried; 24 take up to about 10 ms
_STARTS = 2  # new placements that are improved, where there are few slots


@dataclass(frozen=True)
class Problem:
    """What is to be improved.

    Args:
        placement: Where experts are.
        loads: Tokens of each expert, relative to the mean load of a rank.
        sources: The same by the rank they come from, ``[ranks, experts]``.
        split: How tokens are split.
        prices: What counts besides balance.
        max_ops: Most operations.
    """

    placement: Placement
    loads: Sequence[float]
    sources: Floats
    split: SplitName
    prices: Prices
    max_ops: int

    def state(self, placement: Placement) -> State:
        """A placement as the search sees it: with many ranks the optimal split is searched as the even one."""
        layout = Layout(placement, self.loads, self.sources)
        few = placement.num_ranks <= MOST_RANKS
        return FlowState(layout) if self.split == "flow" and few else EvenState(layout)

    def effort(self) -> Effort:
        """How much to try: the less, the more slots there are."""
        size = self.placement.num_ranks * self.placement.num_slots
        if size <= _FEW_SLOTS:
            return Effort(wide=True, ahead=12, looks=3, moves=64, least_gain=1e-9, least_room=0.005)
        return Effort(
            wide=False, ahead=3, looks=1, moves=6 + self.placement.num_ranks, least_gain=2e-3, least_room=0.02
        )


def ways(problem: Problem) -> list[list[Operation]]:
    """Operations that may be worth it, each list for itself; the most likely first.

    Args:
        problem: What is to be improved.
    """
    effort, start, most = problem.effort(), problem.placement, problem.max_ops
    state = problem.state(start)
    path = improve(state, problem.prices, effort, most)
    options = [_option(problem, path, state)]
    if state.fullest - 1 + problem.prices.locality > effort.least_room:
        for other in _new_placements(problem, effort):
            named = relabel(start, other.layout.experts)
            copies = num_missing(start, named)
            if effort.wide and copies > most // 2:
                options += _part_of_the_way(problem, named, effort)
            if copies <= 2 * most:  # an operation sends two experts at most
                options.append((_estimate(problem, other, copies), None, named))
    out = []
    for _, operations, target in sorted(options, key=lambda option: option[0]):
        operations = transition(start, target, problem.prices.ranks_per_node) if operations is None else operations
        if len(operations) <= most:
            out.append(operations)
        if out and not effort.wide:
            break
    return out


_Option = tuple[float, list[Operation] | None, Sequence[Collection[int]]]
"""An estimate, operations if they are known, and experts of each rank."""


def _option(problem: Problem, path: list[Operation], state: State) -> _Option:
    """What a search has found, by a direct way if some of its operations were in vain."""
    target = state.layout.experts
    copies = num_missing(problem.placement, target)
    operations: list[Operation] | None = path
    if sum(len(operation.copies) for operation in path) > copies:
        direct = transition(problem.placement, target, problem.prices.ranks_per_node)
        operations = direct if len(direct) <= problem.max_ops else path
    return _estimate(problem, state, copies), operations, target


def _part_of_the_way(problem: Problem, named: Sequence[Collection[int]], effort: Effort) -> list[_Option]:
    """Where a new placement is too far: some steps towards it, and then what helps most."""
    direct = transition(problem.placement, named, problem.prices.ranks_per_node)
    most = problem.max_ops
    options: list[_Option] = []
    if len(direct) > most:
        for steps in sorted({most // 4, most // 2, most - most // 4} - {0}):
            state = problem.state(problem.placement.apply(*direct[:steps]))
            path = improve(state, problem.prices, replace(effort, looks=1), most - steps)
            options.append(_option(problem, direct[:steps] + path, state))
    return options


def _estimate(problem: Problem, state: State, copies: int) -> float:
    """What a placement costs per step, in mean loads."""
    return problem.prices.standing(state) + problem.prices.copy * copies


def _new_placements(problem: Problem, effort: Effort) -> list[State]:
    """A placement that uses all slots, and where there are few some improved ones with fewer replicas."""
    ranks, slots = problem.placement.num_ranks, problem.placement.num_slots
    room = ranks * slots - problem.placement.num_experts
    states = [
        problem.state(_filled(constructed(problem.loads, ranks, slots, replicas), slots))
        for replicas in (range(room, -1, -1) if effort.wide else (room,))
    ]
    if not effort.wide:
        return states
    best = [state.copy() for state in sorted(states, key=lambda state: state.fullest)[:_STARTS]]
    for state in best:
        improve(state, Prices.free(ranks), replace(effort, ahead=6, looks=1), problem.max_ops)
    if problem.split == "even" and ranks * slots <= MOST_SLOTS:
        found = exhaustive(problem.loads, ranks, slots, min(state.fullest for state in best))
        best += [problem.state(_filled(found, slots))] if found is not None else []
    return [states[0], *best]


def _filled(experts: Sequence[Sequence[int]], num_slots: int) -> Placement:
    return Placement(tuple((*row, *(FREE,) * (num_slots - len(row))) for row in experts))
