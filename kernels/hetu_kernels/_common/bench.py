"""Time operators and their peers in turns on one device, against what that device can do.

Implementations take turns (A B A B ...) over the same arguments, so that a clock that slows down slows all of them
down. A measurement is what ``triton.testing.do_bench`` makes of it: events around each call, a cache that holds nothing
of the call before, quantiles instead of a mean. The device's limits are measured in the same run, because no two of one
kind are equally fast.

This is the timing; :mod:`hetu_kernels._common.bench_run` says what is timed.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from hetu_kernels._common import device as _device
from hetu_kernels._common.bench_report import Limits, one_line

_CACHE_BYTES = 256 * 2**20  # written between calls: more than the level-2 cache of any target
_MAX_SAMPLES = 1000  # of an implementation; a call of 5 us would otherwise be repeated for seconds
_QUANTILES = (0.5, 0.2, 0.8)


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Args:
        warmup_ms: Calls of this duration in all come before those that count.
        rep_ms: Calls of this duration in all count; 0 for a single call.
        rounds: Turns among which both are divided.
        host_calls: Calls of which the median time to enqueue is taken.
        tiny: Take every benchmark's tiny shape.
    """

    warmup_ms: float = 25.0
    rep_ms: float = 200.0
    rounds: int = 4
    host_calls: int = 20
    tiny: bool = False

    @staticmethod
    def once() -> Settings:
        """A single call of everything, at tiny shapes: to see that it runs."""
        return Settings(warmup_ms=0.0, rep_ms=0.0, rounds=1, host_calls=1, tiny=True)


class Event(Protocol):
    """A point in the device's stream of work."""

    def record(self) -> None:
        """Put it there."""

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds between it and another one."""


class _ClockEvent:
    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.at = clock, 0.0

    def record(self) -> None:
        self.at = self.clock()

    def elapsed_time(self, end: _ClockEvent) -> float:
        return (end.at - self.at) * 1e3


class Meter:
    """What the benchmark asks a device. This one is the CPU, which does its work at once and has no cache to empty.

    Args:
        clock: Seconds since any point in time; tests give one that they move themselves.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device = torch.device("cpu")
        self.clock = clock

    @property
    def name(self) -> str:
        """What the device is called."""
        return "cpu"

    @property
    def arch(self) -> str:
        """Its architecture."""
        return "cpu"

    def event(self) -> Event:
        """A new event."""
        return _ClockEvent(self.clock)

    def synchronize(self) -> None:
        """Wait until the device has finished."""

    def flush(self) -> None:
        """Empty the cache, in the stream of work."""

    def allocated(self) -> int | None:
        """Bytes of memory in use; None where nobody counts them."""
        return None

    def reset_peak(self) -> None:
        """Forget the peak so far."""

    def peak(self) -> int | None:
        """The most bytes in use since then."""
        return None

    def release(self) -> None:
        """Give memory that is not in use back."""


class CudaMeter(Meter):
    """An NVIDIA or AMD GPU.

    Args:
        device: Which one.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        if device.index is not None:
            torch.cuda.set_device(device)
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._cache = torch.empty(_CACHE_BYTES, dtype=torch.int8, device=self.device)

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    @property
    def arch(self) -> str:
        return _device.arch(self.device)

    def event(self) -> Event:
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def flush(self) -> None:
        self._cache.zero_()

    def allocated(self) -> int | None:
        return torch.cuda.memory_allocated(self.device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device)

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


@dataclass
class Trial:
    """One implementation in one pass.

    Args:
        name: Of the implementation.
        prepare: What comes before every call and is not timed.
        call: What is timed; it is given what ``prepare`` returned.
        times: Milliseconds of the calls so far.
        estimate: Milliseconds that a call takes, once known.
        reason: Why it was given up.
    """

    name: str
    prepare: Callable[[], Any]
    call: Callable[[Any], Any]
    times: list[float] = field(default_factory=list)
    estimate: float | None = None
    reason: str | None = None

    def quantiles(self) -> tuple[float, float, float]:
        """Median, 20th and 80th percentile of the times."""
        times = torch.tensor(self.times, dtype=torch.float64)
        median, low, high = times.quantile(torch.tensor(_QUANTILES, dtype=torch.float64)).tolist()
        return median, low, high


def take_turns(
    trials: Sequence[Trial],
    meter: Meter,
    settings: Settings,
    failed: Callable[[str, str], None] = lambda name, reason: None,
) -> None:
    """Measure trials round after round; one that raises is given up, with its reason, and the others go on.

    Args:
        trials: What takes turns.
        meter: The device.
        settings: How long each is measured.
        failed: Told of the name of a trial and the reason as soon as it is given up.
    """
    for _ in range(settings.rounds):
        for trial in trials:
            if trial.reason is None:
                try:
                    _one_turn(trial, meter, settings)
                except Exception as error:
                    trial.reason = one_line(error)
                    failed(trial.name, trial.reason)


def _one_turn(trial: Trial, meter: Meter, settings: Settings) -> None:
    def timed(calls: int) -> list[float]:
        events = []
        for _ in range(calls):
            state = trial.prepare()
            meter.flush()
            start, end = meter.event(), meter.event()
            start.record()
            trial.call(state)
            end.record()
            events.append((start, end))
            del state  # its memory belongs to the next call
        meter.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    if settings.rep_ms == 0:
        trial.times += timed(1)
        return
    if trial.estimate is None:
        timed(1)  # what is done once, such as compiling, tells nothing of the calls to come
        trial.estimate = max(statistics.median(timed(3)), 1e-4)

    def calls_in(milliseconds: float) -> int:
        assert trial.estimate is not None
        return max(1, min(_MAX_SAMPLES, round(milliseconds / trial.estimate)) // settings.rounds)

    timed(calls_in(settings.warmup_ms))
    trial.times += timed(calls_in(settings.rep_ms))


def measure_limits(meter: Meter, settings: Settings) -> Limits:
    """Copy 1 GiB within the device's memory, and multiply 8192 x 8192 matrices."""
    elements, n = (2**18, 64) if settings.tiny else (2**28, 8192)
    source = torch.randn(elements, device=meter.device)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=meter.device, dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    copy = Trial("copy", lambda: None, lambda _: target.copy_(source))
    matmul = Trial("matmul", lambda: None, lambda _: torch.matmul(a, b, out=c))
    take_turns([copy, matmul], meter, settings)
    for trial in (copy, matmul):
        if trial.reason is not None:
            raise RuntimeError(f"The device's limits could not be measured: {trial.name}: {trial.reason}")
    seconds = [trial.quantiles()[0] * 1e-3 for trial in (copy, matmul)]
    return Limits(2 * 4 * elements / seconds[0] * 1e-9, 2 * n**3 / seconds[1] * 1e-12)


def peak_memory(trial: Trial, meter: Meter) -> int | None:
    """Bytes that one call needs above what was in use before its preparation; what that leaves behind counts."""
    meter.synchronize()
    before = meter.allocated()
    state = trial.prepare()
    meter.synchronize()
    meter.reset_peak()
    trial.call(state)
    meter.synchronize()
    peak = meter.peak()
    return None if before is None or peak is None else peak - before


def host_time(trial: Trial, meter: Meter, settings: Settings) -> float:
    """Microseconds until a call returns, with nothing before it in the device's stream; the median of several."""
    times = []
    for _ in range(settings.host_calls):
        state = trial.prepare()
        meter.synchronize()
        start = meter.clock()
        trial.call(state)
        times.append((meter.clock() - start) * 1e6)
        del state
    meter.synchronize()
    return statistics.median(times)
