"""The protocol of HET (arXiv 2112.07221) on a list of events: for teaching, and the reference of the real cache.

Plain Python, one row with one number at a time, no processes: events happen one after the other, and every one is
complete before the next begins. ``rules`` explains the clocks. :func:`replay` follows these steps:

- A read looks for the row in the worker's cache. A copy that lacks more than ``pull_limit`` updates of others is
  fetched again, a missing one is fetched and inserted, for which another row may have to leave.
- A write adds to the copy and counts one update. Above ``push_limit``, and where there is no copy, it goes to the
  owner, who adds what is pending and advances the global clock by as many updates.
- A row that leaves with pending updates waits for the worker's next message to the owners: its next write, or a message
  of its own before its next read. So a worker always sees its own writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_hetu.embedding.rules import PERMANENT_COUNT, CacheRules, OnStale, Policy


@dataclass(frozen=True)
class TraceStep:
    """What one event did.

    Args:
        worker: Who did it.
        operation: ``R``, ``W`` or ``F``.
        row: The row; ``None`` for a flush.
        value: What a read saw; ``None`` otherwise.
        actions: In order, of: ``write_back:<row>`` (an evicted row's updates were pushed), ``hit``, ``miss`` or
            ``stale`` (the copy was valid, missing, fetched again), ``push`` or ``local`` (own updates of the row went
            to its owner, or stayed), ``evict:<row>``, ``overflow`` (a missing row was read but not inserted). A flush
            says ``push:<row>`` for every row.
        start_clock: ``v`` of the worker's copy behind the event; ``None`` if it has none.
        updates: ``u`` of that copy, 0 if there is none.
        global_clock: ``c_g`` of the row behind the event; 0 for a flush.
    """

    worker: str
    operation: str
    row: int | None
    value: float | None
    actions: tuple[str, ...]
    start_clock: int | None
    updates: int
    global_clock: int

    @property
    def client_clock(self) -> int | None:
        """``c_c = v + u``: the updates that the copy contains, own ones included."""
        return None if self.start_clock is None else self.start_clock + self.updates


def replay(
    events: Iterable[tuple[Any, ...]],
    *,
    staleness: float,
    capacity: int,
    policy: Policy = "lfu",
    on_stale: OnStale = "rebase",
    pull_bound: float | None = None,
    push_bound: float | None = None,
    aging: int | None = None,
    initial: Mapping[int, float] | None = None,
) -> list[TraceStep]:
    """Lets workers with a cache each read and write a table, one event at a time.

    Args:
        events: ``(worker, "R", row)``, ``(worker, "W", row, delta)``, or ``(worker, "F")`` to push all that is pending.
        staleness: See :class:`CacheRules`, as for the other bounds and choices.
        capacity: Rows that a worker's cache can hold; 0 fetches and pushes everything.
        policy: Which row leaves a full cache.
        on_stale: What becomes of own updates when a copy is fetched again.
        pull_bound: Bound for reads where it differs from ``staleness``.
        push_bound: Bound for writes where it differs.
        aging: Halve a worker's counts after every so many of its reads.
        initial: Values of rows before any update, 0 where not given.

    Returns:
        One step for each event.

    Raises:
        ValueError: If an event or an option is not one of these.
    """
    rules = CacheRules(staleness, pull_bound, push_bound, policy, on_stale, aging)
    if capacity < 0:
        raise ValueError(f"capacity={capacity}: expected at least 0 rows.")
    table = _Table(dict(initial or {}))
    workers: dict[str, _Worker] = {}
    steps = []
    for number, event in enumerate(events):
        match event:
            case (worker, "R", row):
                delta = None
            case (worker, "W", row, delta):
                pass
            case (worker, "F"):
                row = delta = None
            case _:
                raise ValueError(
                    f"events[{number}]={event!r}: expected (worker, 'R', row), (worker, 'W', row, delta) or"
                    " (worker, 'F')."
                )
        state = workers.setdefault(worker, _Worker(table, rules, capacity))
        steps.append(state.run(worker, event[1], row, delta))
    return steps


@dataclass
class _Table:
    """What the owners have."""

    values: dict[int, float]
    clocks: dict[int, int] = field(default_factory=dict)

    def fetch(self, row: int) -> tuple[float, int]:
        return self.values.get(row, 0.0), self.clocks.get(row, 0)

    def push(self, row: int, pending: float, updates: int) -> None:
        value, clock = self.fetch(row)
        self.values[row], self.clocks[row] = value + pending, clock + updates


@dataclass
class _Copy:
    """A row in a cache: its value with own updates, ``v``, the pending sum, ``u``, and what policies look at."""

    value: float
    start: int
    pending: float = 0.0
    updates: int = 0
    count: int = 0
    last_read: int = 0


@dataclass
class _Worker:
    table: _Table
    rules: CacheRules
    capacity: int
    copies: dict[int, _Copy] = field(default_factory=dict)
    evicted: dict[int, _Copy] = field(default_factory=dict)
    """Left the cache with updates that the next message takes along."""
    reads: int = 0

    def run(self, name: str, operation: str, row: int | None, delta: float | None) -> TraceStep:
        value = None
        if row is None:
            return TraceStep(name, operation, None, None, tuple(self._flush()), None, 0, 0)
        if delta is None:
            value, actions = self._read(row)
        else:
            actions = self._write(row, delta)
        copy, clock = self.copies.get(row), self.table.fetch(row)[1]
        start, updates = (None, 0) if copy is None else (copy.start, copy.updates)
        return TraceStep(name, operation, row, value, tuple(actions), start, updates, clock)

    def _read(self, row: int) -> tuple[float, list[str]]:
        actions = self._push_evicted()
        self.reads += 1
        copy = self.copies.get(row)
        if copy is None:
            value = self._insert(row, actions)
        else:
            self._refresh(row, copy, actions)
            value = copy.value
            copy.last_read = self.reads
            if self.rules.policy == "lfu":
                copy.count += 1
            elif self.rules.policy == "lfuopt":
                copy.count = min(copy.count + 1, PERMANENT_COUNT)
        if self.rules.aging is not None and self.reads % self.rules.aging == 0:
            for each in self.copies.values():
                each.count //= 2
        return value, actions

    def _refresh(self, row: int, copy: _Copy, actions: list[str]) -> None:
        if self.table.fetch(row)[1] - copy.start <= self.rules.pull_limit:
            actions.append("hit")
            return
        actions.append("stale")
        if self.rules.on_stale == "flush" and copy.updates:
            self._push(row, copy)
            actions.append("push")
        value, copy.start = self.table.fetch(row)
        copy.value = value + copy.pending

    def _insert(self, row: int, actions: list[str]) -> float:
        value, clock = self.table.fetch(row)
        actions.append("miss")
        if len(self.copies) >= self.capacity:
            victim = self._victim()
            if victim is None:
                actions.append("overflow")
                return value
            actions.append(f"evict:{victim}")
            copy = self.copies.pop(victim)
            if copy.updates:
                self.evicted[victim] = copy
        self.copies[row] = _Copy(value, clock, count=int(self.rules.policy == "lfu"), last_read=self.reads)
        return value

    def _victim(self) -> int | None:
        """Lowest count first, which is 0 for all with ``lru``, then longest unread, then smallest id."""
        permanent = PERMANENT_COUNT if self.rules.policy == "lfuopt" else float("inf")
        order = [(copy.count, copy.last_read, row) for row, copy in self.copies.items() if copy.count < permanent]
        return min(order)[2] if order else None

    def _write(self, row: int, delta: float) -> list[str]:
        copy = self.copies.get(row)
        if copy is not None:
            copy.value += delta
            copy.pending += delta
            copy.updates += 1
            actions = self._push_evicted()
            if copy.updates <= self.rules.push_limit:
                return [*actions, "local"]
            self._push(row, copy)
            return [*actions, "push"]
        waiting = self.evicted.get(row)
        if waiting is None:
            actions = self._push_evicted()
            self.table.push(row, delta, 1)
        else:  # one message, so one entry for the row
            waiting.pending += delta
            waiting.updates += 1
            actions = self._push_evicted()
        return [*actions, "push"]

    def _flush(self) -> list[str]:
        actions = self._push_evicted()
        for row, copy in sorted(self.copies.items()):
            if copy.updates:
                self._push(row, copy)
                actions.append(f"push:{row}")
        return actions

    def _push_evicted(self) -> list[str]:
        rows = sorted(self.evicted)
        for row in rows:
            self._push(row, self.evicted.pop(row))
        return [f"write_back:{row}" for row in rows]

    def _push(self, row: int, copy: _Copy) -> None:
        self.table.push(row, copy.pending, copy.updates)
        copy.start += copy.updates  # the copy contains them already
        copy.pending, copy.updates = 0.0, 0
