"""The part of OSDP's knapsack that a multiplier leaves open, solved over lists of non-dominated sums.

Expanding core of Pisinger's MCKNAP (European Journal of Operational Research 83, 1995): the relaxed problem gives every
class a default, and classes are taken into the core in the order of what deviating from it costs per byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lightning_hetu.planning.osdp.frontier import Floats, Frontier, Hull, Ints, Keep, TooManySumsError, combine, repeat
from lightning_hetu.planning.osdp.relaxation import MAX_PAIRS, UNLIMITED, Relaxed, Search

# Where there are more than MAX_PAIRS pairs, only the most promising sums go on, and the search goes on with fewer
# pairs. That is no longer a proof, but still bounds what was left out.
_FEWER_PAIRS = 60_000
# So close to the bound, no more pairs than the smaller number are spent on the rest of the proof.
_CLOSE_GAP = 1e-9
# Times that the loss allowed to a class is divided by 4 before the class is given up.
_MOST_ATTEMPTS = 8
# Units of time by which bounds computed in float64 may be off; a total has up to 2**50 of them.
_ROUNDING = 8.0


class GaveUpError(Exception):
    """The search for one transient ended at its limit; ``bound`` is a time that no choice is below."""

    def __init__(self, bound: int) -> None:
        super().__init__(bound)
        self.bound = bound


def solve_for_transient(search: Search, relaxed: Relaxed, transient: int) -> None:
    """Offers the best choice whose transients are at most the given one, which is counted.

    Raises:
        GaveUpError: If a limit was reached first.
    """
    hulls = [item.hull(transient) for item in search.classes]
    _offer_greedy(search, relaxed, hulls, transient)
    core = _Core(search, relaxed, hulls, transient)
    sums = Frontier.empty_sum()
    for position in range(len(core.order)):
        try:
            if search.expired():
                raise TooManySumsError
            sums = core.add(sums, position)
        except TooManySumsError:
            core.leave(sums, position)
            break
        if not len(sums):
            break
        core.offer_best(sums)
    if core.left_bound < core.best_time():
        raise GaveUpError(max(relaxed.bound, core.left_bound))


def _offer_greedy(search: Search, relaxed: Relaxed, hulls: Sequence[Hull], transient: int) -> None:
    """Offers the relaxed solution without its broken step, and with whatever later steps fit instead."""
    position = relaxed.steps.tolist()
    at = [{h.corners[step]: item.count} for h, step, item in zip(hulls, position, search.classes, strict=True)]
    rest = relaxed.rest
    number, added, _ = (column[relaxed.taken :].tolist() for column in relaxed.order)
    for item, size in zip(number, added, strict=True):
        start = position[item]  # steps of a class follow each other
        position[item] += 1
        if size > rest:
            continue
        source, target = hulls[item].corners[start : start + 2]
        moved = min(at[item].get(source, 0), rest // size)
        if moved:
            at[item][source] -= moved
            at[item][target] = moved
            rest -= moved * size
    total, memory, groups = 0, transient, 0
    for hull, points in zip(hulls, at, strict=True):
        for point, n in points.items():
            total += n * int(hull.frontier.time[point])
            memory += n * int(hull.frontier.memory[point])
            groups += n * int(hull.frontier.groups[point])
    options = [
        {int(hull.frontier.origin[1, point]): n for point, n in points.items() if n}
        for hull, points in zip(hulls, at, strict=True)
    ]
    search.offer((total, memory, groups), options)


class _Core:
    """The part of the search for one transient that the multiplier leaves open.

    Every class has a default, the point that is best for the multiplier. A choice is the defaults plus deviations;
    its Lagrangian value ``time + slope * (memory - room)`` is a bound on its time, and no deviation lowers it.
    """

    def __init__(self, search: Search, relaxed: Relaxed, hulls: Sequence[Hull], transient: int) -> None:
        self.search, self.hulls, self.transient = search, hulls, transient
        self.room = search.capacity - transient
        self.slope = relaxed.slope
        self.lower_bound = relaxed.bound
        self.left_bound = UNLIMITED  # a time that no choice is below that was left out
        self.default = [hull.corners[step] for hull, step in zip(hulls, relaxed.steps, strict=True)]
        fronts = [hull.frontier for hull in hulls]
        lengths = np.array([len(front) for front in fronts])
        counts = np.array([item.count for item in search.classes], dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        at = starts + np.array(self.default)
        memory, times, groups = (
            np.concatenate([getattr(front, name) for front in fronts]) for name in ("memory", "time", "groups")
        )
        # Sums over the defaults of the classes that are not in the core: at first of all of them.
        self.outside = tuple(int((column[at] * counts).sum()) for column in (times, memory, groups))
        self.base = self.outside[0] + self.slope * (self.outside[1] - self.room)
        added = (memory - np.repeat(memory[at], lengths)).astype(np.float64)
        loss = np.maximum(times - np.repeat(times[at], lengths) + self.slope * added, 0.0)
        self.losses = np.split(loss, starts[1:])
        # What it costs per byte to deviate to a lighter or a heavier point.
        usable = (added != 0) & (loss <= self._allowance())
        ratio = loss / np.maximum(np.abs(added), 1)
        lighter = np.minimum.reduceat(np.where(usable & (added < 0), ratio, np.inf), starts)
        heavier = np.minimum.reduceat(np.where(usable & (added > 0), ratio, np.inf), starts)
        nearest = np.minimum(lighter, heavier)
        order = np.argsort(nearest, kind="stable")
        self.order: list[int] = order[np.isfinite(nearest[order])].tolist()
        # The least of them over the classes from each position on.
        self.lighter, self.heavier = (_least_from(column[self.order]) for column in (lighter, heavier))

    def _allowance(self) -> float:
        """Loss above which a choice is slower than the best known one."""
        return self.best_time() - self.base + _ROUNDING

    def best_time(self) -> int:
        """Time of the best known choice."""
        assert self.search.best is not None  # the greedy choice was offered
        return self.search.best[0]

    def _bounds(self, memory: Ints, times: Ints, position: int) -> Floats:
        """For sums over the core, times that no choice is below that else deviates only from a position on."""
        excess = (memory + (self.outside[1] - self.room)).astype(np.float64)
        bounds: Floats = times + self.outside[0] + self.slope * excess
        # Bytes too many have to be saved, and bytes left over are paid for unless they are put to use.
        over = excess > 0
        saving, using = self.lighter[position], min(self.slope, self.heavier[position])
        bounds[over] += excess[over] * saving
        bounds[~over] -= excess[~over] * using
        return bounds

    def leave(self, sums: Frontier, position: int) -> None:
        """Leaves out all choices that continue one of the sums with classes from a position on."""
        bound = float(self._bounds(sums.memory, sums.time, position).min())
        self.left_bound = min(self.left_bound, math.floor(min(bound, UNLIMITED) - _ROUNDING))

    def add(self, sums: Frontier, position: int) -> Frontier:
        """Takes the class at a position of the order into the core.

        Raises:
            TooManySumsError: If the class alone has too many sums, or what is left is not worth the effort.
        """
        number = self.order[position]
        allowed, limit = self._allowance(), self.best_time() + _ROUNDING
        alive = self.losses[number] <= allowed
        if np.count_nonzero(alive) < 2:
            return sums
        front, at, count = self.hulls[number].frontier, self.default[number], self.search.classes[number].count
        one = tuple(int(column[at]) for column in (front.time, front.memory, front.groups))
        items = self._repeat(front.select(alive), count, one, allowed)
        close = self.best_time() - self.lower_bound <= _CLOSE_GAP * self.best_time()
        if len(sums) * len(items) > (min(self.search.max_pairs, _FEWER_PAIRS) if close else self.search.max_pairs):
            if close:
                raise TooManySumsError
            self.search.max_pairs = _FEWER_PAIRS
            sums = self._most_promising(sums, position, max(_FEWER_PAIRS // (2 * len(items)), 1))
        before = self.outside
        for attempt in range(2):
            self.outside = tuple(value - count * each for value, each in zip(before, one, strict=True))
            try:
                return combine(sums, items, lambda m, t: self._bounds(m, t, position + 1) <= limit, MAX_PAIRS)
            except TooManySumsError:
                self.outside = before
                if close or attempt:
                    raise
                self.search.max_pairs = _FEWER_PAIRS
                sums = self._most_promising(sums, position, max(_FEWER_PAIRS // (2 * len(items)), 1))
        raise AssertionError("unreachable")

    def _repeat(self, front: Frontier, count: int, one: tuple[int, ...], allowed: float) -> Frontier:
        """Sums over the items of a class that lose no more than allowed; where these are too many, than a part of it.

        Raises:
            TooManySumsError: If even a small part allows too many sums.
        """
        for attempt in range(_MOST_ATTEMPTS + 1):
            limit = allowed / 4.0**attempt
            if attempt:
                self.left_bound = min(self.left_bound, math.floor(self.base + limit - _ROUNDING))

            def worth_repeating(n: int, limit: float = limit) -> Keep:
                return lambda memory, times: (times - n * one[0]) + self.slope * (memory - n * one[1]) <= limit

            try:
                return repeat(front, count, worth_repeating, self.search.max_pairs)
            except TooManySumsError:
                self.search.max_pairs = _FEWER_PAIRS
        raise TooManySumsError

    def _most_promising(self, sums: Frontier, position: int, count: int) -> Frontier:
        """The sums with the lowest bounds; leaves the others out."""
        order = np.argsort(self._bounds(sums.memory, sums.time, position), kind="stable")
        if len(order) > count:
            self.leave(sums.select(np.sort(order[count:])), position)
        return sums.select(np.sort(order[:count]))

    def offer_best(self, sums: Frontier) -> None:
        """Offers the fastest of the sums that fits together with the defaults of the other classes."""
        best = int(np.searchsorted(sums.memory, self.room - self.outside[1], side="right")) - 1
        if best < 0:
            return
        columns = (sums.time, sums.memory, sums.groups)
        total, memory, groups = (int(column[best]) + rest for column, rest in zip(columns, self.outside, strict=True))
        key = (total, memory + self.transient, groups)
        if self.search.best is not None and key >= self.search.best:
            return
        options: list[dict[int, int]] = [{} for _ in self.hulls]
        for number, option in sums.choices(best):
            options[number][option] = options[number].get(option, 0) + 1
        for hull, at, item, chosen in zip(self.hulls, self.default, self.search.classes, options, strict=True):
            if not chosen:
                chosen[int(hull.frontier.origin[1, at])] = item.count
        self.search.offer(key, options)


def _least_from(values: Floats) -> Floats:
    """Minimum of the values from each position on, with infinity behind the last one."""
    padded = np.append(values, np.inf)
    least: Floats = np.minimum.accumulate(padded[::-1])[::-1]
    return least
