"""Cases, launches and benchmarks of :func:`hetu_kernels.grouped_gemm`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hetu_kernels._common.registry import AotCall, Benchmark, Case, OpSpec
from hetu_kernels.moe.grouped_gemm import grouped_gemm
from hetu_kernels.moe.grouped_gemm_ref import grouped_gemm_reference


def offsets_of(lengths: Sequence[int]) -> Tensor:
    """Rows per expert as offsets, int32 ``[E + 1]``."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _make(
    lengths: Sequence[int],
    depth: int = 20,
    width: int = 37,
    *,
    rest: int = 0,
    bias: bool = False,
    wide: bool = False,
    offset_dtype: torch.dtype = torch.int32,
    fill: tuple[str, Any, float] | None = None,
) -> Callable[[torch.dtype, torch.Generator], dict[str, Any]]:
    def arguments(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator)

        kept = torch.float32 if wide else dtype
        made: dict[str, Any] = {
            "x": normal(sum(lengths) + rest, depth).to(dtype),
            "weight": (normal(len(lengths), depth, width) / depth**0.5).to(kept),
            "offsets": offsets_of(lengths).to(offset_dtype),
        }
        if bias:
            made["bias"] = normal(len(lengths), width).to(kept)
        if fill is not None:
            made[fill[0]][fill[1]] = fill[2]
        return made

    return arguments


def _cases() -> Sequence[Case]:
    """Sizes on and off a block, experts of no row, of one and of many, and rows that belong to none."""
    inf, nan, full = float("inf"), float("nan"), (torch.float32,)
    narrow = (torch.float16, torch.bfloat16)
    return [
        Case("ragged", _make([5, 0, 21, 1]), frozenset({"ragged", "strided"})),
        Case("bias", _make([5, 0, 21, 1], bias=True), frozenset({"ragged", "strided"})),
        Case("whole blocks, contiguous", _make([16, 32], 32, 64, bias=True), contiguous=True),
        Case("whole blocks of the depth only", _make([3, 17], 32, 45)),
        Case("whole blocks of the width only", _make([3, 17], 21, 64)),
        Case("rows of no expert", _make([4, 13], rest=23, bias=True)),
        Case("only rows of no expert", _make([0, 0, 0], rest=19, bias=True), frozenset({"empty"})),
        Case("all rows of one expert", _make([0, 0, 40, 0], 33, 40, bias=True)),
        Case("one row", _make([0, 1, 0], bias=True)),
        Case("one expert", _make([37], rest=3)),
        Case("one column of each", _make([3, 4], 1, 1, bias=True)),
        Case("several bands of tiles", _make([70, 2, 49], 16, 70), dtypes=(torch.float32, torch.bfloat16)),
        Case("more experts than rows", _make([1, 0, 0, 2, 0, 1, 0] * 3, 17, 33, bias=True), dtypes=full),
        Case("float32 weight and bias", _make([5, 0, 20], bias=True, wide=True, rest=2), dtypes=narrow),
        Case("int64 offsets", _make([5, 0, 20], offset_dtype=torch.int64, rest=2, bias=True), dtypes=full),
        Case("no rows", _make([0, 0], bias=True), frozenset({"empty"})),
        Case("no experts", _make([], rest=5), frozenset({"empty"}), dtypes=full, grads=False),
        Case("one infinity", _make([5, 20], fill=("x", (7, 3), inf)), frozenset({"inf"})),
        Case("a row of -inf", _make([5, 20], bias=True, fill=("x", 2, -inf)), frozenset({"inf"})),
        Case("one NaN", _make([5, 20, 3], fill=("x", (7, 3), nan)), frozenset({"nan"})),
        Case("NaN in the weight of an expert", _make([5, 0, 20], fill=("weight", 1, nan)), frozenset({"nan"})),
        Case("NaN in the bias", _make([5, 20], bias=True, fill=("bias", (0, 3), nan), rest=2), frozenset({"nan"})),
        Case("NaN in rows of no expert", _make([5, 9], rest=4, fill=("x", slice(14, 18), nan)), frozenset({"nan"})),
    ]


def _example(tokens: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(tokens)
    return {
        "x": torch.randn(tokens, 12, generator=generator),
        "weight": torch.randn(3, 12, 20, generator=generator),
        "offsets": offsets_of([tokens // 2, 0, tokens // 2 - 1]),
        "bias": torch.randn(3, 20, generator=generator),
    }


def _aot_calls() -> Sequence[AotCall]:
    """Layers of Mixtral, Qwen3 and gpt-oss, whose width is no multiple of a tile's."""
    from hetu_kernels._common.device import dot_precision
    from hetu_kernels.moe._grouped_gemm_kernels import launch_bias_gradient, launch_products, launch_weight_gradient

    def launch(
        rows: int,
        experts: int,
        depth: int,
        width: int,
        dtype: torch.dtype = torch.bfloat16,
        *,
        transposed: bool = False,
        bias: bool = False,
        training: bool = True,
        weight_dtype: torch.dtype | None = None,
    ) -> Callable[[], object]:
        def run() -> None:
            def meta(*size: int, dtype: torch.dtype = dtype) -> Tensor:
                return torch.empty(*size, dtype=dtype, device="meta")

            x, dy, offsets = meta(rows, depth), meta(rows, width), meta(experts + 1, dtype=torch.int32)
            weight = meta(experts, width, depth).transpose(1, 2) if transposed else meta(experts, depth, width)
            precision = dot_precision(x, allow_tf32=False)
            launch_products(x, weight, meta(experts, width) if bias else None, offsets, precision)
            if training:
                launch_products(dy, weight.transpose(1, 2), None, offsets, precision)
                launch_weight_gradient(x, dy, offsets, weight_dtype or dtype, precision)
            if training and bias:
                launch_bias_gradient(dy, offsets)

        return run

    bf16, full = torch.bfloat16, torch.float32
    wgmma = ("_grouped_gemm_fwd_kernel", "_grouped_gemm_wgrad_kernel")
    mixtral = (8, 4096, 14336)
    return [
        AotCall("bf16 4096x14336", launch(16384, *mixtral), wgmma=wgmma, same_as=launch(9001, *mixtral)),
        AotCall("bf16 2880x2880, bias", launch(16384, 32, 2880, 2880, transposed=True, bias=True), wgmma=wgmma),
        AotCall("bf16 2048x768, few rows", launch(1024, 128, 2048, 768, training=False)),
        AotCall("bf16 2048x768", launch(131072, 128, 2048, 768), wgmma=wgmma, slow=True),
        AotCall("bf16 2048x768, 64 rows", launch(8192, 128, 2048, 768), wgmma=wgmma, slow=True),
        AotCall("bf16 2048x768, few rows, training", launch(1024, 128, 2048, 768, bias=True), slow=True),
        AotCall("bf16 1000x1004, bias", launch(4096, 8, 1000, 1004, bias=True), slow=True),
        AotCall("fp16 4096x14336", launch(16384, *mixtral, torch.float16), wgmma=wgmma, slow=True),
        AotCall("fp32 4096x14336, bias", launch(16384, *mixtral, full, bias=True), slow=True),
        AotCall("fp32 1001x501", launch(4096, 8, 1001, 501, full), slow=True),
        AotCall("bf16, fp32 weight", launch(16384, *mixtral, bf16, weight_dtype=full), wgmma=wgmma, slow=True),
    ]


def _loads(rows: int, experts: int, skew: float) -> list[int]:
    """Rows per expert in proportion to ``rank ** -skew``, in an order drawn by a seed: 0 for all the same."""
    shares = torch.arange(1, experts + 1, dtype=torch.float64) ** -skew
    ends = (shares.cumsum(0) / shares.sum() * rows).round().to(torch.int64)
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(0))
    return torch.diff(ends, prepend=ends.new_zeros(1))[order].tolist()


def _benchmarks() -> Sequence[Benchmark]:
    """The layers of Mixtral 8x7B at 8192 tokens and of Qwen3 30B-A3B at 16384; loads even, and Zipf's with 1.2."""

    def benchmark(model: str, rows: int, experts: int, depth: int, width: int, skew: float) -> Benchmark:
        def make(device: torch.device, tiny: bool) -> dict[str, Any]:
            e, m, k, n = (4, 24, 32, 48) if tiny else (experts, rows, depth, width)
            return {
                "x": torch.randn(m, k, device=device, dtype=torch.bfloat16),
                "weight": torch.randn(e, k, n, device=device, dtype=torch.bfloat16) / k**0.5,
                "offsets": offsets_of(_loads(m, e, skew)).to(device),
            }

        def flops(arguments: dict[str, Any]) -> tuple[int, int]:
            forward = 2 * arguments["x"].numel() * arguments["weight"].shape[2]
            return forward, 2 * forward

        load = f"Zipf {skew}" if skew else "balanced"
        return Benchmark(f"bf16 {model} {depth}x{width}, {load}", make, flops=flops)

    return [
        benchmark(model, rows, experts, depth, width, skew)
        for model, rows, experts, hidden, inner in (
            ("Mixtral", 8192 * 2, 8, 4096, 14336),
            ("Qwen3", 16384 * 8, 128, 2048, 768),
        )
        for depth, width in ((hidden, inner), (inner, hidden))
        for skew in (0.0, 1.2)
    ]


def _eager(arguments: dict[str, Any]) -> Callable[..., Any]:
    """One product per expert; how many rows each has is known beforehand."""
    lengths = arguments["offsets"].diff().tolist()

    def eager(x, weight, offsets):  # type: ignore[no-untyped-def]
        return torch.cat([rows @ matrix for rows, matrix in zip(x.split(lengths), weight, strict=True)])

    return eager


def _torch_grouped(arguments: dict[str, Any]) -> Callable[..., Any]:
    function = getattr(torch.nn.functional, "grouped_mm", None)
    if function is None:
        raise RuntimeError("this torch has no grouped_mm")
    return lambda x, weight, offsets: function(x, weight, offs=offsets[1:])


SPEC = OpSpec(
    name="grouped_gemm",
    function=grouped_gemm,
    reference=grouped_gemm_reference,
    custom_ops=("grouped_gemm_fwd", "grouped_gemm_bwd"),
    differentiable=("x", "weight", "bias"),
    cases=_cases,
    example=_example,
    aot=_aot_calls,
    benchmarks=_benchmarks,
    peers={"torch eager": _eager, "torch grouped_mm": _torch_grouped},
    goal="0.65 of the matmul limit for Mixtral and Qwen3; balanced at least 0.9x torch's grouped_mm, under skew at "
    "least 1.0x",
)
