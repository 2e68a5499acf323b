"""Settings every test runs under, and where the tests that need devices are skipped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

# Before torch and numpy are imported: tests are small, and distributed ones start several processes on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
# Gloo would otherwise look the host name up, which fails on machines without a resolvable one.
os.environ.setdefault("MASTER_ADDR", "127.0.0.1")

import pytest
import torch

# Triton reads this when a kernel is defined: without a GPU, kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # triton 3.9 warns where it is unset

from tests._ranks import RankPool

torch.set_num_threads(1)

_START_PROCESSES = {"test_cli.py", "test_ranks.py", "test_profile_cluster.py"}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Spreads tests over the workers of pytest-xdist, and skips those whose devices are missing, saying so."""
    # All that start processes go to one worker, which shares them, and start first; of the others, files stay together.
    alone = {
        item for item in items if "ranks" in getattr(item, "fixturenames", ()) or item.path.name in _START_PROCESSES
    }
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ranks" if item in alone else str(item.path)))
    items.sort(key=lambda item: item not in alone)
    available = torch.cuda.device_count()
    for marker, needed in (("gpu", 1), ("multigpu", 2)):
        if available >= needed:
            continue
        skip = pytest.mark.skip(reason=f"marked {marker}: needs {needed} GPU(s), this machine has {available}")
        for item in items:
            if item.get_closest_marker(marker):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, whichever ran before it."""
    torch.manual_seed(0)


_pools: dict[int, RankPool] = {}


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """Gives a pool of gloo processes by its size; the same one to all tests of the session."""

    def pool(world_size: int) -> RankPool:
        if world_size not in _pools:
            _pools[world_size] = RankPool(world_size)
        return _pools[world_size]

    yield pool
    for started in _pools.values():
        started.close()
    _pools.clear()
