"""Cutting a sequence of layers into contiguous pipeline stages: the balance of a cut, and the best-balanced one.

Galvatron-BMW (arXiv 2307.02031, section 4) balances two workloads at once. Under 1F1B an early stage holds more
microbatches than a late one, so stages of equal time have unequal memory, and the other way round. The cut of least
step time lies between the two extremes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ROUNDING = 1e-12

Cut = tuple[int, ...]
"""Number of blocks in each stage."""


def balance_degree(loads: Sequence[float]) -> float:
    """``1 - max / sum`` of the loads of all stages: 0 if one stage has everything, ``1 - 1/P`` if all have the same.

    Args:
        loads: Time or memory of each of the P stages.

    Raises:
        ValueError: If there is no stage or a load is negative.
    """
    if not loads or min(loads) < 0:
        raise ValueError(f"loads={list(loads)}: expected one load of at least 0 for each stage.")
    total = sum(loads)
    return 1.0 - max(loads) / total if total > 0 else 1.0 - 1.0 / len(loads)


def balanced_cut(loads: ArrayLike, extra: ArrayLike | None = None) -> Cut:
    """The cut whose most loaded stage has the least load; of those, the one of least sum of squares.

    Args:
        loads: ``[P, L]``: what block ``l`` adds to stage ``i`` if it is there.
        extra: ``[P]``: what each stage has besides its blocks (embedding, head); none if not given.

    Returns:
        P counts of at least 1 that sum up to L.

    Raises:
        ValueError: If there are fewer blocks than stages, or the shapes do not agree.
    """
    table = np.asarray(loads, dtype=float)
    if table.ndim != 2 or not 1 <= table.shape[0] <= table.shape[1]:
        raise ValueError(f"loads{list(table.shape)}: expected [stages, blocks] with at least one block per stage.")
    stages, blocks = table.shape
    fixed = np.zeros(stages) if extra is None else np.asarray(extra, dtype=float)
    if fixed.shape != (stages,):
        raise ValueError(f"extra{list(fixed.shape)}: expected one number for each of {stages} stages.")
    sums = np.concatenate([np.zeros((stages, 1)), np.cumsum(table, axis=1)], axis=1)
    # load[i, a, b]: of stage i if it holds blocks a to b - 1
    load = sums[:, None, :] - sums[:, :, None] + fixed[:, None, None]
    load[:, np.arange(blocks + 1)[:, None] >= np.arange(blocks + 1)[None]] = np.inf
    least = _shortest(load, np.maximum)[0]
    load[load > least * (1 + _ROUNDING)] = np.inf
    return _shortest(np.square(load), np.add)[1]


def _shortest(cost: NDArray[np.float64], combine: np.ufunc) -> tuple[float, Cut]:
    """The cut whose stage costs combine to the least value, by dynamic programming over stages."""
    stages, size, _ = cost.shape
    best = np.full(size, np.inf)
    best[0] = 0.0
    parents = np.zeros((stages, size), dtype=np.int64)
    for stage in range(stages):
        total = combine(best[:, None], cost[stage])
        parents[stage] = total.argmin(axis=0)
        best = total.min(axis=0)
    ends = [size - 1]
    for stage in reversed(range(stages)):
        ends.append(int(parents[stage, ends[-1]]))
    ends.reverse()
    return float(best[-1]), tuple(b - a for a, b in zip(ends[:-1], ends[1:], strict=True))


def neighbors(cut: Cut, stage: int, receivers: Collection[int] | None = None) -> Iterator[Cut]:
    """Cuts in which ``stage`` has one block less and another one has one more, nearest stages first.

    Where the other one is not next to it, the stages in between hand one block on and keep their number.

    Args:
        cut: The cut.
        stage: The stage that gives a block away; one that has a single block gives none.
        receivers: Stages that may get it; all if not given.
    """
    if cut[stage] < 2:
        return
    for other in sorted(range(len(cut)), key=lambda i: (abs(i - stage), i)):
        if other != stage and (receivers is None or other in receivers):
            yield tuple(count + (i == other) - (i == stage) for i, count in enumerate(cut))


def count_cuts(num_layers: int, num_stages: int) -> int:
    """Number of ways to cut ``num_layers`` blocks into ``num_stages`` stages, none of them empty."""
    return comb(num_layers - 1, num_stages - 1)


def all_cuts(num_layers: int, num_stages: int) -> Iterator[Cut]:
    """Every cut of ``num_layers`` blocks into ``num_stages`` stages."""
    for borders in combinations(range(1, num_layers), num_stages - 1):
        ends = (0, *borders, num_layers)
        yield tuple(b - a for a, b in zip(ends[:-1], ends[1:], strict=True))
