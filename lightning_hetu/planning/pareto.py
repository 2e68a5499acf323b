"""Which of many points no other point beats in everything."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def non_dominated(points: Floats) -> NDArray[np.intp]:
    """Indices of the rows of ``points[n, k]`` that no other one beats in all columns; the first of equal ones stays."""
    # Columns that order the points alike need to be compared only once.
    varying = points[:, points.min(axis=0) < points.max(axis=0)] if points.shape[0] else points
    if varying.shape[1] == 0:
        return np.arange(min(1, points.shape[0]), dtype=np.intp)
    finite = bool(np.isfinite(varying).all())
    if varying.shape[1] > 1 and finite:
        shifted = varying - varying[0]
        varying = varying[
            :,
            [
                i
                for i in range(varying.shape[1])
                if not any(np.array_equal(shifted[:, i], shifted[:, j]) for j in range(i))
            ],
        ]
    if varying.shape[1] <= 2:
        # In lexicographic order, only an earlier point can beat a later one. The sort is stable.
        order = np.lexsort(varying.T[::-1])
        if varying.shape[1] == 1:
            return order[:1].astype(np.intp)
        ordered = varying[order]
        best = np.minimum.accumulate(ordered[:, 1])
        keep = np.concatenate([[True], ordered[1:, 1] < best[:-1]])
        return np.sort(order[keep]).astype(np.intp)
    columns = np.ascontiguousarray(varying.T)
    if finite:
        low, high = columns.min(axis=1), columns.max(axis=1)
        # A point of small sum beats many others and can only be beaten by one of smaller or equal sum.
        total = ((columns - low[:, None]) / (high - low)[:, None]).sum(axis=0)
        order = np.argsort(total, kind="stable")
        if not np.diff(total[order]).all():
            order = np.lexsort((*columns[::-1], total))
    else:
        order = np.lexsort(columns[::-1])
    return np.sort(order[_filter_in_chunks(columns[:, order])]).astype(np.intp)


def _filter_in_chunks(columns: Floats, chunk: int = 128) -> NDArray[np.intp]:
    """Indices of the non-dominated ones of points ``[k, n]`` ordered so that only an earlier one can beat a later."""
    kept: list[NDArray[np.intp]] = []
    index = np.arange(columns.shape[1])
    while index.size:
        block = columns[:, :chunk]
        beats = block[0][:, None] <= block[0]
        for column in block[1:]:
            beats &= column[:, None] <= column
        # Nothing beats itself, and of equal points the first one stays.
        best = np.flatnonzero(~(beats & _earlier(len(beats))).any(axis=0))
        kept.append(index[:chunk][best])
        columns, index = columns[:, chunk:], index[chunk:]
        front = block[:, best]
        # The strongest points first: few of them beat most of the others.
        for part in (front[:, :8], front[:, 8:]):
            if part.shape[1] and index.size:
                alive = np.flatnonzero(~_beaten(columns, part))
                if alive.size < index.size:
                    columns, index = columns[:, alive], index[alive]
    return np.concatenate(kept)


@lru_cache(maxsize=128)
def _earlier(count: int) -> NDArray[np.bool_]:
    """Whether the first of two points comes before the second one."""
    return np.triu(np.ones((count, count), dtype=bool), 1)


def _beaten(columns: Floats, front: Floats) -> NDArray[np.bool_]:
    """Whether each point is beaten by one of ``front``; both as ``[k, n]``."""
    beats = front[0][:, None] <= columns[0]
    for one, other in zip(front[1:], columns[1:], strict=True):
        beats &= one[:, None] <= other
    found: NDArray[np.bool_] = np.logical_or.reduce(beats, axis=0)
    return found
