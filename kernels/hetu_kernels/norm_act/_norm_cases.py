"""Cases, launches and benchmarks that RMSNorm and LayerNorm share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hetu_kernels._common.registry import AotCall, Benchmark, Case


def norm_cases(*, has_shift: bool) -> Sequence[Case]:
    """Row lengths on and off a power of two, longer than any block, and every optional argument."""

    def make(
        shape: tuple[int, ...],
        *,
        residual: bool = True,
        bias: bool = False,
        shift: bool = True,
        wide_weight: bool = False,
        residual_fp32: bool = False,
        fill: tuple[tuple[int, ...] | int, float] | None = None,
        offset: float = 0.0,
        **options: Any,
    ) -> Callable[[torch.dtype, torch.Generator], dict[str, Any]]:
        def arguments(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
            def normal(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
                return torch.randn(*size, generator=generator).to(dtype)

            n = shape[-1]
            parameter = torch.float32 if wide_weight else dtype
            made: dict[str, Any] = {
                "x": (torch.randn(*shape, generator=generator) + offset).to(dtype),
                "residual": normal(*shape, dtype=torch.float32 if residual_fp32 else dtype) if residual else None,
                "weight": normal(n, dtype=parameter),
                **options,
            }
            if fill is not None:
                made["x"][fill[0]] = fill[1]
            if has_shift:
                made["shift"] = normal(n, dtype=parameter) if shift else None
            if bias:
                made["bias"] = normal(n)
            return made

        return arguments

    inf, nan = float("inf"), float("nan")
    cases = [
        Case("plain", make((5, 96)), frozenset({"ragged", "strided"})),
        Case("contiguous", make((7, 128), bias=True), contiguous=True),
        Case("many rows, three dimensions", make((3, 17, 40), bias=True, wide_weight=True)),
        Case("nothing to add", make((4, 33), residual=False), frozenset({"ragged"})),
        Case("float32 residual stream", make((4, 65), residual_fp32=True), dtypes=(torch.float16, torch.bfloat16)),
        Case("float32 result stream", make((4, 65), residual_dtype=torch.float32), dtypes=(torch.bfloat16,)),
        Case("bias, no residual", make((6, 100), residual=False, bias=True)),
        Case("one column", make((5, 1), eps=0.5)),
        Case("no rows", make((0, 64), bias=True), frozenset({"empty"})),
        Case("rows longer than a backward block", make((3, 8200), bias=True), dtypes=(torch.float32, torch.bfloat16)),
        Case("rows longer than a block", make((2, 16400), bias=True), dtypes=(torch.float32, torch.bfloat16)),
        Case("long rows, nothing to add", make((3, 8200), residual=False), dtypes=(torch.float32,)),
        Case("a row of -inf", make((4, 50), fill=(2, -inf)), frozenset({"inf"})),
        Case("one infinity", make((4, 50), fill=((1, 3), inf)), frozenset({"inf"}), dtypes=(torch.float32,)),
        Case("one NaN", make((4, 50), fill=((1, 3), nan)), frozenset({"nan"})),
        Case("NaN in a long row", make((2, 8200), fill=((1, 3), nan)), frozenset({"nan"}), dtypes=(torch.float32,)),
        Case("mean far from zero", make((4, 200), offset=300.0), dtypes=(torch.float32,)),
    ]
    if has_shift:
        cases.append(Case("no shift", make((5, 96), shift=False)))
    else:
        cases.append(Case("zero-centered weight", make((5, 96), zero_centered=True)))
        cases.append(
            Case("zero-centered weight, long rows", make((2, 8200), zero_centered=True), dtypes=(torch.float32,))
        )
    return cases


def norm_example(tokens: int, *, has_shift: bool) -> dict[str, Any]:
    """Small float32 arguments."""
    generator = torch.Generator().manual_seed(tokens)
    made = {
        "x": torch.randn(tokens, 48, generator=generator),
        "residual": torch.randn(tokens, 48, generator=generator),
        "weight": torch.randn(48, generator=generator),
    }
    return {**made, "shift": torch.randn(48, generator=generator)} if has_shift else made


def norm_aot_calls(*, subtract_mean: bool) -> Sequence[AotCall]:
    """Hidden sizes of real models in bfloat16, one in float32, one longer than any block."""
    from hetu_kernels.norm_act._norm_kernels import launch_norm_backward, launch_norm_forward

    def both(rows: int, n: int, dtype: torch.dtype) -> Callable[[], object]:
        def launch() -> None:
            def meta(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
                return torch.empty(*size, dtype=dtype, device="meta")

            x, weight = meta(rows, n), meta(n)
            shift = meta(n) if subtract_mean else None
            _, z, mean, rstd = launch_norm_forward(
                x, meta(rows, n), weight, shift, meta(n), 1e-5,
                subtract_mean=subtract_mean, zero_centered=False, z_dtype=dtype,
            )  # fmt: skip
            launch_norm_backward(
                meta(rows, n), meta(rows, n), z, weight, mean, rstd,
                subtract_mean=subtract_mean, zero_centered=False, has_shift=subtract_mean, has_bias=True,
            )  # fmt: skip

        return launch

    return [
        AotCall("bf16 n=4096", both(8192, 4096, torch.bfloat16), same_as=both(77, 4096, torch.bfloat16)),
        AotCall("bf16 n=768", both(8192, 768, torch.bfloat16), slow=True),
        AotCall("bf16 n=8192", both(8192, 8192, torch.bfloat16)),
        AotCall("fp32 n=8192", both(8192, 8192, torch.float32), slow=True),
        AotCall("bf16 n=20000", both(512, 20000, torch.bfloat16)),
    ]


def norm_benchmarks(*, has_shift: bool) -> Sequence[Benchmark]:
    """64 MB of bfloat16 and more."""

    def benchmark(rows: int, n: int, dtype: torch.dtype, name: str) -> Benchmark:
        def make(device: torch.device, tiny: bool) -> dict[str, Any]:
            count, width = (8, 64) if tiny else (rows, n)

            def normal(*size: int) -> torch.Tensor:
                return torch.randn(*size, device=device, dtype=dtype)

            made: dict[str, Any] = {
                "x": normal(count, width),
                "residual": normal(count, width),
                "weight": normal(width),
                "eps": 1e-5,
            }
            return {**made, "shift": normal(width)} if has_shift else made

        def bytes_moved(arguments: dict[str, Any]) -> tuple[int, int]:
            x = arguments["x"]
            return 4 * x.numel() * x.element_size(), 4 * x.numel() * x.element_size()

        return Benchmark(name, make, bytes=bytes_moved)

    return [
        benchmark(16384, 4096, torch.bfloat16, "bf16 16384x4096"),
        benchmark(65536, 1024, torch.bfloat16, "bf16 65536x1024"),
        benchmark(8192, 8192, torch.bfloat16, "bf16 8192x8192"),
        benchmark(8192, 4096, torch.float32, "fp32 8192x4096"),
    ]


def norm_peers(reference: Callable[..., Any], eager: Callable[..., Any], liger: Callable[..., Any]) -> dict[str, Any]:
    """torch's own norm, the compiled reference, and Liger."""
    return {"torch eager": eager, "torch.compile": lambda _: torch.compile(reference), "liger": liger}
