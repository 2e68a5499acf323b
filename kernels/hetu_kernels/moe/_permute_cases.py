"""Cases, launches and benchmarks that :func:`hetu_kernels.permute` and :func:`hetu_kernels.unpermute` share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hetu_kernels._common.registry import AotCall, Benchmark, Case
from hetu_kernels.moe.permute_ref import count_rows, route

Make = Callable[[torch.dtype, torch.Generator], dict[str, Any]]


def random_ids(tokens: int, choices: int, experts: int, generator: torch.Generator, skipped: float = 0.0) -> Tensor:
    """Different experts for each token, int64 ``[tokens, choices]``; a share of them is -1."""
    order = torch.rand(tokens, experts, generator=generator).argsort(1)
    ids = order[:, torch.arange(choices) % experts]
    return torch.where(torch.rand(ids.shape, generator=generator) < skipped, -1, ids)


def permute_cases(*, unpermute: bool) -> Sequence[Case]:
    """Ids of several blocks and of none, experts without tokens, with and without capacity, more and fewer rows."""

    def make(
        tokens: int,
        dim: int,
        experts: int,
        choices: int,
        *,
        skipped: float = 0.0,
        only: int | None = None,
        rows: int | None = None,
        capacity: int | None = None,
        integers: torch.dtype = torch.int32,
        fill: tuple[Any, float] | None = None,
        weight: tuple[Any, float] | None = None,
    ) -> Make:
        def arguments(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
            ids = random_ids(tokens, choices, experts, generator, skipped)
            if only is not None:
                ids = torch.where(ids >= 0, only, -1)
            if not unpermute:
                x = torch.randn(tokens, dim, generator=generator).to(dtype)
                if fill is not None:
                    x[fill[0]] = fill[1]
                made = {"x": x, "expert_ids": ids.to(integers), "num_experts": experts}
                return {**made, "capacity": capacity, "num_rows": rows}
            count = count_rows(ids, experts, capacity) if rows is None else rows
            position_of = route(ids, experts, capacity, count)[1]
            results = torch.randn(count, dim, generator=generator).to(dtype)
            weights = torch.rand(tokens, choices, generator=generator)
            if fill is not None:
                results[fill[0]] = fill[1]
            if weight is not None:
                weights[weight[0]] = weight[1]
            return {"rows": results, "position_of": position_of.to(integers), "weights": weights}

        return arguments

    inf, nan = float("inf"), float("nan")
    full = (torch.float32,)
    cases = [
        Case("plain", make(9, 37, 5, 2), frozenset({"ragged", "strided"})),
        Case("some skipped", make(11, 24, 6, 3, skipped=0.3), frozenset({"ragged", "strided"})),
        Case("contiguous", make(16, 64, 4, 2), contiguous=True),
        Case("one choice", make(13, 20, 4, 1)),
        Case("every expert chosen", make(6, 33, 12, 12), dtypes=(torch.float32, torch.bfloat16)),
        Case("one expert", make(7, 20, 1, 1, skipped=0.3)),
        Case("one token", make(1, 40, 8, 2)),
        Case("experts without tokens", make(9, 20, 70, 2), dtypes=full),
        Case("all to one expert", make(9, 20, 5, 1, only=3), dtypes=full),
        Case("one expert several times", make(5, 20, 3, 4), dtypes=full),
        Case("int64", make(9, 20, 5, 2, integers=torch.int64), dtypes=full),
        Case("capacity", make(17, 20, 4, 2, capacity=5)),
        Case("capacity of 0", make(5, 20, 4, 2, capacity=0), frozenset({"empty"}), dtypes=full),
        Case("more rows than assignments", make(9, 37, 5, 2, skipped=0.4, rows=23)),
        Case("fewer rows than assignments", make(9, 37, 5, 2, rows=11)),
        Case("capacity and more rows", make(17, 20, 4, 2, skipped=0.2, capacity=6, rows=40), dtypes=full),
        Case("capacity and fewer rows", make(17, 20, 4, 2, capacity=6, rows=13), dtypes=full),
        Case("several blocks of assignments", make(201, 3, 40, 4, skipped=0.1), dtypes=full),
        Case("several blocks, capacity and more rows", make(201, 3, 33, 4, capacity=20, rows=850), contiguous=True,
             dtypes=full),
        Case("several column blocks", make(3, 4100, 4, 2, skipped=0.2), dtypes=(torch.float32, torch.bfloat16)),
        Case("several column blocks, more rows", make(3, 2100, 4, 2, rows=9), dtypes=full),
        Case("many token tiles", make(150, 130, 4, 2, skipped=0.1), dtypes=full),
        Case("one column", make(9, 1, 5, 2)),
        Case("no columns", make(9, 0, 5, 2), frozenset({"empty"}), dtypes=full),
        Case("no tokens", make(0, 20, 5, 2), frozenset({"empty"})),
        Case("no tokens, more rows", make(0, 20, 5, 2, rows=4), frozenset({"empty"}), dtypes=full),
        Case("none kept", make(6, 20, 5, 2, skipped=1.0), frozenset({"empty"}), dtypes=full),
        Case("none kept, more rows", make(6, 20, 5, 2, skipped=1.0, rows=4), frozenset({"empty"}), dtypes=full),
        Case("a row of -inf", make(5, 20, 4, 2, fill=(2, -inf)), frozenset({"inf"})),
        Case("one NaN", make(5, 20, 4, 2, fill=((2, 3), nan)), frozenset({"nan"})),
    ]  # fmt: skip
    if unpermute:
        cases += [
            Case("a weight of NaN", make(5, 20, 4, 2, weight=((2, 1), nan)), frozenset({"nan"})),
            Case("NaN where nothing is kept", make(6, 20, 4, 2, rows=7, skipped=1.0, weight=(..., nan)), dtypes=full),
        ]
    else:
        cases.append(Case("no choices", make(4, 20, 5, 0, rows=3), frozenset({"empty"}), dtypes=full))
    return cases


def permute_example(tokens: int, *, unpermute: bool) -> dict[str, Any]:
    """Small float32 arguments; the number of rows is given, as it must be under ``torch.compile``."""
    generator = torch.Generator().manual_seed(tokens)
    ids = random_ids(tokens, 2, 4, generator).to(torch.int32)
    x = torch.randn(2 * tokens, 6, generator=generator)
    if not unpermute:
        return {"x": x[:tokens].clone(), "expert_ids": ids, "num_experts": 4, "num_rows": 2 * tokens}
    position_of = route(ids, 4, None, 2 * tokens)[1]
    return {"rows": x, "position_of": position_of, "weights": torch.rand(tokens, 2, generator=generator)}


def permute_aot_calls() -> Sequence[AotCall]:
    """Mixtral and Qwen3 MoE, and a dimension that divides by nothing."""
    from hetu_kernels.moe._permute_kernels import launch_gather_sum, launch_permute_rows, launch_unpermute_backward
    from hetu_kernels.moe._permute_route_kernels import launch_route

    def all_of(
        tokens: int, dim: int, experts: int, choices: int, dtype: torch.dtype, integers: torch.dtype = torch.int32
    ) -> Callable[[], object]:
        def launch() -> None:
            def meta(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
                return torch.empty(*size, dtype=dtype, device="meta")

            count = tokens * choices
            _, position_of, offsets = launch_route(meta(tokens, choices, dtype=integers), experts, None, count)
            rows = launch_permute_rows(meta(tokens, dim), position_of, offsets, count)
            weights = meta(tokens, choices, dtype=torch.float32)
            launch_gather_sum(rows, position_of, None)
            y = launch_gather_sum(rows, position_of, weights)
            launch_unpermute_backward(y, rows, position_of, weights)

        return launch

    bf16, fp32 = torch.bfloat16, torch.float32
    return [
        AotCall("bf16 D=2048 E=128 k=8", all_of(16384, 2048, 128, 8, bf16), same_as=all_of(77, 2048, 128, 8, bf16)),
        AotCall("bf16 D=4096 E=8 k=2", all_of(8192, 4096, 8, 2, bf16), slow=True),
        AotCall("fp32 D=1000 E=60 k=4, int64", all_of(4096, 1000, 60, 4, fp32, torch.int64)),
    ]


def permute_benchmarks(*, unpermute: bool) -> Sequence[Benchmark]:
    """Mixtral, Qwen3 MoE and DeepSeek-V3; the number of rows is known."""

    def benchmark(tokens: int, dim: int, experts: int, choices: int) -> Benchmark:
        def make(device: torch.device, tiny: bool) -> dict[str, Any]:
            t, d, e, k = (8, 16, 4, 2) if tiny else (tokens, dim, experts, choices)
            ids = random_ids(t, k, e, torch.Generator().manual_seed(0)).to(device, torch.int32)
            if not unpermute:
                x = torch.randn(t, d, device=device, dtype=torch.bfloat16)
                return {"x": x, "expert_ids": ids, "num_experts": e, "num_rows": t * k}
            rows = torch.randn(t * k, d, device=device, dtype=torch.bfloat16)
            position_of = route(ids, e, None, t * k)[1]
            return {"rows": rows, "position_of": position_of, "weights": torch.rand(t, k, device=device)}

        def bytes_moved(arguments: dict[str, Any]) -> tuple[int, int]:
            """A token is read once, or written once; backward of unpermute reads tokens and rows and writes rows."""
            few, many = arguments["position_of" if unpermute else "expert_ids"].shape
            row = 2 * arguments["rows" if unpermute else "x"].shape[1]
            once = (few + few * many) * row
            return once, once + few * many * row if unpermute else once

        return Benchmark(f"bf16 {tokens}x{dim}, {choices} of {experts}", make, bytes=bytes_moved)

    return [
        benchmark(8192, 4096, 8, 2),
        benchmark(16384, 2048, 128, 8),
        benchmark(4096, 7168, 256, 8),
    ]
