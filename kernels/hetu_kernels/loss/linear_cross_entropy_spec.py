"""Cases, launches and benchmarks of :func:`hetu_kernels.linear_cross_entropy`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hetu_kernels._common.registry import AotCall, Benchmark, Case, OpSpec
from hetu_kernels.loss.linear_cross_entropy import linear_cross_entropy
from hetu_kernels.loss.linear_cross_entropy_ref import linear_cross_entropy_reference


def _make(
    rows: tuple[int, ...],
    classes: int,
    hidden: int = 16,
    *,
    bias: bool = False,
    class_weight: bool = False,
    fill: tuple[Any, float] | None = None,
    bias_fill: tuple[Any, float] | None = None,
    labels: dict[int, int] | None = None,
    label_dtype: torch.dtype = torch.int64,
    scale: float = 1.0,
    **options: Any,
) -> Callable[[torch.dtype, torch.Generator], dict[str, Any]]:
    def arguments(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator)

        made: dict[str, Any] = {
            "x": normal(*rows, hidden).to(dtype),
            "weight": (scale * normal(classes, hidden) / hidden**0.5).to(dtype),
            "target": torch.randint(classes, rows, generator=generator).to(label_dtype),
            **options,
        }
        if bias:
            made["bias"] = normal(classes).to(dtype)
        if class_weight:
            made["class_weight"] = torch.rand(classes, generator=generator).to(dtype) + 0.1
        if fill is not None:
            made["x"][fill[0]] = fill[1]
        if bias_fill is not None:
            made["bias"][bias_fill[0]] = bias_fill[1]
        for place, label in (labels or {}).items():
            made["target"].view(-1)[place] = label
        return made

    return arguments


def _cases() -> Sequence[Case]:
    """Vocabularies on and off a block, longer than one and than 64k; every option; labels and logits out of order."""
    inf, nan, full = float("inf"), float("nan"), (torch.float32,)
    everything: dict[str, Any] = {
        "bias": True,
        "class_weight": True,
        "label_smoothing": 0.2,
        "z_loss": 0.01,
        "softcap": 3.0,
    }
    few = 4 * 64 * 3  # bytes of the logits of three rows of up to 64 classes
    return [
        Case("mean", _make((7,), 37), frozenset({"ragged", "strided"})),
        Case("sum, contiguous", _make((5,), 64, reduction="sum"), contiguous=True),
        Case("none", _make((2, 4), 50, reduction="none")),
        Case("everything, mean", _make((7,), 37, labels={2: -100}, **everything)),
        Case("everything, none", _make((2, 3), 37, labels={2: -100}, reduction="none", **everything)),
        Case("everything, sum in chunks", _make((7,), 37, chunk_bytes=few, reduction="sum", **everything)),
        Case("none in chunks", _make((7,), 37, chunk_bytes=few, reduction="none", bias=True)),
        Case("bias", _make((6,), 40, bias=True)),
        Case("class weights", _make((6,), 40, class_weight=True)),
        Case("label smoothing", _make((6,), 40, label_smoothing=0.1)),
        Case("label smoothing, none", _make((6,), 40, label_smoothing=0.1, reduction="none"), dtypes=full),
        Case("smoothing with class weights", _make((6,), 40, label_smoothing=0.3, class_weight=True), dtypes=full),
        Case("z-loss", _make((6,), 40, z_loss=0.1)),
        Case("z-loss, none", _make((6,), 40, z_loss=0.1, reduction="none"), dtypes=full),
        Case("softcap", _make((6,), 40, softcap=2.0, scale=3.0)),
        Case("class weights of ignored rows", _make((6,), 40, class_weight=True, labels={0: 3, 4: 3}, ignore_index=3)),
        Case("int32 labels, one row a chunk", _make((3,), 33, label_dtype=torch.int32, chunk_bytes=1)),
        Case("more than a block of classes", _make((4,), 4100, 8, bias=True, z_loss=0.01, labels={0: 4099, 1: 0})),
        Case(
            "more than a block, none", _make((3,), 8200, 8, reduction="none", labels={0: 4096, 2: -100}),
            dtypes=(torch.float32, torch.bfloat16),
        ),
        Case("everything, two blocks", _make((3,), 4099, 8, labels={1: 4098, 2: -100}, **everything), dtypes=full),
        Case(
            "more than 64k classes", _make((2,), 70_001, 8, labels={0: 70_000}), dtypes=(torch.float32, torch.float16)
        ),
        Case("one class", _make((4,), 1, 3)),
        Case("one column", _make((4,), 20, 1)),
        Case("large logits", _make((5,), 40, scale=60.0)),
        Case("no rows", _make((0,), 20, bias=True), frozenset({"empty"})),
        Case("no rows, none", _make((0, 3), 20, reduction="none"), frozenset({"empty"})),
        Case("all ignored", _make((3,), 20, bias=True, labels={0: -100, 1: -100, 2: -100}), frozenset({"empty"})),
        Case("all ignored, none", _make((2,), 20, reduction="none", labels={0: 5, 1: 5}, ignore_index=5), dtypes=full),
        Case("label above the range", _make((4,), 20, labels={1: 20}, reduction="none"), frozenset({"nan"})),
        Case("label below the range", _make((4,), 20, labels={1: -1}, class_weight=True), frozenset({"nan"})),
        Case("a row of -inf", _make((4,), 20, fill=(1, -inf), reduction="none"), frozenset({"inf"})),
        Case("all logits of a row -inf", _make((3,), 20, 1, fill=(1, -inf), scale=0.0, bias=True), frozenset({"inf"})),
        Case("classes ruled out", _make((4,), 20, bias=True, bias_fill=(slice(2, 9), -inf)), frozenset({"inf"})),
        Case(
            "a block of classes ruled out", _make((2,), 4200, 4, bias=True, bias_fill=(slice(0, 4150), -inf)),
            frozenset({"inf"}), dtypes=full,
        ),
        Case(
            "a block of classes far above the rest", _make((2,), 4200, 4, bias=True, bias_fill=(slice(0, 50), 300.0)),
            dtypes=full,
        ),
        Case("every class ruled out", _make((2,), 20, bias=True, bias_fill=(..., -inf)), frozenset({"inf"})),
        Case("softcap of infinite logits", _make((3,), 20, bias=True, bias_fill=(4, inf), softcap=5.0), dtypes=full),
        Case("one infinity", _make((4,), 20, bias=True, bias_fill=(4, inf), reduction="none"), frozenset({"inf"})),
        Case("one NaN", _make((4,), 20, fill=((1, 3), nan), reduction="none"), frozenset({"nan"})),
        Case("NaN in an ignored row", _make((4,), 20, fill=((1, 3), nan), labels={1: -100}), frozenset({"nan"})),
    ]  # fmt: skip


def _example(tokens: int) -> dict[str, Any]:
    """Small float32 arguments; one loss per row, so that backward is an operator of its own."""
    generator = torch.Generator().manual_seed(tokens)
    return {
        "x": torch.randn(tokens, 12, generator=generator),
        "weight": torch.randn(30, 12, generator=generator),
        "target": torch.randint(30, (tokens,), generator=generator),
        "bias": torch.randn(30, generator=generator),
        "label_smoothing": 0.1,
        "reduction": "none",
    }


def _aot_calls() -> Sequence[AotCall]:
    """The vocabularies of Llama 3 and GPT-2, logits in float32, gradients in bfloat16; then every option."""
    from hetu_kernels.loss._linear_cross_entropy_kernels import launch_rows_backward, launch_rows_forward

    def both(
        rows: int,
        total: int,
        classes: int,
        dtype: torch.dtype,
        *,
        logits_dtype: torch.dtype = torch.float32,
        options: bool = False,
        split: bool = False,
    ) -> Callable[[], object]:
        def launch() -> None:
            def meta(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
                return torch.empty(*size, dtype=dtype, device="meta")

            buffer = meta(rows, -(-classes // 16) * 16, dtype=logits_dtype)
            logits, grad = buffer[:, :classes], buffer.view(dtype)[:, :classes]
            labels, lse = meta(total, dtype=torch.int64), meta(total)
            bias = meta(classes, dtype=dtype) if options else None
            class_weight = meta(classes) if options else None
            smoothing = meta(2) if options else None
            vocabulary = meta(2, dtype=torch.int64) if split else None
            numbers: dict[str, Any] = {
                "row_start": total - rows,
                "ignore_index": -100,
                "label_smoothing": 0.1 if options else 0.0,
                "z_loss": 1e-4,
                "softcap": 30.0 if options else None,
            }
            place = (labels, class_weight, vocabulary, smoothing)
            losses = meta(4, total) if split else lse
            launch_rows_forward(logits, bias, *place, losses, lse, None if split else grad, **numbers)
            launch_rows_backward(logits, bias, *place, lse, lse, grad, **numbers)

        return launch

    bf16 = torch.bfloat16
    return [
        AotCall("bf16 C=128256", both(512, 8192, 128_256, bf16), same_as=both(77, 1001, 128_256, bf16)),
        AotCall("bf16 C=50257, every option", both(512, 8192, 50_257, bf16, options=True)),
        AotCall("fp32 C=32000, split", both(512, 8192, 32_000, torch.float32, split=True, options=True)),
        AotCall("bf16 C=32000, logits too", both(512, 8192, 32_000, bf16, logits_dtype=bf16), slow=True),
    ]


def _benchmarks() -> Sequence[Benchmark]:
    """Llama 3 and a small model, in bfloat16."""

    def benchmark(rows: int, hidden: int, classes: int) -> Benchmark:
        def make(device: torch.device, tiny: bool) -> dict[str, Any]:
            t, h, c = (8, 16, 40) if tiny else (rows, hidden, classes)
            x = torch.randn(t, h, device=device, dtype=torch.bfloat16)
            weight = torch.randn(c, h, device=device, dtype=torch.bfloat16) / h**0.5
            return {"x": x, "weight": weight, "target": torch.randint(c, (t,), device=device)}

        def flops(arguments: dict[str, Any]) -> tuple[int, int]:
            (t, h), c = arguments["x"].shape, arguments["weight"].shape[0]
            return 2 * t * h * c, 4 * t * h * c

        return Benchmark(f"bf16 {rows}x{hidden}, {classes} classes", make, flops=flops)

    return [benchmark(8192, 4096, 128_256), benchmark(8192, 2048, 50_257), benchmark(16_384, 4096, 32_000)]


def _eager(_: dict[str, Any]) -> Callable[..., Any]:
    def eager(x, weight, target):  # type: ignore[no-untyped-def]
        return torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, weight), target)

    return eager


def _torch_fused(_: dict[str, Any]) -> Callable[..., Any]:
    function = getattr(torch.nn.functional, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise RuntimeError("this torch has no linear_cross_entropy in chunks")
    return lambda x, weight, target: function(x, weight, target, options=options())


def _liger(_: dict[str, Any]) -> Callable[..., Any]:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return lambda x, weight, target: LigerFusedLinearCrossEntropyFunction.apply(x, weight, target)[0]


SPEC = OpSpec(
    name="linear_cross_entropy",
    function=linear_cross_entropy,
    reference=linear_cross_entropy_reference,
    custom_ops=("linear_cross_entropy_fwd", "linear_cross_entropy_bwd"),
    differentiable=("x", "weight", "bias"),
    cases=_cases,
    example=_example,
    aot=_aot_calls,
    benchmarks=_benchmarks,
    peers={
        "torch eager": _eager,
        "torch.compile": lambda arguments: torch.compile(_eager(arguments)),
        "torch linear_cross_entropy": _torch_fused,
        "liger": _liger,
    },
    goal="0.65 of the matmul limit at 8192x4096 and 128k classes; at least 0.9x Liger; memory of x, weight, its "
    "gradient in float32 and one chunk",
)
