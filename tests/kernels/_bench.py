"""A device whose clock and memory the tests move, and an operator to time on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hetu_kernels._common.bench import Meter, Settings, Trial
from hetu_kernels._common.bench_report import OURS, Limits, Report, Row, speeds, with_ratios
from hetu_kernels._common.bench_run import run_benchmark
from hetu_kernels._common.registry import Benchmark, OpSpec

LIMITS = Limits(copy_gb_s=4000.0, matmul_tflop_s=800.0)
SHORT = Settings(warmup_ms=8.0, rep_ms=40.0, rounds=4, host_calls=3)


class Device(Meter):
    """A device whose time and memory the tests move."""

    def __init__(self) -> None:
        super().__init__(lambda: self.now)
        self.now = 0.0
        self.memory = self.most = 0
        self.log: list[str] = []
        self.broken = False

    def work(self, ms: float) -> None:
        self.now += ms * 1e-3

    def flush(self) -> None:
        self.log.append("flush")
        self.work(0.1)

    def synchronize(self) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ...")

    def allocate(self, size: int) -> None:
        self.memory += size
        self.most = max(self.most, self.memory)

    def allocated(self) -> int:
        return self.memory

    def reset_peak(self) -> None:
        self.most = self.memory

    def peak(self) -> int:
        return self.most


def trial(device: Device, name: str, *milliseconds: float) -> Trial:
    """Its calls take these times in turn."""
    calls = iter(range(10**9))

    def call(_: Any) -> None:
        device.log.append(name)
        device.work(milliseconds[next(calls) % len(milliseconds)])

    return Trial(name, lambda: device.work(7.0), call)


def make_spec(function: Callable[..., Any], *, differentiable: tuple[str, ...] = (), **peers: Any) -> OpSpec:
    """An operator of ``x`` that its peers compute as well."""

    def benchmark(name: str, size: int) -> Benchmark:
        return Benchmark(
            name,
            lambda device, tiny: {"x": torch.randn(3 if tiny else size, device=device)},
            bytes=lambda arguments: (10**9, 2 * 10**9),
            flops=lambda arguments: (10**12, 0),
        )

    return OpSpec(
        name="double",
        function=function,
        reference=lambda x: 2 * x,
        custom_ops=(),
        differentiable=differentiable,
        cases=lambda: (),
        example=lambda tokens: {},
        aot=lambda: (),
        benchmarks=lambda: [benchmark("small", 4), benchmark("large", 1000)],
        peers={name.replace("_", " "): peer for name, peer in peers.items()},
        goal="twice as fast",
    )


def measure(spec: OpSpec, device: Device, settings: Settings = SHORT, peers: bool = True, **options: Any) -> list[Row]:
    return run_benchmark(spec, spec.benchmarks()[0], device, LIMITS, settings, peers=peers, **options)


def taking(device: Device, ms: float, scale: float = 2.0) -> Callable[..., Tensor]:
    def function(x: Tensor) -> Tensor:
        device.work(ms)
        return scale * x

    return function


def by_name(rows: Sequence[Row], pass_: str = "forward") -> dict[str, Row]:
    return {row.implementation: row for row in rows if row.pass_ in (pass_, "all")}


def synthetic(peers: bool = True, tiny: bool = False) -> Report:
    rows = []
    for benchmark in ("small", "large"):
        for pass_, ms in (("forward", 1.0), ("backward", 2.0), ("both", 3.0), ("no_grad", 1.0)):
            made = [
                Row("double", benchmark, pass_, name, ms=ms * factor, ms_p20=ms, ms_p80=ms * 1.5, agrees=agrees,
                    peak_bytes=2**20, host_us=12.5, **speeds((10**9, 0), ms * factor, LIMITS))
                for name, factor, agrees in ((OURS, 1.0, True), ("torch eager", 2.0, True), ("fishy", 0.5, False))
            ]  # fmt: skip
            rows += with_ratios(made)
        rows.append(Row("double", benchmark, "all", "liger", reason="ImportError: none"))
    return Report("GPU 9000", "sm_90", {"torch": "2"}, tiny, peers, LIMITS, "2026-01-01", "python -m ...", rows)
