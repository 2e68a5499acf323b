"""Cases, launches and benchmarks of :func:`hetu_kernels.varlen_attention`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hetu_kernels._common.registry import AotCall, Benchmark, Case, OpSpec
from hetu_kernels.attention.tiling_mask import TilingMask
from hetu_kernels.attention.varlen import varlen_attention
from hetu_kernels.attention.varlen_ref import varlen_attention_reference

_FP32 = (torch.float32,)
_HALVES = (torch.float16, torch.bfloat16)


def cumulative(lengths: Sequence[int]) -> Tensor:
    """``[0, l0, l0 + l1, ...]`` as int32."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def _cases() -> Sequence[Case]:
    def make(
        lengths: Sequence[int],
        lengths_k: Sequence[int] | None = None,
        *,
        heads: int = 2,
        group: int = 1,
        dim: int = 16,
        rest: int = 0,
        bias: tuple[int, int, int, int] | None = None,
        alibi: bool = False,
        sinks: bool = False,
        fill: tuple[str, tuple[Any, ...] | int, float] | None = None,
        **options: Any,
    ) -> Callable[[torch.dtype, torch.Generator], dict[str, Any]]:
        def arguments(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
            def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
                return torch.randn(*size, generator=generator).to(dtype)

            of_keys = lengths if lengths_k is None else lengths_k
            tokens_q, tokens_k = sum(lengths) + rest, sum(of_keys) + rest
            made: dict[str, Any] = {
                "q": normal(tokens_q, heads, dim),
                "k": normal(tokens_k, heads // group, dim),
                "v": normal(tokens_k, heads // group, dim),
                "cu_seqlens_q": cumulative(lengths),
                "max_seqlen_q": max(lengths, default=0),
                **options,
            }
            if lengths_k is not None:
                made |= {"cu_seqlens_k": cumulative(lengths_k), "max_seqlen_k": max(lengths_k)}
            if bias is not None:
                made["bias"] = normal(*bias)
            if alibi:
                made["alibi_slopes"] = torch.rand(heads, generator=generator).to(dtype)
            if sinks:
                made["sinks"] = normal(heads)
            if fill is not None:
                made[fill[0]][fill[1]] = fill[2]
            return made

        return arguments

    def tags(*names: str) -> frozenset[str]:
        return frozenset(names)

    inf, nan = float("inf"), float("nan")
    ragged = (37, 0, 1, 20)
    cases = [
        Case("full", make(ragged), tags("empty", "ragged", "strided")),
        Case("causal", make(ragged, causal=True), tags("empty", "ragged", "strided")),
        Case("contiguous", make((33, 16), heads=2, causal=True), contiguous=True),
        Case("one head", make((35,), heads=1, dim=64, causal=True), tags("one_head", "head_dim_64"), dtypes=_HALVES),
        Case("no tokens", make((0, 0), causal=True), tags("empty"), dtypes=_FP32),
        Case("no sequences", make((), rest=5), tags("empty"), dtypes=_FP32, grads=False),
        Case("no keys", make((5, 3), (0, 4), causal=True), tags("empty"), dtypes=_FP32),
        Case("fewer keys than rows", make((33, 5), (17, 2), causal=True), dtypes=_FP32),
        Case("more keys than rows", make((9, 20, 1), (40, 21, 33), heads=1, causal=True), dtypes=_FP32),
        Case("rows of no sequence", make((18, 5), rest=40, causal=True), dtypes=_FP32),
        Case("window", make((70, 9), heads=1, causal=True, window=20), dtypes=(torch.float32, torch.bfloat16)),
        Case("window of one key", make((40,), causal=True, window=1), dtypes=_FP32),
        Case("window on both sides", make((70, 20), heads=1, window=(18, 7)), dtypes=_FP32),
        Case("window on the right", make((40,), (55,), window=(None, 3)), dtypes=_FP32),
        Case("wide window", make((90,), heads=1, window=(50, 40)), dtypes=_FP32),
        Case("gqa 3", make((21, 18), heads=6, group=3, dim=80, causal=True), tags("gqa_3", "head_dim_80")),
        Case("gqa 8", make((18,), heads=8, group=8, dim=64), tags("gqa_8", "gqa_1", "head_dim_64"), dtypes=_HALVES),
        Case("head dim 96", make((34,), dim=96, causal=True), tags("head_dim_96", "gqa_1")),
        Case("head dim 128", make((34,), dim=128, causal=True), tags("head_dim_128")),
        Case("head dim 256", make((20,), dim=256, causal=True), tags("head_dim_256")),
        Case("head dim 7", make((20,), dim=7), tags("ragged"), dtypes=_FP32),
        Case("scale and soft cap", make((37, 5), causal=True, scale=0.9, softcap=2.0)),
        Case("alibi", make((20, 37), heads=3, alibi=True, causal=True)),
        Case("alibi, full", make((20,), (37,), alibi=True), dtypes=_FP32),
        Case("bias", make((20, 33), heads=2, bias=(2, 2, 33, 33)), dtypes=(torch.float32, torch.bfloat16)),
        Case("bias for all sequences", make((20, 33), bias=(1, 2, 33, 33), causal=True), dtypes=_FP32),
        Case("bias for all heads", make((20, 33), heads=4, group=2, bias=(2, 1, 33, 33)), dtypes=_FP32),
        Case("bias per key", make((20, 33), (18, 35), bias=(2, 1, 1, 35)), dtypes=_FP32),
        Case("bias per row", make((20, 33), bias=(1, 2, 33, 1), window=(20, 3)), dtypes=_FP32),
        Case("bias per head", make((20, 33), heads=3, bias=(1, 3, 1, 1), softcap=3.0, alibi=True), dtypes=_FP32),
        Case("sinks", make((20, 0, 33), sinks=True, causal=True)),
        Case("sinks and no keys", make((5, 3), (0, 4), sinks=True, causal=True), dtypes=_FP32),
        Case("log-sum-exp", make((20, 33), heads=4, group=2, return_lse=True, causal=True)),
        Case(
            "rows of -inf in the bias",
            make((20,), bias=(1, 1, 20, 20), fill=("bias", (0, 0, slice(3, 7)), -inf)),
            tags("inf"),
            dtypes=_FP32,
        ),
        Case("a row of -inf", make((20, 5), causal=True, fill=("q", 4, -inf)), tags("inf"), grads=False),
        Case("an infinite key", make((40,), causal=True, fill=("k", (30, 0, 2), inf)), tags("inf"), grads=False),
        Case("a NaN row", make((20, 18), causal=True, fill=("q", (3, 1, 2), nan)), tags("nan"), grads=False),
        Case("a NaN key", make((20, 40), causal=True, fill=("k", (50, 1, 2), nan)), tags("nan"), grads=False),
        Case("a NaN value", make((20, 18), fill=("v", (25, 1, 2), nan)), tags("nan")),
        Case("large logits", make((20, 18), scale=8.0, causal=True), dtypes=_FP32),
        Case("long", make((300, 129, 64), heads=4, group=2, dim=64, causal=True), slow=True),
        Case("long window", make((300, 129), (310, 200), heads=4, group=2, dim=32, window=(100, 30)), slow=True),
    ]
    for causal, window in ((True, None), (False, (9, 4)), (True, 5)):
        for lengths, of_keys in (((50, 17), (33, 64)), ((16, 32), (48, 16)), ((31,), (97,))):
            name = f"sweep: causal={causal} window={window} {lengths} {of_keys}"
            cases.append(Case(name, make(lengths, of_keys, causal=causal, window=window), dtypes=_FP32, slow=True))
    return cases


def _example(tokens: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(tokens, heads, 16, generator=generator) for heads in (4, 2, 2))
    slopes, sinks = torch.rand(2, 4, generator=generator)
    return {
        "q": q, "k": k, "v": v, "cu_seqlens_q": cumulative([2, tokens - 2]), "max_seqlen_q": 16, "causal": True,
        "alibi_slopes": slopes, "bias": torch.randn(1, 4, 16, 16, generator=generator), "sinks": sinks,
    }  # fmt: skip


def _aot() -> Sequence[AotCall]:
    from hetu_kernels.attention._varlen_backward_kernels import launch_backward
    from hetu_kernels.attention._varlen_forward_kernels import Options, launch_forward

    def launch(
        dim: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        heads: int = 32,
        kv_heads: int = 8,
        tokens: int = 32768,
        longest: int = 4096,
        causal: bool = True,
        window: int | None = None,
        extras: bool = False,
        precision: str | None = None,
    ) -> Callable[[], object]:
        def run() -> None:
            def meta(*size: int, dtype: torch.dtype = dtype) -> Tensor:
                return torch.empty(*size, dtype=dtype, device="meta")

            from hetu_kernels._common.device import dot_precision

            q, k, v = meta(tokens, heads, dim), meta(tokens, kv_heads, dim), meta(tokens, kv_heads, dim)
            cu_seqlens = meta(9, dtype=torch.int32)
            bias = meta(1, heads, longest, longest) if extras else None
            slopes = meta(heads, dtype=torch.float32) if extras else None
            sinks = meta(heads) if extras else None
            options = Options(
                dim**-0.5, TilingMask.of(causal=causal, window=window), 30.0 if extras else None,
                precision or dot_precision(q, allow_tf32=False),
            )  # fmt: skip
            out, lse = launch_forward(q, k, v, cu_seqlens, cu_seqlens, longest, options, slopes, bias, sinks)
            launch_backward(
                meta(tokens, heads, dim), lse if extras else None, q, k, v, out, lse, cu_seqlens, cu_seqlens, longest,
                longest, options, slopes, bias, want_dbias=extras,
            )  # fmt: skip

        return run

    wgmma = ("_varlen_fwd_kernel", "_varlen_bwd_dq_kernel", "_varlen_bwd_dkv_kernel")
    calls = [
        AotCall(f"bf16 d={dim} causal", launch(dim), wgmma=wgmma if dim <= 128 else wgmma[:2]) for dim in (64, 128, 256)
    ]
    calls[1] = AotCall("bf16 d=128 causal", launch(128), wgmma=wgmma, same_as=launch(128, tokens=777, longest=301))
    everything: dict[str, Any] = {"extras": True, "window": 1024, "longest": 512}
    variants: dict[str, dict[str, Any]] = {
        "causal": {}, "full": {"causal": False}, "window": {"window": 1024}, "everything": everything,
    }  # fmt: skip
    done = {("bf16", dim, "causal") for dim in (64, 128, 256)} | {("bf16", 64, "everything")}
    return [
        *calls,
        AotCall("bf16 d=64 everything", launch(64, **everything)),
        AotCall("fp16 d=128 gqa 3", launch(128, dtype=torch.float16, heads=24), slow=True),
        AotCall("fp16 d=128 one head", launch(128, dtype=torch.float16, heads=1, kv_heads=1), slow=True),
        *[
            AotCall(f"{name} d={dim} {variant}", launch(dim, dtype=dtype, **options), slow=True)
            for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
            for dim in (64, 80, 96, 128, 256)
            for variant, options in variants.items()
            if (name, dim, variant) not in done and (name == "bf16" or variant in ("causal", "everything"))
        ],
    ]


def _benchmarks() -> Sequence[Benchmark]:
    def benchmark(
        name: str, lengths: Sequence[int], heads: int, kv_heads: int, dim: int, causal: bool = True
    ) -> Benchmark:
        def make(device: torch.device, tiny: bool) -> dict[str, Any]:
            own = ([12, 12] if len(set(lengths)) == 1 else [5, 12]) if tiny else lengths

            def normal(heads: int) -> Tensor:
                return torch.randn(sum(own), heads, dim, device=device, dtype=torch.bfloat16)

            return {
                "q": normal(heads), "k": normal(kv_heads), "v": normal(kv_heads),
                "cu_seqlens_q": cumulative(own).to(device), "max_seqlen_q": max(own), "causal": causal,
            }  # fmt: skip

        def flops(arguments: dict[str, Any]) -> tuple[int, int]:
            own = arguments["cu_seqlens_q"].diff().tolist()
            forward = 4 * sum(n * n for n in own) * heads * dim // (2 if causal else 1)
            return forward, forward * 5 // 2

        return Benchmark(name, make, flops=flops)

    skewed = [4096, 300, 1700, 60, 2500, 900, 3400, 700, 1200, 128, 2048, 512, 3000, 256, 1500, 2600]
    return [
        benchmark("bf16 8x4096 causal d=128", [4096] * 8, 32, 8, 128),
        benchmark("bf16 8x4096 full d=64", [4096] * 8, 16, 16, 64, causal=False),
        benchmark("bf16 16 lengths to 4096 causal d=128", skewed, 32, 8, 128),
        benchmark("bf16 2x8192 causal d=256", [8192] * 2, 16, 8, 256),
    ]


def _padded(t: Tensor, lengths: Sequence[int]) -> Tensor:
    """``[tokens, heads, dim]`` as ``[sequences, heads, longest, dim]``."""
    return torch.nn.utils.rnn.pad_sequence(t.split(list(lengths)), batch_first=True).transpose(1, 2)


def _sdpa(arguments: dict[str, Any]) -> Any:
    lengths = arguments["cu_seqlens_q"].diff().tolist()

    def sdpa(q, k, v, cu_seqlens_q, max_seqlen_q, causal):  # type: ignore[no-untyped-def]
        query, key, value = (_padded(t, lengths) for t in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
        return torch.cat([out[b, :, :n].transpose(0, 1) for b, n in enumerate(lengths)])

    return sdpa


def _flash_sdpa(arguments: dict[str, Any]) -> Any:
    """FlashAttention-2 as SDPA runs it; sequences of one length only, so that nothing is padded."""
    lengths = set(arguments["cu_seqlens_q"].diff().tolist())
    if len(lengths) > 1:
        raise RuntimeError("sequences differ in length: padded SDPA is a row of its own")
    if arguments["q"].device.type != "cuda":
        raise RuntimeError("FlashAttention-2 runs on GPUs only")
    (length,) = lengths

    def flash(q, k, v, cu_seqlens_q, max_seqlen_q, causal):  # type: ignore[no-untyped-def]
        from torch.nn.attention import SDPBackend, sdpa_kernel

        query, key, value = (t.view(-1, length, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2).reshape(q.shape)

    return flash


def _torch_varlen(arguments: dict[str, Any]) -> Any:
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    accepted = inspect.signature(varlen_attn).parameters
    grouped = arguments["q"].shape[1] != arguments["k"].shape[1]
    if grouped and "enable_gqa" not in accepted:
        raise RuntimeError("this torch's varlen_attn has no enable_gqa")

    def varlen(q, k, v, cu_seqlens_q, max_seqlen_q, causal):  # type: ignore[no-untyped-def]
        options: dict[str, Any] = {"enable_gqa": True} if grouped else {}
        if "window_size" in accepted:
            options["window_size"] = (-1, 0) if causal else (-1, -1)
        else:
            options["is_causal"] = causal
        return varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_q, max_seqlen_q, max_seqlen_q, **options)

    return varlen


def _flash_attn(arguments: dict[str, Any]) -> Any:
    from flash_attn import flash_attn_varlen_func

    def flash_attn(q, k, v, cu_seqlens_q, max_seqlen_q, causal):  # type: ignore[no-untyped-def]
        return flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_q, max_seqlen_q, max_seqlen_q, causal=causal
        )  # fmt: skip

    return flash_attn


SPEC = OpSpec(
    name="varlen_attention",
    function=varlen_attention,
    reference=varlen_attention_reference,
    custom_ops=("varlen_attention_fwd", "varlen_attention_bwd"),
    differentiable=("q", "k", "v", "bias", "sinks"),
    cases=_cases,
    example=_example,
    aot=_aot,
    benchmarks=_benchmarks,
    peers={
        "torch eager": _sdpa,
        "FlashAttention-2 (SDPA)": _flash_sdpa,
        "torch varlen_attn": _torch_varlen,
        "flash-attn": _flash_attn,
    },  # fmt: skip
    goal="d=128, causal, 8 x 4096: forward 0.50, backward 0.35 of the matmul limit; forward at least 1.0x, backward at "
    "least 0.9x FlashAttention-2",
    attention=True,
)
