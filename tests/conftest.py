"""Settings every test runs under, and where the tests that need devices are skipped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

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

_START_PROCESSES = ("tests/strategies", "tests/parallel", "tests/profiling", "tests/moe", "tests/test_cli.py")
"""Rooms whose tests start processes, the longest first: each is one worker's, which shares its processes."""


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which one may do without
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Spreads tests over the workers of pytest-xdist: rooms that start processes as a whole, other tests by file."""
    from xdist.scheduler import LoadScopeScheduling

    class ByRoom(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return next((room for room in _START_PROCESSES if file.startswith(room)), file)

    config.option.loadscopereorder = False  # it would put rooms with few long tests last
    return ByRoom(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` and ``multigpu`` where the devices are missing, saying so."""
    rooms = len(_START_PROCESSES)
    order = {room: number for number, room in enumerate(_START_PROCESSES)}
    items.sort(key=lambda item: next((n for room, n in order.items() if item.nodeid.startswith(room)), rooms))
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
