"""Dataloaders whose batch size is the global one."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from lightning_hetu.parallel.resumable import ResumableDataLoader


def global_batches(
    dataset: Dataset[Any],
    trainer: Trainer | None,
    *,
    batch_size: int,
    shuffle: bool,
    drop_last: bool,
    seed: int = 0,
    num_workers: int = 0,
) -> DataLoader[Any]:
    """This process's share of global batches.

    The sampler deals every global batch out among the strategy's data-parallel processes. It is there on a single
    device too (as one of one): Lightning would shuffle differently there than on several.

    Args:
        dataset: The samples.
        trainer: Tells the number of data-parallel processes; ``None`` is one.
        batch_size: Samples per step over all processes together.
        shuffle: Whether their order is random: a function of ``seed`` and the epoch only.
        drop_last: Whether a last incomplete batch is left out.
        seed: Of the order.
        num_workers: Processes that load data, per device.

    Raises:
        ValueError: If the processes cannot share a batch evenly.
    """
    shares = {} if trainer is None else (trainer.distributed_sampler_kwargs or {})
    num_replicas = int(shares.get("num_replicas", 1))
    if batch_size % num_replicas:
        raise ValueError(
            f"batch_size={batch_size} is the global batch size, and {num_replicas} data-parallel processes"
            " cannot share it evenly: use a multiple."
        )
    sampler: DistributedSampler[Any] = DistributedSampler(
        dataset,
        num_replicas=num_replicas,
        rank=int(shares.get("rank", 0)),
        shuffle=shuffle,
        seed=seed,
        drop_last=drop_last,
    )
    return ResumableDataLoader(
        dataset,
        batch_size=batch_size // num_replicas,
        sampler=sampler,
        drop_last=drop_last,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
