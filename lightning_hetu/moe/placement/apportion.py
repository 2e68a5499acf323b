"""Which rank computes which tokens: whole tokens from every rank to holders of their experts.

Fractions of a split become quotas of whole tokens. Then a rank first takes its own tokens, as far as its quota goes;
what is left over goes in the order of ranks to the holders with room, in the order of ranks. All ranks that know the
counts and the fractions find the same without a message.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_hetu.moe.placement.placement import Placement

_SUM_ERROR = 1e-6


class Assignment(NamedTuple):
    """Tokens that go from rank to rank, as parallel lists without order.

    Args:
        source: Rank that has the tokens, int64 ``[entries]``.
        expert: Their expert.
        destination: Rank that computes them.
        tokens: How many, above 0; whole or not, as they were given.
    """

    source: NDArray[np.int64]
    expert: NDArray[np.int64]
    destination: NDArray[np.int64]
    tokens: NDArray[np.generic]


def quotas(counts: ArrayLike, fractions: ArrayLike, placement: Placement) -> NDArray[np.int64]:
    """Whole tokens of each expert for each rank: fractions by largest remainder, of equal ones the lowest rank's.

    Args:
        counts: Tokens of each expert by the rank they come from, whole numbers ``[ranks, experts]``.
        fractions: Of a split, ``[experts, ranks]``.
        placement: Where experts are.

    Returns:
        int64 ``[experts, ranks]``; a row sums up to the expert's tokens.

    Raises:
        ValueError: If counts are not whole or negative, or fractions give tokens to a rank without the expert or do
            not sum up to 1.
    """
    totals = _whole(counts, placement).sum(axis=0)
    shares = np.asarray(fractions, dtype=np.float64)
    if shares.shape != placement.matrix.shape:
        raise ValueError(f"fractions{list(shares.shape)}: expected {list(placement.matrix.shape)} experts and ranks.")
    if not (shares >= 0).all() or (shares[~placement.matrix] > 0).any():
        raise ValueError("fractions: expected at least 0 on the ranks that hold an expert, and 0 elsewhere.")
    sums = shares.cumsum(axis=1)[:, -1:]  # one by one, so that the last bit is the same on every processor
    if not (np.abs(sums - 1) <= _SUM_ERROR).all():
        expert = int(np.abs(sums - 1).argmax())
        raise ValueError(f"fractions[{expert}] sums up to {float(sums[expert, 0])}: expected 1.")
    exact = totals[:, None] * (shares / sums)
    found = np.floor(exact).astype(np.int64)
    missing = totals - found.sum(axis=1)
    rows = np.flatnonzero(missing)
    if len(rows):
        remainders = np.where(placement.matrix[rows], exact[rows] - found[rows], -1.0)
        order = np.argsort(-remainders, axis=1, kind="stable")
        first = np.arange(order.shape[1]) < missing[rows, None]
        np.put_along_axis(extra := np.zeros_like(order), order, first, axis=1)
        found[rows] += extra
    return found


def assign(counts: NDArray[np.generic], wanted: NDArray[np.generic], placement: Placement) -> Assignment:
    """Sends tokens to holders, each rank's own first.

    Args:
        counts: Tokens by the rank they come from, ``[ranks, experts]``, whole or not.
        wanted: Tokens of each expert for each rank, ``[experts, ranks]``, with the same sum for each expert.
        placement: Where experts are.
    """
    table = _holder_table(placement)
    single = table[:, 1] < 0 if table.shape[1] > 1 else np.ones(len(table), dtype=bool)
    # Experts with one holder: everything goes there.
    source, item = np.nonzero(counts[:, single])
    expert = np.flatnonzero(single)[item]
    parts = [(source, expert, table[expert, 0], counts[source, expert])]
    several = np.flatnonzero(~single)
    if len(several):
        parts += _assign_replicated(counts.T[several], wanted[several], several, table[several])
    return Assignment(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _assign_replicated(
    counts: NDArray[np.generic],
    wanted: NDArray[np.generic],
    experts: NDArray[np.int64],
    holders: NDArray[np.int64],
) -> list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.generic]]]:
    """The same for experts with several holders: ``counts`` and ``wanted`` are ``[items, ranks]``."""
    rows = np.arange(len(experts))[:, None]
    at_home = np.minimum(counts, wanted)  # 0 where the expert is not, as nothing is wanted there
    item, rank = np.nonzero(at_home)
    own = (rank, experts[item], rank, at_home[item, rank])
    left = counts - at_home
    room = np.where(holders >= 0, (wanted - at_home)[rows, holders], 0)
    # Both are laid end to end along one line: where two pieces overlap, tokens go from one to the other.
    left_end, room_end = left.cumsum(axis=1), room.cumsum(axis=1)
    overlap = np.minimum(left_end[:, :, None], room_end[:, None, :]) - np.maximum(
        (left_end - left)[:, :, None], (room_end - room)[:, None, :]
    )
    item, source, place = np.nonzero(overlap > 0)
    away = (source, experts[item], holders[item, place], overlap[item, source, place])
    return [own, away]


def apportion(counts: ArrayLike, fractions: ArrayLike, placement: Placement) -> NDArray[np.int64]:
    """Every token's rank.

    Args:
        counts: Tokens of each expert by the rank they come from, whole numbers ``[ranks, experts]``.
        fractions: Of a split, ``[experts, ranks]``; those of an earlier step will do.
        placement: Where experts are.

    Returns:
        int64 ``[ranks, experts, ranks]``: tokens from the first to the last. Summed over the last they are the counts.

    Raises:
        ValueError: As :func:`quotas`.
    """
    found = assign(_whole(counts, placement), quotas(counts, fractions, placement), placement)
    out = np.zeros((placement.num_ranks, placement.num_experts, placement.num_ranks), dtype=np.int64)
    np.add.at(out, (found.source, found.expert, found.destination), found.tokens)
    return out


def _whole(counts: ArrayLike, placement: Placement) -> NDArray[np.int64]:
    tokens = np.asarray(counts)
    shape = (placement.num_ranks, placement.num_experts)
    if tokens.shape != shape:
        raise ValueError(f"counts{list(tokens.shape)}: expected {list(shape)} ranks and experts.")
    if tokens.dtype.kind not in "iu":
        if not np.isfinite(tokens).all() or (tokens != np.floor(tokens)).any():
            raise ValueError("counts: expected whole numbers of tokens; fractions are the next argument.")
        tokens = tokens.astype(np.int64)
    if (tokens < 0).any():
        raise ValueError(f"counts has {tokens.min()}: expected at least 0 tokens.")
    return tokens.astype(np.int64, copy=False)


def _holder_table(placement: Placement) -> NDArray[np.int64]:
    """Holders of each expert, padded with -1, int64 ``[experts, most]``."""
    holders = placement.all_holders
    most = max(map(len, holders))
    return np.array([ranks + (-1,) * (most - len(ranks)) for ranks in holders], dtype=np.int64)
