"""The relaxed knapsack of OSDP's solver: steps along convex hulls, in the order of the time that they save per byte.

This is the linear relaxation of the multiple-choice knapsack problem; at most one step is taken in part. Bounds are
computed in integers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from lightning_hetu.planning.osdp.frontier import Ints, ItemClass

UNLIMITED = 2**60
"""Bytes of a capacity without limit; also a time above all others."""
MAX_PAIRS = 4_000_000
"""Pairs of sums that are looked at for one class."""


@dataclass(frozen=True)
class Relaxed:
    """The relaxed problem for one interval of the transient.

    Attributes:
        bound: Time that no choice is below.
        slope: Time saved per byte at the capacity.
        steps: Steps along the hull that each class takes as a whole.
        rest: Bytes of capacity left after them.
        memory: Bytes in use after them, without the transient.
        order: All steps, best first, as ``(class, bytes of one item, time of one item)``.
        taken: Number of steps at the front of the order that are taken as a whole.
        time: Time after them.
    """

    bound: int
    slope: float
    steps: Ints
    rest: int
    order: tuple[Ints, Ints, Ints]
    taken: int
    time: int
    memory: int


@dataclass
class Search:
    """State of one search: classes, the best choice so far, and limits."""

    classes: list[ItemClass]
    capacity: int
    deadline: float
    best: tuple[int, int, int] | None = None  # time, bytes with the transient, groups
    counts: list[dict[int, int]] = field(default_factory=list)  # items of each class per option
    max_pairs: int = MAX_PAIRS
    timed_out: bool = False

    def offer(self, key: tuple[int, int, int], counts: list[dict[int, int]]) -> None:
        """Makes a choice the best one if it is better: ``(time, bytes with the transient, groups)``."""
        if self.best is None or key < self.best:
            self.best, self.counts = key, counts

    def expired(self) -> bool:
        """Whether the search must end. It never does before there is a choice."""
        self.timed_out = self.timed_out or (self.best is not None and time.monotonic() > self.deadline)
        return self.timed_out


def relax(search: Search, smallest: int, largest: int) -> Relaxed | None:
    """The relaxed problem with options of at most ``largest`` transient bytes while ``smallest`` of them are counted.

    Returns:
        ``None`` if it has no solution.
    """
    hulls = [item.hull(largest) for item in search.classes]
    counts = np.array([item.count for item in search.classes], dtype=np.int64)
    memory = sum(h.frontier.memory[0].item() * item.count for h, item in zip(hulls, search.classes, strict=True))
    total = sum(h.frontier.time[0].item() * item.count for h, item in zip(hulls, search.classes, strict=True))
    room = search.capacity - smallest - memory
    if room < 0:
        return None
    number = np.repeat(np.arange(len(hulls)), [len(h.bytes_added) for h in hulls])
    added = np.fromiter(chain.from_iterable(h.bytes_added for h in hulls), dtype=np.int64, count=len(number))
    saved = np.fromiter(chain.from_iterable(h.time_saved for h in hulls), dtype=np.int64, count=len(number))
    best_first = np.argsort(-(saved / np.maximum(added, 1)), kind="stable")
    number, added, saved = number[best_first], added[best_first], saved[best_first]
    used = np.cumsum(added * counts[number])
    taken = int(np.searchsorted(used, room, side="right"))
    steps = np.bincount(number[:taken], minlength=len(hulls)).astype(np.int64)
    total -= int((saved * counts[number])[:taken].sum())
    in_use = int(used[taken - 1]) if taken else 0
    rest = room - in_use
    bound, slope = total, 0.0
    if taken < len(number):
        step_bytes, step_time = int(added[taken]), int(saved[taken])
        slope = step_time / step_bytes
        # Steps of nearly the same slope may have been sorted wrongly in float64, by far less than this.
        bound = max(total - step_time * rest // step_bytes - 2, 0)
    return Relaxed(bound, slope, steps, rest, (number, added, saved), taken, total, memory + in_use)
