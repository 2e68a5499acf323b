"""Backward kernels of :func:`hetu_kernels.varlen_attention`, and their launcher.

The weights are recomputed from the stored log-sum-exp: p = exp(s - lse), ds = p (dp - delta), with delta =
rowsum(dO * O) - dlse (FlashAttention-2, 2307.08691, section 3.2). One kernel owns keys (dK, dV: it loops over the rows
and over the query heads of its group), one owns rows (dQ), one owns elements of the bias (it loops over whatever the
bias is broadcast over). Nothing is added atomically, so the same input gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hetu_kernels._common import alloc
from hetu_kernels._common.checks import contiguous
from hetu_kernels._common.config import Config
from hetu_kernels._common.device import arch, on_device
from hetu_kernels._common.triton_utils import LOG2E, cdiv, dotf, tl, triton
from hetu_kernels.attention._varlen_tiles import (
    NEVER_SPECIALIZE,
    Options,
    bias_strides,
    chunk_of_head_dim,
    config_of,
    load_tile,
    logits,
    padded_head_dim,
    products,
    store_tile,
)
from hetu_kernels.attention.tiling_mask import key_phases, row_phases, visible

GRID_LIMIT = 65_535  # programs in the second or third dimension of a grid, by CUDA


@triton.jit(do_not_specialize=NEVER_SPECIALIZE, do_not_specialize_on_alignment=NEVER_SPECIALIZE)
def _varlen_bwd_delta_kernel(
    out_ptr, dout_ptr, dlse_ptr, delta_ptr,
    stride_out, stride_out_head, stride_dout, stride_dout_head, stride_dlse_head, num_tokens_q,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, heads): ``delta = rowsum(dO * O) - dlse``, float32 ``[heads, tokens]``."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    head = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    out = load_tile(out_ptr + head * stride_out_head, stride_out, rows, num_tokens_q, cols, D, BLOCK_D, False)
    dout = load_tile(dout_ptr + head * stride_dout_head, stride_dout, rows, num_tokens_q, cols, D, BLOCK_D, False)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
    mask = rows < num_tokens_q
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + head * stride_dlse_head + rows, mask=mask, other=0.0).to(tl.float32)
    tl.store(delta_ptr + head * num_tokens_q + rows, delta, mask=mask)


@triton.jit
def _dkv_loop(dk, dv, k, v, q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, stride_q, stride_k, stride_v,
              stride_dout, begin, full_begin, full_end, end, j, cols, len_q, len_k, left, right, scale, softcap, slope,
              bias_ptr, stride_bias_q, stride_bias_k, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr,
              BLOCK_M: tl.constexpr, WANT_DK: tl.constexpr, WANT_DV: tl.constexpr, HAS_LEFT: tl.constexpr,
              HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """Add what one head's rows contribute to a block of keys; everything is transposed, ``[keys, rows]``.

    One loop with a branch around the mask: three loops, one for each phase, spill 130 registers on sm_90 (D = 128).
    """
    for start in range(begin, end, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        q = load_tile(q_ptr, stride_q, i, len_q, cols, D, BLOCK_D, False)
        kq = products(k, q, k_ptr, stride_k, j, len_k, q_ptr, stride_q, i, len_q, D, BLOCK_D, CHUNK_D, PRECISION)
        s, derivative = logits(kq, i[None, :], j[:, None], len_q, len_k,
                                left, right, scale, softcap, slope, bias_ptr, stride_bias_q, stride_bias_k,
                                False, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HAS_BIAS)  # fmt: skip
        if HAS_LEFT or HAS_RIGHT:
            if (start < full_begin) | (start >= full_end):
                mask = visible(i[None, :], j[:, None], len_q, len_k, left, right, HAS_LEFT, HAS_RIGHT)
                s = tl.where(mask, s, float("-inf"))
        at = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_M)
        lse = tl.load(lse_ptr + at, mask=i < len_q, other=float("inf"))
        lse = tl.where(lse == float("-inf"), float("inf"), lse)  # a row that sees nothing has no weights
        p = tl.exp2(s - (lse * LOG2E)[None, :])
        dout = load_tile(dout_ptr, stride_dout, i, len_q, cols, D, BLOCK_D, False)
        if WANT_DV:
            dv = dotf(p.to(dout.dtype), dout, dv, PRECISION)
        if WANT_DK:
            delta = tl.load(delta_ptr + at, mask=i < len_q, other=0.0)
            dp = products(v, dout, v_ptr, stride_v, j, len_k, dout_ptr, stride_dout, i, len_q, D, BLOCK_D, CHUNK_D,
                          PRECISION)  # fmt: skip
            ds = p * (dp - delta[None, :]) * derivative
            dk = dotf(ds.to(q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=NEVER_SPECIALIZE, do_not_specialize_on_alignment=NEVER_SPECIALIZE)
def _varlen_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_q_ptr, cu_k_ptr, slopes_ptr, bias_ptr,
    stride_q, stride_q_head, stride_k, stride_k_head, stride_v, stride_v_head, stride_dout, stride_dout_head,
    stride_bias_batch, stride_bias_head, stride_bias_q, stride_bias_k,
    num_sequences, blocks_per_sequence, num_tokens_q, num_tokens_k, left, right, scale, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WANT_DK: tl.constexpr, WANT_DV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (sequences + 1 times key blocks, key heads); ``dk`` and ``dv`` are contiguous ``[tokens, KV_HEADS, D]``."""
    sequence = tl.program_id(0) // blocks_per_sequence
    block = tl.program_id(0) % blocks_per_sequence
    key_head = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    stride_dk = KV_HEADS * D
    dk_ptr += key_head * D
    dv_ptr += key_head * D
    start_k = tl.load(cu_k_ptr + sequence)
    if sequence == num_sequences:
        first = start_k + tl.cast(block, tl.int64) * BLOCK_N
        for key in range(first, num_tokens_k, tl.cast(blocks_per_sequence, tl.int64) * BLOCK_N):
            keys = key + tl.arange(0, BLOCK_N)
            nothing = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
            if WANT_DK:
                store_tile(dk_ptr, stride_dk, keys, num_tokens_k, cols, nothing, D, BLOCK_D)
            if WANT_DV:
                store_tile(dv_ptr, stride_dk, keys, num_tokens_k, cols, nothing, D, BLOCK_D)
        return
    len_k = tl.load(cu_k_ptr + sequence + 1) - start_k
    key = (tl.cast(block, tl.int64) * BLOCK_N).to(tl.int32)  # it becomes an offset into the bias
    if key >= len_k:
        return
    start_q = tl.load(cu_q_ptr + sequence)
    len_q = tl.load(cu_q_ptr + sequence + 1) - start_q
    j = key + tl.arange(0, BLOCK_N)
    k_ptr += tl.cast(start_k, tl.int64) * stride_k + key_head * stride_k_head
    k = load_tile(k_ptr, stride_k, j, len_k, cols, D, BLOCK_D, False)
    v = k
    if WANT_DK:
        v_ptr += tl.cast(start_k, tl.int64) * stride_v + key_head * stride_v_head
        v = load_tile(v_ptr, stride_v, j, len_k, cols, D, BLOCK_D, False)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    begin, full_begin, full_end, end = row_phases(key, len_q, len_k, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    for member in range(0, GROUP):
        head = key_head * GROUP + member
        q_head_ptr = q_ptr + tl.cast(start_q, tl.int64) * stride_q + head * stride_q_head
        dout_head_ptr = dout_ptr + tl.cast(start_q, tl.int64) * stride_dout + head * stride_dout_head
        lse_head_ptr = lse_ptr + head * num_tokens_q + start_q
        delta_head_ptr = delta_ptr + head * num_tokens_q + start_q
        bias_head_ptr = bias_ptr
        if HAS_BIAS:
            bias_head_ptr = bias_ptr + tl.cast(sequence, tl.int64) * stride_bias_batch + head * stride_bias_head
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(slopes_ptr + head).to(tl.float32)
        dk, dv = _dkv_loop(dk, dv, k, v, q_head_ptr, k_ptr, v_ptr, dout_head_ptr, lse_head_ptr, delta_head_ptr,
                           stride_q, stride_k, stride_v, stride_dout, begin, full_begin, full_end, end, j, cols, len_q,
                           len_k, left, right, scale, softcap, slope, bias_head_ptr, stride_bias_q, stride_bias_k, D,
                           BLOCK_D, CHUNK_D, BLOCK_M, WANT_DK, WANT_DV, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI,
                           HAS_BIAS, PRECISION)  # fmt: skip
    if WANT_DK:
        dk_ptr += tl.cast(start_k, tl.int64) * stride_dk
        store_tile(dk_ptr, stride_dk, j, len_k, cols, dk * scale, D, BLOCK_D)
    if WANT_DV:
        dv_ptr += tl.cast(start_k, tl.int64) * stride_dk
        store_tile(dv_ptr, stride_dk, j, len_k, cols, dv, D, BLOCK_D)


@triton.jit
def _dq_phase(dq, q, dout, lse, delta, q_ptr, dout_ptr, k_ptr, v_ptr, stride_q, stride_dout, stride_k, stride_v,
              begin, end, i, cols, len_q, len_k, left, right, scale, softcap, slope, bias_ptr, stride_bias_q,
              stride_bias_k, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, BLOCK_N: tl.constexpr,
              MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
              HAS_ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add what the keys of one phase contribute to the gradient of a block of rows."""
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, stride_k, n, len_k, cols, D, BLOCK_D, not MASKED)
        v = load_tile(v_ptr, stride_v, n, len_k, cols, D, BLOCK_D, not MASKED)
        qk = products(q, k, q_ptr, stride_q, i, len_q, k_ptr, stride_k, n, len_k, D, BLOCK_D, CHUNK_D, PRECISION)
        s, derivative = logits(qk, i[:, None], n[None, :], len_q, len_k,
                                left, right, scale, softcap, slope, bias_ptr, stride_bias_q, stride_bias_k,
                                MASKED, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HAS_BIAS)  # fmt: skip
        p = tl.exp2(s - lse[:, None])
        dp = products(dout, v, dout_ptr, stride_dout, i, len_q, v_ptr, stride_v, n, len_k, D, BLOCK_D, CHUNK_D,
                      PRECISION)  # fmt: skip
        ds = p * (dp - delta[:, None]) * derivative
        dq = dotf(ds.to(k.dtype), k, dq, PRECISION)
    return dq


@triton.jit(do_not_specialize=NEVER_SPECIALIZE, do_not_specialize_on_alignment=NEVER_SPECIALIZE)
def _varlen_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, cu_q_ptr, cu_k_ptr, slopes_ptr, bias_ptr,
    stride_q, stride_q_head, stride_k, stride_k_head, stride_v, stride_v_head, stride_dout, stride_dout_head,
    stride_bias_batch, stride_bias_head, stride_bias_q, stride_bias_k,
    num_sequences, blocks_per_sequence, num_tokens_q, left, right, scale, softcap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (sequences + 1 times row blocks, heads); ``dq`` is contiguous ``[tokens, HEADS, D]``."""
    sequence = tl.program_id(0) // blocks_per_sequence
    block = blocks_per_sequence - 1 - tl.program_id(0) % blocks_per_sequence
    head = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    stride_dq = HEADS * D
    dq_ptr += head * D
    start_q = tl.load(cu_q_ptr + sequence)
    if sequence == num_sequences:
        first = start_q + tl.cast(block, tl.int64) * BLOCK_M
        for row in range(first, num_tokens_q, tl.cast(blocks_per_sequence, tl.int64) * BLOCK_M):
            nothing = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
            store_tile(dq_ptr, stride_dq, row + tl.arange(0, BLOCK_M), num_tokens_q, cols, nothing, D, BLOCK_D)
        return
    len_q = tl.load(cu_q_ptr + sequence + 1) - start_q
    row = block * BLOCK_M
    if row >= len_q:
        return
    start_k = tl.load(cu_k_ptr + sequence)
    len_k = tl.load(cu_k_ptr + sequence + 1) - start_k
    key_head = head // GROUP
    i = row + tl.arange(0, BLOCK_M)
    q_ptr += tl.cast(start_q, tl.int64) * stride_q + head * stride_q_head
    dout_ptr += tl.cast(start_q, tl.int64) * stride_dout + head * stride_dout_head
    k_ptr += tl.cast(start_k, tl.int64) * stride_k + key_head * stride_k_head
    v_ptr += tl.cast(start_k, tl.int64) * stride_v + key_head * stride_v_head
    if HAS_BIAS:
        bias_ptr += tl.cast(sequence, tl.int64) * stride_bias_batch + head * stride_bias_head
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes_ptr + head).to(tl.float32)
    q = load_tile(q_ptr, stride_q, i, len_q, cols, D, BLOCK_D, False)
    dout = load_tile(dout_ptr, stride_dout, i, len_q, cols, D, BLOCK_D, False)
    at = head * num_tokens_q + start_q + tl.cast(block, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + at, mask=i < len_q, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse) * LOG2E
    delta = tl.load(delta_ptr + at, mask=i < len_q, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    begin, full_begin, full_end, end = key_phases(row, len_q, len_k, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    if HAS_LEFT:
        dq = _dq_phase(dq, q, dout, lse, delta, q_ptr, dout_ptr, k_ptr, v_ptr, stride_q, stride_dout, stride_k,
                       stride_v, begin, full_begin, i, cols, len_q, len_k, left, right, scale, softcap, slope,
                       bias_ptr, stride_bias_q, stride_bias_k, D, BLOCK_D, CHUNK_D, BLOCK_N, True, HAS_LEFT, HAS_RIGHT,
                       HAS_SOFTCAP, HAS_ALIBI, HAS_BIAS, PRECISION)  # fmt: skip
    dq = _dq_phase(dq, q, dout, lse, delta, q_ptr, dout_ptr, k_ptr, v_ptr, stride_q, stride_dout, stride_k, stride_v,
                   full_begin, full_end, i, cols, len_q, len_k, left, right, scale, softcap, slope, bias_ptr,
                   stride_bias_q, stride_bias_k, D, BLOCK_D, CHUNK_D, BLOCK_N, False, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
                   HAS_ALIBI, HAS_BIAS, PRECISION)  # fmt: skip
    dq = _dq_phase(dq, q, dout, lse, delta, q_ptr, dout_ptr, k_ptr, v_ptr, stride_q, stride_dout, stride_k, stride_v,
                   full_end, end, i, cols, len_q, len_k, left, right, scale, softcap, slope, bias_ptr, stride_bias_q,
                   stride_bias_k, D, BLOCK_D, CHUNK_D, BLOCK_N, True, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI,
                   HAS_BIAS, PRECISION)  # fmt: skip
    dq_ptr += tl.cast(start_q, tl.int64) * stride_dq
    store_tile(dq_ptr, stride_dq, i, len_q, cols, dq * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=NEVER_SPECIALIZE, do_not_specialize_on_alignment=NEVER_SPECIALIZE)
def _varlen_bwd_dbias_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dbias_ptr, cu_q_ptr, cu_k_ptr, slopes_ptr, bias_ptr,
    stride_q, stride_q_head, stride_k, stride_k_head, stride_v, stride_v_head, stride_dout, stride_dout_head,
    stride_bias_batch, stride_bias_head, stride_bias_q, stride_bias_k,
    num_sequences, num_tokens_q, left, right, scale, softcap, bias_rows, bias_keys, max_q, max_k,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS_HEADS: tl.constexpr,
    ONE_BATCH: tl.constexpr, ONE_ROW: tl.constexpr, ONE_KEY: tl.constexpr, ROW_AXIS: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (key blocks, row blocks, bias batches times bias heads), the first two the other way with ROW_AXIS = 0:
    gradient of the bias, contiguous, float32.

    A dimension over which the bias is broadcast is looped over: sequences (ONE_BATCH), heads (BIAS_HEADS = 1), rows
    (ONE_ROW) and keys (ONE_KEY).
    """
    bias_batch = tl.program_id(2) // BIAS_HEADS
    bias_head = tl.program_id(2) % BIAS_HEADS
    cols = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    first_batch = bias_batch
    end_batch = bias_batch + 1
    if ONE_BATCH:
        end_batch = num_sequences
    first_head = bias_head
    end_head = bias_head + 1
    if BIAS_HEADS == 1:
        end_head = HEADS
    first_row = tl.program_id(ROW_AXIS) * BLOCK_M
    end_row = first_row + BLOCK_M
    if ONE_ROW:
        end_row = max_q
    first_key = tl.program_id(1 - ROW_AXIS) * BLOCK_N
    end_key = first_key + BLOCK_N
    if ONE_KEY:
        end_key = max_k
    for sequence in range(first_batch, end_batch):
        start_q = tl.load(cu_q_ptr + sequence)
        len_q = tl.load(cu_q_ptr + sequence + 1) - start_q
        start_k = tl.load(cu_k_ptr + sequence)
        len_k = tl.load(cu_k_ptr + sequence + 1) - start_k
        for head in range(first_head, end_head):
            wide_head = tl.cast(head, tl.int64)
            key_head = tl.cast(head // GROUP, tl.int64)
            q_head_ptr = q_ptr + tl.cast(start_q, tl.int64) * stride_q + wide_head * stride_q_head
            dout_head_ptr = dout_ptr + tl.cast(start_q, tl.int64) * stride_dout + wide_head * stride_dout_head
            k_head_ptr = k_ptr + tl.cast(start_k, tl.int64) * stride_k + key_head * stride_k_head
            v_head_ptr = v_ptr + tl.cast(start_k, tl.int64) * stride_v + key_head * stride_v_head
            bias_head_ptr = bias_ptr + tl.cast(sequence, tl.int64) * stride_bias_batch + wide_head * stride_bias_head
            slope = 0.0
            if HAS_ALIBI:
                slope = tl.load(slopes_ptr + head).to(tl.float32)
            for row in range(first_row, tl.minimum(end_row, len_q), BLOCK_M):
                i = row + tl.arange(0, BLOCK_M)
                q = load_tile(q_head_ptr, stride_q, i, len_q, cols, D, BLOCK_D, False)
                dout = load_tile(dout_head_ptr, stride_dout, i, len_q, cols, D, BLOCK_D, False)
                at = wide_head * num_tokens_q + start_q + tl.cast(row, tl.int64) + tl.arange(0, BLOCK_M)
                lse = tl.load(lse_ptr + at, mask=i < len_q, other=float("inf"))
                lse = tl.where(lse == float("-inf"), float("inf"), lse) * LOG2E
                delta = tl.load(delta_ptr + at, mask=i < len_q, other=0.0)
                for key in range(first_key, tl.minimum(end_key, len_k), BLOCK_N):
                    n = key + tl.arange(0, BLOCK_N)
                    k = load_tile(k_head_ptr, stride_k, n, len_k, cols, D, BLOCK_D, False)
                    v = load_tile(v_head_ptr, stride_v, n, len_k, cols, D, BLOCK_D, False)
                    qk = products(q, k, q_head_ptr, stride_q, i, len_q, k_head_ptr, stride_k, n, len_k, D, BLOCK_D,
                                  CHUNK_D, PRECISION)  # fmt: skip
                    s, _ = logits(qk, i[:, None], n[None, :], len_q, len_k,
                                   left, right, scale, softcap, slope, bias_head_ptr, stride_bias_q, stride_bias_k,
                                   True, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, True)  # fmt: skip
                    dp = products(dout, v, dout_head_ptr, stride_dout, i, len_q, v_head_ptr, stride_v, n, len_k, D,
                                  BLOCK_D, CHUNK_D, PRECISION)  # fmt: skip
                    total += tl.exp2(s - lse[:, None]) * (dp - delta[:, None])
    dbias_ptr += tl.program_id(2).to(tl.int64) * bias_rows * bias_keys
    i = tl.program_id(ROW_AXIS).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1 - ROW_AXIS).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    if ONE_ROW and ONE_KEY:
        tl.store(dbias_ptr, tl.sum(tl.sum(total, axis=1), axis=0))
    elif ONE_ROW:
        tl.store(dbias_ptr + n, tl.sum(total, axis=0), mask=n < bias_keys)
    elif ONE_KEY:
        tl.store(dbias_ptr + i, tl.sum(total, axis=1), mask=i < bias_rows)
    else:
        mask = (i < bias_rows)[:, None] & (n < bias_keys)[None, :]
        tl.store(dbias_ptr + (i * bias_keys)[:, None] + n[None, :], total, mask=mask)


def launch_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: Options,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    *,
    want_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the backward kernels.

    Returns:
        ``dq``, ``dk``, ``dv`` like their tensors; ``dbias`` like ``bias`` in float32 (empty unless wanted); and
        ``delta`` float32 ``[heads, tokens]``.
    """
    tokens_q, heads, head_dim = q.shape
    tokens_k, kv_heads, _ = k.shape
    sequences = cu_seqlens_q.shape[0] - 1
    cu_seqlens_q, cu_seqlens_k, alibi_slopes = contiguous(cu_seqlens_q, cu_seqlens_k, alibi_slopes)
    dq, dk, dv = (alloc.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    delta = alloc.empty((heads, tokens_q), dtype=torch.float32, device=q.device)
    dbias_shape = bias.shape if bias is not None and want_dbias else (0,)
    dbias = alloc.empty(dbias_shape, dtype=torch.float32, device=q.device)
    if tokens_q == 0 or tokens_k == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias.zero_(), delta.zero_()
    heavy = options.softcap is not None or alibi_slopes is not None or bias is not None
    block_d = padded_head_dim(head_dim)
    sizes = {
        "D": head_dim, "BLOCK_D": block_d, "CHUNK_D": chunk_of_head_dim(q), "GROUP": heads // kv_heads,
        "HAS_ALIBI": alibi_slopes is not None,
    }  # fmt: skip
    strides = (
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), dout.stride(0), dout.stride(1),
        *bias_strides(bias),
    )  # fmt: skip

    def launch_dkv(config: Config) -> None:
        blocks = max(1, cdiv(max_seqlen_k, config.blocks["BLOCK_N"]))
        # Where both accumulators do not fit into registers, one pass for each.
        passes = ((True, False), (False, True)) if _split_dkv(head_dim) else ((True, True),)
        for want_dk, want_dv in passes:
            _varlen_bwd_dkv_kernel[((sequences + 1) * blocks, kv_heads)](
                q, k, v, dout, lse, delta, dk, dv, cu_seqlens_q, cu_seqlens_k, alibi_slopes, bias, *strides,
                sequences, blocks, tokens_q, tokens_k, *options.runtime,
                KV_HEADS=kv_heads, WANT_DK=want_dk, WANT_DV=want_dv, HAS_BIAS=bias is not None,
                **sizes, **options.flags, **config.kwargs,
            )  # fmt: skip

    def launch_dq(config: Config) -> None:
        blocks = max(1, cdiv(max_seqlen_q, config.blocks["BLOCK_M"]))
        _varlen_bwd_dq_kernel[((sequences + 1) * blocks, heads)](
            q, k, v, dout, lse, delta, dq, cu_seqlens_q, cu_seqlens_k, alibi_slopes, bias, *strides,
            sequences, blocks, tokens_q, *options.runtime,
            HEADS=heads, HAS_BIAS=bias is not None, **sizes, **options.flags, **config.kwargs,
        )  # fmt: skip

    with on_device(q):
        block_m = 16 if arch(q.device) == "interpreter" else 64
        _varlen_bwd_delta_kernel[(cdiv(tokens_q, block_m), heads)](
            out, dout, dlse, delta, out.stride(0), out.stride(1), dout.stride(0), dout.stride(1),
            0 if dlse is None else dlse.stride(0), tokens_q,
            D=head_dim, BLOCK_D=block_d, BLOCK_M=block_m, HAS_DLSE=dlse is not None, num_warps=4,
        )  # fmt: skip
        launch_dkv(config_of("varlen_bwd_dkv", q, max_seqlen_k, launch_dkv, heavy=heavy))
        launch_dq(config_of("varlen_bwd_dq", q, max_seqlen_q, launch_dq, heavy=heavy))
        if bias is not None and want_dbias and dbias.numel():
            config = config_of("varlen_bwd_dbias", q, max_seqlen_k, None, heavy=True)
            batch, bias_heads, bias_rows, bias_keys = bias.shape
            key_blocks = cdiv(bias_keys, config.blocks["BLOCK_N"])
            row_blocks = cdiv(bias_rows, config.blocks["BLOCK_M"])
            # One of the two is within the limit: no memory has room for such a bias that is long both ways. And some
            # sequences at a time are. Were all in one dimension, what a program finds of its place by dividing would
            # take 30 registers of each thread for the whole of its loops, and spill.
            row_axis = 1 if row_blocks <= GRID_LIMIT else 0
            blocks = (key_blocks, row_blocks) if row_axis else (row_blocks, key_blocks)
            step = max(1, GRID_LIMIT // bias_heads)
            for start in range(0, batch, step):
                part = slice(start, start + step)
                _varlen_bwd_dbias_kernel[(*blocks, dbias[part].shape[0] * bias_heads)](
                    q, k, v, dout, lse, delta, dbias[part], cu_seqlens_q[start:], cu_seqlens_k[start:], alibi_slopes,
                    bias[part], *strides,
                    sequences, tokens_q, *options.runtime, bias_rows, bias_keys, max_seqlen_q, max_seqlen_k,
                    HEADS=heads, BIAS_HEADS=bias_heads,
                    ONE_BATCH=batch == 1, ONE_ROW=bias_rows == 1, ONE_KEY=bias_keys == 1, ROW_AXIS=row_axis,
                    **sizes, **options.flags, **config.kwargs,
                )  # fmt: skip
    return dq, dk, dv, dbias, delta


def _split_dkv(head_dim: int) -> bool:
    return padded_head_dim(head_dim) > 128
