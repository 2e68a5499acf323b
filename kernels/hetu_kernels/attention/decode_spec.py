"""Cases, launches and benchmarks of :func:`hetu_kernels.paged_decode_attention`."""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hetu_kernels._common.registry import LOW_AND_FULL, AotCall, Benchmark, Case, OpSpec
from hetu_kernels.attention._decode_kernels import launch_paged_decode_attention
from hetu_kernels.attention.decode import paged_decode_attention
from hetu_kernels.attention.decode_ref import paged_decode_attention_reference, visibility

_FULL = (torch.float32,)
_SOME = (torch.float32, torch.bfloat16)
_LOW = (torch.float16, torch.bfloat16)
Arguments = dict[str, Any]


def paged(
    lens: Sequence[int],
    page_size: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    spare_pages: int = 2,
    index_dtype: torch.dtype = torch.int32,
) -> Arguments:
    """A cache with the pages of all sequences in random order; what no sequence owns is NaN.

    Every row of the block table has ``spare_pages`` entries more than it needs, which name pages of NaN.
    """
    counts = [-(-length // page_size) for length in lens]
    pages = sum(counts) + 9  # so that the number that guards integers in tests is a page
    order = random.Random(pages).sample(range(pages), pages)  # not of torch: fake tensors have no values
    table = torch.full((len(lens), max(counts, default=0) + spare_pages), order[0], dtype=index_dtype)
    k, v = torch.full((2, pages, page_size, kv_heads, dim), float("nan"), dtype=dtype)
    used = 1
    for b, (length, count) in enumerate(zip(lens, counts, strict=True)):
        own = torch.tensor(order[used : used + count], dtype=index_dtype)
        used += count
        table[b, :count] = own
        for cache in (k, v):
            flat = torch.full((count * page_size, kv_heads, dim), float("nan"))
            flat[:length] = torch.randn(length, kv_heads, dim, generator=generator)
            cache[own.long()] = flat.view(count, page_size, kv_heads, dim).to(dtype)
    return {"k_cache": k, "v_cache": v, "block_table": table, "lens": torch.tensor(lens, dtype=index_dtype)}


def random_tree(tokens: int, generator: torch.Generator) -> Tensor:
    """Ancestor bits ``[tokens, words]`` of a random tree; each token's parent comes before it."""
    seen = torch.eye(tokens, dtype=torch.bool)
    for t in range(1, tokens):
        seen[t] |= seen[int(torch.randint(t, (1,), generator=generator))]
    return packed(seen)


def packed(seen: Tensor) -> Tensor:
    """A mask ``[rows, tokens]`` as bits in as many int64 words as it takes."""
    padded = torch.nn.functional.pad(seen.long(), (0, -seen.shape[1] % 64)).unflatten(1, (-1, 64))
    return (padded << torch.arange(64)).sum(-1)  # bit 63 is the sign; the sum wraps around to it


def _cases() -> Sequence[Case]:
    """Head dimensions, ratios of heads, pages smaller and larger than a block of keys, and every optional argument."""

    def make(
        lens: Sequence[int],
        *,
        tokens: int = 1,
        heads: int = 2,
        kv_heads: int = 1,
        dim: int = 32,
        page_size: int = 16,
        spare_pages: int = 2,
        index_dtype: torch.dtype = torch.int32,
        squeeze: bool = False,
        tree: str = "",
        alibi: bool = False,
        claim: Sequence[int] | None = None,
        fill: dict[str, tuple[tuple[int, ...], float]] | None = None,
        **options: Any,
    ) -> Callable[[torch.dtype, torch.Generator], Arguments]:
        def arguments(dtype: torch.dtype, generator: torch.Generator) -> Arguments:
            made = paged(
                lens, page_size, kv_heads, dim, dtype, generator, spare_pages=spare_pages, index_dtype=index_dtype
            )
            q = torch.randn(len(lens), tokens, heads, dim, generator=generator).to(dtype)
            if claim is not None:
                made["lens"] = torch.tensor(claim, dtype=index_dtype)
            for name, (where, value) in (fill or {}).items():
                if name == "q":
                    q[where] = value
                else:  # sequence, key and the rest
                    b, n, *rest = where
                    page = int(made["block_table"][b, n // page_size])
                    made[name][(page, n % page_size, *rest)] = value
            made = {"q": q.squeeze(1) if squeeze else q, **made, **options}
            if tree == "ancestors":
                trees = torch.stack([random_tree(tokens, generator) for _ in lens])
                made["tree_mask"] = trees.squeeze(-1) if tokens <= 64 else trees
            elif tree:  # any bits at all, later tokens and words of their own dimension included
                seen = torch.rand(len(lens), tokens, tokens, generator=generator) < 0.5
                made["tree_mask"] = torch.stack([packed(s | torch.eye(tokens, dtype=torch.bool)) for s in seen])
            if alibi:
                made["alibi_slopes"] = torch.rand(heads, generator=generator) / 4
            return made

        return arguments

    inf, nan = float("inf"), float("nan")
    every: dict[str, Any] = {"softcap": 3.0, "alibi": True, "scale": 0.3}
    return [
        Case("one token", make([37, 5, 130], heads=4, kv_heads=2, dim=64, squeeze=True, return_lse=True),
             frozenset({"ragged", "strided", "head_dim_64"})),
        Case("contiguous", make([70, 64], heads=4, kv_heads=4, dim=128, page_size=32, return_lse=True),
             frozenset({"head_dim_128", "gqa_1"}), contiguous=True),
        Case("three heads in a group", make([67, 129], heads=6, kv_heads=2, dim=80, tokens=2, return_lse=True),
             frozenset({"head_dim_80", "gqa_3"})),
        Case("eight heads in a group", make([90], heads=16, kv_heads=2, dim=96, page_size=64, return_lse=True),
             frozenset({"head_dim_96", "gqa_8"})),
        Case("wide heads", make([75, 40], heads=2, kv_heads=1, dim=256, tokens=3, return_lse=True),
             frozenset({"head_dim_256"})),
        Case("one head", make([50], heads=1, kv_heads=1, dim=8, return_lse=True), frozenset({"one_head"})),
        Case("odd head dimension", make([50, 80], heads=2, kv_heads=2, dim=37, tokens=2), dtypes=_FULL),
        Case("pages of one token", make([19, 66], page_size=1, spare_pages=7, return_lse=True), dtypes=_SOME),
        Case("pages longer than a block", make([300, 257, 256], page_size=256, num_splits=2), dtypes=_LOW),
        Case("64-bit indices", make([40, 3], index_dtype=torch.int64), dtypes=_FULL),
        Case("several tokens", make([200, 5], heads=6, kv_heads=2, tokens=3, num_splits=2, return_lse=True),
             dtypes=_SOME),
        Case("more rows than a block", make([100, 141], heads=3, tokens=45, num_splits=1, return_lse=True),
             dtypes=_FULL),
        Case("one split", make([150, 20], num_splits=1, return_lse=True), dtypes=_SOME),
        Case("more splits than blocks", make([150, 20], num_splits=9, return_lse=True), dtypes=_SOME),
        Case("more splits than one step merges", make([300], heads=1, dim=128, num_splits=19, alibi=True,
             return_lse=True),
             dtypes=_FULL),
        Case("tree", make([30, 150], tokens=7, tree="ancestors", return_lse=True)),
        Case("tree of 64", make([64, 130], tokens=64, heads=1, tree="ancestors", num_splits=1, return_lse=True),
             dtypes=_FULL),
        Case("tree of 64, any bits", make([191], tokens=64, heads=1, tree="any", num_splits=2), dtypes=_FULL),
        Case("tree of 100", make([101, 170], tokens=100, heads=1, tree="ancestors", num_splits=1, return_lse=True),
             dtypes=_FULL),
        Case("tree of 128, any bits", make([140], tokens=128, heads=1, tree="any", num_splits=1), dtypes=_FULL),
        Case("tree, everything", make([130, 3], tokens=6, tree="any", window=70, **every, return_lse=True)),
        Case("tree longer than the window", make([80, 90], tokens=20, tree="any", window=9, num_splits=1, **every),
             dtypes=_FULL),
        Case("window", make([200, 40, 130], window=65, return_lse=True), dtypes=_SOME),
        Case("window of one", make([64, 65, 1], window=1, tokens=2, return_lse=True), dtypes=_FULL),
        Case("window longer than a sequence", make([30, 2], window=2**31 - 1, tokens=6), dtypes=_FULL),
        Case("window and several rows", make([300], heads=3, window=100, tokens=22, num_splits=2), dtypes=_FULL),
        Case("soft cap", make([70, 9], softcap=2.0, tokens=2, return_lse=True), dtypes=_SOME),
        Case("linear biases", make([70, 9], alibi=True, heads=4, kv_heads=2, tokens=2, return_lse=True), dtypes=_SOME),
        Case("linear biases of a tree", make([70, 9], alibi=True, heads=4, tokens=5, tree="any", num_splits=1),
             dtypes=_FULL),
        Case("everything", make([140, 66], heads=3, window=80, tokens=3, **every, return_lse=True)),
        Case("no sequences", make([], return_lse=True), frozenset({"empty"}), dtypes=_FULL),
        Case("no tokens", make([5, 6], tokens=0, return_lse=True), frozenset({"empty"}), dtypes=_FULL),
        Case("nothing in the cache", make([0, 40, 0], return_lse=True), frozenset({"empty"})),
        Case("no pages", make([0, 0], spare_pages=0, return_lse=True), frozenset({"empty"}), dtypes=_FULL),
        Case("fewer in the cache than tokens", make([2, 0, 9], tokens=4, return_lse=True), frozenset({"empty"}),
             dtypes=_SOME),
        Case("fewer in the cache than drafts", make([2, 0, 9], tokens=4, tree="any", return_lse=True), dtypes=_FULL),
        Case("lengths out of range", make([48, 48], spare_pages=0, claim=[1000, -3], tokens=2, return_lse=True),
             frozenset({"empty"}), dtypes=_FULL),
        Case("lengths far out of range", make([48, 48], spare_pages=0, claim=[2**40, 48 - 2**40],
             index_dtype=torch.int64, tokens=2, return_lse=True), dtypes=_FULL),
        Case("a key of -inf", make([70], fill={"q": ((), 1.0), "k_cache": ((0, 3), -inf)}, return_lse=True),
             frozenset({"inf"})),
        Case("all keys -inf", make([1, 70], fill={"q": ((0,), 1.0), "k_cache": ((0, 0), -inf)}, return_lse=True),
             frozenset({"inf"}), dtypes=_SOME),
        Case("a key of inf", make([70, 9], fill={"q": ((), 1.0), "k_cache": ((0, 66), inf)}, return_lse=True),
             frozenset({"inf"}), dtypes=_SOME),
        Case("a value of inf", make([70, 9], fill={"v_cache": ((0, 3, 0, 5), inf)}), frozenset({"inf"}), dtypes=_FULL),
        Case("NaN in a query", make([70, 9], heads=4, tokens=2, fill={"q": ((0, 1, 2, 3), nan)}, return_lse=True),
             frozenset({"nan"})),
        Case("NaN in a key", make([70, 90], heads=4, kv_heads=2, fill={"k_cache": ((0, 69, 1, 3), nan)},
             return_lse=True), frozenset({"nan"}), dtypes=_FULL),
        Case("NaN in a value", make([170, 90], heads=4, kv_heads=2, fill={"v_cache": ((0, 2, 1, 3), nan)},
             num_splits=3, return_lse=True), frozenset({"nan"}), dtypes=_FULL),
        Case("NaN outside of the window", make([170], window=67, return_lse=True, fill={
            "k_cache": ((0, 102), nan), "v_cache": ((0, 102), nan)}), frozenset({"nan"}), dtypes=_FULL),
        *(Case(f"D={dim} G={group} T={tokens}", make(
            [150, 0, 70], heads=2 * group, kv_heads=2, dim=dim, tokens=tokens, tree="any", **every, return_lse=True),
            slow=True, dtypes=LOW_AND_FULL)
          for dim in (16, 64, 80, 96, 128, 256) for group in (1, 3, 4, 8) for tokens in (1, 9)),
    ]  # fmt: skip


def _example(count: int) -> Arguments:
    """Small float32 arguments: a batch of ``count`` sequences, two drafts each."""
    generator = torch.Generator().manual_seed(count)
    lens = [2 + (3 * b) % 7 for b in range(count)]
    made = paged(lens, 4, 2, 16, torch.float32, generator)
    q = torch.randn(count, 2, 4, 16, generator=generator)
    options = {"tree_mask": torch.tensor([1, 3]).repeat(count, 1), "alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4])}
    return {"q": q, **made, **options, "return_lse": True}


def _aot() -> Sequence[AotCall]:
    """Caches of real models: 8 key-value heads of 128 shared by 32, wide and narrow heads, and a tree of drafts."""
    fwd = "_paged_decode_attention_fwd_kernel"

    def call(
        batch: int, tokens: int, heads: int, kv_heads: int, dim: int, page_size: int, max_pages: int, *,
        dtype: torch.dtype = torch.bfloat16, words: int = 0, window: int | None = None, softcap: float | None = None,
        alibi: bool = False, num_splits: int | None = None,
    ) -> Callable[[], object]:  # fmt: skip
        def launch() -> object:
            def meta(*size: int, dtype: torch.dtype = dtype) -> Tensor:
                return torch.empty(*size, dtype=dtype, device="meta")

            cache = meta(4096, page_size, kv_heads, dim)
            return launch_paged_decode_attention(
                meta(batch, tokens, heads, dim), cache, cache, meta(batch, max_pages, dtype=torch.int32),
                meta(batch, dtype=torch.int32), dim**-0.5,
                meta(batch, tokens, words, dtype=torch.int64) if words else None, window, softcap,
                meta(heads, dtype=torch.float32) if alibi else None, num_splits,
            )  # fmt: skip

        return launch

    return [
        AotCall("bf16 D=128 G=4", call(4, 1, 32, 8, 128, 16, 512), same_as=call(7, 1, 32, 8, 128, 16, 77)),
        AotCall("bf16 D=128 G=4 tree of 64", call(4, 64, 32, 8, 128, 64, 128, words=1), wgmma=(fwd,),
                same_as=call(3, 61, 32, 8, 128, 64, 129, words=1)),
        AotCall("bf16 D=256 G=8", call(4, 1, 16, 2, 256, 64, 128), slow=True),
        AotCall("bf16 D=64 G=1", call(64, 1, 16, 16, 64, 256, 32), slow=True),
        AotCall("bf16 D=80 G=1, everything", call(4, 3, 32, 32, 80, 16, 99, window=1024, softcap=30.0, alibi=True)),
        AotCall("fp16 D=96 G=3, four tokens", call(4, 4, 24, 8, 96, 16, 99, dtype=torch.float16), slow=True),
        AotCall("bf16 D=128 G=2, sixteen tokens", call(4, 16, 16, 8, 128, 16, 99), slow=True),
        AotCall("bf16 D=256 G=4 tree of 128", call(4, 128, 16, 4, 256, 64, 99, words=2, window=4096), slow=True),
        AotCall("bf16 D=64 G=4 tree of 64", call(4, 64, 32, 8, 64, 16, 99, words=1), slow=True),
    ]  # fmt: skip


def _benchmarks() -> Sequence[Benchmark]:
    """At least 256 MB of keys and values, but for the last."""

    def benchmark(
        name: str, lens: Sequence[int], heads: int, kv_heads: int, dim: int, page_size: int, *, tokens: int = 1,
        tree: bool = False,
    ) -> Benchmark:  # fmt: skip
        def make(device: torch.device, tiny: bool) -> Arguments:
            generator = torch.Generator().manual_seed(0)
            own = [tokens + 5 + i for i in range(2)] if tiny else list(lens)
            counts = [-(-length // page_size) for length in own]
            order = torch.randperm(sum(counts), generator=generator, dtype=torch.int32)
            table = torch.zeros(len(own), max(counts), dtype=torch.int32)
            for b, count in enumerate(counts):
                table[b, :count], order = order[:count], order[count:]

            def normal(*size: int) -> Tensor:
                return torch.randn(*size, device=device, dtype=torch.bfloat16)

            made: Arguments = {
                "q": normal(len(own), tokens, heads, dim),
                "k_cache": normal(sum(counts), page_size, kv_heads, dim),
                "v_cache": normal(sum(counts), page_size, kv_heads, dim),
                "block_table": table.to(device),
                "lens": torch.tensor(own, dtype=torch.int32, device=device),
            }
            if tree:
                trees = [random_tree(tokens, generator).squeeze(-1) for _ in own]
                made["tree_mask"] = torch.stack(trees).to(device)
            return made

        return Benchmark(name, make, bytes=lambda a: (_bytes(a), 0), flops=lambda a: (_flops(a), 0))

    ragged = [1024 + 517 * i % 8192 for i in range(64)]
    return [
        benchmark("bf16 64x4096 H=32/8 D=128 P=256", [4096] * 64, 32, 8, 128, 256),
        benchmark("bf16 64x4096 H=32/8 D=128 P=16", [4096] * 64, 32, 8, 128, 16),
        benchmark("bf16 64 ragged H=32/8 D=128 P=16", ragged, 32, 8, 128, 16),
        benchmark("bf16 1x131072 H=32/8 D=128 P=256", [131072], 32, 8, 128, 256),
        benchmark("bf16 32x4096 H=16/16 D=64 P=256", [4096] * 32, 16, 16, 64, 256),
        benchmark("bf16 16x8192 H=16/2 D=256 P=64", [8192] * 16, 16, 2, 256, 64),
        benchmark("bf16 8x8192 H=32/8 D=128 P=64, tree of 64", [8192] * 8, 32, 8, 128, 64, tokens=64, tree=True),
        benchmark("bf16 1x2048 H=32/8 D=128 P=16", [2048], 32, 8, 128, 16),
    ]


def _bytes(arguments: Arguments) -> int:
    """Keys and values of all sequences once, queries and results."""
    q, cache = arguments["q"], arguments["k_cache"]
    keys = int(arguments["lens"].sum()) * cache.shape[2] * cache.shape[3]
    return (2 * keys + 2 * q.numel()) * q.element_size()


def _flops(arguments: Arguments) -> int:
    q = arguments["q"]
    return 4 * int(arguments["lens"].sum()) * q.shape[1] * q.shape[2] * q.shape[3]


def _sdpa(arguments: Arguments, *, gather: bool) -> Callable[..., Any]:
    """torch's attention over keys and values that lie in one piece; gathered at every call, or once beforehand."""
    q, table = arguments["q"], arguments["block_table"]
    capacity = table.shape[1] * arguments["k_cache"].shape[1]
    seen, _ = visibility(q.shape[1], capacity, arguments["lens"], arguments.get("tree_mask"), None)
    mask = None if bool(seen.all()) else seen.unsqueeze(1)

    def gathered(cache: Tensor, table: Tensor) -> Tensor:
        return cache[table].flatten(1, 2).transpose(1, 2)

    beforehand = None if gather else [gathered(arguments[name], table).contiguous() for name in ("k_cache", "v_cache")]

    def sdpa(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lens: Tensor, **_: Any) -> Tensor:
        k, v = beforehand or (gathered(k_cache, block_table), gathered(v_cache, block_table))
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    return sdpa


def _varlen_attn(arguments: Arguments) -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    missing = {"block_table", "seqused_k", "enable_gqa", "window_size"} - set(names)
    if missing:
        raise RuntimeError(f"varlen_attn of this torch has no {', '.join(sorted(missing))}")
    if "tree_mask" in arguments:
        raise RuntimeError("varlen_attn has no tree mask")
    q, capacity = arguments["q"], arguments["block_table"].shape[1] * arguments["k_cache"].shape[1]
    cu_seqlens = torch.arange(0, q.shape[0] + 1, device=q.device, dtype=torch.int32) * q.shape[1]

    def varlen(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lens: Tensor) -> Any:
        return varlen_attn(
            q.flatten(0, 1), k_cache, v_cache, cu_seqlens, None, q.shape[1], capacity,
            window_size=(-1, 0), enable_gqa=True, seqused_k=lens, block_table=block_table,
        ).view_as(q)  # type: ignore[union-attr]  # fmt: skip

    varlen(**arguments)  # it has limits of its own, on the size of pages among others: known only by trying
    return varlen


def _flash_attn(arguments: Arguments) -> Callable[..., Any]:
    from flash_attn import flash_attn_with_kvcache

    if "tree_mask" in arguments:
        raise RuntimeError("flash_attn_with_kvcache has no tree mask")

    def flash(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lens: Tensor) -> Any:
        return flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lens, block_table=block_table, causal=True)

    flash(**arguments)
    return flash


SPEC = OpSpec(
    name="paged_decode_attention",
    function=paged_decode_attention,
    reference=paged_decode_attention_reference,
    custom_ops=("paged_decode_attention_fwd",),
    differentiable=(),
    cases=_cases,
    example=_example,
    aot=_aot,
    benchmarks=_benchmarks,
    peers={
        "torch sdpa, gathered beforehand": functools.partial(_sdpa, gather=False),
        "torch sdpa with gather": functools.partial(_sdpa, gather=True),
        "torch varlen_attn": _varlen_attn,
        "flash-attn": _flash_attn,
    },
    goal="0.75 of the copy limit where keys and values are at least 256 MB",
    attention=True,
)
