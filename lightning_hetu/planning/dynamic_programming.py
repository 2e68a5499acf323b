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

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_hetu.planning.pareto import non_dominated

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_NUM_PRICES = 6
_RELATIVE_SLACK = 1e-9
DEFAULT_LABEL_LIMIT = 4096
QUICK_LABEL_LIMIT = 24


@dataclass(frozen=True)
class RowTable:
    """The options of one row; arrays of ``S`` entries.

    Args:
        held: ``H``, bytes after forward.
        released: ``R``, bytes after backward.
        working: ``W``, bytes while the row runs, larger of forward and backward; at least ``H``.
        step: Bytes in the optimizer step.
        cost: ``[S, C]`` seconds; ``C`` criteria that add up along the rows.
    """

    held: Floats
    released: Floats
    working: Floats
    step: Floats
    cost: Floats

    def take(self, options: NDArray[np.intp]) -> RowTable:
        """The table of some of the options."""
        columns = (self.held, self.released, self.working, self.step, self.cost)
        return RowTable(*(column[options] for column in columns))


@dataclass(frozen=True)
class StageChoice:
    """One way to choose the strategies of a stage.

    Args:
        cost: Sum of each criterion, relayouts included.
        peak: Bytes in the fullest phase.
        options: Index of the chosen option of each row.
    """

    cost: tuple[float, ...]
    peak: float
    options: tuple[int, ...]


@dataclass(frozen=True)
class Support:
    """A linear lower bound on the time of a whole plan: ``constant + weights . criteria`` of this stage."""

    weights: tuple[float, ...]
    constant: float = 0.0


@dataclass
class _Labels:
    """Partial choices up to one row: ``n`` labels."""

    held: Floats
    peak: Floats
    step: Floats
    cost: Floats  # [n, C]
    layout: Ints
    parent: Ints
    option: Ints

    def take(self, index: NDArray[np.intp]) -> _Labels:
        return _Labels(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


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
    num_criteria = rows[0].cost.shape[1]
    compare = np.eye(num_criteria) if comparison is None else comparison
    spread = {id(matrix): _of_all_criteria(matrix, num_criteria) for matrix in relayouts}
    rows, relayouts, kept = _drop_dominated_options(rows, [spread[id(matrix)] for matrix in relayouts], compare)
    bound = _Bound(rows, budget, supports, incumbent)
    history: list[_Labels] = []
    labels = _Labels(
        held=np.zeros(1),
        peak=np.full(1, -np.inf),
        step=np.zeros(1),
        cost=np.zeros((1, num_criteria)),
        layout=np.zeros(1, dtype=np.int64),
        parent=np.zeros(1, dtype=np.int64),
        option=np.zeros(1, dtype=np.int64),
    )
    incoming = np.zeros((1, len(rows[0].held), num_criteria))
    track_step = any(np.any(row.step > np.minimum(row.held, row.working)) for row in rows)
    for index, row in enumerate(rows):
        labels = _extend(labels, row, incoming)
        labels = labels.take(np.flatnonzero(bound.keeps(labels, index)))
        if index + 1 < len(rows):
            # Options whose relayouts to the next row cost the same are one layout.
            _, first, layout_of = np.unique(
                relayouts[index].reshape(len(row.held), -1), axis=0, return_index=True, return_inverse=True
            )
            incoming, layout_of = relayouts[index][first], layout_of.reshape(-1)
        else:
            layout_of = np.zeros(len(row.held), dtype=np.int64)
        labels.layout = layout_of[labels.option].astype(np.int64)
        labels = _prune(labels, bound.final_time(labels, index), compare, track_step=track_step, limit=limit)
        history.append(labels)
        if not labels.held.size:
            return []
    return _read_choices(history, kept)


def _of_all_criteria(relayout: Floats, num_criteria: int) -> Floats:
    """Relayout seconds ``[S, S, C]`` from those of the first criterion."""
    if relayout.ndim == 3:
        return relayout
    found = np.zeros((*relayout.shape, num_criteria))
    found[:, :, :1] = relayout[:, :, None] if num_criteria else 0.0
    return found


def _extend(labels: _Labels, row: RowTable, incoming: Floats) -> _Labels:
    """Every label with every option of the next row."""
    count, options = labels.held.size, row.held.size
    cost = labels.cost[:, None, :] + row.cost[None] + incoming[labels.layout]
    peak = np.maximum(labels.peak[:, None] + row.released, labels.held[:, None] + row.working)
    return _Labels(
        held=(labels.held[:, None] + row.held).reshape(-1),
        peak=peak.reshape(-1),
        step=(labels.step[:, None] + row.step).reshape(-1),
        cost=cost.reshape(count * options, -1),
        layout=np.zeros(count * options, dtype=np.int64),
        parent=np.repeat(np.arange(count), options),
        option=np.tile(np.arange(options), count),
    )


class _Memory:
    """What rows hold at least. Layers of one type share a table, so the work is per type."""

    def __init__(self, rows: Sequence[RowTable]) -> None:
        self.types = list({id(row): row for row in rows}.values())
        position = {id(row): index for index, row in enumerate(self.types)}
        self.which = np.array([position[id(row)] for row in rows])
        self.counts = np.bincount(self.which)
        self.released = self.suffix([float(row.released.min()) for row in self.types])
        self.step = self.suffix([float(row.step.min()) for row in self.types])
        # need[i]: of rows i and later while they run, on top of what the rows in front of them hold
        held = [float(row.held.min()) for row in self.types]
        working = [float(row.working.min()) for row in self.types]
        self.need = np.zeros(len(rows) + 1)
        for index in reversed(range(len(rows))):
            kind = self.which[index]
            later = held[kind] + self.need[index + 1] if index + 1 < len(rows) else 0.0
            self.need[index] = max(working[kind] + self.released[index + 1], later)
        # Two relaxed budgets: what is held at the end of forward, and what is left after backward.
        self._tail = float((rows[-1].working - rows[-1].held).min())
        # The peak starts with the first row's work, not with what that row has left.
        self._head = max(0.0, float((rows[0].released - rows[0].working).max()))

    def suffix(self, least: Sequence[float]) -> Floats:
        """``out[i]`` is the sum of the least values of rows ``i`` and later; one entry longer than the rows."""
        return np.concatenate([np.cumsum(np.array(least, dtype=float)[self.which][::-1])[::-1], [0.0]])

    def budgets(self, budget: float) -> tuple[tuple[list[Floats], float], tuple[list[Floats], float]]:
        """What is held and what is released by the options of each type, each with the bytes for all rows together."""
        held, released = [row.held for row in self.types], [row.released for row in self.types]
        return (held, budget - self._tail), (released, budget + self._head)


class _Bound:
    """What the rows that are still to come must take at least: memory, and time at several prices per byte."""

    def __init__(self, rows: Sequence[RowTable], budget: float, supports: Sequence[Support], incumbent: float) -> None:
        self.budget = budget
        self.limit = incumbent * (1 + _RELATIVE_SLACK) if np.isfinite(incumbent) else np.inf
        memory = _Memory(rows)
        self.need, self.released, self.step = memory.need, memory.released, memory.step
        self.terms: list[tuple[Floats, float, str, float, Floats]] = []
        for support in supports:
            weights = np.array(support.weights)
            times = [row.cost @ weights for row in memory.types]
            self.terms.append((weights, 0.0, "held", support.constant, memory.suffix([float(t.min()) for t in times])))
            for kind, (sizes, capacity) in zip(("held", "peak"), memory.budgets(budget), strict=True):
                for price in _prices(times, sizes, memory.counts, capacity):
                    least = [float((t + price * size).min()) for t, size in zip(times, sizes, strict=True)]
                    self.terms.append((weights, price, kind, support.constant - price * capacity, memory.suffix(least)))

    def keeps(self, labels: _Labels, index: int) -> NDArray[np.bool_]:
        """Whether a label may still lead to a plan that fits and beats the incumbent."""
        after = index + 1
        keep: NDArray[np.bool_] = (
            (labels.held + self.need[after] <= self.budget)
            & (labels.peak + self.released[after] <= self.budget)
            & (labels.step + self.step[after] <= self.budget)
        )
        if np.isfinite(self.limit):
            keep &= self.final_time(labels, index) <= self.limit
        return keep

    def final_time(self, labels: _Labels, index: int) -> Floats:
        """Lower bound on the time of any plan that begins with each label."""
        best = np.full(labels.held.size, -np.inf)
        for weights, price, kind, constant, suffix in self.terms:
            size = labels.held if kind == "held" else labels.peak
            np.maximum(best, labels.cost @ weights + price * size + (constant + suffix[index + 1]), out=best)
        return best


def _lagrangian_bounds(
    times: Sequence[Floats], sizes: Sequence[Floats], counts: NDArray[np.intp], capacity: float
) -> tuple[Floats, Floats]:
    """Prices per byte, ascending, and the lower bound on the time that each gives.

    One of the exchange rates that the rows offer gives the best bound.
    """
    rates = []
    for time, size in zip(times, sizes, strict=True):
        saved, spent = time[:, None] - time[None], size[None] - size[:, None]
        useful = (saved > 0) & (spent > 0)
        rates.append(saved[useful] / spent[useful])
    prices = np.unique(np.concatenate(rates)) if np.isfinite(capacity) else np.zeros(0)
    values = -prices * capacity
    for time, size, count in zip(times, sizes, counts, strict=True):
        values = values + count * (time[None] + prices[:, None] * size[None]).min(axis=1)
    return prices, values


def _prices(times: Sequence[Floats], sizes: Sequence[Floats], counts: NDArray[np.intp], capacity: float) -> list[float]:
    """Prices per byte near the one with the best Lagrangian bound."""
    prices, values = _lagrangian_bounds(times, sizes, counts, capacity)
    if not prices.size:
        return []
    low = max(0, int(values.argmax()) - _NUM_PRICES // 2)
    return [float(price) for price in prices[low : low + _NUM_PRICES]]


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


def _prune(labels: _Labels, final_time: Floats, compare: Floats, *, track_step: bool, limit: int) -> _Labels:
    """Keeps the labels of each layout that no other one beats in everything."""
    columns = [labels.held, labels.peak, *(labels.cost @ compare).T]
    if track_step:
        columns.append(labels.step)
    points = np.stack(columns, axis=1)
    chosen = []
    for layout in np.unique(labels.layout):
        members = np.flatnonzero(labels.layout == layout)
        members = members[non_dominated(points[members])]
        if members.size > limit:
            members = _thin(points, final_time, members, limit)
        chosen.append(members)
    index = np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, dtype=np.intp)
    return labels.take(index)


def _thin(points: Floats, final_time: Floats, members: NDArray[np.intp], limit: int) -> NDArray[np.intp]:
    """About ``limit`` labels: half of them the most promising, half spread evenly over the range of memory.

    Those that are least in any one column stay, so a plan of little memory is not lost.
    """
    promising = members[np.argsort(final_time[members], kind="stable")[: limit // 2]]
    order = members[np.lexsort(points[members].T[::-1])]
    spread = order[np.unique(np.linspace(0, order.size - 1, limit - limit // 2).astype(np.intp))]
    extremes = [members[points[members, column].argmin()] for column in range(points.shape[1])]
    return np.unique(np.concatenate([promising, spread, extremes]))


def _read_choices(history: Sequence[_Labels], kept: Sequence[NDArray[np.intp]]) -> list[StageChoice]:
    """Follows the parents back from every final label."""
    final = history[-1]
    position = np.arange(final.held.size)
    options = np.zeros((final.held.size, len(history)), dtype=np.int64)
    for index in reversed(range(len(history))):
        options[:, index] = kept[index][history[index].option[position]]
        position = history[index].parent[position]
    choices = [
        StageChoice(tuple(cost), max(float(peak), float(step)), tuple(int(i) for i in row))
        for cost, peak, step, row in zip(final.cost.tolist(), final.peak, final.step, options, strict=True)
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
    best = fastest_choice(rows, relayouts, float(budget))
    if best is None or not np.isfinite(best.cost[0]):
        return np.inf, None
    return best.cost[0], [int(o[i]) for o, i in zip(possible, best.options, strict=True)]


def fastest_choice(
    rows: Sequence[RowTable], relayouts: Sequence[Floats], budget: float, *, incumbent: float = np.inf
) -> StageChoice | None:
    """The choice of least cost for rows with one criterion; ``None`` if none fits or beats ``incumbent``.

    A first pass with few labels finds a good plan quickly; the second one, exact, prunes against it. Of equal costs,
    the smaller peak wins, then the earlier options.
    """
    supports = [Support((1.0,))]
    quick = solve_stage(rows, relayouts, budget, supports, incumbent=incumbent, limit=QUICK_LABEL_LIMIT)
    known = min(quick[0].cost[0], incumbent) if quick else incumbent
    exact = solve_stage(rows, relayouts, budget, supports, incumbent=known)
    return exact[0] if exact else None


def time_bound(rows: Sequence[RowTable], budget: float, weights: Sequence[float]) -> float:
    """No choice that fits has a smaller weighted sum of criteria; infinite if it is plain that none fits."""
    memory = _Memory(rows)
    if memory.need[0] > budget or memory.step[0] > budget:
        return np.inf
    times = [row.cost @ np.array(weights) for row in memory.types]
    best = sum(float(count * time.min()) for count, time in zip(memory.counts, times, strict=True))
    for sizes, capacity in memory.budgets(budget):
        values = _lagrangian_bounds(times, sizes, memory.counts, capacity)[1]
        best = max(best, float(values.max(initial=-np.inf)))
    return best


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
