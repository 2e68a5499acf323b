"""What may be done next to a placement: candidates for the search.

A move gives an expert ``e`` a new rank ``to``, takes the rank ``off`` from it, or both, and may do the same with
another expert ``f``. That covers the primitives, and the pairs of them that only pay together:

===================  ====  ====  ====  ====  =======  ========
move                 e     to    off   f     f gains  f loses
===================  ====  ====  ====  ====  =======  ========
expand               e     d
replace              e     d           f              d
migrate              e     d     s
migrate and replace  e     d     s     f              d
swap                 e     d     s     f     s        d
shrink               e           s
===================  ====  ====  ====  ====  =======  ========
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_hetu.moe.placement.operations import Expand, Migrate, Operation, Shrink
from lightning_hetu.moe.placement.placement import FREE, Placement
from lightning_hetu.moe.placement.transition import nearest

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Move = tuple[int, int, int, int, int, int]

NONE = -1


class Layout:
    """A placement that changes.

    Arrays have one row or column more than there are experts or ranks: index -1 is nobody.

    Args:
        placement: Where experts are.
        loads: Tokens of each expert relative to the mean load of a rank.
        sources: The same by the rank they come from, ``[ranks, experts]``.
    """

    def __init__(self, placement: Placement, loads: Sequence[float], sources: Floats) -> None:
        self.num_slots = placement.num_slots
        self.experts = [[expert for expert in row if expert != FREE] for row in placement.slots]
        self.holders = [list(ranks) for ranks in placement.all_holders]
        self.loads = list(loads)
        # Tokens of each expert for each of its holders, if they are split evenly.
        self.shares = [load / len(ranks) for load, ranks in zip(loads, self.holders, strict=True)]
        self.load_array: Floats = np.array([*loads, 0.0])
        self.held: Floats = np.zeros((placement.num_experts + 1, placement.num_ranks + 1))
        self.held[:-1, :-1] = placement.matrix
        self.sources: Floats = np.zeros_like(self.held)
        self.sources[:-1, :-1] = sources.T
        # Tokens of each rank that it can compute itself.
        self.at_home: Floats = (self.held * self.sources).sum(axis=0)
        self.counts: Ints = np.array([*map(len, self.holders), 1])

    def copy(self) -> Layout:
        """A copy that can be changed."""
        twin = object.__new__(Layout)
        twin.num_slots, twin.loads, twin.load_array = self.num_slots, self.loads, self.load_array
        twin.experts = [row.copy() for row in self.experts]
        twin.holders = [ranks.copy() for ranks in self.holders]
        twin.sources = self.sources
        twin.shares = self.shares.copy()
        twin.held, twin.counts, twin.at_home = self.held.copy(), self.counts.copy(), self.at_home.copy()
        return twin

    @property
    def num_ranks(self) -> int:
        """Number of ranks."""
        return len(self.experts)

    def apply(self, move: Move) -> None:
        """Changes the layout."""
        for item, gained, lost in (move[:3], move[3:]):
            if lost != NONE:
                self.experts[lost].remove(item)
                self.holders[item].remove(lost)
                self.held[item, lost] = 0.0
                self.at_home[lost] -= self.sources[item, lost]
                self.counts[item] -= 1
            if gained != NONE:
                self.experts[gained].append(item)
                self.holders[item].append(gained)
                self.held[item, gained] = 1.0
                self.at_home[gained] += self.sources[item, gained]
                self.counts[item] += 1
            if item != NONE:
                self.shares[item] = self.loads[item] / len(self.holders[item])

    def operations(self, move: Move, ranks_per_node: int) -> list[Operation]:
        """The move as operations, at most two."""
        expert, to, off, other, other_to, other_off = move
        if to == NONE:
            return [Shrink(expert, off)]
        if other_to != NONE:
            return [Migrate(expert, off, to, other)]
        before: list[Operation] = [] if other_off == NONE else [Shrink(other, other_off)]
        if off != NONE:
            return [*before, Migrate(expert, off, to)]
        return [*before, Expand(expert, nearest(self.holders[expert], to, ranks_per_node), to)]


def candidates(
    layout: Layout, pairs: Iterable[tuple[int, int]], targets: Sequence[int], levels: Sequence[float], *, wide: bool
) -> list[Move]:
    """Moves that take experts from ranks or give them more.

    Args:
        layout: The placement.
        pairs: Experts, and the rank each is to be taken from.
        targets: Ranks they may go to.
        levels: Load of each rank.
        wide: Whether to try all exchanges and replacements, instead of the likely ones for each expert and target.
    """
    moves: list[Move] = []
    share, holders = layout.shares, layout.holders
    rows = []
    for target in targets:
        row = sorted(layout.experts[target], key=share.__getitem__)
        full = len(row) == layout.num_slots
        # A replica gives way to another expert: one that others hold too, the coldest first.
        replicas = [expert for expert in row if len(holders[expert]) > 1] if wide or full else []
        rows.append((target, full, row, [share[expert] for expert in row], replicas if wide else replicas[:1]))
    for expert, source in pairs:
        own = layout.experts[source]
        for target, full, row, shares, replicas in rows:
            if target in holders[expert]:
                continue
            if not full:
                moves.append((expert, target, NONE, NONE, NONE, NONE))
                moves.append((expert, target, source, NONE, NONE, NONE))
            for other in replicas:
                moves.append((expert, target, NONE, other, NONE, target))
                if wide:
                    moves.append((expert, target, source, other, NONE, target))
            others = row
            if not wide:
                if not full:  # a free slot is better than an exchange
                    continue
                # Half of the difference between the ranks should move.
                place = bisect_left(shares, share[expert] - (levels[source] - levels[target]) / 2)
                others = row[max(place - 1, 0) : place + 1]
            moves += [(expert, target, source, other, source, target) for other in others if other not in own]
        if len(holders[expert]) > 1:
            moves.append((expert, NONE, source, NONE, NONE, NONE))
    return moves


def all_pairs(layout: Layout) -> list[tuple[int, int]]:
    """Every expert with every rank that holds it."""
    return [(expert, rank) for expert, ranks in enumerate(layout.holders) for rank in ranks]


def parts(moves: Ints) -> tuple[Ints, Ints, Ints]:
    """Of moves ``[moves, 6]`` the experts, the ranks that they gain, and those that they lose, ``[moves, 2]`` each."""
    both = moves.reshape(-1, 2, 3)
    return both[:, :, 0], both[:, :, 1], both[:, :, 2]
