"""Attention of a few new tokens over a paged cache of keys and values: decoding, and checking a tree of drafts.

    o = softmax(mask(c tanh(scale q k^T / c) - slope |i - n|)) v

for the last ``T`` tokens of each sequence, whose keys and values are in the cache already. Key ``n`` of a sequence lies
in page ``block_table[n // P]`` at slot ``n % P``; query row ``t`` has index ``i = len - T + t``. A row sees keys up to
its own, or, among the ``T`` newest, those that its bits of the tree mask name (SpecInfer, 2305.09781; Medusa,
2401.10774). Everything else is read once and not masked at all.

One step reads the whole cache to produce a few rows, so the keys of a sequence are split among programs, each of which
leaves its normalized partial result in float32 and the logarithm of its sum of exponentials; a second kernel merges
them:

    lse = log sum_s exp(lse_s),    o = sum_s exp(lse_s - lse) o_s

The online softmax is FlashAttention's (2205.14135). The query heads that share a key-value head are rows of the same
matrix product. Scores, sums and results are in float32; weights are rounded to the dtype of ``v`` for its product.

Keys and values that no row sees are not read, or not used, whatever they are. A value that only some rows of a sequence
see has weight 0 in the others, as in torch's attention: if it is infinite or NaN, they are NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hetu_kernels._common import alloc, checks
from hetu_kernels._common.config import Config, tuned
from hetu_kernels._common.device import dot_precision, may_read, on_device, sm_count, smem_limit, use_triton
from hetu_kernels._common.triton_utils import LN2, LOG2E, cdiv, dotf, next_power_of_2, tanh, tl, triton
from hetu_kernels.attention.decode_ref import paged_decode_attention_reference

MAX_HEAD_DIM = 256
MAX_SPLITS = 256
_DEFAULT_MAX_SPLITS = 64
_PAGE_SIZES = tuple(2**i for i in range(17))
_LONG_WINDOW = 2**30  # longer than any sequence; differences of indices do not overflow
_LOG2E = 1.4426950408889634


@triton.jit
def _load_tile(pointers, inside, d_mask, MASKED: tl.constexpr, PADDED: tl.constexpr):
    """A tile of keys or values, 0 where a mask says so; the common case has no mask."""
    if MASKED:
        return tl.load(pointers, mask=inside[:, None] & d_mask[None, :], other=0.0)
    elif PADDED:
        return tl.load(pointers, mask=d_mask[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _attend(
    acc, peak, total, q, begin, end, k_ptr, v_ptr, table_ptr,
    stride_k_page, stride_k_slot, stride_k_d, stride_v_page, stride_v_slot, stride_v_d,
    first, last, draft_start, position, word_low, word_high, slope, scale, softcap, window,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE_BITS: tl.constexpr, BLOCK_N: tl.constexpr,
    TREE_WORDS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Go on with the online softmax over the keys from ``begin`` to ``end``; MASKED where some are not seen."""
    d = tl.arange(0, BLOCK_D)
    d_mask = d < D
    k_d = (d.to(tl.int64) * stride_k_d)[None, :]
    v_d = (d.to(tl.int64) * stride_v_d)[None, :]
    # Pages are looked up a block ahead: the pipeline then sees loads of keys that wait for nothing.
    n = begin + tl.arange(0, BLOCK_N)
    next_page = tl.load(table_ptr + (n >> PAGE_BITS), mask=n < last, other=0)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = (n >= first) & (n < last)
        page = next_page.to(tl.int64)
        next_page = tl.load(table_ptr + ((n + BLOCK_N) >> PAGE_BITS), mask=n + BLOCK_N < last, other=0)
        slot = (n & ((1 << PAGE_BITS) - 1)).to(tl.int64)
        k_start = (page * stride_k_page + slot * stride_k_slot)[:, None]
        v_start = (page * stride_v_page + slot * stride_v_slot)[:, None]
        k = _load_tile(k_ptr + k_start + k_d, inside, d_mask, MASKED, BLOCK_D != D)
        s = dotf(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_N], dtype=tl.float32), PRECISION) * scale
        if HAS_SOFTCAP:
            s = tanh(s) * softcap
        distance = position[:, None] - n[None, :]
        if HAS_ALIBI:
            s -= slope[:, None] * tl.abs(distance).to(tl.float32)
        if MASKED:
            if TREE_WORDS > 0:
                draft = n - draft_start
                word = word_low[:, None]
                if TREE_WORDS > 1:
                    word = tl.where((draft < 64)[None, :], word_low[:, None], word_high[:, None])
                bit = (word >> (draft & 63).to(tl.int64)[None, :]) & 1
                seen = inside[None, :] & ((draft < 0)[None, :] | (bit != 0))
            else:
                seen = inside[None, :] & (distance >= 0)
            if HAS_WINDOW:
                seen = seen & (distance < window)
            s = tl.where(seen, s, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, axis=1))
        safe_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.exp2(s - safe_peak[:, None])
        alpha = tl.exp2(peak - safe_peak)
        total = total * alpha + tl.sum(p, axis=1)
        peak = new_peak
        v = _load_tile(v_ptr + v_start + v_d, inside, d_mask, MASKED, BLOCK_D != D)
        acc = dotf(p.to(v.dtype), v, acc * alpha[:, None], PRECISION)
    return acc, peak, total


@triton.jit(
    do_not_specialize=["tokens", "row_blocks", "capacity", "num_rows", "window", "stride_table_b", "stride_mask_b"]
)
def _paged_decode_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, lens_ptr, mask_ptr, slopes_ptr, out_ptr, lse_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_page, stride_k_slot, stride_k_h, stride_k_d,
    stride_v_page, stride_v_slot, stride_v_h, stride_v_d, stride_table_b, stride_mask_b, stride_mask_t, stride_mask_w,
    tokens, row_blocks, capacity, num_rows, scale, softcap, window,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGE_BITS: tl.constexpr, TREE_WORDS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (sequences x blocks of rows, key-value heads, splits).

    Rows are the ``G`` query heads of each of the tokens. ``out`` is contiguous ``[splits, tokens, heads, D]`` over the
    tokens of all sequences, ``lse`` float32 ``[splits, tokens, heads]``. ``scale`` and ``softcap`` include log2(e).
    """
    b = (tl.program_id(0) // row_blocks).to(tl.int64)
    row_start = ((tl.program_id(0) % row_blocks).to(tl.int64) * BLOCK_R).to(tl.int32)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    row = row_start + tl.arange(0, BLOCK_R)
    row_mask = row < tokens * G
    t = (row // G).to(tl.int64)
    head = kv_head * G + row % G
    d = tl.arange(0, BLOCK_D)

    length = tl.minimum(tl.maximum(tl.load(lens_ptr + b), 0), capacity).to(tl.int32)
    draft_start = length - tokens
    position = draft_start + row // G
    lowest = draft_start + row_start // G
    highest = draft_start + tl.minimum((row_start + BLOCK_R - 1) // G, tokens - 1)
    # Keys that some row sees are in [first, last); every row sees all of [whole_begin, whole_end).
    first = 0
    whole_begin = 0
    last = tl.maximum(highest + 1, 0)
    whole_end = tl.maximum(lowest + 1, 0)
    if TREE_WORDS > 0:
        last = length
        whole_end = tl.maximum(draft_start, 0)
    if HAS_WINDOW:
        first = tl.maximum(lowest - window + 1, 0)
        whole_begin = tl.maximum(highest - window + 1, 0)
    # This program's share of the blocks, in three phases: masked, whole, masked.
    share = tl.cdiv(last - (first & -BLOCK_N), BLOCK_N * tl.num_programs(2)) * BLOCK_N
    begin = (first & -BLOCK_N) + (split * share).to(tl.int32)
    end = tl.minimum((first & -BLOCK_N) + ((split + 1) * share).to(tl.int32), last)
    whole_begin = tl.minimum(tl.maximum((whole_begin + BLOCK_N - 1) & -BLOCK_N, begin), end)
    whole_end = tl.minimum(tl.maximum(whole_end & -BLOCK_N, whole_begin), end)

    q_start = (b * stride_q_b + t * stride_q_t + head * stride_q_h)[:, None]
    q = tl.load(q_ptr + q_start + d[None, :], mask=row_mask[:, None] & (d < D)[None, :], other=0.0)
    word_low = tl.zeros([BLOCK_R], dtype=tl.int64)
    word_high = word_low
    if TREE_WORDS > 0:
        mask_start = b * stride_mask_b + t * stride_mask_t
        word_low = tl.load(mask_ptr + mask_start, mask=row_mask, other=0)
        if TREE_WORDS > 1:
            word_high = tl.load(mask_ptr + mask_start + stride_mask_w, mask=row_mask, other=0)
    slope = tl.zeros([BLOCK_R], dtype=tl.float32)
    if HAS_ALIBI:
        slope = tl.load(slopes_ptr + head).to(tl.float32) * LOG2E
    acc = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    peak = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_R], dtype=tl.float32)
    k_ptr += kv_head * stride_k_h
    v_ptr += kv_head * stride_v_h
    table_ptr += b * stride_table_b
    if HAS_WINDOW:
        acc, peak, total = _attend(
            acc, peak, total, q, begin, whole_begin, k_ptr, v_ptr, table_ptr,
            stride_k_page, stride_k_slot, stride_k_d, stride_v_page, stride_v_slot, stride_v_d,
            first, last, draft_start, position, word_low, word_high, slope, scale, softcap, window,
            D, BLOCK_D, PAGE_BITS, BLOCK_N, TREE_WORDS, HAS_WINDOW, HAS_SOFTCAP, HAS_ALIBI, PRECISION, True,
        )  # fmt: skip
    acc, peak, total = _attend(
        acc, peak, total, q, whole_begin, whole_end, k_ptr, v_ptr, table_ptr,
        stride_k_page, stride_k_slot, stride_k_d, stride_v_page, stride_v_slot, stride_v_d,
        first, last, draft_start, position, word_low, word_high, slope, scale, softcap, window,
        D, BLOCK_D, PAGE_BITS, BLOCK_N, TREE_WORDS, HAS_WINDOW, HAS_SOFTCAP, HAS_ALIBI, PRECISION, False,
    )  # fmt: skip
    acc, peak, total = _attend(
        acc, peak, total, q, whole_end, end, k_ptr, v_ptr, table_ptr,
        stride_k_page, stride_k_slot, stride_k_d, stride_v_page, stride_v_slot, stride_v_d,
        first, last, draft_start, position, word_low, word_high, slope, scale, softcap, window,
        D, BLOCK_D, PAGE_BITS, BLOCK_N, TREE_WORDS, HAS_WINDOW, HAS_SOFTCAP, HAS_ALIBI, PRECISION, True,
    )  # fmt: skip

    total = tl.where(total == 0.0, 1.0, total)  # of a row that sees nothing; its peak is -inf
    out_row = split * num_rows + (b * tokens + t) * (tl.num_programs(1) * G) + head
    tl.store(lse_ptr + out_row, (peak + tl.log2(total)) * LN2, mask=row_mask)
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_row[:, None] * D + d[None, :], out, mask=row_mask[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["splits", "num_rows"])
def _paged_decode_attention_combine_kernel(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, splits, num_rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid (rows,): merges ``[splits, rows, D]`` into ``[rows, D]``. All are contiguous."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    peak = tl.full([1], float("-inf"), dtype=tl.float32)
    total = tl.zeros([1], dtype=tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        split_mask = split < splits
        source = split.to(tl.int64) * num_rows + row
        lse = tl.load(partial_lse_ptr + source, mask=split_mask, other=float("-inf"))
        mask = split_mask[:, None] & (d < D)[None, :]
        partial = tl.load(partial_ptr + source[:, None] * D + d[None, :], mask=mask, other=0.0)
        new_peak = tl.maximum(peak, tl.max(lse, axis=0))
        safe_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp(lse - safe_peak)
        alpha = tl.exp(peak - safe_peak)
        acc = acc * alpha + tl.sum(weight[:, None] * partial, axis=0)
        total = total * alpha + tl.sum(weight, axis=0)
        peak = new_peak
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(lse_ptr + row + tl.arange(0, 1), peak + tl.log(total))
    tl.store(out_ptr + row * D + d, (acc / total).to(out_ptr.dtype.element_ty), mask=d < D)


def _row_block(rows: int, block_d: int, itemsize: int) -> int:
    """Query rows of one program. More than these are spread over programs that read the same keys."""
    return min(max(16, next_power_of_2(rows)), 256 // itemsize, 65_536 // (block_d * itemsize**2))


def _config(block_r: int, block_d: int, itemsize: int, limit: int) -> Config:
    """Launch of the first kernel: 16 KiB of keys and as many of values at a time, and twice that in flight.

    Args:
        block_r: Query rows of one program.
        block_d: Head dimension, padded.
        itemsize: Bytes per element of the cache.
        limit: Bytes of shared memory of one program.
    """
    size = block_r * block_d * itemsize
    # Large sums leave few registers; so does float32, which is multiplied in parts, and AMD with eight warps.
    crowded = size > 16_384 or itemsize > 2 or (size == 16_384 and limit <= 65_536)
    block_n = min(64, max(16, (8_192 if crowded else 16_384) // (block_d * itemsize)))
    num_stages = 3 if _shared_memory(block_n, 3, block_r, block_d, itemsize) <= limit else 2
    return Config({"BLOCK_N": block_n}, num_warps=8 if size >= 16_384 else 4, num_stages=num_stages)


def _shared_memory(block_n: int, num_stages: int, block_r: int, block_d: int, itemsize: int) -> int:
    """Bytes of shared memory, at most: buffers of keys and values; queries and weights, for some products twice.

    AMD's matrix units take the queries from registers and need less.
    """
    return 2 * ((num_stages - 1) * block_n * block_d + block_r * (block_d + block_n)) * itemsize


def default_num_splits(programs: int, key_blocks: int, device: torch.device) -> int:
    """Into how many parts to split the keys: enough programs for two on every multiprocessor.

    Args:
        programs: Programs without splitting.
        key_blocks: Blocks of keys that the block table has room for.
        device: Where it runs.
    """
    return max(1, min(cdiv(2 * sm_count(device), max(programs, 1)), _DEFAULT_MAX_SPLITS, key_blocks))


def launch_paged_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lens: Tensor,
    scale: float,
    tree_mask: Tensor | None,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    num_splits: int | None,
) -> tuple[Tensor, Tensor]:
    """Run both kernels.

    Args:
        q: ``[B, T, H, D]``.
        k_cache: ``[pages, P, Hkv, D]``.
        v_cache: Like ``k_cache``.
        block_table: ``[B, max_pages]``.
        lens: ``[B]``.
        scale: Factor of the scores.
        tree_mask: ``[B, T]`` or ``[B, T, words]``, int64.
        window: Keys that a row sees up to its own.
        softcap: Bound of the scores.
        alibi_slopes: ``[H]``.
        num_splits: Parts that keys are split into; chosen unless told.

    Returns:
        The result like ``q`` and the log-sum-exp, float32 ``[B, T, H]``, both contiguous.
    """
    batch, tokens, heads, dim = q.shape
    page_size, kv_heads = k_cache.shape[1:3]
    rows = batch * tokens * heads
    out = alloc.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = alloc.empty((batch, tokens, heads), dtype=torch.float32, device=q.device)
    if rows == 0:
        return out, lse
    q, table, lens = checks.last_dim_contiguous(q), checks.last_dim_contiguous(block_table), lens.contiguous()
    slopes = None if alibi_slopes is None else alibi_slopes.contiguous()
    words = 0 if tree_mask is None else 1 if tree_mask.dim() == 2 else tree_mask.shape[2]
    group = heads // kv_heads
    block_d = max(16, next_power_of_2(dim))
    block_r = _row_block(tokens * group, block_d, q.element_size())
    row_blocks = cdiv(tokens * group, block_r)
    capacity = block_table.shape[1] * page_size
    limit = smem_limit(q.device)

    def launch(config: Config) -> None:
        key_blocks = cdiv(capacity, config.blocks["BLOCK_N"])
        splits = num_splits or default_num_splits(batch * row_blocks * kv_heads, key_blocks, q.device)
        partial, partial_lse = out, lse
        if splits > 1:
            partial = alloc.empty((splits, rows, dim), dtype=torch.float32, device=q.device)
            partial_lse = alloc.empty((splits, rows), dtype=torch.float32, device=q.device)
        with on_device(q):
            _paged_decode_attention_fwd_kernel[(batch * row_blocks, kv_heads, splits)](
                q, k_cache, v_cache, table, lens, tree_mask, slopes, partial, partial_lse,
                *q.stride()[:3], *k_cache.stride(), *v_cache.stride(), table.stride(0),
                0 if tree_mask is None else tree_mask.stride(0), 0 if tree_mask is None else tree_mask.stride(1),
                tree_mask.stride(2) if tree_mask is not None and words > 1 else 0,
                tokens, row_blocks, capacity, rows,
                scale * _LOG2E if softcap is None else scale / softcap, 0.0 if softcap is None else softcap * _LOG2E,
                0 if window is None else min(window, _LONG_WINDOW),
                G=group, D=dim, BLOCK_D=block_d, BLOCK_R=block_r, PAGE_BITS=page_size.bit_length() - 1,
                TREE_WORDS=words, HAS_WINDOW=window is not None, HAS_SOFTCAP=softcap is not None,
                HAS_ALIBI=slopes is not None, PRECISION=dot_precision(q, allow_tf32=False), **config.kwargs,
            )  # fmt: skip
            if splits > 1:
                _paged_decode_attention_combine_kernel[(rows,)](
                    partial, partial_lse, out, lse, splits, rows,
                    D=dim, BLOCK_D=block_d, BLOCK_S=16, num_warps=2 if block_d <= 64 else 4,
                )  # fmt: skip

    size = q.element_size()
    candidates = [
        Config({"BLOCK_N": block_n}, num_warps, num_stages)
        for block_n in (32, 64, 128)
        for num_warps in (4, 8)
        for num_stages in (2, 3, 4)
    ]
    launch(
        tuned(
            "paged_decode_attention", (q.dtype, dim, block_r, page_size), q.device,
            _config(block_r, block_d, size, limit), candidates, launch,
            lambda c: _shared_memory(c.blocks["BLOCK_N"], c.num_stages, block_r, block_d, size) <= limit,
        )
    )  # fmt: skip
    return out, lse


@torch.library.custom_op("lightning_hetu::paged_decode_attention_fwd", mutates_args=())
def paged_decode_attention_fwd(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lens: Tensor,
    scale: float,
    tree_mask: Tensor | None,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    num_splits: int | None,
) -> tuple[Tensor, Tensor]:
    """Returns the result like ``q`` ``[B, T, H, D]`` and the log-sum-exp ``[B, T, H]``, at least float32."""
    if may_read(block_table):
        used = _pages_in_use(block_table, lens, k_cache.shape[1], q.shape[1], window)
        checks.indices(
            "paged_decode_attention", "block_table", block_table, k_cache.shape[0], "the pages of k_cache", where=used
        )
    if use_triton(q, needs_dot=True) and q.dtype != torch.float64:
        return launch_paged_decode_attention(
            q, k_cache, v_cache, block_table, lens, scale, tree_mask, window, softcap, alibi_slopes, num_splits
        )
    out, lse = paged_decode_attention_reference(
        q, k_cache, v_cache, block_table, lens,
        scale=scale, tree_mask=tree_mask, window=window, softcap=softcap, alibi_slopes=alibi_slopes, return_lse=True,
    )  # fmt: skip
    return out.contiguous(), lse.contiguous()


def _pages_in_use(block_table: Tensor, lens: Tensor, page_size: int, tokens: int, window: int | None) -> Tensor:
    """Which entries of the block table are read: those of pages with a key that is within the window of any row."""
    length = lens.long().clamp(0, block_table.shape[1] * page_size)[:, None]
    page = torch.arange(block_table.shape[1], device=lens.device)
    used = page * page_size < length
    if window is not None:
        used = used & ((page + 1) * page_size > length - tokens - min(window, _LONG_WINDOW) + 1)
    return used


@paged_decode_attention_fwd.register_fake
def _(q, k_cache, v_cache, block_table, lens, scale, tree_mask, window, softcap, alibi_slopes, num_splits):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


def paged_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lens: Tensor,
    *,
    scale: float | None = None,
    tree_mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest tokens of each sequence over its pages of keys and values.

    For inference: it has no gradients. No value is read back from the device, so it can be captured in a CUDA graph.
    For the same reason the entries of ``block_table`` are checked on the CPU only, unless ``LIGHTNING_HETU_CHECK=1``;
    on a GPU, one that is no page of the cache reads beside it.

    Args:
        q: Queries of the ``T`` newest tokens of each sequence, ``[B, T, H, D]``; ``[B, H, D]`` for one token. ``D`` is
            at most 256.
        k_cache: Keys ``[pages, P, Hkv, D]`` in the dtype of ``q``, those of the newest tokens included. ``P`` is a
            power of two, ``H`` a multiple of ``Hkv``. Any strides; nothing is copied.
        v_cache: Values, shaped like ``k_cache``.
        block_table: Pages of each sequence in order ``[B, max_pages]``, int32 or int64. Entries behind a sequence's
            last page, and those of pages wholly before the window, are not read.
        lens: Tokens of each sequence in the cache, the newest included, ``[B]``, int32 or int64. More than
            ``max_pages * P`` counts as that many. Of a sequence with fewer than ``T``, the last rows of ``q`` are its
            tokens.
        scale: Factor of the scores; ``1 / sqrt(D)`` unless told.
        tree_mask: Which of the ``T`` newest tokens each of them sees: bit ``j`` of ``[B, T]`` int64 is set where row
            ``t`` sees token ``j``, its own included. ``[B, T, 2]`` for up to 128 tokens, the second word for tokens
            from 64. All older keys are seen. Without it, the newest tokens see each other causally.
        window: Of the keys up to its own, a row sees the last ``window``. Distances are those of positions in the
            cache, not of depths in a tree: a draft that is ``window`` or more slots behind is not seen even where the
            tree mask has its bit.
        softcap: Bound ``c`` of the scores, ``c * tanh(s / c)``; finite.
        alibi_slopes: Slope per head ``[H]``; each score loses the slope times the distance in the cache.
        num_splits: Parts that a sequence's keys are split into, 1 to 256. Unless told, enough for the device by ``B``,
            ``T``, ``Hkv`` and ``max_pages``. A number of one's own makes a sequence's result independent of the others
            in the batch, to the bit.
        return_lse: Return the logarithm of the sum of the exponentials of the scores, too.

    Returns:
        The result, shaped like ``q`` and contiguous. With ``return_lse``, also float32 ``[B, T, H]`` (``[B, H]``). A
        row that sees nothing gets 0 and ``-inf``.

    Raises:
        ValueError: If shapes, devices, options or (on the CPU) pages do not fit together.
        TypeError: If a dtype does not, or an argument is of the wrong type.
        RuntimeError: If a tensor requires a gradient.
    """
    op = "paged_decode_attention"
    checks.tensors(op, q=q, k_cache=k_cache, v_cache=v_cache, block_table=block_table, lens=lens)
    checks.same_device(
        op, q=q, k_cache=k_cache, v_cache=v_cache, block_table=block_table, lens=lens, tree_mask=tree_mask,
        alibi_slopes=alibi_slopes,
    )  # fmt: skip
    checks.not_distributed(op, q=q, k_cache=k_cache, v_cache=v_cache)
    checks.floating(op, q=q, alibi_slopes=alibi_slopes)
    checks.same_dtype(op, q=q, k_cache=k_cache, v_cache=v_cache)
    checks.integer(op, block_table=block_table, lens=lens)
    if q.dim() not in (3, 4) or not 1 <= q.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(
            f"{op}: q has shape {list(q.shape)}, expected [B, T, H, D] or [B, H, D] with D from 1 to {MAX_HEAD_DIM}."
        )
    if torch.is_grad_enabled():
        for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("alibi_slopes", alibi_slopes)):
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(f"{op}: {name} requires a gradient, there is none: call it under torch.no_grad().")
    one_token = q.dim() == 3
    queries = q.unsqueeze(1) if one_token else q
    batch, tokens, heads, dim = queries.shape
    _check_cache(op, k_cache, v_cache, heads, dim)
    checks.shape(op, "block_table", block_table, (batch, None), "pages of each sequence")
    checks.shape(op, "lens", lens, (batch,), "one per sequence")
    checks.shape(op, "alibi_slopes", alibi_slopes, (heads,), "one per head of q")
    if tree_mask is not None:
        _check_tree_mask(op, tree_mask, batch, tokens)
    if window is not None:
        window = checks.whole(op, "window", window, at_least=1, meaning=", or None for no window")
    if scale is not None:
        scale = checks.number(op, "scale", scale)
    if softcap is not None:
        softcap = checks.number(op, "softcap", softcap, sign="positive", meaning=", or None for no cap")
    if num_splits is not None:
        num_splits = checks.whole(
            op, "num_splits", num_splits, at_least=1, at_most=MAX_SPLITS, meaning=", or None to choose"
        )
    out, lse = paged_decode_attention_fwd(
        queries, k_cache, v_cache, block_table, lens, 1 / math.sqrt(dim) if scale is None else scale, tree_mask, window,
        softcap, alibi_slopes, num_splits,
    )  # fmt: skip
    if one_token:
        out, lse = out.squeeze(1), lse.squeeze(1)
    return (out, lse) if return_lse else out


def _check_cache(op: str, k_cache: Tensor, v_cache: Tensor, heads: int, dim: int) -> None:
    checks.shape(op, "k_cache", k_cache, (None, None, None, dim), "pages, tokens of a page, heads, D of q")
    checks.shape(op, "v_cache", v_cache, tuple(k_cache.shape), "that of k_cache")
    page_size, kv_heads = k_cache.shape[1:3]
    if page_size not in _PAGE_SIZES:
        raise ValueError(f"{op}: k_cache has pages of {page_size} tokens, expected a power of two.")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{op}: q has {heads} heads, expected a multiple of the {kv_heads} of k_cache.")


def _check_tree_mask(op: str, tree_mask: Tensor, batch: int, tokens: int) -> None:
    if tree_mask.dtype != torch.int64:
        raise TypeError(f"{op}: tree_mask has dtype {tree_mask.dtype}, expected int64.")
    if tree_mask.dim() == 3 and tree_mask.shape[2] in (1, 2):
        checks.shape(op, "tree_mask", tree_mask, (batch, tokens, None), "words of each token of q")
        bits = 64 * tree_mask.shape[2]
    else:
        checks.shape(op, "tree_mask", tree_mask, (batch, tokens), "one word per token of q")
        bits = 64
    if tokens > bits:
        raise ValueError(f"{op}: q has {tokens} tokens, expected at most the {bits} bits of tree_mask.")
