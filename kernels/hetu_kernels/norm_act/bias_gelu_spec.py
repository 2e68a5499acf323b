"""Cases, launches and benchmarks of :func:`hetu_kernels.bias_gelu`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from hetu_kernels._common.registry import AotCall, Benchmark, Case, OpSpec
from hetu_kernels.norm_act.bias_gelu import bias_gelu
from hetu_kernels.norm_act.bias_gelu_ref import bias_gelu_reference


def _cases() -> Sequence[Case]:
    def make(
        *shape: int,
        bias: bool = True,
        wide_bias: bool = False,
        scale: float = 1.5,
        fill: tuple[tuple[int, ...] | int, float] | None = None,
        **options: Any,
    ) -> Callable[[torch.dtype, torch.Generator], dict[str, Any]]:
        def arguments(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
            made: dict[str, Any] = {"x": (scale * torch.randn(*shape, generator=generator)).to(dtype), **options}
            if fill is not None:
                made["x"][fill[0]] = fill[1]
            if bias:
                made["bias"] = torch.randn(shape[-1], generator=generator).to(torch.float32 if wide_bias else dtype)
            return made

        return arguments

    inf, nan = float("inf"), float("nan")
    narrow, full = (torch.float16, torch.bfloat16), (torch.float32,)
    return [
        Case("plain", make(5, 96), frozenset({"ragged", "strided"})),
        Case("tanh", make(5, 96, approximate="tanh"), frozenset({"ragged", "strided"})),
        Case("contiguous", make(7, 128), contiguous=True),
        Case("no bias", make(9, 33, bias=False), frozenset({"ragged"})),
        Case("no bias, tanh", make(9, 33, bias=False, approximate="tanh")),
        Case("many row tiles, three dimensions", make(3, 23, 300, approximate="tanh"), dtypes=full),
        Case("float32 bias", make(2, 5, 40, wide_bias=True), dtypes=narrow),
        Case("several column blocks", make(21, 2100, approximate="tanh")),
        Case("several column blocks, no bias", make(6, 1025, bias=False), dtypes=full),
        Case("one column", make(5, 1)),
        Case("one row", make(40)),
        Case("no rows", make(0, 64), frozenset({"empty"})),
        Case("large", make(4, 64, scale=1e4), dtypes=full),
        Case("large, tanh", make(4, 64, bias=False, scale=1e4, approximate="tanh")),
        Case("square overflows", make(4, 64, bias=False, scale=1e25), dtypes=(torch.float32, torch.bfloat16)),
        Case(
            "square overflows, tanh",
            make(4, 64, bias=False, scale=1e25, approximate="tanh"),
            dtypes=(torch.float32, torch.bfloat16),
        ),
        Case("a row of -inf", make(4, 50, fill=(2, -inf)), frozenset({"inf"})),
        Case("a row of -inf, tanh", make(4, 50, fill=(2, -inf), approximate="tanh"), frozenset({"inf"})),
        Case("one infinity", make(4, 50, fill=((1, 3), inf)), frozenset({"inf"}), dtypes=full),
        Case("one NaN", make(4, 50, fill=((1, 3), nan)), frozenset({"nan"})),
        Case("one NaN, tanh", make(4, 50, fill=((1, 3), nan), approximate="tanh"), frozenset({"nan"})),
    ]


def _example(tokens: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(tokens)
    return {"x": torch.randn(tokens, 48, generator=generator), "bias": torch.randn(48, generator=generator)}


def _aot_calls() -> Sequence[AotCall]:
    from hetu_kernels.norm_act._act_kernels import launch_act_backward, launch_act_forward

    def both(rows: int, n: int, dtype: torch.dtype, activation: str, *, bias: bool = True) -> Callable[[], object]:
        def launch() -> None:
            x, dy = (torch.empty(rows, n, dtype=dtype, device="meta") for _ in range(2))
            b = torch.empty(n, dtype=dtype, device="meta") if bias else None
            launch_act_forward(x, None, b, activation)
            launch_act_backward(dy, x, None, b, activation, has_dbias=bias)

        return launch

    bf16 = torch.bfloat16
    return [
        AotCall("bf16 n=3072", both(8192, 3072, bf16, "gelu"), same_as=both(77, 3072, bf16, "gelu")),
        AotCall("bf16 n=16384 tanh", both(8192, 16384, bf16, "gelu_tanh"), slow=True),
        AotCall("bf16 n=4096, no bias", both(8192, 4096, bf16, "gelu", bias=False), slow=True),
        AotCall("fp32 n=3072", both(8192, 3072, torch.float32, "gelu")),
    ]


def _benchmarks() -> Sequence[Benchmark]:
    """64 MB of bfloat16 and more."""

    def benchmark(rows: int, n: int, dtype: torch.dtype, approximate: str, name: str) -> Benchmark:
        def make(device: torch.device, tiny: bool) -> dict[str, Any]:
            count, width = (8, 64) if tiny else (rows, n)
            return {
                "x": torch.randn(count, width, device=device, dtype=dtype),
                "bias": torch.randn(width, device=device, dtype=dtype),
                "approximate": approximate,
            }

        def bytes_moved(arguments: dict[str, Any]) -> tuple[int, int]:
            x = arguments["x"]
            return 2 * x.numel() * x.element_size(), 3 * x.numel() * x.element_size()

        return Benchmark(name, make, bytes=bytes_moved)

    return [
        benchmark(16384, 3072, torch.bfloat16, "none", "bf16 16384x3072"),
        benchmark(16384, 3072, torch.bfloat16, "tanh", "bf16 16384x3072 tanh"),
        benchmark(8192, 16384, torch.bfloat16, "tanh", "bf16 8192x16384 tanh"),
        benchmark(16384, 3072, torch.float32, "none", "fp32 16384x3072"),
    ]


def _eager(arguments: dict[str, Any]) -> Any:
    return lambda x, bias, approximate: F.gelu(x + bias, approximate=approximate)


SPEC = OpSpec(
    name="bias_gelu",
    function=bias_gelu,
    reference=bias_gelu_reference,
    custom_ops=("bias_gelu_fwd", "bias_gelu_bwd"),
    differentiable=("x", "bias"),
    cases=_cases,
    example=_example,
    aot=_aot_calls,
    benchmarks=_benchmarks,
    peers={"torch eager": _eager, "torch.compile": lambda _: torch.compile(bias_gelu_reference)},
    goal="forward and backward 0.88 of the copy limit from 64 MB; at least 1.0x torch.compile",
)
