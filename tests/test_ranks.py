"""The pool of processes that distributed tests run on: it names the first failure, and keeps nothing between runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests._ranks import RankPool


def raise_on_the_last(rank: int) -> None:
    if rank == dist.get_world_size() - 1:
        raise ValueError("lost its way")
    dist.barrier()


def end_the_last(rank: int) -> None:
    if rank == dist.get_world_size() - 1:
        os._exit(3)
    dist.barrier()


def raise_one_after_another(rank: int) -> None:
    time.sleep(0.05 * (dist.get_world_size() - 1 - rank))
    raise ValueError(f"as number {rank}")


def wait_on_the_first(rank: int) -> None:
    if rank == 0:
        time.sleep(60)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (raise_on_the_last, ["rank 1 of 2", "in raise_on_the_last", "ValueError: lost its way"]),
        (end_the_last, ["rank 1 of 2", "ended with code 3"]),
        (raise_one_after_another, ["rank 1 of 2", "ValueError: as number 1"]),
    ],
)
def test_the_first_failure_is_told_at_once(
    ranks: Callable[[int], RankPool], function: Callable[[int], None], words: list[str]
) -> None:
    """Though rank 0 waits for the other one, or fails because of it; the next run starts afresh."""
    pool = ranks(2)
    start = time.monotonic()
    with pytest.raises(RuntimeError) as error:
        pool.run(function, timeout=60)
    assert time.monotonic() - start < 30
    assert all(word in str(error.value) for word in words), error.value
    assert pool.run(total, (2, 1)) == [4.0, 4.0]


def test_ranks_without_an_answer_are_named(ranks: Callable[[int], RankPool]) -> None:
    pool = ranks(2)
    pool.run(total, (2, 1))
    with pytest.raises(TimeoutError, match="no answer within 2.0 s from rank 0 of 2"):
        pool.run(wait_on_the_first, timeout=2.0)


def total(rank: int, shape: tuple[int, int]) -> float:
    """Sum of ones that lie on a mesh in shards."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner"))
    ones = distribute_tensor(torch.ones(4, 1), mesh, [Shard(0), Shard(0)])
    return float(ones.sum().full_tensor())


def what_is_there(rank: int) -> tuple[int, int]:
    """Process groups and threads."""
    return len(dist.distributed_c10d._world.pg_map), len(os.listdir("/proc/self/task"))


def test_groups_end_with_the_run(ranks: Callable[[int], RankPool]) -> None:
    """Only WORLD, and no thread of another group, is left; an equal mesh of a later run works with new groups."""
    pool = ranks(4)
    pool.run(total, (2, 2))
    before = pool.run(what_is_there)
    for shape in ((2, 2), (4, 1), (2, 2)):
        assert pool.run(total, shape) == [4.0] * 4
    assert [groups for groups, _ in before] == [1] * 4
    assert pool.run(what_is_there) == before
