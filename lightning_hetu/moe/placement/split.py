"""Which share of an expert's tokens each of its holders computes, such that no rank has more than it must.

The least load of the fullest rank is a maximum flow from experts to the ranks that hold them. By its duality with cuts
it is the largest density ``load(A) / |A|`` over sets of ranks ``A``, where ``load(A)`` are the tokens of experts held
nowhere else. The solver starts from the even split and moves tokens, by shortest paths, from ranks above a level to
ranks below it. Where no path is left, the ranks that were reached are a set whose density is the next level
(Dinkelbach's method, as in Goldberg 1984, "Finding a maximum density subgraph"). Levels only rise, so it ends, and the
last one is exact.

There are many optimal splits. One that is close to the even split lets most tokens stay on the rank they come from, and
is still good when loads have changed since.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_hetu.moe.placement._checks import tokens_by_expert
from lightning_hetu.moe.placement.placement import Placement

SplitName = Literal["even", "flow"]
"""``even``: every holder of an expert gets as many of its tokens; ``flow``: the optimal split."""

_ROUNDING = 1e-11  # of the mean load: levels closer than this are the same


class Split(NamedTuple):
    """How tokens are split.

    Args:
        fractions: Of the tokens of an expert, the share of each rank, float64 ``[experts, ranks]``. A row sums up to
            1 and is 0 where the expert is not.
        ratio: Balance ratio: the load of the fullest rank, relative to the mean; 1 where there are no tokens.
    """

    fractions: NDArray[np.float64]
    ratio: float


def balance_ratio(loads: ArrayLike) -> float:
    """Load of the fullest rank, relative to the mean; 1 where there is none.

    Args:
        loads: Tokens of each rank.
    """
    tokens = np.asarray(loads, dtype=np.float64)
    total = tokens.sum()
    return float(tokens.max() * len(tokens) / total) if total > 0 else 1.0


def even_split(loads: ArrayLike, placement: Placement) -> Split:
    """The split in which every holder of an expert gets as many of its tokens.

    Args:
        loads: Tokens of each expert, ``[experts]`` or ``[ranks, experts]``.
        placement: Where experts are.

    Raises:
        ValueError: If the loads are no numbers of tokens, or do not fit the placement.
    """
    tokens = tokens_by_expert(loads, placement)
    fractions = placement.matrix / placement.matrix.sum(axis=1, keepdims=True)
    return Split(fractions, balance_ratio(tokens @ fractions))


def optimal_split(loads: ArrayLike, placement: Placement) -> Split:
    """The split in which the fullest rank has the least load, and little else differs from the even split.

    Args:
        loads: Tokens of each expert, ``[experts]`` or ``[ranks, experts]``.
        placement: Where experts are.

    Raises:
        ValueError: If the loads are no numbers of tokens, or do not fit the placement.
    """
    tokens = tokens_by_expert(loads, placement)
    holders = placement.all_holders
    total = float(tokens.sum())
    fractions = placement.matrix / placement.matrix.sum(axis=1, keepdims=True)
    if total > 0:
        solver = _Flow(tokens.tolist(), holders, placement.num_ranks)
        for expert, shares in zip(solver.experts, solver.solve(), strict=True):
            fractions[expert, holders[expert]] = np.array(shares) / sum(shares)
        return Split(fractions, max(solver.level) * placement.num_ranks / total)
    return Split(fractions, 1.0)


def split_tokens(loads: ArrayLike, placement: Placement, split: SplitName) -> Split:
    """The split of this name; see :func:`even_split` and :func:`optimal_split`."""
    return even_split(loads, placement) if split == "even" else optimal_split(loads, placement)


class _Flow:
    """Tokens of replicated experts on their holders, over those that cannot move."""

    def __init__(self, tokens: Sequence[float], holders: Sequence[tuple[int, ...]], num_ranks: int) -> None:
        self.level = [0.0] * num_ranks
        self.experts: list[int] = []
        self.holders: list[tuple[int, ...]] = []
        self.tokens: list[float] = []
        for expert, (load, ranks) in enumerate(zip(tokens, holders, strict=True)):
            if len(ranks) == 1:
                self.level[ranks[0]] += load
            elif load > 0:
                self.experts.append(expert)
                self.holders.append(ranks)
                self.tokens.append(load)
        self.mean = sum(tokens) / num_ranks
        self.least = max(self.mean, *self.level) if num_ranks > 1 else self.mean
        self.shares = [[0.0] * len(ranks) for ranks in self.holders]
        self.on_rank: list[list[tuple[int, int]]] = [[] for _ in range(num_ranks)]
        for item, ranks in enumerate(self.holders):
            for place, rank in enumerate(ranks):
                self.on_rank[rank].append((item, place))

    def solve(self) -> list[list[float]]:
        """Shares of each replicated expert, in tokens by holder."""
        for item, ranks in enumerate(self.holders):
            self.shares[item] = [self.tokens[item] / len(ranks)] * len(ranks)
            for rank in ranks:
                self.level[rank] += self.shares[item][0]
        self._lower_to_least()
        return self.shares

    def _lower_to_least(self) -> None:
        """Moves tokens until no rank is above the least level that is possible."""
        level, margin = self.level, self.mean * _ROUNDING
        cap = self.least
        while True:
            fullest = max(range(len(level)), key=level.__getitem__)
            if level[fullest] <= cap + margin:
                return
            path, reached = self._path(fullest, cap - margin)
            if path is None:
                density = sum(level[rank] for rank in reached) / len(reached)
                if density <= cap + margin:  # all of them are at the cap, up to rounding
                    return
                cap = density
                continue
            amount = min(level[fullest] - cap, cap - level[path[-1][2]])
            amount = min(amount, *(self.shares[item][place] for item, place, _ in path))
            rank = fullest
            for item, place, target in path:
                self.shares[item][place] -= amount
                self.shares[item][self.holders[item].index(target)] += amount
                rank = target
            level[fullest] -= amount
            level[rank] += amount

    def _path(self, start: int, below: float) -> tuple[list[tuple[int, int, int]] | None, list[int]]:
        """The shortest way on which tokens of ``start`` get to a rank below a level, and the ranks that were reached.

        A step ``(item, place, target)`` moves tokens of an expert from its holder at ``place`` to the rank ``target``.
        """
        came: dict[int, tuple[int, int, int]] = {}  # rank: the step to it, and where it starts
        reached = [start]
        seen_items = [False] * len(self.experts)
        queue = deque(reached)
        while queue:
            rank = queue.popleft()
            for item, place in self.on_rank[rank]:
                # A holder that was reached earlier led to all other holders; this one may add that holder only.
                if seen_items[item] or self.shares[item][place] <= self.mean * _ROUNDING:
                    continue
                seen_items[item] = True
                for target in self.holders[item]:
                    if target == start or target in came:
                        continue
                    came[target] = (item, place, rank)
                    reached.append(target)
                    queue.append(target)
                    if self.level[target] < below:
                        return _walk_back(came, start, target), reached
        return None, reached


def _walk_back(came: dict[int, tuple[int, int, int]], start: int, end: int) -> list[tuple[int, int, int]]:
    steps = []
    while end != start:
        item, place, before = came[end]
        steps.append((item, place, end))
        end = before
    return steps[::-1]
