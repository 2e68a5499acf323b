"""Candidates and scores under the optimal split, for few ranks.

The ratio that the optimal split reaches is the largest density over all sets of ranks (see
:mod:`~lightning_hetu.moe.placement.split`). Eight ranks have 255 sets, so the densities after many moves are a few
array operations, and no flow has to be solved.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_hetu.moe.placement.moves import (
    Floats,
    Ints,
    Layout,
    Move,
    all_pairs,
    candidates,
    parts,
)

MOST_RANKS = 8
_HOT = 3  # experts of the densest set that are looked at, where there are many


class _Sets(NamedTuple):
    """All sets of ranks, small ones first: of equally dense ones they say more exactly where the tokens are."""

    members: list[list[int]]
    sizes: Floats
    lacks: NDArray[np.int8]  # [ranks + 1, sets]: whether a rank is not in a set; nobody is in all


@cache
def _sets(num_ranks: int) -> _Sets:
    members = (np.arange(1, 2**num_ranks)[:, None] >> np.arange(num_ranks)) & 1
    members = members[np.argsort(members.sum(axis=1), kind="stable")]
    lacks = np.zeros((num_ranks + 1, len(members)), dtype=np.int8)
    lacks[:-1] = 1 - members.T
    return _Sets([row.nonzero()[0].tolist() for row in members], members.sum(axis=1).astype(np.float64), lacks)


class FlowState:
    """A placement with the density of each set of ranks."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.sets = _sets(layout.num_ranks)
        # Holders of each expert outside of each set.
        self.outside = np.einsum("er,rs->es", layout.held.astype(np.int8), self.sets.lacks)
        self._update()

    def _update(self) -> None:
        self.inside = self.outside == 0
        self.densities: Floats = (self.inside * self.layout.load_array[:, None]).sum(axis=0) / self.sets.sizes
        self.fullest = float(self.densities.max())

    def copy(self) -> FlowState:
        """A copy that can be changed."""
        twin = object.__new__(FlowState)
        twin.__dict__.update(self.__dict__)
        twin.layout, twin.outside = self.layout.copy(), self.outside.copy()
        return twin

    def apply(self, move: Move) -> None:
        """Changes the placement."""
        self.layout.apply(move)
        for item, gained, lost in (move[:3], move[3:]):
            self.outside[item] += self.sets.lacks[gained] - self.sets.lacks[lost]
        self._update()

    def candidates(self, *, wide: bool) -> list[Move]:
        """Moves that take tokens out of the densest set; all moves if ``wide``."""
        layout, ranks = self.layout, self.layout.num_ranks
        levels = self.densities[:ranks].tolist()  # of single ranks: what cannot leave them
        if wide:
            return candidates(layout, all_pairs(layout), range(ranks), levels, wide=True)
        densest = int(self.densities.argmax())
        members = self.sets.members[densest]
        for rank in members:
            levels[rank] = self.fullest
        inside = self.inside[:-1, densest].nonzero()[0].tolist()
        hot = sorted(inside, key=lambda expert: (-layout.loads[expert], expert))[:_HOT]
        targets = sorted((rank for rank in range(ranks) if rank not in members), key=levels.__getitem__)
        return candidates(
            layout, [(expert, min(layout.holders[expert])) for expert in hot], targets, levels, wide=False
        )

    def loads(self, moves: Ints | None = None) -> Floats:
        """Densities of sets, or what they would be after each move: ``[moves, sets]``."""
        if moves is None:
            return self.densities
        experts, to, off = parts(moves)
        outside = self.outside[experts] + self.sets.lacks[to] - self.sets.lacks[off]
        change = (outside == 0).astype(np.int8) - self.inside[experts]
        tokens = (change * self.layout.load_array[experts][:, :, None]).sum(axis=1)
        return self.densities + tokens / self.sets.sizes
