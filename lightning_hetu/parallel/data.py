"""Gives every rank its rows of the batches that a user's dataloader describes.

The loader a user writes yields global batches, the same as on one device; the plan decides which rows of each a rank
loads. Wherever the loader has a batch sampler only those rows are read; any other iterable is read whole and cut.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sized
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler

from lightning_hetu.parallel.batch import (
    batch_samples,
    evaluation_microbatches,
    largest_dp,
    local_dp,
    shard_rows,
    training_microbatches,
)
from lightning_hetu.parallel.mesh import PlanMesh
from lightning_hetu.parallel.resumable import make_resumable
from lightning_hetu.planning.plan import HybridPlan


class RowSelector:
    """Which rows of a global batch this rank works on.

    Args:
        plan: The plan.
        mesh: Its meshes.
        training: Whether batches are trained on. Those must divide evenly; a last, smaller batch of an evaluation is
            filled up with copies of its last sample instead, as torch's ``DistributedSampler`` does.
    """

    def __init__(self, plan: HybridPlan, mesh: PlanMesh, *, training: bool) -> None:
        self.plan = plan
        self.training = training
        self.dp = local_dp(plan)
        self.index = mesh.data_index(self.dp)
        self.largest_dp = largest_dp(plan)

    def rows(self, samples: int) -> list[int]:
        """Row numbers in a global batch of ``samples``.

        Raises:
            ValueError: If a training batch does not divide.
        """
        if self.training:
            return shard_rows(samples, training_microbatches(self.plan, samples), self.dp, self.index)
        padded = -(-samples // self.largest_dp) * self.largest_dp
        microbatches = evaluation_microbatches(self.plan, padded)
        return [min(row, samples - 1) for row in shard_rows(padded, microbatches, self.dp, self.index)]


class ShardedBatchSampler:
    """Yields this rank's part of every batch of another batch sampler."""

    def __init__(self, batch_sampler: Any, select: RowSelector, synchronize: Callable[[Any], Any]) -> None:
        self.batch_sampler = batch_sampler
        self.select = select
        self.synchronize = synchronize
        self.skip = 0
        self.seed: int | None = None
        self.resume_seed: int | None = None

    @property
    def sampler(self) -> Any:
        """The sampler below, which Lightning tells the epoch."""
        return getattr(self.batch_sampler, "sampler", None)

    def set_epoch(self, epoch: int) -> None:
        """Forwards the epoch to the sampler below."""
        for candidate in (self.batch_sampler, self.sampler):
            if hasattr(candidate, "set_epoch"):
                candidate.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[list[Any]]:
        sampler = self.sampler
        if isinstance(sampler, RandomSampler) and sampler.generator is None:
            # Every rank must draw the same order, and the same as one process would: rank 0 draws the seed just as
            # RandomSampler does.
            seed = self.synchronize(int(torch.empty((), dtype=torch.int64).random_().item()))
            self.seed = seed if self.resume_seed is None else self.resume_seed
            self.resume_seed = None
            sampler.generator = torch.Generator().manual_seed(self.seed)
            try:
                yield from self._parts()
            finally:
                sampler.generator = None
        else:
            share_random_state(self.synchronize)
            yield from self._parts()

    def _parts(self) -> Iterator[list[Any]]:
        skip, self.skip = self.skip, 0
        for batch in islice(iter(self.batch_sampler), skip, None):
            batch = list(batch)
            yield [batch[row] for row in self.select.rows(len(batch))]


class ShardedIterable:
    """Cuts this rank's rows out of the batches of any iterable."""

    def __init__(self, loader: Any, select: RowSelector, synchronize: Callable[[Any], Any]) -> None:
        self.loader = loader
        self.select = select
        self.synchronize = synchronize

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name in ("loader", "select", "synchronize"):
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        share_random_state(self.synchronize)
        for batch in self.loader:
            yield select_rows(batch, self.select)


def share_random_state(synchronize: Callable[[Any], Any]) -> None:
    """Gives every rank the random state of rank 0, so that samplers and datasets that draw give all the same order."""
    shared = synchronize((torch.get_rng_state(), np.random.get_state(), random.getstate()))
    torch.set_rng_state(shared[0])
    np.random.set_state(shared[1])
    random.setstate(shared[2])


def select_rows(batch: Any, select: RowSelector) -> Any:
    """This rank's rows of every tensor in ``batch`` whose dimension 0 counts the samples of the batch."""
    samples = batch_samples(batch)
    rows = torch.tensor(select.rows(samples))

    def pick(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 0 or tensor.shape[0] != samples:
            return tensor
        return tensor.index_select(0, rows.to(tensor.device))

    return tree_map_only(torch.Tensor, pick, batch)


def check_training_batches(loader: Any, plan: HybridPlan, steps: int | None) -> int | None:
    """Refuses batches that the plan cannot cut before the first step, rather than at the end of an epoch.

    Args:
        loader: The user's training loader; one that does not tell its batch sizes is not checked.
        plan: The plan.
        steps: Batches that will be trained at most; ``None`` for all.

    Returns:
        Samples in a full batch, if there is one.

    Raises:
        ValueError: If a batch that will be reached does not divide.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if not isinstance(sampler, BatchSampler) or not isinstance(sampler.sampler, Sized):
        return None
    samples = len(sampler.sampler)
    if samples >= sampler.batch_size:
        training_microbatches(plan, sampler.batch_size)
    last = samples % sampler.batch_size
    if last and not sampler.drop_last and (steps is None or steps > samples // sampler.batch_size):
        training_microbatches(plan, last)
    return sampler.batch_size if samples >= sampler.batch_size else None


def shard_dataloader(loader: Any, select: RowSelector, synchronize: Callable[[Any], Any]) -> Any:
    """A loader of this rank's rows of the batches of ``loader``, which itself is left as it was.

    Args:
        loader: A ``DataLoader``, or any iterable of batches.
        select: Which rows.
        synchronize: Returns rank 0's value of its argument on every rank.
    """
    if (
        not isinstance(loader, DataLoader)
        or isinstance(loader.dataset, IterableDataset)
        or loader.batch_sampler is None
    ):
        return ShardedIterable(loader, select, synchronize)
    sharded = copy.copy(loader)
    # DataLoader refuses to set batch_sampler after construction; a copy is not in use yet, and constructing it anew
    # would need to know the arguments of every subclass.
    sharded.__dict__["batch_sampler"] = _wrap_batch_sampler(loader.batch_sampler, select, synchronize)
    if isinstance(sharded.batch_sampler, ShardedBatchSampler):
        make_resumable(sharded)
    return sharded


def _wrap_batch_sampler(batch_sampler: Any, select: RowSelector, synchronize: Callable[[Any], Any]) -> Any:
    inner = getattr(batch_sampler, "_batch_sampler", None)
    if inner is not None:  # Lightning's recorder of predicted indices must see this rank's rows: it stays outermost
        return type(batch_sampler)(ShardedBatchSampler(inner, select, synchronize))
    return ShardedBatchSampler(batch_sampler, select, synchronize)
