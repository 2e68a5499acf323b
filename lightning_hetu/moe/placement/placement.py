"""Which rank holds which experts in which slots.

FlexMoE (arXiv 2304.03946) divides a rank into shares ("vExperts") and may give one expert several of them.
Here a slot holds an expert once: how many tokens of it a rank computes is decided by the split of tokens, so a second
slot for the same expert on the same rank would hold nothing new.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import index

import numpy as np
from numpy.typing import NDArray

from lightning_hetu.moe.placement.operations import Migrate, Operation, Shrink

FREE = -1
"""What a slot without an expert holds."""


@dataclass(frozen=True)
class Placement:
    """Experts in slots; immutable, equal and hashable by its slots.

    Args:
        slots: Ids of experts, ``[ranks][slots]``; -1 is a free slot. Ids are 0 to ``num_experts - 1``. A rank holds an
            expert at most once, and every expert is held somewhere.

    Raises:
        ValueError: If it is none.
    """

    slots: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        try:
            table = tuple(tuple(index(expert) for expert in row) for row in self.slots)
        except TypeError as error:
            raise ValueError(f"slots={self.slots!r}: expected a row of whole numbers for each rank.") from error
        if not table or not table[0] or len({len(row) for row in table}) > 1:
            raise ValueError(f"slots: rows of {[len(row) for row in table]} slots, expected as many on every rank.")
        experts = {expert for row in table for expert in row} - {FREE}
        if experts != set(range(len(experts))) or not experts:
            raise ValueError(
                f"slots hold the experts {sorted(experts)}: expected each of 0 to {max(experts, default=0)} and -1 for"
                " free slots."
            )
        for rank, row in enumerate(table):
            held = [expert for expert in row if expert != FREE]
            if len(held) > len(set(held)):
                raise ValueError(f"slots[{rank}]={list(row)}: expected an expert at most once on a rank.")
        object.__setattr__(self, "slots", table)

    @classmethod
    def contiguous(cls, num_experts: int, ranks: int, slots: int | None = None) -> Placement:
        """Every expert once, in blocks of neighbors; where training begins.

        Args:
            num_experts: Number of experts; rank ``r`` of ``R`` gets ``r * num_experts // R`` and those that follow.
            ranks: Number of ranks.
            slots: Slots of each rank; those beyond its experts are free. By default as few as will do.

        Raises:
            ValueError: If a number is below 1, or the slots do not suffice.
        """
        for name, value in (("num_experts", num_experts), ("ranks", ranks)):
            if value < 1:
                raise ValueError(f"{name}={value}: expected at least 1.")
        most = -(-num_experts // ranks)
        slots = most if slots is None else slots
        if slots < most:
            raise ValueError(f"slots={slots}: {num_experts} experts on {ranks} ranks need at least {most}.")
        bounds = [rank * num_experts // ranks for rank in range(ranks + 1)]
        rows = (tuple(range(low, high)) for low, high in zip(bounds[:-1], bounds[1:], strict=True))
        return cls(tuple(row + (FREE,) * (slots - len(row)) for row in rows))

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[int]]) -> Placement:
        """Reads what :meth:`to_lists` wrote.

        Raises:
            ValueError: If it is no placement.
        """
        return cls(tuple(tuple(row) for row in lists))

    def to_lists(self) -> list[list[int]]:
        """The slots as lists, for a checkpoint."""
        return [list(row) for row in self.slots]

    @property
    def num_ranks(self) -> int:
        """Number of ranks."""
        return len(self.slots)

    @property
    def num_slots(self) -> int:
        """Slots of each rank."""
        return len(self.slots[0])

    @cached_property
    def num_experts(self) -> int:
        """Number of experts."""
        return max(map(max, self.slots)) + 1

    @cached_property
    def all_holders(self) -> tuple[tuple[int, ...], ...]:
        """The ranks that hold each expert, in ascending order."""
        found: list[list[int]] = [[] for _ in range(self.num_experts)]
        for rank, row in enumerate(self.slots):
            for expert in row:
                if expert != FREE:
                    found[expert].append(rank)
        return tuple(map(tuple, found))

    @cached_property
    def matrix(self) -> NDArray[np.bool_]:
        """Whether an expert is on a rank, ``[experts, ranks]``; read-only."""
        matrix = np.zeros((self.num_experts + 1, self.num_ranks), dtype=bool)
        matrix[np.array(self.slots), np.arange(self.num_ranks)[:, None]] = True  # free slots mark the last row
        matrix = matrix[:-1]
        matrix.flags.writeable = False
        return matrix

    def holders(self, expert: int) -> tuple[int, ...]:
        """The ranks that hold an expert, in ascending order."""
        return self.all_holders[expert]

    def holds(self, rank: int, expert: int) -> bool:
        """Whether a rank holds an expert."""
        return expert != FREE and expert in self.slots[rank]

    def slot_of(self, rank: int, expert: int) -> int:
        """The slot of an expert on a rank.

        Raises:
            ValueError: If the rank does not hold it.
        """
        if not self.holds(rank, expert):
            raise ValueError(f"expert={expert} is not on rank={rank}, which holds {list(self.slots[rank])}.")
        return self.slots[rank].index(expert)

    def num_free(self, rank: int) -> int:
        """Free slots of a rank."""
        return self.slots[rank].count(FREE)

    def apply(self, *operations: Operation) -> Placement:
        """The placement after operations, one after another.

        Raises:
            ValueError: If an operation is not allowed when its turn comes.
        """
        rows = [list(row) for row in self.slots]
        for operation in operations:
            _check(rows, operation)
            source = rows[operation.source]
            if isinstance(operation, Shrink):
                source[source.index(operation.expert)] = FREE
                continue
            target = rows[operation.destination]
            if isinstance(operation, Migrate):
                other = FREE if operation.other is None else operation.other
                source[source.index(operation.expert)] = other
                target[target.index(other)] = operation.expert
            else:
                target[target.index(FREE)] = operation.expert
        after = object.__new__(Placement)  # valid because this one is: no need to look at every slot again
        object.__setattr__(after, "slots", tuple(map(tuple, rows)))
        return after


def _check(rows: list[list[int]], operation: Operation) -> None:
    """Refuses an operation that slots do not allow."""
    expert, source = operation.expert, operation.source
    target = source if isinstance(operation, Shrink) else operation.destination
    if not (0 <= source < len(rows) and 0 <= target < len(rows)):
        raise ValueError(f"{operation}: expected ranks from 0 to {len(rows) - 1}.")
    if expert < 0 or expert not in rows[source]:
        raise ValueError(f"{operation}: rank {source} does not hold expert {expert}, but {rows[source]}.")
    if isinstance(operation, Shrink):
        if not any(expert in row for rank, row in enumerate(rows) if rank != source):
            raise ValueError(f"{operation}: no other rank holds expert {expert}; expand it first.")
    elif expert in rows[target]:
        raise ValueError(f"{operation}: rank {target} holds expert {expert} already.")
    elif isinstance(operation, Migrate) and operation.other is not None:
        if operation.other < 0 or operation.other not in rows[target] or operation.other in rows[source]:
            raise ValueError(f"{operation}: expected expert {operation.other} on rank {target} and not on {source}.")
    elif FREE not in rows[target]:
        raise ValueError(f"{operation}: rank {target} has no free slot; shrink one of {rows[target]}.")
