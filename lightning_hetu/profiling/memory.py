"""Measures the peak of live tensor bytes of any piece of code, such as one distributed training step."""

from __future__ import annotations

import ctypes
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

_log = logging.getLogger(__name__)


class MemoryMeter:
    """Peak bytes of tensors between enter and exit, to the byte.

    On CUDA these are the caching allocator's own counters. On CPU every allocation of torch's allocator is recorded by
    the profiler: those of C++ autograd, FSDP's buffers and the collectives included, in whichever thread they happen.
    The processes of a distributed run each measure their own share. Plain ``malloc`` inside kernels is not seen. From
    the first use on CPU, torch keeps book of its allocations for the rest of the process (about 1 microsecond each).

    Tensors that are alive at the start are given as ``tensors``: they form ``baseline``, and where they are freed
    meanwhile the peak knows. Tensors made before the first use and not given count as zero, also when they are freed.

    After exit ``peak`` is the most bytes alive beyond ``baseline`` at any moment, and ``kept`` are those still alive.
    A meter is used once.

    Example::

        with MemoryMeter(device, tensors=[*model.parameters(), *optimizer_states]) as meter:
            training_step()
        meter.total  # bytes

    Args:
        device: Where to measure.
        tensors: Tensors (DTensors count with their local part) that are alive already.

    Raises:
        RuntimeError: On enter on CPU, if another torch profiler is running in this thread.
    """

    def __init__(self, device: torch.device | str = "cpu", *, tensors: Iterable[Tensor] = ()) -> None:
        self.device = torch.device(device)
        self._storages = [tensor.untyped_storage() for tensor in map(local_tensor, tensors)]
        unique = {storage._cdata: storage.nbytes() for storage in self._storages}
        self.baseline = sum(unique.values())
        self.peak = 0
        self.kept = 0
        self._profile: Any = None
        self._log_level = 0
        self._start = 0
        self._freed: list[tuple[int, int, int]] = []
        self._watches: list[weakref.finalize[..., Any]] = []

    @property
    def total(self) -> int:
        """``baseline`` plus ``peak``: the most bytes alive at any moment."""
        return self.baseline + self.peak

    def __enter__(self) -> MemoryMeter:
        storages, self._storages = self._storages, []
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
            return self
        if torch.autograd._profiler_enabled():
            raise RuntimeError("MemoryMeter(device='cpu'): another torch profiler is running, stop it first.")
        self._watches = _watch({storage._cdata: storage for storage in storages}, self._note_free)
        storages.clear()
        _count_in_all_threads()
        self._log_level = _set_log_level(2)
        self._profile = _start_recording()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak = max(torch.cuda.max_memory_allocated(self.device) - self._start, 0)
            self.kept = torch.cuda.memory_allocated(self.device) - self._start
            return
        events = _stop_recording(self._profile)
        _set_log_level(self._log_level)
        self._profile = None
        for watch in self._watches:
            watch.detach()
        self._watches = []
        counted = _counted_releases(events)
        freed = iter(sorted(item for item in self._freed if item[2] not in counted))
        gone, pending = 0, next(freed, None)
        for event in events:
            while pending is not None and pending[0] <= event.time:
                gone += pending[1]
                pending = next(freed, None)
            self.kept = event.live - gone
            self.peak = max(self.peak, self.kept)

    def _note_free(self, nbytes: int, address: int) -> None:
        self._freed.append((time.time_ns(), nbytes, address))


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a DTensor that lives here; any other tensor as it is."""
    local = getattr(tensor, "_local_tensor", None)
    return tensor if local is None else local


def _watch(storages: dict[int, Any], note_free: Callable[[int, int], None]) -> list[weakref.finalize[..., Any]]:
    watches = []
    for storage in storages.values():
        watch = weakref.finalize(storage, note_free, storage.nbytes(), storage.data_ptr())
        watch.atexit = False
        watches.append(watch)
    return watches


# What follows is the only use of torch's internals; the same in torch 2.11 to 2.13.


class _Event(NamedTuple):
    """One allocation (``size`` > 0) or release: ns since the epoch, and live bytes since the start behind it."""

    time: int
    address: int
    size: int
    live: int


def _count_in_all_threads() -> None:
    """Lets the allocator count what every thread frees, not only those that are recorded.

    The worker threads of the collectives are often the last to hold a buffer. Switched off again, the allocator would
    mistake new blocks for those it has not seen freed, so it stays on.
    """
    flag = _torch_flag("FLAGS_caffe2_report_cpu_memory_usage", ctypes.c_bool)
    if flag is None:
        _log.warning("MemoryMeter: this torch cannot count what other threads free, peaks may come out too large.")
        return
    flag.value = True


def _torch_flag(name: str, kind: Any) -> Any:
    """A global setting of torch's C++ part; ``None`` if this torch has none of that name."""
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    try:
        return kind.in_dll(ctypes.CDLL(str(library)), name)
    except (OSError, ValueError):
        return None


def _set_log_level(level: int) -> int:
    """Sets what torch's C++ part writes to the error stream (1: warnings, 2: errors); returns what it was.

    The allocator warns of every thousandth release of a block from before the start. They are accounted for here.
    """
    flag = _torch_flag("FLAGS_caffe2_log_level", ctypes.c_int)
    if flag is None:
        return level
    before = int(flag.value)
    flag.value = level
    return before


def _start_recording() -> Any:
    # The recorder writes lines of its own to the error stream unless told not to before it first starts.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # Without acc_events some releases warn that a second recording replaces the first, which is what is wanted.
    profile = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    )
    profile.start()
    _make_event()
    return profile


def _stop_recording(profile: Any) -> list[_Event]:
    from torch._C._profiler import _EventType

    _make_event()
    profile.stop()
    found = []
    waiting = list(profile.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
            fields = event.extra_fields
            found.append(_Event(event.start_time_ns, fields.ptr, fields.alloc_size, fields.total_allocated))
    found.sort(key=lambda item: item.time)
    start = found[0].live - found[0].size
    return [event._replace(live=event.live - start) for event in found]


def _make_event() -> None:
    # What threads that are not recorded allocate and free is known from the total at the next event only.
    torch.empty(1, dtype=torch.uint8)


def _counted_releases(events: Sequence[_Event]) -> set[int]:
    """Addresses of blocks from before the start whose release the allocator has counted."""
    born: set[int] = set()
    counted: set[int] = set()
    for event in events:
        if event.size > 0:
            born.add(event.address)
        elif event.address not in born:
            counted.add(event.address)
    return counted
