"""From one placement to another: which operations, in an order in which each is possible when its turn comes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_hetu.moe.placement.operations import Expand, Migrate, Operation, Shrink
from lightning_hetu.moe.placement.placement import FREE, Placement


def transition(
    start: Placement, target: Sequence[Collection[int]], ranks_per_node: int | None = None
) -> list[Operation]:
    """Operations after which each rank holds the experts of the target.

    Args:
        start: The placement before.
        target: Experts of each rank, every expert on at least one and no more than fit.
        ranks_per_node: Ranks of a node, within which copies are preferred; by default there is one node.
    """
    return _Transition(start, target, ranks_per_node or start.num_ranks).operations()


class _Transition:
    """What is still to be done. An expert that is to leave a rank is "spare" there."""

    def __init__(self, start: Placement, target: Sequence[Collection[int]], ranks_per_node: int) -> None:
        before = [set(row) - {FREE} for row in start.slots]
        self.spare = [sorted(held - set(wanted)) for held, wanted in zip(before, target, strict=True)]
        self.missing = [
            (rank, expert) for rank, wanted in enumerate(target) for expert in sorted(set(wanted) - before[rank])
        ]
        self.free = [start.num_free(rank) for rank in range(start.num_ranks)]
        self.holders = [list(ranks) for ranks in start.all_holders]
        self.spare_at: list[list[int]] = [[] for _ in self.holders]
        for rank, experts in enumerate(self.spare):
            for expert in experts:
                self.spare_at[expert].append(rank)
        self.ranks_per_node = ranks_per_node
        self.done: list[Operation] = []

    def operations(self) -> list[Operation]:
        before = -1
        while len(self.missing) != before:
            before = len(self.missing)
            self.missing = [item for item in self.missing if not self._place(*item)]
        while self.missing:
            self._swap()
        for rank, experts in enumerate(self.spare):
            for expert in tuple(experts):
                self._shrink(expert, rank)
        return self.done

    def _place(self, rank: int, expert: int) -> bool:
        """Puts a missing expert on a rank if there is room, or room can be made without losing an expert."""
        if not self.free[rank]:
            replica = next((other for other in self.spare[rank] if len(self.holders[other]) > 1), None)
            if replica is None:
                return False
            self._shrink(replica, rank)
        self.free[rank] -= 1
        if self.spare_at[expert]:
            source = self._nearest(self.spare_at[expert], rank)
            self.done.append(Migrate(expert, source, rank))
            self._leaves(expert, source)
            self.free[source] += 1
        else:
            self.done.append(Expand(expert, self._nearest(self.holders[expert], rank), rank))
        self.holders[expert].append(rank)
        return True

    def _swap(self) -> None:
        """Exchanges two experts that are both where they should not stay.

        Where nothing can be placed, every rank that misses an expert is full, and what it has to spare is the last
        copy and so missing elsewhere. Then there are as many missing as spare ones, the same experts, and after an
        exchange as well.
        """
        rank, expert = next(item for item in self.missing if self.spare_at[item[1]])
        source = self._nearest(self.spare_at[expert], rank)
        other = self.spare[rank][0]
        self.done.append(Migrate(expert, source, rank, other))
        self._leaves(expert, source)
        self._leaves(other, rank)
        self.holders[expert].append(rank)
        self.holders[other].append(source)
        self.missing.remove((rank, expert))
        if (source, other) in self.missing:
            self.missing.remove((source, other))
        else:
            self.spare[source].append(other)
            self.spare_at[other].append(source)

    def _shrink(self, expert: int, rank: int) -> None:
        self.done.append(Shrink(expert, rank))
        self._leaves(expert, rank)
        self.free[rank] += 1

    def _leaves(self, expert: int, rank: int) -> None:
        self.spare[rank].remove(expert)
        self.spare_at[expert].remove(rank)
        self.holders[expert].remove(rank)

    def _nearest(self, ranks: Sequence[int], to: int) -> int:
        return nearest(ranks, to, self.ranks_per_node)


def nearest(ranks: Sequence[int], to: int, ranks_per_node: int) -> int:
    """The lowest rank on the node of ``to``, or else the lowest of all."""
    node = to // ranks_per_node
    return min([rank for rank in ranks if rank // ranks_per_node == node] or ranks)


def relabel(start: Placement, target: Sequence[Collection[int]]) -> list[Collection[int]]:
    """The target with its ranks renamed such that many experts stay where they are.

    Ranks are matched one by one, those with the most experts in common first, of equal ones the lowest. Loads of ranks
    only change places.
    """
    shape = (start.num_experts, start.num_ranks)
    wanted = np.zeros(shape, dtype=np.float64)
    for rank, experts in enumerate(target):
        wanted[list(experts), rank] = 1.0
    common: NDArray[np.float64] = wanted.T @ start.matrix  # whole numbers, so exact
    out: list[Collection[int]] = [()] * start.num_ranks
    taken = [False] * start.num_ranks
    named = [False] * start.num_ranks
    for pair in np.argsort(-common, axis=None, kind="stable").tolist():
        rank, name = divmod(pair, start.num_ranks)
        if not taken[rank] and not named[name]:
            out[name] = target[rank]
            taken[rank] = named[name] = True
    return out


def num_missing(start: Placement, target: Sequence[Collection[int]]) -> int:
    """How many experts must be sent at least."""
    return sum(len(set(wanted).difference(held)) for wanted, held in zip(target, start.slots, strict=True))
