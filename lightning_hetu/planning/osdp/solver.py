"""Exact multiple-choice knapsack with a bound on the largest transient, for OSDP (arXiv 2209.13258, section on search).

Choose one option per item so that the times add up to as little as possible while the bytes of all options, plus the
largest transient among them, stay within the capacity. OSDP searches depth first or over quantized memory; this search
is exact in bytes:

- Equal items form classes, and dominated options are removed.
- A best-first search goes over intervals of the largest transient. An interval is bounded by the relaxed problem
  (``relaxation``), with the smallest transient of the interval counted and options up to its largest one allowed.
- For a single value of the transient, the relaxed problem's multiplier says what every option loses. Those that lose
  more than the best known choice is away from the bound cannot be in a better one; the rest is solved by a list of
  non-dominated sums (``core``).

Without a proof within reach, the search keeps the most promising sums only, or ends at its time limit, and says how far
from the best choice its own can be.

Among equally fast choices the one with fewer bytes is taken, then the one with fewer gather groups, then the first one
in the order in which the classes are sorted.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from lightning_hetu.planning.osdp.core import GaveUpError, solve_for_transient
from lightning_hetu.planning.osdp.frontier import ItemClass, integer_scale
from lightning_hetu.planning.osdp.relaxation import UNLIMITED, Relaxed, Search, relax


@dataclass(frozen=True)
class Item:
    """One item of the knapsack: for each of its options the seconds, bytes, transient bytes and gather groups."""

    seconds: tuple[float, ...]
    memory: tuple[int, ...]
    transient: tuple[int, ...]
    groups: tuple[int, ...]

    def __post_init__(self) -> None:
        lengths = {len(column) for column in vars(self).values()}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"item: columns of {sorted(lengths)} options: expected the same number, at least 1.")
        if not all(0 <= value < math.inf for column in vars(self).values() for value in column):
            raise ValueError("item: expected numbers of at least 0.")


Proof = Literal["complete", "bounded", "time limit"]


@dataclass(frozen=True)
class Solution:
    """What :func:`solve_knapsack` found.

    Args:
        options: Chosen option of each item.
        gap: Upper bound on how much faster any other choice can be, relative to this one's time; 0 if proven best.
        bound: Seconds that no choice is faster than.
        shadow_price: Seconds saved per byte of more capacity: the relaxed problem's slope at the capacity, for the
            largest transient of this choice; 0 where the fastest options fit.
        proof: ``complete``; ``bounded`` if the search kept only the most promising sums or ended within the tolerance;
            ``time limit`` if that was hit, and only then does the choice depend on the speed of the machine.
    """

    options: tuple[int, ...]
    gap: float
    bound: float
    shadow_price: float
    proof: Proof


def least_memory(items: Sequence[Item]) -> tuple[int, int]:
    """Fewest bytes with which a choice exists.

    Returns:
        Bytes in total, and the largest transient among them. Of equal totals the one with the smaller transient.
    """
    classes, _ = _classes(items, 1.0)
    return min((memory + bound, bound) for bound, memory in _least_memory(classes))


def solve_knapsack(
    items: Sequence[Item], capacity: int | None, *, time_limit: float = 4.0, tolerance: float = 0.0
) -> Solution:
    """Solves the problem.

    Args:
        items: The items. Of equal ones, the first get the options with the lowest numbers.
        capacity: Bytes; ``None`` is without limit.
        time_limit: Seconds after which the best choice so far is returned, once there is one.
        tolerance: Gap at which the search may end.

    Raises:
        ValueError: If nothing fits, or a limit is negative.
    """
    for name, value in (("time_limit", time_limit), ("tolerance", tolerance)):
        if not value >= 0:
            raise ValueError(f"{name}={value!r}: expected a number of at least 0.")
    if not items:
        return Solution((), 0.0, 0.0, 0.0, "complete")
    deadline = time.monotonic() + time_limit
    scale = integer_scale([item.seconds for item in items])
    classes, members = _classes(items, scale)
    search = Search(classes, UNLIMITED if capacity is None else capacity, deadline)
    bound = _branch(search, tolerance)
    if search.best is None:
        raise ValueError(f"capacity={capacity}: no choice fits.")
    best = search.best[0]
    options = [0] * len(items)
    for number, positions in enumerate(members):
        chosen = chain.from_iterable([option] * n for option, n in sorted(search.counts[number].items()))
        for position, option in zip(positions, chosen, strict=True):
            options[position] = option
    largest = max((item.transient[option] for item, option in zip(items, options, strict=True)), default=0)
    relaxed = relax(search, largest, largest)
    return Solution(
        tuple(options),
        gap=(best - bound) / best if best > bound else 0.0,
        bound=min(bound, best) / scale,
        shadow_price=relaxed.slope / scale if relaxed else 0.0,
        proof="time limit" if search.timed_out else "bounded" if bound < best else "complete",
    )


def _classes(items: Sequence[Item], scale: float) -> tuple[list[ItemClass], list[list[int]]]:
    """Classes of equal items in an order that does not depend on that of the items, and the items of each."""
    members: dict[tuple[tuple[float, ...], ...], list[int]] = {}
    for position, item in enumerate(items):
        members.setdefault((item.seconds, item.memory, item.transient, item.groups), []).append(position)
    keys = sorted(members)
    classes = [
        ItemClass(number, len(members[key]), [round(t * scale) for t in key[0]], *key[1:])  # type: ignore[arg-type]
        for number, key in enumerate(keys)
    ]
    return classes, [members[key] for key in keys]


def _least_memory(classes: Sequence[ItemClass]) -> list[tuple[int, int]]:
    """``(bound, bytes)`` for each bound on the transient from which on the items need fewer bytes, ascending."""
    lists = [item.least_memory() for item in classes]
    lowest = max((steps[0][0] for steps in lists), default=0)
    total, changes = 0, []
    for item, steps in zip(classes, lists, strict=True):
        now = [memory for bound, memory in steps if bound <= lowest][-1]
        total += item.count * now
        for bound, memory in steps:
            if bound > lowest:
                changes.append((bound, item.count * (memory - now)))
                now = memory
    out = [(lowest, total)]
    for bound, change in sorted(changes):
        total += change
        if bound == out[-1][0]:
            out.pop()
        out.append((bound, total))
    return out


def _branch(search: Search, tolerance: float) -> int:
    """Searches over intervals of the largest transient, and returns a time that no choice is below."""
    lowest = max((item.bounds[0] for item in search.classes), default=0)
    values = sorted({v for item in search.classes for v in item.bounds if v >= lowest} | {lowest})
    # Of intervals with equal bounds the one that may need fewest bytes is first. None is here in which nothing fits.
    heap: list[tuple[int, int, int, int, Relaxed]] = []
    proven: list[int] = []  # bounds of what was given up within the tolerance

    def push(first: int, last: int) -> None:
        relaxed = relax(search, values[first], values[last])
        if relaxed is not None:
            heapq.heappush(heap, (relaxed.bound, values[first] + relaxed.memory, first, last, relaxed))

    push(0, len(values) - 1)
    while heap:
        bound, _, first, last, relaxed = heapq.heappop(heap)
        if search.best is not None:
            if bound > search.best[0] or (bound == search.best[0] and _only_ties(search, relaxed, values[first])):
                continue
            if 0 < search.best[0] - bound <= tolerance * search.best[0]:
                proven.append(bound)
                continue
        if search.expired():
            return min([bound, *proven])
        if first < last:
            middle = (first + last) // 2
            push(first, middle)
            push(middle + 1, last)
            continue
        try:
            solve_for_transient(search, relaxed, values[first])
        except GaveUpError as stop:
            proven.append(stop.bound)
    return min([search.best[0] if search.best else 0, *proven])


def _only_ties(search: Search, relaxed: Relaxed, transient: int) -> bool:
    """Whether choices as fast as the best one need more bytes, if the bound on their time is that time."""
    assert search.best is not None
    if relaxed.taken < len(relaxed.order[0]):  # some step was left out, so bytes do not follow from the time
        return False
    return transient + relaxed.memory > search.best[1]
