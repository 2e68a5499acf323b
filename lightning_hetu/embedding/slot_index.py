"""Where a cache keeps which row, and which row leaves when another needs its place.

Rows are kept in sets: a row may be in any of the ``ways`` slots of its own set, and nowhere else. Looking up and
choosing victims are then fixed-size operations on ``[rows, ways]`` tables, without probing loops, for a whole batch at
once. Policies hold exactly within a set; with ``ways >= capacity`` there is one set, and they hold for the whole cache.
A full set evicts even while another has free slots, so a cache as large as its table can still miss.

In a batch, all hits are counted first. The rows of the batch then cannot leave, and victims are those with the lowest
count, then those read longest ago, then those with the smallest id. Rows that find no place are for the caller.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hetu.embedding.rules import PERMANENT_COUNT, CacheRules

DEFAULT_WAYS = 32
"""Slots of a set: one warp's width, so that a GPU can look at a set at once."""
NO_ROW = torch.iinfo(torch.int64).min
"""Key of an empty slot; the one int64 that is not an id."""

_MAX_COUNT = 2**30 - 1


class SlotIndex:
    """Slots of a cache by row id, with the counts its policy needs.

    Args:
        capacity: Slots wanted. Sets have equal sizes, so there may be up to ``ways - 1`` fewer.
        rules: The policy and its aging.
        ways: Slots of a set: a few more where ``capacity`` is not a multiple, and fewer where it is below. The work for
            a row grows with it.
        device: Where the tables are.

    Attributes:
        capacity: Slots there are.
        ways: Slots of a set.
        keys: ``[capacity]`` int64: the row in each slot, or ``NO_ROW``.
        counts: ``[capacity]`` int32: how often it was read, as the policy counts.
        last_read: ``[capacity]`` int32: number of the batch that read it last.
        reads: Batches so far.

    Raises:
        ValueError: If a size is out of range.
    """

    def __init__(
        self, capacity: int, rules: CacheRules, *, ways: int = DEFAULT_WAYS, device: torch.device | str = "cpu"
    ) -> None:
        if capacity < 0:
            raise ValueError(f"capacity={capacity}: expected at least 0 rows.")
        if ways < 1:
            raise ValueError(f"ways={ways}: expected at least 1 slot in a set.")
        self.rules = rules
        self.num_sets = max(1, capacity // ways)
        self.ways = capacity // self.num_sets
        self.capacity = self.num_sets * self.ways
        self.keys = torch.full((self.capacity,), NO_ROW, dtype=torch.int64, device=device)
        self.counts = torch.zeros(self.capacity, dtype=torch.int32, device=device)
        self.last_read = torch.zeros(self.capacity, dtype=torch.int32, device=device)
        self.reads = 0

    def set_of(self, ids: Tensor) -> Tensor:
        """The set each row belongs to, ``[n]`` int64; there must be one."""
        return (mix64(ids) & torch.iinfo(torch.int64).max) % self.num_sets

    def find(self, ids: Tensor) -> Tensor:
        """Slots of distinct rows ``[n]`` int64, -1 for those that are not there; counts nothing."""
        if self.capacity == 0:
            return torch.full_like(ids, -1)
        slots = self._slots_of(self.set_of(ids))
        found = self.keys[slots] == ids[:, None]
        slot = slots.gather(1, found.int().argmax(1, keepdim=True))[:, 0]
        return torch.where(found.any(1), slot, -1)

    def touch(self, slots: Tensor) -> None:
        """Begins the next batch and counts its hits, distinct slots ``[n]``, which pins them until the next one."""
        self.reads += 1
        self.last_read[slots] = self.reads
        if self.rules.policy == "lfu":
            self.counts[slots] = (self.counts[slots] + 1).clamp(max=_MAX_COUNT)
        elif self.rules.policy == "lfuopt":
            self.counts[slots] = (self.counts[slots] + 1).clamp(max=PERMANENT_COUNT)

    def place(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Gives slots to missing rows of the current batch, free ones first; earlier rows are served first.

        Args:
            ids: ``[n]`` int64 distinct rows that are not there.

        Returns:
            Slots ``[n]`` int64, -1 where a row found no place, and the row that was in each, ``NO_ROW`` if none.
        """
        if self.capacity == 0 or ids.numel() == 0:
            return torch.full_like(ids, -1), torch.full_like(ids, NO_ROW)
        sets, group = self.set_of(ids).unique(return_inverse=True)
        slots = self._slots_of(sets)
        rank, available = self._victims(slots)
        turn = _position_in_group(group)
        placed = turn < available[group]
        slot = slots[group, rank[group, turn.clamp(max=self.ways - 1)]]
        slot = torch.where(placed, slot, -1)
        evicted = torch.where(placed, self.keys[slot], NO_ROW)
        taken = slot[placed]
        self.keys[taken] = ids[placed]
        self.counts[taken] = int(self.rules.policy == "lfu")
        self.last_read[taken] = self.reads
        return slot, evicted

    def age(self) -> None:
        """Ends a batch: halves all counts if it is time to."""
        if self.rules.aging is not None and self.reads % self.rules.aging == 0:
            self.counts //= 2

    def clear(self) -> None:
        """Forgets all rows."""
        self.keys.fill_(NO_ROW)
        self.counts.zero_()
        self.last_read.zero_()

    def _slots_of(self, sets: Tensor) -> Tensor:
        """``[n, ways]``."""
        return sets[:, None] * self.ways + torch.arange(self.ways, device=sets.device)

    def _victims(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """For sets of slots ``[n, ways]``, the ways in the order they are given away, and how many may be, ``[n]``."""
        keys, counts, last = self.keys[slots], self.counts[slots].long(), self.last_read[slots].long()
        kept = last == self.reads  # in this batch
        if self.rules.policy == "lfuopt":
            kept |= counts >= PERMANENT_COUNT
        free = keys == NO_ROW
        kept &= ~free
        # One number for the order: free ones, those that may leave, those that stay; then the count; then the read.
        state = torch.where(free, 0, torch.where(kept, 2, 1))
        order = state * 2**61 + counts * 2**31 + last
        by_id = keys.argsort(dim=1, stable=True)
        rank = by_id.gather(1, order.gather(1, by_id).argsort(dim=1, stable=True))
        return rank, self.ways - kept.sum(1)


def mix64(ids: Tensor) -> Tensor:
    """Spreads int64 numbers evenly over all int64: the finalizer of SplitMix64 (Steele et al., OOPSLA 2014)."""
    mixed = ids
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ _shift_right(mixed, shift)) * (factor - 2**64)  # wraps, as it should
    return mixed ^ _shift_right(mixed, 31)


def _shift_right(numbers: Tensor, bits: int) -> Tensor:
    """Shifts zeros in; ``>>`` would repeat the sign."""
    return (numbers >> bits) & (2 ** (64 - bits) - 1)


def _position_in_group(group: Tensor) -> Tensor:
    """How many earlier entries of ``[n]`` have the same number, ``[n]``."""
    by_group = group.argsort(stable=True)
    ordered = group[by_group]
    position = torch.empty_like(group)
    start = torch.searchsorted(ordered, ordered, side="left")
    position[by_group] = torch.arange(group.numel(), device=group.device) - start
    return position
