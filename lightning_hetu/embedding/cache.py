"""A worker's cache of embedding rows under the protocol of HET (arXiv 2112.07221), for whole batches of rows.

It does not communicate. It says what to ask the owners of the rows and what to send them, and takes their answers:

1. :meth:`RowCache.begin_read` gives, for each row, the version the cache has. Owners answer which must be fetched.
2. :meth:`RowCache.push_stale` gives what has to reach the owners before they send those (nothing, with ``rebase``).
3. :meth:`RowCache.finish_read` takes the fetched rows and gives the values of all.
4. :meth:`RowCache.write` takes one optimizer step's gradients and gives what goes to the owners.

Rows that found no place are used once and pushed with the next write. A cache without capacity is therefore plain
synchronous training, by the same path. For batches of one row, this is ``trace.replay``, event for event.

With an optimizer, gradients are accumulated, and the owner makes one step of their sum. Until then a copy moves by the
steps that the worker can make alone. As that is only an estimate, a pushed copy counts as stale.

Nothing here loops over rows. Some operations wait for a GPU, since the number of misses decides what follows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hetu.embedding.push import Push
from lightning_hetu.embedding.row_optimizers import RowOptimizer
from lightning_hetu.embedding.rules import CacheRules
from lightning_hetu.embedding.slot_index import DEFAULT_WAYS, NO_ROW, SlotIndex


@dataclass(frozen=True)
class ReadPlan:
    """What a batch asks the owners.

    Args:
        ids: ``[n]`` int64 distinct rows.
        versions: ``[n]`` int32 start clocks of the copies, -1 for rows that must be fetched in any case.
        slots: ``[n]`` int64 slots of the copies, -1 for rows that are missing.
        training: Whether the read changes the cache.
    """

    ids: Tensor
    versions: Tensor
    slots: Tensor
    training: bool


@dataclass(frozen=True)
class ReadResult:
    """What a batch reads.

    Args:
        values: ``[n, dim]`` in the order of the plan.
        overflow: ``[n]`` bool: missing rows that are not in the cache now either.
        evicted: ``[m]`` int64 rows that had to leave.
    """

    values: Tensor
    overflow: Tensor
    evicted: Tensor


class RowCache:
    """Copies of rows with their clocks and pending updates.

    Args:
        capacity: Rows it can hold; rounded down to sets of equal size. 0 fetches and pushes everything.
        dim: Values per row.
        rules: Bounds and policy.
        optimizer: Makes the local steps; rows then come with its state behind their values. Without one, writes are
            changes that are added.
        ways: Slots of a set, see ``slot_index``; ``capacity`` or more for exact policies over the whole cache.
        dtype: Type of rows and gradients.
        device: Where the copies are.

    Raises:
        ValueError: If a size is out of range.
    """

    def __init__(
        self,
        capacity: int,
        dim: int,
        rules: CacheRules,
        *,
        optimizer: RowOptimizer | None = None,
        ways: int = DEFAULT_WAYS,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if dim < 1:
            raise ValueError(f"dim={dim}: expected at least 1.")
        self.index = SlotIndex(capacity, rules, ways=ways, device=device)
        self.dim, self.rules, self.optimizer = dim, rules, optimizer
        self.width = dim if optimizer is None else dim + optimizer.state_width(dim)
        size = self.index.capacity
        self._rows = torch.zeros(size, self.width, dtype=dtype, device=device)
        # Without room for a single pending update, a write's own gradients are all there is to push.
        self._pending = torch.zeros(size if rules.push_limit > 0 else 0, dim, dtype=dtype, device=device)
        self._start = torch.zeros(size, dtype=torch.int32, device=device)
        self._updates = torch.zeros(size, dtype=torch.int32, device=device)
        self._evicted = self._no_push()
        self._plan: ReadPlan | None = None

    @property
    def capacity(self) -> int:
        """Rows it can hold."""
        return self.index.capacity

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        index = (self.index.keys, self.index.counts, self.index.last_read)
        return sum(t.nbytes for t in (self._rows, self._pending, self._start, self._updates, *index))

    @property
    def dirty(self) -> Tensor:
        """``[capacity]`` bool: copies with updates that were not pushed."""
        return self._updates > 0

    def clocks(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Start clocks and pending updates of rows, both ``[n]`` int32; -1 and 0 where there is no copy.

        Args:
            ids: ``[n]`` int64 rows.
        """
        return self._clocks_of(self.index.find(ids))

    def begin_read(self, ids: Tensor, *, training: bool = True) -> ReadPlan:
        """Looks rows up, and counts the hits.

        The read before must be finished. A write may come between beginning and finishing this one, to overlap it with
        computing. The owners must then answer behind that write, by the versions that :meth:`clocks` gives there.

        Args:
            ids: ``[n]`` int64 distinct rows.
            training: Whether missing rows are inserted, stale ones replaced, and accesses counted; no evaluation does.
        """
        slots = self.index.find(ids)
        if training:
            self.index.touch(slots[slots >= 0])
        self._plan = ReadPlan(ids, self._clocks_of(slots)[0], slots, training)
        return self._plan

    def push_stale(self, plan: ReadPlan, stale: Tensor) -> Push:
        """Takes pending updates of stale copies, which the owners must have before they send the rows.

        Copies of other workers that were valid stay so for this read: what arrives within a step is not counted.

        Args:
            plan: The read.
            stale: ``[n]`` bool: rows that the owners found stale or missing.

        Returns:
            Nothing, unless the rules say ``flush`` and the read is one of training.
        """
        if self.rules.on_stale == "rebase" or not plan.training:
            return self._no_push()
        slots = plan.slots[stale & (plan.slots >= 0)]
        return self._take(slots[self._updates[slots] > 0])

    def finish_read(self, plan: ReadPlan, stale: Tensor, rows: Tensor, clocks: Tensor) -> ReadResult:
        """Takes what was fetched and gives the values of all rows of the plan.

        Args:
            plan: The read that was begun last.
            stale: ``[n]`` bool: rows that were fetched, all missing ones among them.
            rows: ``[m, width]`` contents of those, in the order of the plan.
            clocks: ``[m]`` int32 their global clocks.

        Raises:
            ValueError: If a missing row was not fetched, or shapes do not fit.
            RuntimeError: If the plan is not that of the last :meth:`begin_read`, or evicted rows wait to be pushed.
        """
        self._check_answer(plan, stale, rows, clocks)
        slots = plan.slots[stale]
        fetched = self._with_pending(rows, slots)
        cached = slots >= 0
        if plan.training:
            self._rows[slots[cached]] = fetched[cached]
            self._start[slots[cached]] = clocks[cached]
        values = rows.new_empty(plan.ids.numel(), self.dim)
        values[stale] = fetched[:, : self.dim]
        values[~stale] = self._rows[plan.slots[~stale], : self.dim]
        overflow = plan.slots < 0
        evicted = plan.ids.new_empty(0)
        if plan.training:
            places, evicted = self._insert(plan.ids[stale][~cached], rows[~cached], clocks[~cached])
            overflow[overflow.clone()] = places < 0
            self.index.age()
        return ReadResult(values, overflow, evicted)

    def write(self, ids: Tensor, gradients: Tensor) -> Push:
        """Adds one update to each row.

        A pushed copy's start clock moves on by the updates that were pushed. With an optimizer it is -1 from then on:
        the copy is fetched when it is read next.

        Args:
            ids: ``[n]`` int64 distinct rows.
            gradients: ``[n, dim]`` of the cache's dtype; changes of the values where there is no optimizer.

        Returns:
            What the owners get: rows above the bound, rows that are not in the cache, and evicted ones.
        """
        slots = self.index.find(ids)
        cached = slots >= 0
        held, own = slots[cached], gradients[cached]
        if self.optimizer is None:
            self._rows[held] += own
        else:
            self._rows[held] = self.optimizer.update_packed(self._rows[held], own)
        self._updates[held] += 1
        outside = Push(ids[~cached], gradients[~cached], torch.ones_like(ids[~cached], dtype=torch.int32))
        pushes = [Push.cat([self.take_evicted(), outside]).merged()]
        if self.rules.push_limit == 0:
            self._mark_pushed(held)
            pushes.append(Push(ids[cached], own, torch.ones_like(held, dtype=torch.int32)))
        else:
            self._pending[held] += own
            pushes.append(self._take(held[self._updates[held] > self.rules.push_limit]))
        return Push.cat(pushes)

    def take_evicted(self) -> Push:
        """Takes updates of evicted rows, which :meth:`write` does by itself; needed where two reads follow."""
        evicted, self._evicted = self._evicted, self._no_push()
        return evicted

    def flush(self) -> Push:
        """Takes all pending updates; the rows stay."""
        return Push.cat([self.take_evicted(), self._take(self.dirty.nonzero()[:, 0])])

    def invalidate(self) -> None:
        """Forgets all rows, as when the table was loaded anew.

        Raises:
            RuntimeError: If updates are pending.
        """
        if len(self._evicted) or bool(self.dirty.any()):
            raise RuntimeError("invalidate: updates are pending; flush the cache first and send what it gives.")
        self.index.clear()
        self._plan = None

    def _check_answer(self, plan: ReadPlan, stale: Tensor, rows: Tensor, clocks: Tensor) -> None:
        if plan is not self._plan:
            raise RuntimeError("finish_read: the plan is not that of the last begin_read; finish one read at a time.")
        if len(self._evicted):
            raise RuntimeError(
                f"finish_read: {len(self._evicted)} evicted rows wait to be pushed; write, or take_evicted, before it."
            )
        if bool(((plan.slots < 0) & ~stale).any()):
            raise ValueError("stale: rows that are not in the cache must be fetched.")
        count = int(stale.sum())
        if rows.shape != (count, self.width) or clocks.shape != (count,):
            raise ValueError(
                f"rows of shape {tuple(rows.shape)} and clocks of {tuple(clocks.shape)}: expected"
                f" ({count}, {self.width}) and ({count},), one for each row that stale marks."
            )
        self._plan = None

    def _clocks_of(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        cached = slots >= 0
        start, updates = torch.full_like(slots, -1, dtype=torch.int32), torch.zeros_like(slots, dtype=torch.int32)
        start[cached], updates[cached] = self._start[slots[cached]], self._updates[slots[cached]]
        return start, updates

    def _with_pending(self, rows: Tensor, slots: Tensor) -> Tensor:
        """Fetched rows ``[m, width]`` with the pending updates of their copies on top."""
        held = (slots >= 0).nonzero()[:, 0]
        held = held[self._updates[slots[held]] > 0]
        if not held.numel():
            return rows
        rows, pending = rows.clone(), self._pending[slots[held]]
        if self.optimizer is None:
            rows[held] += pending
        else:
            rows[held] = self.optimizer.update_packed(rows[held], pending)
        return rows

    def _insert(self, ids: Tensor, rows: Tensor, clocks: Tensor) -> tuple[Tensor, Tensor]:
        """Gives fetched rows a place; returns their slots, -1 for none, and the rows that left."""
        slots, victims = self.index.place(ids)
        left = victims != NO_ROW
        evicted = victims[left]
        dirty = self._updates[slots[left]] > 0
        taken = self._take(slots[left][dirty])
        self._evicted = Push(evicted[dirty], taken.pending, taken.updates)  # the index has the new ids already
        placed = slots >= 0
        self._rows[slots[placed]] = rows[placed]
        self._start[slots[placed]] = clocks[placed]
        return slots, evicted

    def _take(self, slots: Tensor) -> Push:
        """Takes pending updates of distinct slots ``[m]``."""
        if self.rules.push_limit == 0:  # nothing is ever pending
            return self._no_push()
        push = Push(self.index.keys[slots], self._pending[slots], self._updates[slots])
        self._pending[slots] = 0
        self._mark_pushed(slots)
        return push

    def _mark_pushed(self, slots: Tensor) -> None:
        self._start[slots] = self._start[slots] + self._updates[slots] if self.optimizer is None else -1
        self._updates[slots] = 0

    def _no_push(self) -> Push:
        keys = self.index.keys
        return Push(keys.new_empty(0), self._rows.new_empty(0, self.dim), self._updates.new_empty(0))
