"""Keeps the processes of a run of one mind: the same profile everywhere, and an error everywhere or nowhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

T = TypeVar("T")


def rank_and_size(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """Rank in ``group`` (the default group for ``None``) and its size; ``(0, 1)`` without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(group), dist.get_world_size(group)
    return 0, 1


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The picklable ``value`` of every process, in rank order."""
    _, size = rank_and_size(group)
    if size == 1:
        return [value]
    values: list[T | None] = [None] * size
    dist.all_gather_object(values, value, group=group)
    return values  # type: ignore[return-value]


def broadcast(value: T | None, group: dist.ProcessGroup | None = None) -> T:
    """The picklable ``value`` of the first process of the group."""
    _, size = rank_and_size(group)
    if size == 1:
        return value  # type: ignore[return-value]
    box = [value]
    source = dist.get_global_rank(group, 0) if group is not None else 0
    dist.broadcast_object_list(box, src=source, group=group)
    return box[0]  # type: ignore[return-value]


def run_together(work: Callable[[], T | None], group: dist.ProcessGroup | None = None) -> list[T | None]:
    """Runs ``work`` here and returns what it gave in every process, in rank order.

    ``work`` must not communicate.

    Raises:
        RuntimeError: If ``work`` failed in another process; a failure in this process is raised as it is. Either way
            every process raises, so that none waits for one that is gone.
    """
    error: Exception | None = None
    result: T | None = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    outcomes = gather((result, None if error is None else f"{type(error).__name__}: {error}"), group)
    if error is not None:
        raise error
    for rank, (_, message) in enumerate(outcomes):
        if message is not None:
            raise RuntimeError(f"profiling failed on rank {rank}: {message}")
    return [outcome for outcome, _ in outcomes]


@contextmanager
def lone_mesh(device: torch.device, group: dist.ProcessGroup | None = None) -> Iterator[DeviceMesh | None]:
    """A mesh of this process alone, to run distributed layers without communication; all processes call it together.

    ``None`` without torch.distributed, and where the processes are not those of the default group.
    """
    _, size = rank_and_size()
    if size == 1 or (group is not None and group is not dist.group.WORLD):
        yield None
        return
    alone = init_device_mesh(device.type, (size, 1), mesh_dim_names=("each", "alone"))["alone"]
    try:
        yield alone
    finally:
        dist.destroy_process_group(alone.get_group())


def is_busy(slots: float | None, device: torch.device, group: dist.ProcessGroup | None = None) -> bool:
    """Whether this process takes part when at most ``slots`` of them can compute at full speed.

    Accelerators all take part. Processes that share the cores of a host take turns: ``slots`` of them, spread evenly
    over the ranks and always including the first, measure while the rest waits.
    """
    rank, size = rank_and_size(group)
    if device.type != "cpu" and slots is None:
        return True
    busy = max(1, min(size, round(slots or 1)))
    return rank in {index * size // busy for index in range(busy)}
