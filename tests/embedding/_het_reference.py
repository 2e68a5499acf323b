"""Drives the real cache as ``replay`` does, and a slow cache by the batch rules to compare with."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import torch

from lightning_hetu.embedding import CacheRules, RowCache, RowOwner, TensorRowStore, TraceStep


def random_events(seed: int, length: int, *, workers: str = "AB", rows: int = 6) -> list[tuple[Any, ...]]:
    """Reads, writes to whatever row, and a few flushes; small rows more often."""
    chance = random.Random(seed)
    events: list[tuple[Any, ...]] = []
    for _ in range(length):
        worker, row = chance.choice(workers), min(chance.randrange(rows), chance.randrange(rows))
        kind = chance.random()
        if kind < 0.5:
            events.append((worker, "R", row))
        elif kind < 0.97:
            events.append((worker, "W", row, chance.uniform(-1, 1)))
        else:
            events.append((worker, "F"))
    return events


class Driver:
    """Caches of workers, each fully associative, in front of one owner; float64 rows of one number."""

    def __init__(self, rules: CacheRules, capacity: int, num_rows: int) -> None:
        self.rules, self.capacity = rules, capacity
        self.owner = RowOwner(TensorRowStore(num_rows, 1, dtype=torch.float64), 1, pull_limit=rules.pull_limit)
        self.caches: dict[str, RowCache] = {}

    def run(self, events: Iterable[tuple[Any, ...]]) -> list[TraceStep]:
        return [self._step(*event) for event in events]

    def _step(self, worker: str, operation: str, row: int | None = None, delta: float | None = None) -> TraceStep:
        if worker not in self.caches:
            self.caches[worker] = RowCache(
                self.capacity, 1, self.rules, ways=max(1, self.capacity), dtype=torch.float64
            )
        cache = self.caches[worker]
        if row is None:
            waiting = sorted(cache._evicted.ids.tolist())
            push = cache.flush()
            self.owner.apply(push)
            own = sorted(set(push.ids.tolist()) - set(waiting))
            actions = (*(f"write_back:{other}" for other in waiting), *(f"push:{other}" for other in own))
            return TraceStep(worker, operation, None, None, actions, None, 0, 0)
        ids = torch.tensor([row])
        value = None
        if delta is None:
            value, actions = self._read(cache, ids)
        else:
            actions = self._write(cache, ids, delta)
        start, updates = (int(clock) for clock in cache.clocks(ids))
        clock = int(self.owner.store.clocks(ids))
        return TraceStep(worker, operation, row, value, actions, None if start < 0 else start, updates, clock)

    def _read(self, cache: RowCache, ids: torch.Tensor) -> tuple[float, tuple[str, ...]]:
        evicted = cache.take_evicted()
        self.owner.apply(evicted)
        actions = [f"write_back:{row}" for row in sorted(evicted.ids.tolist())]
        plan = cache.begin_read(ids)
        stale = self.owner.stale(ids, plan.versions)
        pushed = cache.push_stale(plan, stale)
        self.owner.apply(pushed)
        result = cache.finish_read(plan, stale, *self.owner.fetch(ids[stale]))
        actions.append("miss" if plan.slots.item() < 0 else "stale" if stale.item() else "hit")
        actions += ["push"] * len(pushed) + ["overflow"] * int(result.overflow)
        actions += [f"evict:{row}" for row in result.evicted.tolist()]
        return result.values.item(), tuple(actions)

    def _write(self, cache: RowCache, ids: torch.Tensor, delta: float) -> tuple[str, ...]:
        waiting = sorted(cache._evicted.ids.tolist())
        push = cache.write(ids, torch.tensor([[delta]], dtype=torch.float64))
        self.owner.apply(push)
        assert set(push.ids.tolist()) - {int(ids)} == set(waiting) - {int(ids)}
        assert len(push.ids.unique()) == len(push)
        actions = [f"write_back:{row}" for row in waiting]
        return *actions, "push" if int(ids) in push.ids.tolist() else "local"


class SlowIndex:
    """Which rows are in a fully associative cache, by the rules for batches, one row at a time."""

    def __init__(self, capacity: int, rules: CacheRules) -> None:
        self.capacity, self.rules, self.reads = capacity, rules, 0
        self.rows: dict[int, list[int]] = {}  # id: [count, last read]

    def read(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Rows that overflow, and rows that leave."""
        self.reads += 1
        top = {"lru": 0, "lfu": 2**30, "lfuopt": 10}[self.rules.policy]
        for row in ids:
            if row in self.rows:
                self.rows[row] = [min(self.rows[row][0] + 1, top), self.reads]
        overflow, evicted = [], []
        for row in [row for row in ids if row not in self.rows]:
            if len(self.rows) == self.capacity:
                candidates = [
                    (count, last, other)
                    for other, (count, last) in self.rows.items()
                    if other not in ids and not (self.rules.policy == "lfuopt" and count >= 10)
                ]
                if not candidates:
                    overflow.append(row)
                    continue
                evicted.append(min(candidates)[2])
                del self.rows[evicted[-1]]
            self.rows[row] = [int(self.rules.policy == "lfu"), self.reads]
        if self.rules.aging and self.reads % self.rules.aging == 0:
            self.rows = {row: [count // 2, last] for row, (count, last) in self.rows.items()}
        return overflow, evicted
