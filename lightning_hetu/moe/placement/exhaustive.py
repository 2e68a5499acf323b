"""The best placement under the even split, for so few slots that all can be tried.

Replicas that share tokens evenly make balance a matter of fitting fractions together, where a search by small steps
ends early. Branch and bound: experts are given their holders one after the other, the heaviest first, and a branch ends
where it cannot be better than the best one known: where a rank is as full, or the ranks with free slots have too little
room below that for the tokens that are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

MOST_SLOTS = 16  # ranks times slots
_NODES = 1000  # about 10 ms; up to six experts on three ranks with four slots need fewer
_ENOUGH = 1.003  # of the mean load


def exhaustive(loads: Sequence[float], num_ranks: int, num_slots: int, bound: float) -> list[list[int]] | None:
    """Experts of each rank, if there is a placement whose fullest rank has less than ``bound``.

    Args:
        loads: Tokens of each expert, relative to the mean load of a rank.
        num_ranks: Number of ranks.
        num_slots: Slots of each.
        bound: Load of the fullest rank that is to be beaten.
    """
    return _Search(loads, num_ranks, num_slots, bound).run()


class _Search:
    def __init__(self, loads: Sequence[float], num_ranks: int, num_slots: int, bound: float) -> None:
        self.order = sorted(range(len(loads)), key=lambda expert: (-loads[expert], expert))
        self.tokens = [loads[expert] for expert in self.order]
        self.left = [sum(self.tokens[index:]) for index in range(len(loads) + 1)]
        self.free = [num_slots] * num_ranks
        self.level = [0.0] * num_ranks
        self.best = bound
        self.found: list[tuple[int, ...]] | None = None
        self.chosen: list[tuple[int, ...]] = []
        self.nodes = _NODES
        self.sets = [members for count in range(1, num_ranks + 1) for members in combinations(range(num_ranks), count)]

    def run(self) -> list[list[int]] | None:
        self._place(0)
        if self.found is None:
            return None
        held: list[list[int]] = [[] for _ in self.level]
        for expert, ranks in zip(self.order, self.found, strict=True):
            for rank in ranks:
                held[rank].append(expert)
        return held

    def _place(self, index: int) -> None:
        if index == len(self.order):
            self.best, self.found = max(self.level), list(self.chosen)
            return
        spare = sum(self.free) - (len(self.order) - index)  # slots beyond the first of each expert to come
        options = []
        for ranks in self.sets:
            if len(ranks) > spare + 1 or not all(self.free[rank] for rank in ranks) or self._has_twin(ranks):
                continue
            share = self.tokens[index] / len(ranks)
            highest = max(self.level[rank] for rank in ranks) + share
            if highest < self.best:
                options.append((highest, ranks, share))
        for highest, ranks, share in sorted(options):
            if self.nodes <= 0 or self.best <= _ENOUGH:
                return
            if highest >= self.best:
                return
            self.nodes -= 1
            before = [self.level[rank] for rank in ranks]
            for rank in ranks:
                self.level[rank] += share
                self.free[rank] -= 1
            room = sum(self.best - level for level, free in zip(self.level, self.free, strict=True) if free)
            if room >= self.left[index + 1]:
                self.chosen.append(ranks)
                self._place(index + 1)
                self.chosen.pop()
            for rank, level in zip(ranks, before, strict=True):
                self.level[rank] = level
                self.free[rank] += 1

    def _has_twin(self, ranks: tuple[int, ...]) -> bool:
        """Whether an earlier rank of the same state would do instead of one of these."""
        state = list(zip(self.level, self.free, strict=True))
        return any(state[other] == state[rank] for rank in ranks for other in range(rank) if other not in ranks)
