"""Cases, launches and benchmarks that :func:`hetu_kernels.pack` and :func:`hetu_kernels.unpack` share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hetu_kernels._common.registry import AotCall, Benchmark, Case
from hetu_kernels.norm_act.pack import PaddingLayout, padding_layout

Make = Callable[[torch.dtype, torch.Generator], dict[str, Any]]


def pack_cases(*, unpack: bool) -> Sequence[Case]:
    """Prefixes and arbitrary masks; with the number of tokens known, bounded, or not known."""

    def make(
        lengths: Sequence[int] | None,
        *features: int,
        length: int = 9,
        mask: tuple[int, int] | None = None,
        total: int | None = None,
        integers: torch.dtype | None = None,
        padding: float = 7.0,
        value: float | None = None,
        transposed: bool = False,
        **options: Any,
    ) -> Make:
        def arguments(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
            if mask is not None:
                layout = padding_layout(torch.rand(mask, generator=generator) < 0.5, total_tokens=total)
            else:
                layout = padding_layout(lengths=torch.tensor(lengths), max_length=length, total_tokens=total)

            def values(*shape: int) -> torch.Tensor:
                if integers is not None:
                    return torch.randint(0, 2 if integers == torch.bool else 100, shape, generator=generator).to(
                        integers
                    )
                return torch.randn(*shape, generator=generator).to(dtype)

            if unpack:
                packed = values(layout.gather_idx.shape[0], *features)
                if value is not None and packed.shape[0] > 1:
                    packed[1] = value
                return {"packed": packed, "layout": layout, **options}
            x = values(layout.batch, layout.max_length, *features)
            if integers is None:
                x.flatten(0, 1)[layout.scatter_idx < 0] = padding  # whatever it is, it must not come through
            if value is not None:
                x[0, 1] = value
            return {"x": x.transpose(2, 3) if transposed else x, "layout": layout}

        return arguments

    inf, nan = float("inf"), float("nan")
    full, one = (torch.float32,), (torch.float32,)
    cases = [
        Case("plain", make([4, 9, 1], 37), frozenset({"ragged", "strided"})),
        Case("contiguous", make([4, 9, 1], 64), contiguous=True),
        Case("tokens known", make([4, 9, 0, 5], 37, total=18), frozenset({"ragged", "strided"})),
        Case("more rows than tokens", make([4, 0, 5], 33, total=14)),
        Case("fewer rows than tokens", make([4, 9, 5], 33, total=11)),
        Case("any mask", make(None, 20, mask=(4, 13))),
        Case("any mask, tokens bounded", make(None, 20, mask=(4, 13), total=30), dtypes=full),
        Case("heads", make([3, 6], 3, 8, length=7)),
        Case("no features", make([3, 6, 0], length=7)),
        Case("several column blocks", make([3, 1], 4100, length=3), dtypes=(torch.float32, torch.bfloat16)),
        Case("many row tiles", make(None, 130, mask=(5, 41)), dtypes=full),
        Case("many row tiles, contiguous", make(None, 1, mask=(7, 1100), total=4000), contiguous=True, dtypes=full),
        Case("one sequence", make([5], 24), dtypes=full),
        Case("no tokens", make([0, 0], 24), frozenset({"empty"})),
        Case("no rows", make([0, 0], 24, total=0), frozenset({"empty"}), dtypes=full),
        Case("no sequences", make(None, 24, mask=(0, 5)), frozenset({"empty"}), dtypes=full),
        Case("no columns", make([0, 0], 24, length=0, total=3), frozenset({"empty"}), dtypes=full),
        Case("empty features", make([2, 1], 0, 3), frozenset({"empty"}), dtypes=full),
        Case("a row of -inf", make([4, 2], 24, value=-inf), frozenset({"inf"})),
        Case("a row of NaN", make([4, 2], 24, value=nan), frozenset({"nan"})),
    ]
    for integers in (torch.int64, torch.int32, torch.uint8, torch.bool):
        name = str(integers).removeprefix("torch.")
        cases.append(Case(name, make([4, 9, 1], 5, integers=integers, total=16), dtypes=one, grads=False))
    if unpack:
        cases += [
            Case("filled", make([4, 9, 1], 37, fill=-2.5)),
            Case("filled with -inf", make([4, 9, 1], 37, total=14, fill=-inf)),
            Case("filled with NaN", make([4, 9, 1], 37, fill=nan), frozenset({"nan"})),
            Case("filled with -0", make([4, 9, 1], 3, fill=-0.0), dtypes=full),
        ]
        for integers in (torch.int64, torch.uint8):
            name = str(integers).removeprefix("torch.")
            fill = -100 if integers.is_signed else 255
            cases.append(
                Case(f"{name}, filled", make([4, 1], 5, integers=integers, fill=fill), dtypes=one, grads=False)
            )
    else:
        cases += [
            Case("NaN in the padding", make([4, 9, 1], 37, padding=nan), frozenset({"nan"})),
            Case("infinities in the padding", make(None, 20, mask=(4, 13), padding=inf), frozenset({"inf"})),
            Case("features that no view can join", make([4, 9], 6, 5, transposed=True), dtypes=full),
        ]
    return cases


def pack_example(tokens: int, *, unpack: bool) -> dict[str, Any]:
    """Small float32 arguments; the layout is for the longest sequence."""
    generator = torch.Generator().manual_seed(tokens)
    layout = padding_layout(lengths=torch.tensor([tokens, tokens // 2]), max_length=tokens)
    shape = (2 * tokens, 6) if unpack else (2, tokens, 6)
    return {"packed" if unpack else "x": torch.randn(shape, generator=generator), "layout": layout}


def pack_aot_calls() -> Sequence[AotCall]:
    """Hidden sizes of real models, token ids, and a batch that is a slice of a longer one."""
    from hetu_kernels.norm_act._pack_kernels import launch_pack, launch_unpack

    def both(
        batch: int, length: int, rows: int, n: int | None, dtype: torch.dtype, *, sliced: bool = False
    ) -> Callable[[], object]:
        def launch() -> None:
            def meta(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
                return torch.empty(*size, dtype=dtype, device="meta")

            features = () if n is None else (n,)
            x = meta(batch, length + 16, *features)[:, :length] if sliced else meta(batch, length, *features)
            launch_pack(x, meta(rows, dtype=torch.int32))
            launch_unpack(meta(rows, *features), meta(batch * length, dtype=torch.int32), batch, length, 0.0)

        return launch

    bf16 = torch.bfloat16
    return [
        AotCall("bf16 n=4096", both(16, 1024, 9001, 4096, bf16), same_as=both(3, 77, 123, 4096, bf16)),
        AotCall("bf16 n=768", both(16, 512, 4801, 768, bf16), slow=True),
        AotCall(
            "bf16 n=4096, sliced",
            both(16, 1024, 9001, 4096, bf16, sliced=True),
            same_as=both(3, 77, 123, 4096, bf16, sliced=True),
        ),
        AotCall("fp32 n=1024", both(16, 512, 4801, 1024, torch.float32), slow=True),
        AotCall("int64 ids", both(16, 512, 4801, None, torch.int64)),
    ]


def pack_benchmarks(*, unpack: bool) -> Sequence[Benchmark]:
    """64 MB of bfloat16 and more, sequences 0.6 as long as the longest on average."""

    def benchmark(name: str, batch: int, length: int, n: int, dtype: torch.dtype) -> Benchmark:
        def make(device: torch.device, tiny: bool) -> dict[str, Any]:
            sequences, longest, width = (3, 7, 16) if tiny else (batch, length, n)
            lengths = torch.linspace(0.2 * longest, longest, sequences).long()
            tokens = int(lengths.sum())
            layout = padding_layout(lengths=lengths.to(device), max_length=longest, total_tokens=tokens)
            shape = (tokens, width) if unpack else (sequences, longest, width)
            return {"packed" if unpack else "x": torch.randn(shape, device=device, dtype=dtype), "layout": layout}

        def bytes_moved(arguments: dict[str, Any]) -> tuple[int, int]:
            """One direction reads the tokens and writes them; the other writes the padding besides."""
            layout: PaddingLayout = arguments["layout"]
            tensor = arguments["packed" if unpack else "x"]
            row = tensor.element_size() * tensor.shape[-1]
            tokens, padded = layout.gather_idx.shape[0], layout.scatter_idx.shape[0]
            pack, restore = 2 * tokens * row, (tokens + padded) * row
            return (restore, pack) if unpack else (pack, restore)

        return Benchmark(name, make, bytes=bytes_moved)

    return [
        benchmark("bf16 16x1024x4096", 16, 1024, 4096, torch.bfloat16),
        benchmark("bf16 64x1024x1024", 64, 1024, 1024, torch.bfloat16),
        benchmark("bf16 128x512x768", 128, 512, 768, torch.bfloat16),
        benchmark("fp32 64x512x1024", 64, 512, 1024, torch.float32),
    ]
