"""Non-dominated sums of memory and time over classes of equal items, for the solver of ``solver``.

A :class:`Frontier` holds what some choices add up to, without those that others beat. Two of them combine by adding
every pair ((min,+) convolution), and remember from which pair each sum came. All numbers are integers, in float64 where
only bounds are computed, so that sums do not depend on their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
# Pairs that are added at a time, and sums that are sorted at a time, some 100 bytes each.
_CHUNK = 250_000
_MAX_KEPT = 2_000_000
Keep = Callable[[Ints, Ints], NDArray[np.bool_]]


class TooManySumsError(Exception):
    """Combining would need more memory than the search may take."""


@dataclass(frozen=True, eq=False)
class Frontier:
    """Sums in ascending order of memory and strictly descending order of time.

    Args:
        memory: Bytes of each sum.
        time: Time of each sum, in the solver's units.
        groups: Gather groups of each sum.
        left: What the sums were combined of, with ``right``; ``None`` for the options of one item.
        right: See ``left``.
        origin: ``[2, n]``: the sum of ``left`` and that of ``right``; for the options of one item the class and the
            option.
    """

    memory: Ints
    time: Ints
    groups: Ints
    left: Frontier | None
    right: Frontier | None
    origin: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.memory)

    @staticmethod
    def empty_sum() -> Frontier:
        """The sum of nothing."""
        zero = np.zeros(1, dtype=np.int64)
        return Frontier(zero, zero, zero, None, None, np.full((2, 1), -1, dtype=np.int64))

    def select(self, index: NDArray[np.intp] | NDArray[np.bool_]) -> Frontier:
        """Some of the sums, in the same order."""
        return Frontier(
            self.memory[index], self.time[index], self.groups[index], self.left, self.right, self.origin[:, index]
        )

    def choices(self, index: int) -> list[tuple[int, int]]:
        """``(class, option)`` of every item in one of the sums."""
        out = []
        waiting: list[tuple[Frontier, int]] = [(self, index)]
        while waiting:
            frontier, at = waiting.pop()
            first, second = (int(value) for value in frontier.origin[:, at])
            if frontier.left is not None and frontier.right is not None:
                waiting += [(frontier.left, first), (frontier.right, second)]
            elif first >= 0:
                out.append((first, second))
        return out


def combine(left: Frontier, right: Frontier, keep: Keep, max_pairs: int) -> Frontier:
    """All sums of one of ``left`` and one of ``right``, without dominated ones.

    Of equal sums the one with fewer gather groups stays, then the one that comes first in ``left``.

    Args:
        left: Sums.
        right: Sums.
        keep: Says which ``(memory, time)`` are worth keeping.
        max_pairs: Number of pairs above which it gives up.

    Raises:
        TooManySumsError: If there are more pairs, or too many of them are worth keeping.
    """
    if len(left) * len(right) > max_pairs:
        raise TooManySumsError
    memories, times, indices = [], [], []
    rows = max(_CHUNK // len(right), 1)
    for start in range(0, len(left), rows):
        memory = np.add.outer(left.memory[start : start + rows], right.memory).ravel()
        time = np.add.outer(left.time[start : start + rows], right.time).ravel()
        index = np.flatnonzero(keep(memory, time))
        memories.append(memory[index])
        times.append(time[index])
        indices.append(index + start * len(right))
    memory, time = np.concatenate(memories), np.concatenate(times)
    if len(memory) > _MAX_KEPT:
        raise TooManySumsError
    first, second = np.divmod(np.concatenate(indices), len(right))
    groups = left.groups[first] + right.groups[second]
    order = np.lexsort((groups, time, memory))  # stable
    time = time[order]
    alive = np.ones(len(order), dtype=bool)
    alive[1:] = time[1:] < np.minimum.accumulate(time)[:-1]
    order = order[alive]
    return Frontier(memory[order], time[alive], groups[order], left, right, np.stack([first[order], second[order]]))


def repeat(frontier: Frontier, count: int, keep: Callable[[int], Keep], max_pairs: int) -> Frontier:
    """Sums over ``count`` items with the same options, by repeated doubling.

    Args:
        frontier: The options of one item.
        count: Number of items, at least 1.
        keep: For a number of items, which sums are worth keeping.
        max_pairs: See :func:`combine`.
    """
    total, size = None, 0
    power, length = frontier, 1
    while True:
        if count & length:
            size += length
            total = power if total is None else combine(total, power, keep(size), max_pairs)
        if count < 2 * length:
            assert total is not None  # the highest bit of the count was seen
            return total
        length *= 2
        power = combine(power, power, keep(length), max_pairs)


@dataclass(frozen=True, eq=False)
class Hull:
    """The non-dominated options of one item under a bound on transient bytes, and their convex hull.

    Args:
        frontier: The options.
        corners: Indices into the frontier of the corners of its lower convex hull, by memory.
        bytes_added: Bytes from each corner to the next.
        time_saved: Time from each corner to the next; less per byte with every step.
    """

    frontier: Frontier
    corners: tuple[int, ...]
    bytes_added: tuple[int, ...]
    time_saved: tuple[int, ...]


class ItemClass:
    """Equal items: their options, of which those that can never be chosen are removed.

    Args:
        number: Number of the class, noted in its frontiers.
        count: Items in the class.
        time: Time of each option, in the solver's units.
        memory: Bytes of each option.
        transient: Transient bytes of each option.
        groups: Gather groups of each option.
    """

    def __init__(
        self,
        number: int,
        count: int,
        time: Sequence[int],
        memory: Sequence[int],
        transient: Sequence[int],
        groups: Sequence[int],
    ) -> None:
        self.number = number
        self.count = count
        options = sorted(zip(memory, time, groups, range(len(time)), transient, strict=True))
        # In this order an option can only be beaten by an earlier one.
        kept: list[tuple[int, int, int, int, int]] = []
        for option in options:
            if not any(best[1] <= option[1] and best[4] <= option[4] and _beats(best, option) for best in kept):
                kept.append(option)
        self._options = kept
        self.bounds = sorted({option[4] for option in kept})
        self._hulls: dict[int, Hull] = {}

    def least_memory(self) -> list[tuple[int, int]]:
        """Fewest bytes for each bound on transient bytes from which on they are fewer, ``(bound, bytes)`` ascending."""
        out: list[tuple[int, int]] = []
        for transient, memory in sorted((option[4], option[0]) for option in self._options):
            if not out or memory < out[-1][1]:
                out.append((transient, memory))
        return out

    def hull(self, bound: int) -> Hull:
        """The options with at most ``bound`` transient bytes, at least one of which there must be."""
        allowed = max(value for value in self.bounds if value <= bound)
        found = self._hulls.get(allowed)
        if found is None:
            found = self._hulls[allowed] = self._make_hull(allowed)
        return found

    def _make_hull(self, bound: int) -> Hull:
        front: list[tuple[int, int, int, int]] = []
        for memory, time, groups, option, transient in self._options:
            if transient <= bound and (not front or time < front[-1][1]):
                front.append((memory, time, groups, option))
        corners: list[int] = []
        for i, (x, y, *_) in enumerate(front):
            while len(corners) > 1:
                (x0, y0, *_), (x1, y1, *_) = front[corners[-2]], front[corners[-1]]
                if (y0 - y1) * (x - x1) > (y1 - y) * (x1 - x0):
                    break
                corners.pop()
            corners.append(i)
        columns = np.array(front, dtype=np.int64).T
        origin = np.stack([np.full(len(front), self.number, dtype=np.int64), columns[3]])
        steps = list(zip(corners[:-1], corners[1:], strict=True))
        return Hull(
            Frontier(columns[0], columns[1], columns[2], None, None, origin),
            tuple(corners),
            tuple(front[b][0] - front[a][0] for a, b in steps),
            tuple(front[a][1] - front[b][1] for a, b in steps),
        )


def _beats(best: tuple[int, ...], option: tuple[int, ...]) -> bool:
    """Whether an earlier option that is at least as good in all that counts makes a later one useless."""
    # With equal memory and time, one with more groups and a smaller buffer must not remove one with fewer groups.
    return best[0] < option[0] or best[1] < option[1] or best[2:4] <= option[2:4]


def integer_scale(times: Sequence[Sequence[float]]) -> float:
    """A power of two by which times become integers whose sums are exact in float64, at no loss of precision."""
    total = math.fsum(max(row) for row in times)
    return math.ldexp(1.0, 50 - math.frexp(total)[1]) if total > 0 else 1.0
