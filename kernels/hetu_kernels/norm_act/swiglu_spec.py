"""Cases, launches and benchmarks of :func:`hetu_kernels.swiglu`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from hetu_kernels._common.registry import AotCall, Benchmark, Case, OpSpec
from hetu_kernels.norm_act.swiglu import swiglu
from hetu_kernels.norm_act.swiglu_ref import swiglu_reference


def _cases() -> Sequence[Case]:
    def make(
        *shape: int,
        packed: bool = False,
        bias: bool = False,
        wide_bias: bool = False,
        scale: float = 1.5,
        fill: tuple[str, tuple[int, ...] | int, float] | None = None,
        **options: Any,
    ) -> Callable[[torch.dtype, torch.Generator], dict[str, Any]]:
        def arguments(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
            halves = {name: (scale * torch.randn(*shape, generator=generator)).to(dtype) for name in ("gate", "up")}
            if fill is not None:
                halves[fill[0]][fill[1]] = fill[2]
            made: dict[str, Any] = {"gate": torch.cat(list(halves.values()), -1)} if packed else dict(halves)
            if bias:
                width = 2 * shape[-1]
                made["bias"] = torch.randn(width, generator=generator).to(torch.float32 if wide_bias else dtype)
            return {**made, **options}

        return arguments

    inf, nan = float("inf"), float("nan")
    narrow, full = (torch.float16, torch.bfloat16), (torch.float32,)
    cases = [
        Case("plain", make(5, 96), frozenset({"ragged", "strided"})),
        Case("bias", make(5, 96, bias=True), frozenset({"ragged", "strided"})),
        Case("packed", make(5, 41, packed=True), frozenset({"ragged", "strided"})),
        Case("packed, bias", make(9, 65, packed=True, bias=True), frozenset({"ragged", "strided"})),
        Case("contiguous", make(7, 64, bias=True), contiguous=True),
        Case("packed, contiguous", make(2, 7, 64, packed=True), contiguous=True),
        Case("gelu", make(6, 33, bias=True, activation="gelu")),
        Case("gelu by tanh", make(6, 33, bias=True, activation="gelu_tanh")),
        Case("packed, gelu", make(6, 33, packed=True, activation="gelu"), dtypes=full),
        Case("packed, gelu by tanh", make(6, 33, packed=True, activation="gelu_tanh"), dtypes=full),
        Case("many row tiles, three dimensions", make(3, 23, 300, bias=True), dtypes=full),
        Case("packed, many row tiles, three dimensions", make(3, 23, 300, packed=True, bias=True), dtypes=full),
        Case("float32 bias", make(2, 5, 40, bias=True, wide_bias=True), dtypes=narrow),
        Case("several column blocks", make(9, 2100, bias=True), dtypes=(torch.float32, torch.bfloat16)),
        Case("packed, several column blocks", make(9, 1030, packed=True, bias=True), dtypes=full),
        Case("one column", make(5, 1, bias=True)),
        Case("one row", make(40, packed=True, bias=True), dtypes=full),
        Case("no rows", make(0, 64, bias=True), frozenset({"empty"})),
        Case("no rows, packed", make(2, 0, 64, packed=True), frozenset({"empty"}), dtypes=full),
        Case("a row of -inf", make(4, 50, fill=("gate", 2, -inf)), frozenset({"inf"})),
        Case("infinity that is gated", make(4, 50, fill=("up", 2, inf), bias=True), frozenset({"inf"})),
        Case("one infinity, packed", make(4, 50, fill=("gate", (1, 3), inf), packed=True), frozenset({"inf"})),
        Case("one NaN", make(4, 50, fill=("gate", (1, 3), nan), bias=True), frozenset({"nan"})),
        Case("one NaN that is gated", make(4, 50, fill=("up", (1, 3), nan), packed=True), frozenset({"nan"})),
    ]
    for activation in ("silu", "gelu", "gelu_tanh"):
        name = f"gates of 1e4 stay finite, {activation}"
        cases.append(Case(name, _large_gates(activation), dtypes=(torch.float32, torch.bfloat16)))
    return cases


def _large_gates(activation: str) -> Callable[[torch.dtype, torch.Generator], dict[str, Any]]:
    def arguments(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
        gate = torch.tensor([-1e4, 1e4, -1e25, 1e25, -88.0, 88.0, -104.0, 0.0]).repeat(3, 1)
        return {
            "gate": gate.to(dtype),
            "up": torch.randn(3, 8, generator=generator).to(dtype),
            "activation": activation,
        }

    return arguments


def _example(tokens: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(tokens)
    gate, up = torch.randn(2, tokens, 48, generator=generator)
    return {"gate": gate.clone(), "up": up.clone(), "bias": torch.randn(96, generator=generator)}


def _aot_calls() -> Sequence[AotCall]:
    from hetu_kernels.norm_act._act_kernels import launch_act_backward, launch_act_forward

    def both(
        rows: int, n: int, dtype: torch.dtype, activation: str = "silu", *, packed: bool = False, bias: bool = False
    ) -> Callable[[], object]:
        def launch() -> None:
            def meta(*size: int) -> torch.Tensor:
                return torch.empty(*size, dtype=dtype, device="meta")

            gate, up = meta(rows, 2 * n).chunk(2, -1) if packed else (meta(rows, n), meta(rows, n))
            b = meta(2 * n) if bias else None
            launch_act_forward(gate, up, b, activation)
            launch_act_backward(meta(rows, n), gate, up, b, activation, has_dbias=bias, packed=packed)

        return launch

    bf16 = torch.bfloat16
    return [
        AotCall("bf16 n=14336", both(8192, 14336, bf16), same_as=both(77, 14336, bf16)),
        AotCall("bf16 n=11008, packed, bias", both(8192, 11008, bf16, packed=True, bias=True)),
        AotCall("bf16 n=5120 gelu, bias", both(8192, 5120, bf16, "gelu", bias=True), slow=True),
        AotCall("bf16 n=16384 gelu_tanh, packed", both(8192, 16384, bf16, "gelu_tanh", packed=True), slow=True),
        AotCall("fp32 n=4096, bias", both(8192, 4096, torch.float32, bias=True), slow=True),
    ]


def _benchmarks() -> Sequence[Benchmark]:
    """64 MB of bfloat16 and more."""

    def benchmark(
        rows: int, n: int, dtype: torch.dtype, name: str, *, packed: bool = False, activation: str = "silu"
    ) -> Benchmark:
        def make(device: torch.device, tiny: bool) -> dict[str, Any]:
            count, width = (8, 64) if tiny else (rows, n)

            def normal(columns: int) -> torch.Tensor:
                return torch.randn(count, columns, device=device, dtype=dtype)

            halves = {"gate": normal(2 * width)} if packed else {"gate": normal(width), "up": normal(width)}
            return {**halves, "activation": activation}

        def bytes_moved(arguments: dict[str, Any]) -> tuple[int, int]:
            gate = arguments["gate"]
            one = gate.numel() * gate.element_size() // (2 if packed else 1)
            return 3 * one, 5 * one

        return Benchmark(name, make, bytes=bytes_moved)

    bf16 = torch.bfloat16
    return [
        benchmark(8192, 14336, bf16, "bf16 8192x14336"),
        benchmark(8192, 14336, bf16, "bf16 8192x14336 packed", packed=True),
        benchmark(16384, 4096, bf16, "bf16 16384x4096 gelu_tanh", activation="gelu_tanh"),
        benchmark(8192, 4096, torch.float32, "fp32 8192x4096"),
    ]


def _eager(arguments: dict[str, Any]) -> Any:
    def eager(gate, up=None, activation="silu"):  # type: ignore[no-untyped-def]
        gate, up = gate.chunk(2, -1) if up is None else (gate, up)
        return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up

    return eager


def _liger(arguments: dict[str, Any]) -> Any:
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction, LigerSiLUMulFunction

    def liger(gate, up=None, activation="silu"):  # type: ignore[no-untyped-def]
        if activation == "gelu_tanh":
            return LigerGELUMulFunction.apply(gate, up)
        return LigerFusedGateUpSiLUMulFunction.apply(gate) if up is None else LigerSiLUMulFunction.apply(gate, up)

    return liger


SPEC = OpSpec(
    name="swiglu",
    function=swiglu,
    reference=swiglu_reference,
    custom_ops=("swiglu_fwd", "swiglu_bwd"),
    differentiable=("gate", "up", "bias"),
    cases=_cases,
    example=_example,
    aot=_aot_calls,
    benchmarks=_benchmarks,
    peers={
        "torch eager": _eager,
        "torch.compile": lambda _: torch.compile(swiglu_reference),
        "liger": _liger,
    },
    goal="forward and backward 0.88 of the copy limit from 64 MB; at least 1.0x Liger and torch.compile",
)
