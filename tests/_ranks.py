"""Runs functions on several gloo processes that stay alive between tests."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

PRELOAD = [
    "torch.distributed.tensor.parallel",
    "torch.distributed.pipelining",
    "lightning_hetu.strategies.auto",
    "lightning_hetu.models",
]
GRACE = 0.2
"""Seconds in which a rank that failed earlier may still be heard after the first one that is."""


class RankPool:
    """``world_size`` processes with one gloo process group; :meth:`run` calls a function on all of them.

    The function must be defined at the top of a module. Its return values come back in the order of the ranks. Once it
    raises on one rank, or that rank's process ends, or ``timeout`` seconds are over, the pool is ended at once and the
    first rank's failure raised here, with its traceback. The process groups of a run are destroyed after it.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._workers: list[tuple[Any, Any]] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        port = free_port()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.world_size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 300.0) -> list[Any]:
        """Calls ``function(rank, *args)`` on every rank and returns their results."""
        if not self._workers:
            self._start()
        try:
            results = self._call(function, args, timeout)
            self._call(_destroy_groups, (), timeout)
        except BaseException:  # answers that nobody has read would be taken for those of the next run
            self.close()
            raise
        return results

    def _call(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        for _, pipe in self._workers:
            with suppress(BrokenPipeError):  # it has ended, which is noticed below
                pipe.send((function, args))
        deadline = time.monotonic() + timeout
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._workers)}
        results: dict[int, Any] = {}
        failures: list[tuple[float, int, str]] = []
        while waiting and (ready := wait(list(waiting), max(deadline - time.monotonic(), 0.0))):
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    succeeded, value, at = pipe.recv()
                except (EOFError, ConnectionResetError):
                    process = self._workers[rank][0]
                    process.join(5)
                    # Its peers fail for that reason, and may say so before its end is noticed.
                    succeeded, value, at = False, f"ended with code {process.exitcode}", 0.0
                if succeeded:
                    results[rank] = value
                else:
                    failures.append((at, rank, value))
                    deadline = min(deadline, time.monotonic() + GRACE)
        if failures:
            _, rank, what = min(failures)
            raise RuntimeError(f"rank {rank} of {self.world_size}: {what}")
        if waiting:
            silent = ", ".join(map(str, sorted(waiting.values())))
            raise TimeoutError(f"no answer within {timeout} s from rank {silent} of {self.world_size}")
        return [results[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """Ends the processes; the next run starts new ones."""
        for process, pipe in self._workers:
            pipe.close()
            process.terminate()
        for process, _ in self._workers:
            process.join(5)
            if process.is_alive():
                process.kill()
        self._workers = []


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _work(rank: int, world_size: int, port: int, pipe: Any) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank)
    )
    import logging

    import torch

    torch.set_num_threads(1)
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    # What is there by now stays; collecting garbage is much quicker without looking at it.
    _frozen_caches.extend(_caches())
    gc.freeze()
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(rank, *args), time.monotonic()))
        except BaseException:
            # The same clock in all processes of a machine.
            pipe.send((False, f"\n{traceback.format_exc()}", time.monotonic()))


def _destroy_groups(rank: int) -> None:
    """Destroys every process group but WORLD: their threads would slow down all that comes after.

    DTensor caches its results by the ranks of a mesh, with the groups of that mesh in them. It must forget them, or an
    equal mesh of a later run would be given groups that are gone.
    """
    import torch
    from torch.distributed import distributed_c10d
    from torch.distributed.tensor import _redistribute, debug

    for group in list(distributed_c10d._world.pg_map):
        if group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)
    debug._clear_sharding_prop_cache()
    _redistribute.clear_redistribute_planner_cache()
    for cache in [*_frozen_caches, *_caches()]:
        cache.cache_clear()
    while gc.collect():  # what the graph of autograd held is found only after the graph
        pass


_frozen_caches: list[Any] = []


def _caches() -> list[Any]:
    wrappers = (item for item in gc.get_objects() if type(item) is functools._lru_cache_wrapper)
    return [wrapper for wrapper in wrappers if wrapper.__module__.startswith("torch.distributed")]
