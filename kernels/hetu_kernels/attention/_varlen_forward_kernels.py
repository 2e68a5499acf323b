"""Forward kernel of :func:`hetu_kernels.varlen_attention`, and its launcher.

Per block of rows it keeps the running maximum m, the sum of exp2(s - m) and the weighted sum of values (online softmax,
1805.02867; FlashAttention-2's loop, 2307.08691). It walks the keys in outer blocks of BLOCK_N, each cut into SUBTILES
products for the matrix unit but rescaled once (FastAttention's two-level tiling, 2410.16663), through the three phases
of :mod:`~hetu_kernels.attention.tiling_mask`. Logits are in units of log 2, so that exp2 takes one instruction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hetu_kernels._common import alloc
from hetu_kernels._common.checks import contiguous
from hetu_kernels._common.config import Config
from hetu_kernels._common.device import on_device
from hetu_kernels._common.triton_utils import LN2, LOG2E, cdiv, dotf, tl, triton
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
from hetu_kernels.attention.tiling_mask import key_phases


@triton.jit
def _fwd_phase(acc, m, total, q, q_ptr, k_ptr, v_ptr, stride_q, stride_k, stride_v, begin, end, i, cols, len_q, len_k,
               left, right, scale, softcap, slope, bias_ptr, stride_bias_q, stride_bias_k, D: tl.constexpr,
               BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, BLOCK_N: tl.constexpr, SUBTILES: tl.constexpr,
               MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
               HAS_ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Walk the outer key blocks of one phase."""
    INNER: tl.constexpr = BLOCK_N // SUBTILES
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, INNER)
        k = load_tile(k_ptr, stride_k, n, len_k, cols, D, BLOCK_D, not MASKED)
        qk = products(q, k, q_ptr, stride_q, i, len_q, k_ptr, stride_k, n, len_k, D, BLOCK_D, CHUNK_D, PRECISION)
        s, _ = logits(qk, i[:, None], n[None, :], len_q, len_k, left, right,
                       scale, softcap, slope, bias_ptr, stride_bias_q, stride_bias_k,
                       MASKED, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HAS_BIAS)  # fmt: skip
        m_new = tl.maximum(m, tl.max(s, axis=1))
        if SUBTILES == 2:
            n2 = n + INNER
            k2 = load_tile(k_ptr, stride_k, n2, len_k, cols, D, BLOCK_D, not MASKED)
            qk2 = products(q, k2, q_ptr, stride_q, i, len_q, k_ptr, stride_k, n2, len_k, D, BLOCK_D, CHUNK_D,
                           PRECISION)  # fmt: skip
            s2, _ = logits(qk2, i[:, None], n2[None, :], len_q, len_k, left, right,
                            scale, softcap, slope, bias_ptr, stride_bias_q, stride_bias_k,
                            MASKED, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HAS_BIAS)  # fmt: skip
            m_new = tl.maximum(m_new, tl.max(s2, axis=1))
        # A row that has seen nothing yet has m = -inf, and -inf - -inf is no number.
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        rescale = tl.exp2(m - m_safe)
        p = tl.exp2(s - m_safe[:, None])
        total = total * rescale + tl.sum(p, axis=1)
        acc = acc * rescale[:, None]
        v = load_tile(v_ptr, stride_v, n, len_k, cols, D, BLOCK_D, not MASKED)
        acc = dotf(p.to(v.dtype), v, acc, PRECISION)
        if SUBTILES == 2:
            p2 = tl.exp2(s2 - m_safe[:, None])
            total += tl.sum(p2, axis=1)
            v2 = load_tile(v_ptr, stride_v, n2, len_k, cols, D, BLOCK_D, not MASKED)
            acc = dotf(p2.to(v2.dtype), v2, acc, PRECISION)
        m = m_new
    return acc, m, total


@triton.jit(do_not_specialize=NEVER_SPECIALIZE, do_not_specialize_on_alignment=NEVER_SPECIALIZE)
def _varlen_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, slopes_ptr, bias_ptr, sinks_ptr,
    stride_q, stride_q_head, stride_k, stride_k_head, stride_v, stride_v_head,
    stride_bias_batch, stride_bias_head, stride_bias_q, stride_bias_k,
    num_sequences, blocks_per_sequence, num_tokens_q, left, right, scale, softcap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUBTILES: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (sequences + 1 times row blocks, heads); the last "sequence" is the rows that belong to none.

    ``out`` is contiguous ``[tokens, HEADS, D]``, ``lse`` float32 ``[HEADS, tokens]``.
    """
    sequence = tl.program_id(0) // blocks_per_sequence
    # The longest blocks of a causal sequence first: the short ones then fill the gaps at the end.
    block = blocks_per_sequence - 1 - tl.program_id(0) % blocks_per_sequence
    head = tl.program_id(1)
    cols = tl.arange(0, BLOCK_D)
    out_ptr += tl.cast(head, tl.int64) * D
    lse_ptr += tl.cast(head, tl.int64) * num_tokens_q
    stride_out = HEADS * D
    start_q = tl.load(cu_q_ptr + sequence)
    if sequence == num_sequences:
        first = start_q + tl.cast(block, tl.int64) * BLOCK_M
        for row in range(first, num_tokens_q, tl.cast(blocks_per_sequence, tl.int64) * BLOCK_M):
            rows = row + tl.arange(0, BLOCK_M)
            nothing = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
            store_tile(out_ptr, stride_out, rows, num_tokens_q, cols, nothing, D, BLOCK_D)
            nowhere = tl.full([BLOCK_M], float("-inf"), tl.float32)
            tl.store(lse_ptr + tl.cast(row, tl.int64) + tl.arange(0, BLOCK_M), nowhere, mask=rows < num_tokens_q)
        return
    len_q = tl.load(cu_q_ptr + sequence + 1) - start_q
    row = block * BLOCK_M
    if row >= len_q:
        return
    start_k = tl.load(cu_k_ptr + sequence)
    len_k = tl.load(cu_k_ptr + sequence + 1) - start_k
    key_head = tl.cast(head // GROUP, tl.int64)
    i = row + tl.arange(0, BLOCK_M)
    q_ptr += tl.cast(start_q, tl.int64) * stride_q + tl.cast(head, tl.int64) * stride_q_head
    k_ptr += tl.cast(start_k, tl.int64) * stride_k + key_head * stride_k_head
    v_ptr += tl.cast(start_k, tl.int64) * stride_v + key_head * stride_v_head
    if HAS_BIAS:
        bias_ptr += tl.cast(sequence, tl.int64) * stride_bias_batch + tl.cast(head, tl.int64) * stride_bias_head
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes_ptr + head).to(tl.float32)
    q = load_tile(q_ptr, stride_q, i, len_q, cols, D, BLOCK_D, False)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    begin, full_begin, full_end, end = key_phases(row, len_q, len_k, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    if HAS_LEFT:
        acc, m, total = _fwd_phase(acc, m, total, q, q_ptr, k_ptr, v_ptr, stride_q, stride_k, stride_v, begin,
                                   full_begin, i, cols, len_q, len_k, left, right, scale, softcap, slope, bias_ptr,
                                   stride_bias_q, stride_bias_k, D, BLOCK_D, CHUNK_D, BLOCK_N, SUBTILES, True,
                                   HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HAS_BIAS, PRECISION)  # fmt: skip
    acc, m, total = _fwd_phase(acc, m, total, q, q_ptr, k_ptr, v_ptr, stride_q, stride_k, stride_v, full_begin,
                               full_end, i, cols, len_q, len_k, left, right, scale, softcap, slope, bias_ptr,
                               stride_bias_q, stride_bias_k, D, BLOCK_D, CHUNK_D, BLOCK_N, SUBTILES, False, HAS_LEFT,
                               HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HAS_BIAS, PRECISION)  # fmt: skip
    acc, m, total = _fwd_phase(acc, m, total, q, q_ptr, k_ptr, v_ptr, stride_q, stride_k, stride_v, full_end, end, i,
                               cols, len_q, len_k, left, right, scale, softcap, slope, bias_ptr, stride_bias_q,
                               stride_bias_k, D, BLOCK_D, CHUNK_D, BLOCK_N, SUBTILES, True, HAS_LEFT, HAS_RIGHT,
                               HAS_SOFTCAP, HAS_ALIBI, HAS_BIAS, PRECISION)  # fmt: skip
    if HAS_SINKS:  # one more logit, with no value behind it
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        m_new = tl.maximum(m, sink)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # of a row that sees nothing, where the sink is -inf
        rescale = tl.exp2(m - m_safe)
        total = total * rescale + tl.exp2(sink - m_safe)
        acc = acc * rescale[:, None]
        m = m_new
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), (m + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    out_ptr += tl.cast(start_q, tl.int64) * stride_out
    store_tile(out_ptr, stride_out, i, len_q, cols, acc, D, BLOCK_D)
    lse_ptr += start_q + tl.cast(block, tl.int64) * BLOCK_M
    tl.store(lse_ptr + tl.arange(0, BLOCK_M), lse, mask=i < len_q)


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    options: Options,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run the forward kernel.

    Returns:
        ``out`` like ``q`` and ``lse`` float32 ``[heads, tokens]``.
    """
    tokens, heads, head_dim = q.shape
    out = alloc.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = alloc.empty((heads, tokens), dtype=torch.float32, device=q.device)
    if tokens == 0:
        return out, lse
    sequences = cu_seqlens_q.shape[0] - 1
    cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks = contiguous(cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks)

    def launch(config: Config) -> None:
        blocks = max(1, cdiv(max_seqlen_q, config.blocks["BLOCK_M"]))
        with on_device(q):
            _varlen_fwd_kernel[((sequences + 1) * blocks, heads)](
                q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, alibi_slopes, bias, sinks,
                q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), *bias_strides(bias),
                sequences, blocks, tokens, *options.runtime,
                HEADS=heads, GROUP=heads // k.shape[1], D=head_dim, BLOCK_D=padded_head_dim(head_dim),
                CHUNK_D=chunk_of_head_dim(q), HAS_ALIBI=alibi_slopes is not None, HAS_BIAS=bias is not None,
                HAS_SINKS=sinks is not None, **options.flags, **config.kwargs,
            )  # fmt: skip

    heavy = options.softcap is not None or alibi_slopes is not None or bias is not None
    launch(config_of("varlen_fwd", q, max_seqlen_q, launch, heavy=heavy))
    return out, lse
