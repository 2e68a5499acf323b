"""Which rank and slot every row goes to, decided alike on all ranks from the numbers of rows they all know."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_hetu.moe.placement.apportion import apportion
from lightning_hetu.moe.placement.placement import Placement

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Route:
    """The way of rows that are sorted by expert, as one rank sees it.

    Args:
        table: ``table[i][j]`` rows go from rank ``i`` of the expert group to rank ``j``.
        send_order: This rank's rows in the order of the ranks they go to; ``None`` where they are in it.
        receive_order: Rows as they arrive, first rank first, in the order of this rank's slots.
        slot_counts: Rows of each slot of this rank.
    """

    table: tuple[tuple[int, ...], ...]
    send_order: Ints | None
    receive_order: Ints
    slot_counts: Ints

    @property
    def rank_rows(self) -> tuple[int, ...]:
        """Rows that each rank works on."""
        return tuple(map(sum, zip(*self.table, strict=True)))


def route_of_shares(counts: Ints, rank: int) -> Route:
    """Rows for experts that ranks share out in blocks of neighbors.

    Args:
        counts: Rows for each expert from each rank, ``[ranks, experts]``.
        rank: This rank's place in the group.
    """
    ranks, experts = counts.shape
    blocks = counts.reshape(ranks, ranks, experts // ranks)
    return _route(blocks.sum(axis=2), None, blocks[:, rank], np.arange(experts // ranks), experts // ranks)


def route_of_placement(counts: Ints, rank: int, placement: Placement, fractions: NDArray[np.float64]) -> Route:
    """Rows for experts that are in any slots, perhaps of several ranks.

    Args:
        counts: Rows for each expert from each rank, ``[ranks, experts]``.
        rank: This rank's place in the group.
        placement: Where experts are.
        fractions: Of an expert's rows for each rank, ``[experts, ranks]``.
    """
    ranks, experts = counts.shape
    sent = apportion(counts, fractions, placement)
    destination = np.repeat(np.tile(np.arange(ranks), experts), sent[rank].ravel())
    slots = np.full(experts, -1)
    for slot, expert in enumerate(placement.slots[rank]):
        if expert >= 0:
            slots[expert] = slot
    order = np.argsort(destination, kind="stable")
    return _route(sent.sum(axis=1), order, sent[:, :, rank], slots, placement.num_slots)


def _route(table: Ints, send_order: Ints | None, received: Ints, slots: Ints, num_slots: int) -> Route:
    """The way of rows of which this rank gets ``received`` ``[ranks, experts]``, for experts in ``slots``."""
    slot_of_row = np.repeat(np.tile(slots, len(received)), received.ravel())
    return Route(
        tuple(tuple(row) for row in table.tolist()),
        send_order,
        np.argsort(slot_of_row, kind="stable"),
        np.bincount(slot_of_row, minlength=num_slots),
    )
