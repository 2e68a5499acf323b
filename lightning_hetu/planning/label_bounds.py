"""Lower bounds of the dynamic program: what the rows that are still to come take at least, in memory and in time.

The bounds on the time are Lagrangian: with a price ``u`` per byte, every remaining row takes the option of least
``time + u * memory``, whatever ``u``.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_hetu.planning.stage_tables import Floats, Labels, Move, RowTable, Support

_NUM_PRICES = 6
_NUM_BOUNDS = 6
"""Lower bounds that are computed of each extended label."""
_RELATIVE_SLACK = 1e-9


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


class LabelBounds:
    """What the rows that are still to come must take at least: memory, and time at several prices per byte.

    The time is the least of ``time + price * memory`` over all ways to go on from an option, relayouts included.
    """

    def __init__(
        self,
        rows: Sequence[RowTable],
        moves: Sequence[Move],
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
        self.moves_between: dict[int, Floats] = {}
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

    def _move(self, move: Move) -> Floats:
        """``[T, D, S]`` weighted relayouts."""
        if id(move) not in self.moves_between:
            self.moves_between[id(move)] = np.moveaxis(move.cost @ self.weights.T, -1, 0)
        return self.moves_between[id(move)]

    def extend(self, labels: Labels, index: int, row: RowTable, move: Move) -> Labels:
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
        return Labels(
            held=held[parent, option],
            peak=peak[parent, option],
            step=step[parent, option],
            cost=labels.cost[parent] + (row.cost + move.cost)[labels.layout[parent], option],
            layout=np.zeros(parent.size, dtype=np.int64),
            parent=parent,
            option=option,
        )

    def _promising(
        self, labels: Labels, index: int, row: RowTable, move: Move, fits: NDArray[np.bool_], peak: Floats
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

    def final_time(self, labels: Labels, index: int) -> Floats:
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
