"""Kernels of :func:`hetu_kernels.paged_decode_attention`, and their launcher.

The first kernel walks one part of the keys of a sequence with FlashAttention's online softmax (2205.14135); the second
one merges the parts. The query heads that share a key-value head are rows of the same matrix product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hetu_kernels._common import alloc, checks
from hetu_kernels._common.config import Config, tuned
from hetu_kernels._common.device import dot_precision, on_device, sm_count, smem_limit
from hetu_kernels._common.triton_utils import LN2, LOG2E, cdiv, dotf, next_power_of_2, tanh, tl, triton

LONG_WINDOW = 2**30  # longer than any sequence; differences of indices do not overflow
_DEFAULT_MAX_SPLITS = 64
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
                0 if window is None else min(window, LONG_WINDOW),
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
