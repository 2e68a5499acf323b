"""Cases, launches and benchmarks of :func:`hetu_kernels.topk_gate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hetu_kernels._common.registry import AotCall, Benchmark, Case, OpSpec
from hetu_kernels.moe.topk_gate import topk_gate
from hetu_kernels.moe.topk_gate_ref import topk_gate_reference


def _make(
    tokens: int, experts: int, k: int, *, fill: Sequence[tuple[Any, float]] = (), ties: bool = False, **options: Any
) -> Callable[[torch.dtype, torch.Generator], dict[str, Any]]:
    def arguments(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
        logits = 2 * torch.randn(tokens, experts, generator=generator)
        if ties:
            logits = logits.round().clamp(-1, 1)
        for place, value in fill:
            logits[place] = value
        return {"logits": logits.to(dtype), "k": k, **options}

    return arguments


def _cases() -> Sequence[Case]:
    inf, nan = float("inf"), float("nan")
    full = (torch.float32,)
    everything: dict[str, Any] = {"renormalize": True, "return_scores": True}
    sigmoid: dict[str, Any] = {"score": "sigmoid"}
    cases = [
        Case("plain", _make(5, 37, 2), frozenset({"ragged", "strided"})),
        Case("renormalized", _make(5, 37, 2, renormalize=True), frozenset({"ragged", "strided"})),
        Case("scores too", _make(6, 21, 3, return_scores=True)),
        Case("renormalized, scores too", _make(6, 21, 3, **everything)),
        Case("sigmoid", _make(6, 40, 4, **sigmoid)),
        Case("sigmoid, renormalized, scores too", _make(6, 40, 4, **sigmoid, **everything)),
        Case("contiguous", _make(7, 64, 8, **everything), contiguous=True),
        Case("one choice", _make(9, 8, 1)),
        Case("one choice, renormalized", _make(9, 8, 1, renormalize=True), dtypes=full),
        Case("ties", _make(9, 24, 5, ties=True)),
        Case("ties, contiguous", _make(40, 16, 8, ties=True, **everything), contiguous=True, dtypes=full),
        Case("all equal", _make(4, 12, 8, fill=[(..., 0.5)])),
        Case("every expert chosen", _make(5, 8, 8, **everything)),
        Case("one expert", _make(5, 1, 1, **everything)),
        Case("one token", _make(1, 60, 6, **everything)),
        Case("most experts", _make(7, 512, 8, **everything)),
        Case("more tiles than programs", _make(55, 401, 2, return_scores=True), dtypes=full),
        Case("large logits", _make(5, 20, 3, fill=[((1, slice(3, 6)), 3e4), ((2, 0), -3e4)], **everything)),
        Case("large logits, sigmoid", _make(5, 20, 3, fill=[((1, slice(3, 6)), 80.0)], **sigmoid, **everything)),
        Case("no tokens", _make(0, 20, 2, **everything), frozenset({"empty"})),
    ]
    for options in ({}, everything, sigmoid, {**sigmoid, **everything}):
        name = ", ".join(str(options.get("score", "softmax")).split() + ["everything"] * ("renormalize" in options))
        cases += [
            Case(f"experts ruled out, {name}", _make(5, 20, 4, fill=[((1, slice(2, 19)), -inf), (3, -inf)], **options),
                 frozenset({"inf"})),
            Case(f"one infinity, {name}", _make(5, 20, 4, fill=[((1, 7), inf)], **options), frozenset({"inf"})),
            Case(f"one NaN, {name}", _make(5, 20, 4, fill=[((1, 3), nan), (4, nan)], **options), frozenset({"nan"})),
        ]  # fmt: skip
    return cases


def _example(tokens: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(tokens)
    logits = torch.randn(tokens, 12, generator=generator)
    return {"logits": logits, "k": 3, "renormalize": True, "return_scores": True}


def _aot_calls() -> Sequence[AotCall]:
    """Mixtral, Qwen3 MoE and DeepSeek-V3 in their numbers of experts, and the largest there may be."""
    from hetu_kernels.moe._topk_gate_kernels import launch_topk_gate_backward, launch_topk_gate_forward

    def both(
        tokens: int, experts: int, k: int, dtype: torch.dtype, score: str = "softmax", *, scores: bool = True
    ) -> Callable[[], object]:
        def launch() -> None:
            def meta(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
                return torch.empty(*size, dtype=dtype, device="meta")

            logits = meta(tokens, experts, dtype=dtype)
            launch_topk_gate_forward(logits, k, renormalize=scores, score=score, with_scores=scores)
            launch_topk_gate_backward(
                meta(tokens, k), meta(tokens, experts) if scores else None, logits,
                meta(tokens, k, dtype=torch.int32), renormalize=scores, score=score,
            )  # fmt: skip

        return launch

    fp32, bf16 = torch.float32, torch.bfloat16
    return [
        AotCall("fp32 E=128 k=8", both(16384, 128, 8, fp32), same_as=both(77, 128, 8, fp32)),
        AotCall("bf16 E=8 k=2", both(8192, 8, 2, bf16, scores=False)),
        AotCall("fp32 E=512 k=8 sigmoid", both(16384, 512, 8, fp32, "sigmoid")),
        AotCall("fp32 E=256 k=8 sigmoid", both(16384, 256, 8, fp32, "sigmoid"), slow=True),
        AotCall("fp32 E=60 k=4", both(16384, 60, 4, fp32), slow=True),
    ]


def _benchmarks() -> Sequence[Benchmark]:
    """Mixtral, Qwen3 MoE and DeepSeek-V3."""

    def benchmark(tokens: int, experts: int, k: int, score: str, dtype: torch.dtype) -> Benchmark:
        def make(device: torch.device, tiny: bool) -> dict[str, Any]:
            t, e, choices = (8, 12, 2) if tiny else (tokens, experts, k)
            logits = torch.randn(t, e, device=device, dtype=dtype)
            return {"logits": logits, "k": choices, "renormalize": True, "score": score}

        def bytes_moved(arguments: dict[str, Any]) -> tuple[int, int]:
            logits, choices = arguments["logits"], arguments["k"]
            one = logits.numel() * logits.element_size()
            few = logits.shape[0] * choices * 8  # weights and ids
            return one + few, 2 * one + few

        name = "bf16" if dtype == torch.bfloat16 else "fp32"
        return Benchmark(f"{name} {tokens}x{experts}, {k} by {score}", make, bytes=bytes_moved)

    fp32 = torch.float32
    return [
        benchmark(16384, 128, 8, "softmax", fp32),
        benchmark(8192, 8, 2, "softmax", fp32),
        benchmark(65536, 64, 6, "softmax", torch.bfloat16),
        benchmark(16384, 256, 8, "sigmoid", fp32),
    ]


def _eager(_: dict[str, Any]) -> Callable[..., Any]:
    """Softmax, top-k and histogram, which may break ties otherwise."""

    def eager(logits, k, renormalize, score):  # type: ignore[no-untyped-def]
        scores = logits.float().softmax(-1) if score == "softmax" else logits.float().sigmoid()
        weights, ids = scores.topk(k, dim=-1)
        if renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        counts = ids.new_zeros(logits.shape[1]).scatter_add_(0, ids.flatten(), torch.ones_like(ids).flatten())
        return weights, ids, counts

    return eager


SPEC = OpSpec(
    name="topk_gate",
    function=topk_gate,
    reference=topk_gate_reference,
    custom_ops=("topk_gate_fwd", "topk_gate_bwd"),
    differentiable=("logits",),
    cases=_cases,
    example=_example,
    aot=_aot_calls,
    benchmarks=_benchmarks,
    peers={
        "torch eager (softmax, topk)": _eager,
        "torch.compile": lambda arguments: torch.compile(_eager(arguments)),
    },
    goal="forward and backward at least 2.0x torch eager (softmax, topk) at 16384x128",
)
