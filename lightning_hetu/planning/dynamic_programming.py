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

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_hetu.planning.pareto import non_dominated

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_NUM_PRICES = 6
_NUM_BOUNDS = 6
"""Lower bounds that are computed of each extended label."""
_RELATIVE_SLACK = 1e-9
DEFAULT_LABEL_LIMIT = 4096
QUICK_LABEL_LIMITS = (24, 192)


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
    return ReducedStage.of(rows, relayouts, comparison).solve(budget, supports, incumbent, limit)[0]


@dataclass(frozen=True)
class _Move:
    """The step from one row to the next.

    Options whose relayouts to the next row cost the same are one *layout*, ``D`` of them.

    Args:
        layout_of: ``[S]`` layout of each option of the row in front.
        cost: ``[D, S of the next row, C]`` seconds.
    """

    layout_of: Ints
    cost: Floats


def _moves(rows: Sequence[RowTable], relayouts: Sequence[Floats]) -> list[_Move]:
    """The steps into each row, and the one behind the last row; equal ones are the same object."""
    criteria = rows[0].cost.shape[1]
    found = [_Move(np.zeros(1, dtype=np.int64), np.zeros((1, rows[0].held.size, criteria)))]
    done: dict[int, _Move] = {}
    for matrix in relayouts:
        if id(matrix) not in done:
            _, first, layout_of = np.unique(
                matrix.reshape(len(matrix), -1), axis=0, return_index=True, return_inverse=True
            )
            done[id(matrix)] = _Move(layout_of.reshape(-1).astype(np.int64), matrix[first])
        found.append(done[id(matrix)])
    found.append(_Move(np.zeros(rows[-1].held.size, dtype=np.int64), np.zeros((1, 0, criteria))))
    return found


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
    moves: tuple[_Move, ...]
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
        return cls(tuple(tables), tuple(_moves(tables, between)), tuple(kept), compare)

    def solve(
        self, budget: float, supports: Sequence[Support], incumbent: float = np.inf, limit: int = DEFAULT_LABEL_LIMIT
    ) -> tuple[list[StageChoice], bool]:
        """The choices of :func:`solve_stage`, and whether none was left out for the limit on labels."""
        bound = _Bound(self.rows, self.moves, budget, supports, incumbent)
        track_step = any(np.any(row.step > np.minimum(row.held, row.working)) for row in self.rows)
        history: list[_Labels] = []
        labels = _Labels(
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
        # rise[i]: by how much the fullest phase of rows i and later exceeds what the rows in front of them hold, less
        # what these rows have left
        kept = [float((row.held - row.released).min()) for row in self.types]
        spare = [float((row.working - row.released).min()) for row in self.types]
        self.rise = np.full(len(rows) + 1, -np.inf)
        for index in reversed(range(len(rows))):
            kind = self.which[index]
            self.rise[index] = max(spare[kind], kept[kind] + self.rise[index + 1])
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
    """What the rows that are still to come must take at least: memory, and time at several prices per byte.

    The time is the least of ``time + price * memory`` over all ways to go on from an option, relayouts included.
    """

    def __init__(
        self,
        rows: Sequence[RowTable],
        moves: Sequence[_Move],
        budget: float,
        supports: Sequence[Support],
        incumbent: float,
    ) -> None:
        self.budget = budget
        self.limit = incumbent * (1 + _RELATIVE_SLACK) if np.isfinite(incumbent) else np.inf
        memory = _Memory(rows)
        self.need, self.released, self.step = memory.need, memory.released, memory.step
        self.rise = memory.rise
        weights: list[Floats] = []
        prices: list[tuple[float, float]] = []  # of what is held, of the peak
        constants: list[float] = []
        for support in supports:
            own = np.array(support.weights, dtype=float)
            times = [row.cost @ own for row in memory.types]
            chosen = [(0.0, 0.0)]
            for kind, (sizes, capacity) in enumerate(memory.budgets(budget)):
                found = _prices(list(map(_trade_offs, times, sizes)), memory.counts, capacity)
                chosen += [(price, 0.0) if kind == 0 else (0.0, price) for price in found]
            prices += chosen
            weights += [own] * len(chosen)
            constants += [support.constant - sum(pair) * budget if any(pair) else support.constant for pair in chosen]
        self.weights = np.array(weights).reshape(len(weights), rows[0].cost.shape[1])  # [T, C]
        self.prices = np.array(prices).reshape(-1, 2)  # [T, 2]
        self.constants = np.array(constants)
        self._own: dict[tuple[int, bool], Floats] = {}
        self._moves: dict[int, Floats] = {}
        # still[l]: [T, S of row l], of the rows behind it
        self.still = [np.zeros((len(self.constants), rows[-1].held.size))]
        for index in reversed(range(1, len(rows))):
            after = self._row(rows[index], last=index + 1 == len(rows)) + self.still[-1]
            move = self._move(moves[index])
            self.still.append((move + after[:, None]).min(axis=2)[:, moves[index].layout_of])
        self.still.reverse()

    def _row(self, row: RowTable, *, last: bool = False) -> Floats:
        """``[T, S]`` weighted time and priced memory of the options of a row."""
        key = id(row), last
        if key not in self._own:
            # What the last row holds besides while it works adds to what all rows hold.
            held = row.working if last else row.held
            self._own[key] = self.weights @ row.cost.T + self.prices[:, :1] * held + self.prices[:, 1:] * row.released
        return self._own[key]

    def _move(self, move: _Move) -> Floats:
        """``[T, D, S]`` weighted relayouts."""
        if id(move) not in self._moves:
            self._moves[id(move)] = np.moveaxis(move.cost @ self.weights.T, -1, 0)
        return self._moves[id(move)]

    def extend(self, labels: _Labels, index: int, row: RowTable, move: _Move) -> _Labels:
        """Every label with every option of the next row, as far as that may fit and beat the incumbent."""
        after = index + 1
        held = labels.held[:, None] + row.held
        peak = np.maximum(labels.peak[:, None] + row.released, labels.held[:, None] + row.working)
        # A peak that later phases exceed in any case is as good as what they take at least.
        np.maximum(peak, held + self.rise[after], out=peak)
        step = labels.step[:, None] + row.step
        fits = (
            (held + self.need[after] <= self.budget)
            & (peak + self.released[after] <= self.budget)
            & (step + self.step[after] <= self.budget)
        )
        if np.isfinite(self.limit) and self.constants.size:
            fits = self._promising(labels, index, row, move, fits, peak)
        parent, option = np.nonzero(fits)
        return _Labels(
            held=held[parent, option],
            peak=peak[parent, option],
            step=step[parent, option],
            cost=labels.cost[parent] + (row.cost + move.cost)[labels.layout[parent], option],
            layout=np.zeros(parent.size, dtype=np.int64),
            parent=parent,
            option=option,
        )

    def _promising(
        self, labels: _Labels, index: int, row: RowTable, move: _Move, fits: NDArray[np.bool_], peak: Floats
    ) -> NDArray[np.bool_]:
        """Those of the pairs of label and option, ``[n, S]``, whose lower bounds do not exceed the incumbent.

        What bounds a label best also bounds what it is extended to well, so only those bounds are computed.
        """
        so_far = labels.cost @ self.weights.T + self.constants + self.prices[:, 0] * labels.held[:, None]
        if index:
            bounds = so_far + self.prices[:, 1] * labels.peak[:, None] + self.still[index - 1].T[labels.option]
            most = min(_NUM_BOUNDS, bounds.shape[1])
            chosen = np.argpartition(-bounds, most - 1, axis=1)[:, :most]
        else:
            chosen = np.arange(so_far.shape[1])[None]
        # What the option adds, whatever the label: [T, D, S]
        added = self.weights @ row.cost.T + self.prices[:, :1] * row.held + self.still[index]
        added = self._move(move) + added[:, None]
        everyone = np.arange(labels.held.size)
        for terms in chosen.T:
            value = added[terms, labels.layout]
            value += so_far[everyone, terms][:, None]
            price = self.prices[terms, 1]
            if price.any():
                value += price[:, None] * peak
            fits &= value <= self.limit
        return fits

    def final_time(self, labels: _Labels, index: int) -> Floats:
        """Lower bound on the time of any plan that begins with each label of a row."""
        if not self.constants.size:
            return np.full(labels.held.size, -np.inf)
        bounds = labels.cost @ self.weights.T + self.constants + self.still[index].T[labels.option]
        bounds += self.prices[:, 0] * labels.held[:, None]
        bounds += self.prices[:, 1] * labels.peak[:, None]
        return np.asarray(bounds.max(axis=1))


def _trade_offs(time: Floats, size: Floats) -> tuple[Floats, Floats, Floats]:
    """The options that are best at some price per byte: the prices at which they change, their times, their sizes."""
    hull: list[tuple[float, float]] = []
    rates: list[float] = []  # rates[i] is the price between hull[i] and hull[i + 1], descending
    for spent, taken in sorted(zip(size.tolist(), time.tolist(), strict=True)):
        if hull and taken >= hull[-1][1]:
            continue
        while hull:
            last_spent, last_taken = hull[-1]
            rate = (last_taken - taken) / (spent - last_spent) if spent > last_spent else np.inf
            if not rates or rate < rates[-1]:
                rates.append(rate)
                break
            hull.pop()
            rates.pop()
        hull.append((spent, taken))
    points = np.array(hull)
    return np.array(rates), points[:, 1], points[:, 0]


def _lagrangian_bounds(
    trade_offs: Sequence[tuple[Floats, Floats, Floats]], counts: NDArray[np.intp], capacity: float
) -> tuple[Floats, Floats]:
    """Prices per byte, ascending, and the lower bound on the time that each gives.

    One of the prices at which some type of rows changes its option gives the best bound.

    Args:
        trade_offs: Those of each type of rows.
        counts: Rows of each type.
        capacity: Bytes for all of them together.
    """
    prices = np.array(sorted({rate for rates, _, _ in trade_offs for rate in rates.tolist()}))
    if not np.isfinite(capacity):
        prices = prices[:0]
    values = -prices * capacity
    for (_, time, size), count in zip(trade_offs, counts.tolist(), strict=True):
        values += count * (time + prices[:, None] * size).min(axis=1)
    return prices, values


def _prices(
    trade_offs: Sequence[tuple[Floats, Floats, Floats]], counts: NDArray[np.intp], capacity: float
) -> list[float]:
    """Prices per byte near the one with the best Lagrangian bound."""
    prices, values = _lagrangian_bounds(trade_offs, counts, capacity)
    if not prices.size:
        return []
    low = max(0, int(values.argmax()) - _NUM_PRICES // 2)
    found: list[float] = prices[low : low + _NUM_PRICES].tolist()
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
    labels: _Labels,
    memory: Sequence[Floats],
    compare: Floats,
    final_time: Callable[[_Labels], Floats],
    limit: int,
) -> tuple[_Labels, bool]:
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


def _read_choices(history: Sequence[_Labels], kept: Sequence[NDArray[np.intp]]) -> list[StageChoice]:
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


class TimeBounds:
    """Lower bounds on the time of a stage, for any budget and any weights.

    Args:
        rows: Options of each row.
        known: What stages that share rows have found out about these.
    """

    def __init__(self, rows: Sequence[RowTable], known: dict[Hashable, Any] | None = None) -> None:
        self._memory = _Memory(rows)
        self._known = {} if known is None else known

    def least(self, budget: float, weights: tuple[float, ...]) -> float:
        """No choice that fits has a smaller weighted sum of criteria; infinite if it is plain that none fits."""
        memory = self._memory
        if memory.need[0] > budget or memory.step[0] > budget:
            return np.inf
        held, released = zip(*(self._trade_offs(row, weights) for row in memory.types), strict=True)
        best = sum(float(count * time[-1]) for count, (_, time, _) in zip(memory.counts.tolist(), held, strict=True))
        for trade_offs, (_, capacity) in zip((held, released), memory.budgets(budget), strict=True):
            values = _lagrangian_bounds(trade_offs, memory.counts, capacity)[1]
            best = max(best, float(values.max(initial=-np.inf)))
        return best

    def _trade_offs(self, row: RowTable, weights: tuple[float, ...]) -> tuple[Any, Any]:
        """Time against what is held, and against what is released."""
        key = (id(row), weights)
        if key not in self._known:
            time = row.cost @ np.array(weights)
            self._known[key] = _trade_offs(time, row.held), _trade_offs(time, row.released)
        found: tuple[Any, Any] = self._known[key]
        return found


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
