"""The strategies of all rows of one stage: exact dynamic programming under a memory limit.

Follows Galvatron (arXiv 2211.13878, section 3.4): layer by layer, the state is the memory used and the strategy of the
last layer, because the next one pays for a relayout. The paper fills a table over all memory quanta. Here a state
exists only where it can still lead to the best plan: a *label* carries the memory and time of a partial choice, and
labels that another one with the same layout beats in everything are dropped. That makes the result exact in bytes,
without a quantum, and gives all memory limits a consistent answer.

Memory is the fullest phase of a step, not a sum. Rows run forward first to last and backward last to first. Let ``H``
be the bytes a row holds after forward, ``R`` those left after its backward, ``W`` those while it works. The peak is
``max over r of (sum of H in front of r + W of r + sum of R behind r)``, which the labels follow row by row with two
sums: ``held += H`` and ``peak = max(peak + R, held + W)``. The refinement of Galvatron-BMW (arXiv 2307.02031) for
recomputed layers, ``sum of memory + largest backward peak``, is the case ``R = H``, ``W = H + backward peak``.

Two kinds of pruning keep the number of labels small and the answer exact: what must still come does not fit the budget,
and a lower bound on the final time is worse than a known plan. The bound is Lagrangian: with a price ``u`` per byte,
every remaining row takes the strategy of least ``time + u * memory``, whatever ``u``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_hetu.planning.label_bounds import LabelBounds
from lightning_hetu.planning.pareto import non_dominated
from lightning_hetu.planning.stage_tables import (
    Floats,
    Labels,
    Move,
    RowTable,
    StageChoice,
    Support,
    moves_between,
)

DEFAULT_LABEL_LIMIT = 4096
QUICK_LABEL_LIMITS = (24, 192)


def solve_stage(
    rows: Sequence[RowTable],
    relayouts: Sequence[Floats],
    budget: float,
    supports: Sequence[Support],
    *,
    comparison: Floats | None = None,
    incumbent: float = np.inf,
    limit: int = DEFAULT_LABEL_LIMIT,
) -> list[StageChoice]:
    """All choices for one stage that fit and that no other one beats in everything compared.

    Args:
        rows: Options of each row, ``L`` tables.
        relayouts: ``L - 1`` arrays ``[S of row l, S of row l + 1, C]``: seconds added to each criterion. Without the
            last axis they are added to the first one.
        budget: Bytes available.
        supports: Linear lower bounds on the final time, used with ``incumbent``; any of them may be the tightest.
        comparison: ``[C, K]`` weights, at least 0, of what choices are compared by; if not given, by the criteria.
        incumbent: Time of a known plan. Choices that are proven worse are left out.
        limit: Labels kept per row and layout. Only above it the result may miss the optimum; the labels that are kept
            are spread over the whole range of memory.

    Returns:
        Choices in ascending order of cost; empty if none fits or none can beat ``incumbent``.
    """
    return ReducedStage.of(rows, relayouts, comparison).solve(budget, supports, incumbent, limit)[0]


@dataclass(frozen=True)
class ReducedStage:
    """A stage without the options that are never needed, ready to be solved for any budget.

    Args:
        rows: The options of each row that are left.
        moves: The steps into each row, and the one behind the last row.
        kept: Index of each of these options.
        compare: ``[C, K]`` weights that choices are compared by.
    """

    rows: tuple[RowTable, ...]
    moves: tuple[Move, ...]
    kept: tuple[NDArray[np.intp], ...]
    compare: Floats

    @classmethod
    def of(
        cls, rows: Sequence[RowTable], relayouts: Sequence[Floats], comparison: Floats | None = None
    ) -> ReducedStage:
        """The stage of :func:`solve_stage`."""
        num_criteria = rows[0].cost.shape[1]
        compare = np.eye(num_criteria) if comparison is None else comparison
        spread = {id(matrix): _of_all_criteria(matrix, num_criteria) for matrix in relayouts}
        tables, between, kept = _drop_dominated_options(rows, [spread[id(matrix)] for matrix in relayouts], compare)
        return cls(tuple(tables), tuple(moves_between(tables, between)), tuple(kept), compare)

    def solve(
        self, budget: float, supports: Sequence[Support], incumbent: float = np.inf, limit: int = DEFAULT_LABEL_LIMIT
    ) -> tuple[list[StageChoice], bool]:
        """The choices of :func:`solve_stage`, and whether none was left out for the limit on labels."""
        bound = LabelBounds(self.rows, self.moves, budget, supports, incumbent)
        track_step = any(np.any(row.step > np.minimum(row.held, row.working)) for row in self.rows)
        history: list[Labels] = []
        labels = Labels(
            held=np.zeros(1),
            peak=np.full(1, -np.inf),
            step=np.zeros(1),
            cost=np.zeros((1, len(self.compare))),
            layout=np.zeros(1, dtype=np.int64),
            parent=np.zeros(1, dtype=np.int64),
            option=np.zeros(1, dtype=np.int64),
        )
        exact = True
        for index, row in enumerate(self.rows):
            last = index + 1 == len(self.rows)
            labels = bound.extend(labels, index, row, self.moves[index])
            labels.layout = self.moves[index + 1].layout_of[labels.option]
            if last:
                labels = labels.take(np.flatnonzero(bound.final_time(labels, index) <= bound.limit))
                # All that counts of the memory now is the fullest phase.
                np.maximum(labels.peak, labels.step, out=labels.peak)
            memory = [labels.peak] if last else [labels.held, labels.peak, *([labels.step] if track_step else [])]
            labels, whole = _prune(labels, memory, self.compare, partial(bound.final_time, index=index), limit)
            exact = exact and whole
            history.append(labels)
            if not labels.held.size:
                return [], exact
        return _read_choices(history, self.kept), exact


def _of_all_criteria(relayout: Floats, num_criteria: int) -> Floats:
    """Relayout seconds ``[S, S, C]`` from those of the first criterion."""
    if relayout.ndim == 3:
        return relayout
    found = np.zeros((*relayout.shape, num_criteria))
    found[:, :, :1] = relayout[:, :, None] if num_criteria else 0.0
    return found


def _drop_dominated_options(
    rows: Sequence[RowTable], relayouts: Sequence[Floats], compare: Floats
) -> tuple[list[RowTable], list[Floats], list[NDArray[np.intp]]]:
    """Leaves out options that another one of the same layout beats in time and memory; the first of equals stays."""
    kept: list[NDArray[np.intp]] = []
    tables: list[RowTable] = []
    # Layers of one type share their tables; they are worked on once and stay shared.
    done: dict[tuple[int, ...], tuple[NDArray[np.intp], RowTable]] = {}
    for index, row in enumerate(rows):
        before = relayouts[index - 1] if index else None
        after = relayouts[index] if index + 1 < len(rows) else None
        key = (id(row), id(before), id(after))
        if key not in done:
            keep = _undominated_options(row, before, after, compare)
            done[key] = keep, row.take(keep)
        kept.append(done[key][0])
        tables.append(done[key][1])
    between = [matrix[np.ix_(kept[i], kept[i + 1])] for i, matrix in enumerate(relayouts)]
    return tables, between, kept


def _undominated_options(
    row: RowTable, before: Floats | None, after: Floats | None, compare: Floats
) -> NDArray[np.intp]:
    columns = [row.held, row.released, row.working, row.step, *(row.cost @ compare).T]
    # A relayout into or out of an option is one more thing in which it must not be worse.
    for relayout in (before, None if after is None else after.swapaxes(0, 1)):
        columns += [] if relayout is None else [one for each in relayout @ compare for one in each.T]
    points = np.unique(np.stack(columns), axis=0)
    beats = (points[:, :, None] <= points[:, None, :]).all(axis=0)
    order = np.arange(row.held.size)
    loses = (beats & ~(beats & beats.T & (order[:, None] >= order[None]))).any(axis=0)
    return np.flatnonzero(~loses)


def _prune(
    labels: Labels,
    memory: Sequence[Floats],
    compare: Floats,
    final_time: Callable[[Labels], Floats],
    limit: int,
) -> tuple[Labels, bool]:
    """Keeps the labels of each layout that no other one beats in everything, and says whether these are all kept."""
    points = np.stack([*memory, *(labels.cost @ compare).T], axis=1)
    chosen, whole = [], True
    for layout in np.unique(labels.layout):
        members = np.flatnonzero(labels.layout == layout)
        members = members[non_dominated(points[members])]
        if members.size > limit:
            members, whole = _thin(points[members], final_time(labels.take(members)), members, limit), False
        chosen.append(members)
    index = np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, dtype=np.intp)
    return labels.take(index), whole


def _thin(points: Floats, final_time: Floats, members: NDArray[np.intp], limit: int) -> NDArray[np.intp]:
    """About ``limit`` labels: half of them the most promising, half spread evenly over the range of memory.

    Those that are least in any one column stay, so a plan of little memory is not lost.
    """
    promising = members[np.argsort(final_time, kind="stable")[: limit // 2]]
    order = members[np.lexsort(points.T[::-1])]
    spread = order[np.unique(np.linspace(0, order.size - 1, limit - limit // 2).astype(np.intp))]
    extremes = members[points.argmin(axis=0)]
    return np.unique(np.concatenate([promising, spread, extremes]))


def _read_choices(history: Sequence[Labels], kept: Sequence[NDArray[np.intp]]) -> list[StageChoice]:
    """Follows the parents back from every final label."""
    final = history[-1]
    position = np.arange(final.held.size)
    options = np.zeros((final.held.size, len(history)), dtype=np.int64)
    for index in reversed(range(len(history))):
        options[:, index] = kept[index][history[index].option[position]]
        position = history[index].parent[position]
    choices = [
        StageChoice(tuple(cost), peak, tuple(row))
        for cost, peak, row in zip(final.cost.tolist(), final.peak.tolist(), options.tolist(), strict=True)
    ]
    return sorted(choices, key=lambda choice: (choice.cost, choice.peak, choice.options))


def solve(
    time: ArrayLike,
    memory: ArrayLike,
    reshard: ArrayLike,
    budget: float,
    *,
    backward_peak: ArrayLike | None = None,
) -> tuple[float, list[int] | None]:
    """The fastest choice of one strategy per layer that fits a memory budget; exact.

    Minimizes ``sum time[l, s_l] + sum reshard[s_l, s_l+1]`` subject to
    ``sum memory[l, s_l] + max over l of backward_peak[l, s_l] <= budget`` (Galvatron-BMW, arXiv 2307.02031, section 3).
    Memory and budget may be in any unit and need not be whole numbers.

    Args:
        time: ``[L, S]`` seconds of each layer under each strategy; infinite where the layer cannot have the strategy.
        memory: ``[L, S]`` memory that adds up over the layers.
        reshard: ``[S, S]``, or ``[L - 1, S, S]`` for every pair of layers: seconds to go from the strategy of a layer
            (first index) to that of the next one. At least 0; infinite where it is impossible.
        budget: Memory available.
        backward_peak: ``[L, S]`` memory that only one layer needs at a time; at least 0, none if not given.

    Returns:
        The total time and the strategy of every layer, or ``(inf, None)`` if nothing fits.

    Raises:
        ValueError: If the shapes do not agree, or a relayout or backward peak is negative.
    """
    times, memories = np.asarray(time, dtype=float), np.asarray(memory, dtype=float)
    if times.ndim != 2 or not times.size or times.shape != memories.shape:
        raise ValueError(f"time{list(times.shape)} and memory{list(memories.shape)}: expected equal shapes [L, S].")
    layers, strategies = times.shape
    between = np.asarray(reshard, dtype=float)
    if between.ndim == 2:
        between = np.broadcast_to(between, (layers - 1, *between.shape))
    if between.shape != (layers - 1, strategies, strategies):
        raise ValueError(
            f"reshard{list(np.shape(reshard))}: expected [{strategies}, {strategies}] or"
            f" [{layers - 1}, {strategies}, {strategies}]."
        )
    peaks = np.zeros_like(times) if backward_peak is None else np.asarray(backward_peak, dtype=float)
    if peaks.shape != times.shape:
        raise ValueError(f"backward_peak{list(peaks.shape)}: expected the shape of time, {list(times.shape)}.")
    if np.any(between < 0) or np.any(peaks < 0):
        raise ValueError("reshard and backward_peak: expected no negative entries.")

    finite = np.isfinite(times) & np.isfinite(memories + peaks)
    possible = [np.flatnonzero(row) for row in finite]
    if any(options.size == 0 for options in possible):
        return np.inf, None
    rows = [
        RowTable(
            held=memories[i, o],
            released=memories[i, o],
            working=memories[i, o] + peaks[i, o],
            step=np.zeros(o.size),
            cost=times[i, o][:, None],
        )
        for i, o in enumerate(possible)
    ]
    relayouts = [between[i][np.ix_(possible[i], possible[i + 1])] for i in range(layers - 1)]
    best, _ = fastest_choice(rows, relayouts, float(budget))
    if best is None or not np.isfinite(best.cost[0]):
        return np.inf, None
    return best.cost[0], [int(o[i]) for o, i in zip(possible, best.options, strict=True)]


def fastest_choice(
    rows: Sequence[RowTable], relayouts: Sequence[Floats], budget: float, *, incumbent: float = np.inf
) -> tuple[StageChoice | None, bool]:
    """The choice of least cost for rows with one criterion, or ``None`` if none fits or beats ``incumbent``.

    A pass with few labels finds a good plan quickly; the next one prunes against it, until one needs no limit. Of
    equal costs, the smaller peak wins, then the earlier options.

    Returns:
        The choice, and whether it is proven that no other one costs less.
    """
    stage, supports = ReducedStage.of(rows, relayouts), [Support((1.0,))]
    known, choices, exact = incumbent, list[StageChoice](), False
    for limit in (*QUICK_LABEL_LIMITS, DEFAULT_LABEL_LIMIT):
        choices, exact = stage.solve(budget, supports, known, limit)
        if exact:
            break
        known = min([known, *(choice.cost[0] for choice in choices[:1])])
    return (choices[0] if choices else None), exact


def least_peak(rows: Sequence[RowTable], relayouts: Sequence[Floats]) -> float:
    """Fewest bytes with which any choice fits, whatever it costs in time."""
    bare = {
        id(row): RowTable(row.held, row.released, row.working, row.step, np.zeros((row.held.size, 0))) for row in rows
    }
    free = [bare[id(row)] for row in rows]
    # The best choice of one and the same rule in every row bounds the answer and keeps the labels few.
    known = np.inf
    for rule in ("held", "released", "working", "step"):
        held, peak, step = 0.0, -np.inf, 0.0
        for row in rows:
            pick = int(np.lexsort((row.working, row.held, getattr(row, rule)))[0])
            peak = max(peak + row.released[pick], held + row.working[pick])
            held, step = held + row.held[pick], step + row.step[pick]
        known = min(known, max(peak, step))
    zeros = {id(matrix): np.zeros((*matrix.shape[:2], 0)) for matrix in relayouts}
    choices = solve_stage(free, [zeros[id(matrix)] for matrix in relayouts], known, [])
    return min(choice.peak for choice in choices)
