"""Candidates and scores where every holder of an expert gets as many of its tokens."""

from __future__ import annotations

import numpy as np

from lightning_hetu.moe.placement.moves import (
    NONE,
    Floats,
    Ints,
    Layout,
    Move,
    all_pairs,
    candidates,
    parts,
)

_HOT = 3  # experts of the fullest rank that are looked at, and
_COLD = 4  # ranks they may go to, where there are many


class EvenState:
    """A placement with the load of each rank."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._update()

    def _update(self) -> None:
        layout = self.layout
        self.share = layout.load_array / layout.counts
        # Not a matrix product: its last bits differ from processor to processor.
        self.levels: Floats = (layout.held * self.share[:, None]).sum(axis=0)[:-1]
        self.fullest = float(self.levels.max())

    def copy(self) -> EvenState:
        """A copy that can be changed."""
        twin = object.__new__(EvenState)
        twin.__dict__.update(self.__dict__)
        twin.layout = self.layout.copy()
        return twin

    def apply(self, move: Move) -> None:
        """Changes the placement."""
        self.layout.apply(move)
        self._update()

    def candidates(self, *, wide: bool) -> list[Move]:
        """Moves that relieve the fullest rank; all moves if ``wide``."""
        layout, levels = self.layout, self.levels.tolist()
        if wide:
            return candidates(layout, all_pairs(layout), range(layout.num_ranks), levels, wide=True)
        order = sorted(range(layout.num_ranks), key=levels.__getitem__)
        fullest = levels.index(levels[order[-1]])
        hot = sorted(layout.experts[fullest], key=lambda expert: (-layout.shares[expert], expert))[:_HOT]
        targets = [rank for rank in order[: _COLD + 1] if rank != fullest][:_COLD]
        return candidates(layout, [(expert, fullest) for expert in hot], targets, levels, wide=False)

    def loads(self, moves: Ints | None = None) -> Floats:
        """Loads of ranks, or what they would be after each move: ``[moves, ranks]``."""
        if moves is None:
            return self.levels
        layout = self.layout
        experts, to, off = parts(moves)
        share = layout.load_array[experts] / (layout.counts[experts] + (to != NONE) - (off != NONE))
        levels = (layout.held[experts] * (share - self.share[experts])[:, :, None]).sum(axis=1)
        levels[:, :-1] += self.levels
        rows = np.arange(len(moves))
        for item in (0, 1):
            levels[rows, to[:, item]] += share[:, item]
            levels[rows, off[:, item]] -= share[:, item]
        return levels[:, :-1]
