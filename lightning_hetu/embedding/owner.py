"""The owner's side of the protocol of HET (arXiv 2112.07221): which copies are stale, and how updates are merged.

No communication: what arrived from the workers goes in, answers come out. Rows are numbered as the owner's store does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hetu.embedding.push import Push
from lightning_hetu.embedding.row_optimizers import RowOptimizer
from lightning_hetu.embedding.row_store import RowStore


class RowOwner:
    """Answers reads of rows and applies pushes to them.

    Args:
        store: The rows: ``dim`` values and the optimizer's state.
        dim: Values per row.
        pull_limit: Most updates that a valid copy may lack.
        optimizer: Takes pushes as sums of gradients and makes one step of each; without one, pushes are changes that
            are added.

    Raises:
        ValueError: If the rows of the store do not fit the optimizer.
    """

    def __init__(self, store: RowStore, dim: int, *, pull_limit: float, optimizer: RowOptimizer | None = None) -> None:
        width = dim if optimizer is None else dim + optimizer.state_width(dim)
        if store.width != width:
            kind = "no optimizer" if optimizer is None else type(optimizer).__name__
            raise ValueError(f"store.width={store.width}: rows of dim={dim} with {kind} need {width} numbers.")
        if optimizer is not None and store.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"store.dtype={store.dtype}: an optimizer's state needs torch.float32 or torch.float64.")
        self.store, self.dim, self.pull_limit, self.optimizer = store, dim, pull_limit, optimizer

    def stale(self, rows: Tensor, versions: Tensor) -> Tensor:
        """Which copies must be fetched, ``[n]`` bool; rows may repeat, as several workers ask.

        Args:
            rows: ``[n]`` int64.
            versions: ``[n]`` int32 start clocks of the copies, -1 where there is none.
        """
        return (versions < 0) | (self.store.clocks(rows) - versions > self.pull_limit)

    def fetch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Contents ``[n, width]`` with the optimizer's state, and clocks ``[n]`` int32; rows may repeat."""
        return self.store.get(rows)

    def apply(self, push: Push) -> None:
        """Merges updates of all workers into the rows, one change or one optimizer step for each row.

        Args:
            push: What all workers sent, behind each other in the order of their ranks; ids are rows of the store.
        """
        push = push.merged()
        if not len(push):
            return
        if self.optimizer is None:
            self.store.add(push.ids, push.pending, push.updates)
        else:
            contents, _ = self.store.get(push.ids)
            self.store.put(push.ids, self.optimizer.update_packed(contents, push.pending), push.updates)
