"""What a cache sends to the owners of rows, and how the messages of several workers become one.

Floating-point sums depend on their order. Rows that several workers push are therefore always summed in the order of
the workers, which makes a run repeatable, on a GPU too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Push:
    """Updates for the owners of rows.

    Args:
        ids: ``[n]`` int64 rows.
        pending: ``[n, dim]``: for each row a sum of changes, or of gradients where the owner has an optimizer.
        updates: ``[n]`` int32: how many updates each sum holds; the row's clock advances by it.
    """

    ids: Tensor
    pending: Tensor
    updates: Tensor

    @classmethod
    def cat(cls, pushes: Sequence[Push]) -> Push:
        """Several messages behind each other."""
        return cls(
            torch.cat([push.ids for push in pushes]),
            torch.cat([push.pending for push in pushes]),
            torch.cat([push.updates for push in pushes]),
        )

    def __len__(self) -> int:
        return self.ids.numel()

    def merged(self) -> Push:
        """One entry for each row, sorted by id; entries of the same row are summed in the order they have here."""
        if len(self) < 2:
            return self
        ids, group, sizes = self.ids.unique(return_inverse=True, return_counts=True)
        by_id = group.argsort(stable=True)
        first = by_id[sizes.cumsum(0) - sizes]
        pending, updates = self.pending[first], self.updates[first]
        # How many entries of the same row are before each entry. Those with the same number are of different rows, so
        # each round of the loop, one for each sender at most, adds without conflicts.
        before = torch.arange(len(self), device=ids.device) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        for round_number in range(1, int(sizes.max())):
            entries = by_id[before == round_number]
            pending[group[entries]] += self.pending[entries]
            updates[group[entries]] += self.updates[entries]
        return Push(ids, pending, updates)
