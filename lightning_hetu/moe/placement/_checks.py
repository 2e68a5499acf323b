"""Checks of what callers give."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_hetu.moe.placement.placement import Placement


def tokens_by_source(loads: ArrayLike, placement: Placement, *, name: str = "loads") -> NDArray[np.float64]:
    """Tokens as float64 ``[ranks, experts]``.

    Args:
        loads: Tokens of each expert, ``[experts]``, which then come from all ranks alike, or ``[ranks, experts]``.
        placement: Says how many there are of each.
        name: Name of the argument, for the message.

    Raises:
        ValueError: If the shape does not fit, or a number is negative or not finite.
    """
    try:
        tokens = np.asarray(loads, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={loads!r}: expected numbers.") from error
    ranks, experts = placement.num_ranks, placement.num_experts
    if tokens.shape not in ((experts,), (ranks, experts)):
        raise ValueError(
            f"{name}{list(tokens.shape)}: expected [{experts}] experts or [{ranks}, {experts}] ranks and experts, as"
            " the placement has them."
        )
    if not (tokens >= 0).all() or not np.isfinite(tokens.sum()):
        wrong = tokens[~((tokens >= 0) & np.isfinite(tokens))]
        value = wrong[0] if len(wrong) else tokens.max()
        raise ValueError(f"{name} has {value}: expected finite numbers of tokens of at least 0.")
    return np.broadcast_to(tokens / ranks, (ranks, experts)) if tokens.ndim == 1 else tokens


def tokens_by_expert(loads: ArrayLike, placement: Placement, *, name: str = "loads") -> NDArray[np.float64]:
    """Tokens of each expert, float64 ``[experts]``; arguments as of :func:`tokens_by_source`."""
    tokens = np.asarray(loads)
    checked = tokens_by_source(loads, placement, name=name)
    # The tokens themselves where they are given by expert: a sum over ranks of shares would round.
    return tokens.astype(np.float64) if tokens.ndim == 1 else checked.sum(axis=0)
