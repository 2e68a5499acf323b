"""Plans of an OSDP problem from the fastest to the smallest, when memory is a peak over many points of a step.

At every point of the step the operators hold bytes that depend on their own modes, up to what two neighbors share. The
fastest plan whose sums stay below a level at all points is a multiple-choice knapsack with one constraint per point.
It is solved as Toyoda proposed for knapsacks of several constraints (Management Science 21(12), 1975): from the
fastest plan, always the change that removes most of what is above the level for the time it costs, then whatever
can be taken back. Levels descend, so that one descent gives plans for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
_POINTS = 192
"""Points that are looked at; of more, neighbors are joined, each operator with the most it holds at any of them."""
_AT_ONCE = 100
"""For every so many operators, one more of them is changed at once."""
_PAIRS = 250
"""Up to so many options in all, pairs of changes are tried as well."""


@dataclass(frozen=True)
class Choices:
    """All options of all operators, one row each.

    Args:
        unit: Number of the operator.
        option: Number of the option among those of the operator.
        seconds: Its seconds.
        memory: Bytes at each point.
        rest: Bytes at each point that no operator holds.
    """

    unit: NDArray[np.int64]
    option: NDArray[np.int64]
    seconds: Matrix
    memory: Matrix
    rest: Matrix

    @classmethod
    def build(
        cls,
        options: Sequence[Sequence[int]],
        seconds: Sequence[Sequence[float]],
        memory: Sequence[Matrix],
        rest: Matrix,
    ) -> Choices:
        """Sorts options and leaves out those that cannot be useful.

        Args:
            options: For each operator the numbers of its options.
            seconds: For each operator the seconds of its options.
            memory: For each operator the bytes of its options at each point.
            rest: Bytes at each point that no operator holds.
        """
        edges = np.unique(np.linspace(0, len(rest), min(len(rest), _POINTS) + 1).astype(int))[:-1]
        units, numbers, times, rows = [], [], [], []
        for unit, (its_options, its_seconds, its_memory) in enumerate(zip(options, seconds, memory, strict=True)):
            joined = np.maximum.reduceat(its_memory, edges, axis=1)
            kept = _staircase(np.asarray(its_seconds), joined)
            units += [unit] * len(kept)
            numbers += [its_options[i] for i in kept]
            times += [its_seconds[i] for i in kept]
            rows.append(joined[kept])
        return cls(
            np.array(units), np.array(numbers), np.array(times), np.concatenate(rows), np.maximum.reduceat(rest, edges)
        )


def _staircase(seconds: Matrix, memory: Matrix) -> list[int]:
    """Options that no faster one beats in the most bytes at a point and their mean together, fastest first."""
    size = memory.max(axis=1) + memory.mean(axis=1)
    kept: list[int] = []
    for i in np.lexsort((size, seconds)):
        if not kept or size[i] < size[kept[-1]]:
            kept.append(int(i))
    return kept


def descend(choices: Choices, levels: int) -> list[tuple[tuple[int, ...], float, float]]:
    """Plans from the fastest one down to the smallest that is found.

    Args:
        choices: The options.
        levels: Number of levels between the two peaks.

    Returns:
        For each plan the options, seconds, and its peak by these sums; from one to the next, seconds do not fall.
    """
    count = int(choices.unit.max()) + 1
    fastest = np.full(count, -1)
    smallest = np.full(count, -1)
    for row, unit in enumerate(choices.unit):  # rows of an operator are sorted: fastest first, smallest last
        if fastest[unit] < 0:
            fastest[unit] = row
        smallest[unit] = row
    state = _State(choices, fastest)
    low = _State(choices, smallest).total.max()
    high = state.total.max()
    found = [state.plan()]
    for level in np.linspace(high, low, levels + 1)[1:]:
        while state.total.max() > level:
            if not state.shrink(level):
                break
            found.append(state.plan())
        state.grow(max(level, state.total.max()))
        found.append(state.plan())
    found.append(_State(choices, smallest).plan())
    return _sorted(found)


def _sorted(plans: list[tuple[tuple[int, ...], float, float]]) -> list[tuple[tuple[int, ...], float, float]]:
    """The plans that no other one beats, fastest first."""
    out: list[tuple[tuple[int, ...], float, float]] = []
    for plan in sorted(plans, key=lambda plan: (plan[1], plan[2], plan[0])):
        if not out or plan[2] < out[-1][2]:
            out.append(plan)
    return out


class _State:
    """A choice for every operator, and the bytes at every point."""

    def __init__(self, choices: Choices, rows: NDArray[np.int64]) -> None:
        self.choices = choices
        self.rows = rows.copy()
        self.total = choices.rest + choices.memory[rows].sum(axis=0)

    def plan(self) -> tuple[tuple[int, ...], float, float]:
        """Options, seconds and peak."""
        options = tuple(int(i) for i in self.choices.option[self.rows])
        return options, float(self.choices.seconds[self.rows].sum()), float(self.total.max())

    def _changes(self) -> tuple[Matrix, Matrix]:
        """Bytes at each point, and seconds, that every option adds to what is chosen for its operator."""
        now = self.rows[self.choices.unit]
        return self.choices.memory - self.choices.memory[now], self.choices.seconds - self.choices.seconds[now]

    def _take(self, row: int) -> None:
        unit = self.choices.unit[row]
        self.total += self.choices.memory[row] - self.choices.memory[self.rows[unit]]
        self.rows[unit] = row

    def shrink(self, level: float) -> bool:
        """Makes the changes that remove most of what is above the level for their time; whether there are any."""
        memory, seconds = self._changes()
        over = np.maximum(self.total - level, 0.0).sum()
        gain = over - np.maximum(self.total + memory - level, 0.0).sum(axis=1)
        useful = np.flatnonzero(gain > 0)
        if not len(useful):
            return False
        least = 1e-12 * max(float(np.abs(seconds).max()), 1e-30)
        ratio = gain[useful] / np.maximum(seconds[useful], least)
        # One change at a time; of many operators, a few of them.
        taken: set[int] = set()
        for row in useful[np.argsort(-ratio, kind="stable")[: 8 * (1 + len(self.rows) // _AT_ONCE)]]:
            unit = int(self.choices.unit[row])
            if unit not in taken:
                self._take(int(row))
                taken.add(unit)
            if len(taken) > len(self.rows) // _AT_ONCE or self.total.max() <= level:
                break
        return True

    def grow(self, level: float) -> None:
        """Makes changes, and exchanges of two, that save time and stay below the level."""
        while True:
            memory, seconds = self._changes()
            fits = (self.total + memory).max(axis=1) <= level
            saving = np.flatnonzero(fits & (seconds < 0))
            if len(saving):
                self._take(int(saving[seconds[saving].argmin()]))
            elif len(seconds) > _PAIRS or not self._exchange(level, memory, seconds):
                return

    def _exchange(self, level: float, memory: Matrix, seconds: Matrix) -> bool:
        """Makes one operator faster and another one slower, if that saves time in all."""
        best = -1e-12 * float(np.abs(seconds).max())
        pair: tuple[int, int] | None = None
        for row in np.flatnonzero(seconds < 0):
            fits = (self.total + memory[row] + memory).max(axis=1) <= level
            fits &= self.choices.unit != self.choices.unit[row]
            others = np.flatnonzero(fits & (seconds[row] + seconds < best))
            if len(others):
                other = int(others[seconds[others].argmin()])
                best, pair = float(seconds[row] + seconds[other]), (int(row), other)
        if pair is None:
            return False
        for chosen in pair:
            self._take(chosen)
        return True
