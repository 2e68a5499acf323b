"""Cases, launches and benchmarks of :func:`hetu_kernels.rotary`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hetu_kernels._common.registry import AotCall, Benchmark, Case, OpSpec
from hetu_kernels.norm_act.rotary import rotary
from hetu_kernels.norm_act.rotary_ref import rotary_reference


def _table(positions: int, half: int, dtype: torch.dtype, device: torch.device | None = None) -> dict[str, Any]:
    angles = torch.outer(torch.arange(positions, device=device), 10_000 ** -(torch.arange(half, device=device) / half))
    return {"cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype)}


def _cases() -> Sequence[Case]:
    def make(
        *shape: int,
        half: int | None = None,
        table: int = 40,
        positions: str | None = None,
        narrow_table: bool = False,
        fill: tuple[tuple[int, ...] | int, float] | None = None,
        **options: Any,
    ) -> Callable[[torch.dtype, torch.Generator], dict[str, Any]]:
        def arguments(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
            x = torch.randn(*shape, generator=generator).to(dtype)
            if fill is not None:
                x[fill[0]] = fill[1]
            width = shape[-1] // 2 if half is None else half
            made = {"x": x, **_table(table, width, dtype if narrow_table else torch.float32), **options}
            size = {"tokens": shape[-3:-2], "batch": shape[:-2], "outside": shape[:-2]}
            if positions is not None:
                low, high = (-2, table + 2) if positions == "outside" else (0, table)
                kind = torch.int32 if positions == "tokens" else torch.int64
                made["positions"] = torch.randint(low, high, size[positions], generator=generator, dtype=kind)
                if positions == "outside":  # both ends of the table, and beyond them
                    made["positions"].view(-1)[:6] = torch.tensor([0, table - 1, -1, table, -(2**31), 2**31 - 1])
            return made

        return arguments

    inf, nan = float("inf"), float("nan")
    full = (torch.float32,)
    return [
        Case("plain", make(2, 9, 3, 16), frozenset({"strided", "ragged"})),
        Case("packed", make(11, 4, 32), frozenset({"strided", "ragged"})),
        Case("interleaved", make(2, 9, 3, 16, interleaved=True)),
        Case("contiguous", make(2, 8, 4, 64), contiguous=True),
        Case("contiguous, interleaved", make(2, 8, 4, 64, interleaved=True), contiguous=True, dtypes=full),
        Case("head dimension 80", make(2, 7, 2, 80)),
        Case("head dimension 80, interleaved", make(2, 7, 2, 80, interleaved=True)),
        Case("a part of each head", make(2, 7, 3, 24, half=5)),
        Case("a part of each head, interleaved", make(2, 7, 3, 24, half=5, interleaved=True)),
        Case("odd head dimension", make(5, 2, 9, half=4), dtypes=full),
        Case("one pair", make(5, 3, 2)),
        Case("narrow table", make(2, 9, 3, 16, narrow_table=True)),
        Case("positions of tokens", make(3, 9, 2, 16, positions="tokens")),
        Case("positions of a batch", make(3, 9, 2, 16, positions="batch")),
        Case("positions of a batch, interleaved", make(3, 9, 2, 16, positions="batch", interleaved=True), dtypes=full),
        Case("positions outside of the table", make(2, 9, 2, 16, positions="outside", half=6)),
        Case("more tokens than positions", make(9, 2, 16, table=6), dtypes=full),
        Case("empty table", make(3, 2, 16, table=0), dtypes=full),
        Case("many heads", make(2, 3, 70, 128), dtypes=full),
        Case("many row tiles", make(3, 37, 2, 128, positions="batch", half=60), dtypes=full),
        Case("several leading dimensions", make(2, 2, 5, 2, 16, positions="batch"), dtypes=full),
        Case("no tokens", make(2, 0, 2, 16), frozenset({"empty"})),
        Case("no tokens, packed", make(0, 2, 16, positions="tokens"), frozenset({"empty"}), dtypes=full),
        Case("a row of -inf", make(2, 5, 2, 16, fill=((1, 2), -inf)), frozenset({"inf"})),
        Case("one infinity", make(2, 5, 2, 16, fill=((1, 2, 0, 3), inf), interleaved=True), frozenset({"inf"})),
        Case("one NaN", make(2, 5, 2, 16, fill=((1, 2, 0, 3), nan)), frozenset({"nan"})),
        Case("NaN that is copied", make(2, 5, 2, 16, half=4, fill=((1, 2, 0, 12), nan)), frozenset({"nan"})),
    ]


def _example(tokens: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(tokens)
    return {
        "x": torch.randn(2, tokens, 2, 16, generator=generator),
        **_table(24, 6, torch.float32),
        "positions": torch.randint(0, 24, (2, tokens), generator=generator),
    }


def _aot_calls() -> Sequence[AotCall]:
    from hetu_kernels.norm_act._rotary_kernels import launch_rotary

    def launch(
        batch: int,
        tokens: int,
        heads: int,
        head_dim: int,
        half: int,
        dtype: torch.dtype,
        *,
        positions: bool = False,
        interleaved: bool = False,
        transposed: bool = False,
    ) -> Callable[[], object]:
        def call() -> None:
            def meta(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
                return torch.empty(*size, dtype=dtype, device="meta")

            x = meta(batch, tokens, heads, head_dim)
            if transposed:
                x = meta(batch, heads, tokens, head_dim).transpose(1, 2)
            cos, sin = (meta(8192, half, dtype=torch.float32) for _ in range(2))
            at = meta(batch, tokens, dtype=torch.int64) if positions else None
            for inverse in (False, True):
                launch_rotary(x, cos, sin, at, interleaved=interleaved, inverse=inverse)

        return call

    bf16 = torch.bfloat16
    return [
        AotCall(
            "bf16 32x128, positions",
            launch(4, 4096, 32, 128, 64, bf16, positions=True),
            same_as=launch(3, 77, 32, 128, 64, bf16, positions=True),
        ),
        AotCall("bf16 8x128, transposed", launch(4, 4096, 8, 128, 64, bf16, transposed=True)),
        AotCall("bf16 16x256, 64 interleaved", launch(4, 2048, 16, 256, 32, bf16, interleaved=True)),
        AotCall("fp32 32x80, 32 of them", launch(4, 2048, 32, 80, 16, torch.float32), slow=True),
    ]


def _benchmarks() -> Sequence[Benchmark]:
    """64 MB of bfloat16 and more."""

    def benchmark(name: str, *size: int, half: int, positions: bool = False, interleaved: bool = False) -> Benchmark:
        def make(device: torch.device, tiny: bool) -> dict[str, Any]:
            batch, tokens, heads, head_dim = (1, 5, 2, 2 * half) if tiny else size
            made: dict[str, Any] = {
                "x": torch.randn(batch, tokens, heads, head_dim, device=device, dtype=torch.bfloat16),
                **_table(tokens, half, torch.float32, device),
                "interleaved": interleaved,
            }
            if positions:
                made["positions"] = torch.arange(tokens, device=device).expand(batch, tokens).contiguous()
            return made

        def bytes_moved(arguments: dict[str, Any]) -> tuple[int, int]:
            moved = 2 * arguments["x"].numel() * 2 + 2 * arguments["cos"].numel() * 4
            return moved, moved

        return Benchmark(name, make, bytes=bytes_moved)

    return [
        benchmark("bf16 4x4096x32x128", 4, 4096, 32, 128, half=64),
        benchmark("bf16 4x4096x32x128, positions", 4, 4096, 32, 128, half=64, positions=True),
        benchmark("bf16 16x4096x8x128", 16, 4096, 8, 128, half=64),
        benchmark("bf16 8x2048x16x256, 64 interleaved", 8, 2048, 16, 256, half=32, interleaved=True),
    ]


def _eager(arguments: dict[str, Any]) -> Any:
    def eager(x, cos, sin, positions=None, interleaved=False):  # type: ignore[no-untyped-def]
        c, s = ((table if positions is None else table[positions]).to(x.dtype).unsqueeze(-2) for table in (cos, sin))
        half = cos.shape[1]
        if interleaved:
            a, b = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
            rotated = torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2)
            return torch.cat([rotated, x[..., 2 * half :]], -1)
        c, s = torch.cat([c, c], -1), torch.cat([s, s], -1)
        return x * c + torch.cat([-x[..., half:], x[..., :half]], -1) * s

    return eager


def _liger(arguments: dict[str, Any]) -> Any:
    from liger_kernel.ops.rope import LigerRopeFunction

    if arguments.get("interleaved"):
        raise RuntimeError("Liger rotates half-split pairs only")
    # It wants wide tables of the rows that are used, and keys beside the queries: one head, the fewest possible.
    at = arguments.get("positions")
    tables = [torch.cat([table, table], -1) for table in (arguments["cos"], arguments["sin"])]
    c, s = (table.unsqueeze(0) if at is None else table[at] for table in tables)
    key = arguments["x"][:, :, :1].detach().clone().transpose(1, 2)

    def liger(x, cos, sin, positions=None, interleaved=False):  # type: ignore[no-untyped-def]
        return LigerRopeFunction.apply(x.transpose(1, 2), key, c, s)[0].transpose(1, 2)  # writes into x

    return liger


SPEC = OpSpec(
    name="rotary",
    function=rotary,
    reference=rotary_reference,
    custom_ops=("rotary_fwd", "rotary_bwd"),
    differentiable=("x",),
    cases=_cases,
    example=_example,
    aot=_aot_calls,
    benchmarks=_benchmarks,
    peers={
        "torch eager": _eager,
        "torch.compile": lambda _: torch.compile(rotary_reference),
        "liger, in place, with one key head": _liger,
    },
    goal="forward and backward 0.88 of the copy limit from 64 MB; at least 1.0x Liger and torch.compile",
)
