"""What is timed of an operator: ours and its peers, checked against each other, in every pass of one benchmark.

There are up to four passes. ``forward`` keeps what gradients need, ``no_grad`` does not; ``backward`` runs on a graph
of its own each time, made outside of the timed part; ``both`` is one after the other, which is what counts for an
operator that computes gradients ahead of time. An operator without gradients has ``forward`` only.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hetu_kernels._common import config
from hetu_kernels._common.bench import Meter, Settings, Trial, host_time, peak_memory, take_turns
from hetu_kernels._common.bench_peers import (
    Implementation,
    Results,
    check,
    copies_of,
    gradients,
    implementations,
    outputs_of,
    with_leaves,
)
from hetu_kernels._common.bench_report import OURS, Limits, Row, one_line, speeds, with_ratios
from hetu_kernels._common.registry import Benchmark, OpSpec


class DeviceLostError(RuntimeError):
    """The device does not answer any more: an illegal access by one kernel breaks all that come after it.

    Args:
        row: The implementation after which it was so.
    """

    def __init__(self, row: Row) -> None:
        super().__init__(f"{row.op}, {row.benchmark}, {row.implementation}: {row.reason}")
        self.row = row


def passes_of(spec: OpSpec, benchmark: Benchmark, arguments: dict[str, Any]) -> tuple[str, ...]:
    """What there is to time, given the arguments of a benchmark."""
    if not with_leaves(arguments, spec.differentiable)[1]:
        return ("forward",)
    return ("forward", "backward", "both", "no_grad") if benchmark.backward else ("no_grad",)


def run_benchmark(
    spec: OpSpec,
    benchmark: Benchmark,
    meter: Meter,
    limits: Limits,
    settings: Settings,
    *,
    peers: bool = False,
    leave_out: Collection[str] = (),
) -> list[Row]:
    """Check and time ours and its peers at one shape.

    Args:
        spec: The operator.
        benchmark: The shape.
        meter: The device.
        limits: What it can do.
        settings: How long to measure.
        peers: All peers; otherwise torch eager only.
        leave_out: Peers that are known not to run.

    Returns:
        A row per pass and implementation. Whatever an implementation raises becomes its row's reason.

    Raises:
        DeviceLostError: If the device does not answer any more.
    """
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # a second shape would be compiled for any shape, and be slower
        torch._dynamo.reset()
    try:
        arguments = benchmark.make(meter.device, settings.tiny)
        works = _works(benchmark, arguments)
    except Exception as error:
        return [Row(spec.name, benchmark.name, "all", OURS, reason=f"arguments: {one_line(error)}")]
    found = implementations(spec, peers=peers, tiny_cpu=settings.tiny and meter.device.type == "cpu")
    run = _Run(spec, benchmark, meter, limits, settings, arguments, {}, passes_of(spec, benchmark, arguments))
    rows = run.rows([one for one in found if one.name not in leave_out], works)
    del arguments, run
    meter.release()
    return rows


def _works(benchmark: Benchmark, arguments: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Bytes and operations by pass."""
    of_bytes = benchmark.bytes(arguments) if benchmark.bytes else (0, 0)
    of_flops = benchmark.flops(arguments) if benchmark.flops else (0, 0)
    forward, backward = zip(of_bytes, of_flops, strict=True)
    return {"forward": forward, "no_grad": forward, "backward": backward, "both": (sum(of_bytes), sum(of_flops))}


@dataclass
class _Run:
    """One benchmark while it runs."""

    spec: OpSpec
    benchmark: Benchmark
    meter: Meter
    limits: Limits
    settings: Settings
    arguments: dict[str, Any]
    cotangents: dict[int, Tensor]
    passes: tuple[str, ...]

    def rows(self, contenders: list[Implementation], works: dict[str, tuple[int, int]]) -> list[Row]:
        """Rows of all passes."""
        rows = self._check(contenders)
        contenders = [one for one in contenders if one.function is not None]
        for pass_ in self.passes:
            trials = [self._trial(one, pass_) for one in contenders]
            take_turns(trials, self.meter, self.settings, functools.partial(self._after_failure, pass_))
            made = [self._row(one, pass_, trial, works[pass_]) for one, trial in zip(contenders, trials, strict=True)]
            rows += with_ratios(made)
        return rows

    def _check(self, contenders: list[Implementation]) -> list[Row]:
        """Call everything once and compare; rows of what does not run at all."""
        differentiable = self.spec.differentiable if "backward" in self.passes else ()
        ours: Results | None = None
        rows = []
        for one in contenders:
            results = check(one, self.arguments, differentiable, self.cotangents, ours, self.meter.synchronize)
            ours = results if one.name == OURS else ours
            del results
            for where, reason in one.reasons.items():
                self._after_failure(where, one.name, reason)
            if "all" in one.reasons:
                rows.append(Row(self.spec.name, self.benchmark.name, "all", one.name, reason=one.reasons["all"]))
        return rows

    def _after_failure(self, pass_: str, name: str, reason: str) -> None:
        """After a failure: a device that is broken breaks what comes next, which must not be blamed for it."""
        try:
            self.meter.synchronize()
            self.meter.release()  # what ran out of memory must leave none of it to the next
        except Exception:
            raise DeviceLostError(Row(self.spec.name, self.benchmark.name, pass_, name, reason=reason)) from None

    def _trial(self, one: Implementation, pass_: str) -> Trial:
        function, cotangents = one.function, self.cotangents
        assert function is not None
        arguments, leaves = with_leaves(self.arguments, self.spec.differentiable)

        def outputs() -> list[Tensor]:
            return outputs_of(function(**arguments))

        def without_grad(_: Any) -> Any:
            with torch.no_grad():
                return function(**arguments)

        prepare, call = {
            "forward": (lambda: None, lambda _: function(**arguments)),
            "no_grad": (lambda: None, without_grad),
            "backward": (lambda: (outputs(), copies_of(cotangents)), lambda made: gradients(made[0], leaves, made[1])),
            "both": (lambda: copies_of(cotangents), lambda made: gradients(outputs(), leaves, made)),
        }[pass_]
        return Trial(one.name, prepare, call, reason=one.reason_in(pass_))

    def _row(self, one: Implementation, pass_: str, trial: Trial, work: tuple[int, int]) -> Row:
        row = Row(self.spec.name, self.benchmark.name, pass_, one.name)
        if trial.reason is None:
            try:
                with config.watching() as configurations:
                    peak, host = peak_memory(trial, self.meter), host_time(trial, self.meter, self.settings)
            except Exception as error:
                trial.reason = one_line(error)
                self._after_failure(pass_, one.name, trial.reason)
        if trial.reason is not None:
            return replace(row, reason=trial.reason)
        median, low, high = trial.quantiles()
        seen = {kernel: asdict(chosen) for kernel, chosen in configurations.items()}
        return replace(
            row,
            ms=median,
            ms_p20=low,
            ms_p80=high,
            peak_bytes=peak,
            host_us=host,
            config=seen if seen and one.name == OURS else None,
            agrees=one.agrees_in(pass_),
            reason=one.difference_in(pass_),
            **speeds(work, median, self.limits),
        )
