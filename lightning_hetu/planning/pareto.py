"""Which of many points no other point beats in everything."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def non_dominated(points: Floats) -> NDArray[np.intp]:
    """Indices of the rows of ``points[n, k]`` that no other one beats in all columns; the first of equal ones stays."""
    # Columns that order the points alike need to be compared only once.
    varying = points[:, points.min(axis=0) < points.max(axis=0)] if points.shape[0] else points
    if varying.shape[1] == 0:
        return np.arange(min(1, points.shape[0]), dtype=np.intp)
    if varying.shape[1] > 1:
        shifted = varying - varying[0]
        varying = varying[
            :,
            [
                i
                for i in range(varying.shape[1])
                if not any(np.array_equal(shifted[:, i], shifted[:, j]) for j in range(i))
            ],
        ]
    # In lexicographic order, only an earlier point can beat a later one. The sort is stable.
    order = np.lexsort(varying.T[::-1])
    ordered = varying[order]
    if ordered.shape[1] == 1:
        return order[:1].astype(np.intp)
    if ordered.shape[1] == 2:
        best = np.minimum.accumulate(ordered[:, 1])
        keep = np.concatenate([[True], ordered[1:, 1] < best[:-1]])
        return np.sort(order[keep]).astype(np.intp)
    return np.sort(order[_filter_in_chunks(ordered)]).astype(np.intp)


def _filter_in_chunks(ordered: Floats, chunk: int = 128) -> NDArray[np.intp]:
    """Indices of the non-dominated points among lexicographically ordered ones."""
    front = np.zeros((0, ordered.shape[1]))
    kept: list[NDArray[np.intp]] = []
    for start in range(0, len(ordered), chunk):
        index = np.arange(start, min(start + chunk, len(ordered)))
        block = ordered[index]
        if front.size:
            alive = np.flatnonzero(_beaten(block, front) == 0)
            index, block = index[alive], block[alive]
        beats = np.ones((len(block), len(block)), dtype=bool)
        for column in block.T:
            beats &= column[:, None] <= column[None]
        best = np.flatnonzero(np.triu(beats, 1).any(axis=0) == 0)
        kept.append(index[best])
        front = np.concatenate([front, block[best]])
    return np.concatenate(kept)


def _beaten(block: Floats, front: Floats) -> NDArray[np.bool_]:
    """Whether each point of ``block`` is beaten by one of ``front``."""
    beats = np.ones((len(front), len(block)), dtype=bool)
    for column in range(1, block.shape[1]):  # The first column is ordered already.
        np.logical_and(beats, front[:, column, None] <= block[None, :, column], out=beats)
    found: NDArray[np.bool_] = np.logical_or.reduce(beats, axis=0)
    return found
