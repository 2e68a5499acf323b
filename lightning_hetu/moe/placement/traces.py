"""Routing traces: how many tokens of each rank went to each expert, step by step; recorded ones and made-up ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray


def drifting_trace(
    *,
    steps: int = 200,
    ranks: int = 4,
    experts: int = 16,
    drift: float = 0.05,
    zipf: float = 1.2,
    tokens: int = 8192,
    seed: int = 0,
) -> NDArray[np.int64]:
    """Skewed loads whose logarithms walk at random.

    Args:
        steps: Number of steps.
        ranks: Number of ranks.
        experts: Number of experts; which of them are hot is drawn too.
        drift: Standard deviation of what a step adds to the logarithm of a load.
        zipf: Exponent of Zipf's law that the loads follow at first.
        tokens: Tokens of each rank in each step.
        seed: Of all draws.

    Returns:
        int64 ``[steps, ranks, experts]``. The tokens of a rank are drawn one by one, so there is noise besides.
    """
    draw = np.random.default_rng(seed)
    first = -zipf * np.log(draw.permutation(experts) + 1.0)
    walk = draw.normal(0.0, drift, (steps, experts)).cumsum(axis=0)
    loads = np.exp(first + walk)
    loads /= loads.sum(axis=1, keepdims=True)
    return np.stack([draw.multinomial(tokens, row, size=ranks) for row in loads]).astype(np.int64)


def save_trace(trace: ArrayLike, path: str | Path) -> Path:
    """Writes a trace as an ``.npz`` file of int32 and returns its path.

    Raises:
        ValueError: If it is no trace.
    """
    path = Path(path)
    np.savez_compressed(path, counts=check_trace(trace).astype(np.int32))
    return path if path.suffix == ".npz" else path.with_name(path.name + ".npz")


def load_trace(path: str | Path) -> NDArray[np.int64]:
    """Reads what :func:`save_trace` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has no trace.
    """
    with np.load(path) as file:
        if "counts" not in file:
            raise ValueError(f"trace={str(path)!r} has {sorted(file)}: expected an array named counts.")
        return check_trace(file["counts"])


def check_trace(trace: ArrayLike) -> NDArray[np.int64]:
    """The trace as int64 ``[steps, ranks, experts]``.

    Raises:
        ValueError: If it has another shape, or numbers that are no counts.
    """
    counts = np.asarray(trace)
    if counts.ndim != 3 or not counts.size:
        raise ValueError(f"trace{list(counts.shape)}: expected [steps, ranks, experts], none of them 0.")
    if counts.dtype.kind not in "iu" or (counts < 0).any():
        raise ValueError(f"trace of {counts.dtype} from {counts.min()}: expected whole numbers of at least 0.")
    return counts.astype(np.int64)
