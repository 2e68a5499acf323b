"""Runs functions on several gloo processes that stay alive between tests."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

PRELOAD = [
    "torch.distributed.tensor.parallel",
    "torch.distributed.pipelining",
    "lightning_hetu.strategies.auto",
    "lightning_hetu.models",
]


class RankPool:
    """``world_size`` processes with one gloo process group; :meth:`run` calls a function on all of them.

    The function must be defined at the top of a module. Its return values come back in the order of the ranks; if it
    raises on any rank, or takes longer than ``timeout`` seconds, the pool is ended and the traceback raised here.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._workers: list[tuple[Any, Any]] = []
        self._runs = 0

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.world_size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 300.0) -> list[Any]:
        """Calls ``function(rank, *args)`` on every rank and returns their results."""
        # Every device mesh leaves process groups with threads behind, which slow down all that comes after.
        if self._workers and self._runs >= max(1, 16 // self.world_size):
            self.close()
        if not self._workers:
            self._start()
            self._runs = 0
        self._runs += 1
        for _, pipe in self._workers:
            pipe.send((function, args))
        deadline = time.monotonic() + timeout
        results: list[Any] = []
        for rank, (process, pipe) in enumerate(self._workers):
            try:
                if not pipe.poll(max(deadline - time.monotonic(), 0.0)):
                    self.close()
                    raise TimeoutError(f"rank {rank} of {self.world_size} gave no answer within {timeout} s")
                ok, value = pipe.recv()
            except EOFError:
                process.join(5)
                self.close()
                raise RuntimeError(f"rank {rank} of {self.world_size} ended with code {process.exitcode}") from None
            if not ok:
                self.close()
                raise AssertionError(f"rank {rank} of {self.world_size}:\n{value}")
            results.append(value)
        return results

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


def _work(rank: int, world_size: int, port: int, pipe: Any) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank)
    )
    import logging

    import torch

    torch.set_num_threads(1)
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(rank, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
