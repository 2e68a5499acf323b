"""Kernel and launcher of :func:`rotary`, forward and backward alike: backward rotates the other way.

One tile is some heads of one or more tokens, with all of their pairs; the rows of the tables that they share come from
the cache. The arithmetic is in float32, rounded once at the store.
"""

from __future__ import annotations

import math

from torch import Tensor

from hetu_kernels._common import alloc
from hetu_kernels._common.checks import last_dim_contiguous
from hetu_kernels._common.device import on_device
from hetu_kernels._common.triton_utils import cdiv, next_power_of_2, tl, triton

_TILE = 4096  # elements of one program


@triton.jit(do_not_specialize=["stride_positions_outer", "stride_positions_token", "tokens", "num_rows",
                               "max_position"])  # fmt: skip
def _rotary_kernel(
    x_ptr, cos_ptr, sin_ptr, positions_ptr, y_ptr,
    stride_x_outer, stride_x_token, stride_x_head, stride_cos_row, stride_sin_row,
    stride_positions_outer, stride_positions_token, tokens, num_rows, max_position,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, HALF_BLOCK: tl.constexpr,
    TAIL_BLOCK: tl.constexpr, HAS_POSITIONS: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles,); a row is one head of one token. ``y`` is contiguous."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < num_rows
    head = (row % HEADS).to(tl.int64)
    token = ((row // HEADS) % tokens).to(tl.int64)
    outer = ((row // HEADS) // tokens).to(tl.int64)
    if HAS_POSITIONS:
        at = outer * stride_positions_outer + token * stride_positions_token
        position = tl.load(positions_ptr + at, mask=row_mask, other=0).to(tl.int64)
    else:
        position = token
    x_start = (outer * stride_x_outer + token * stride_x_token + head * stride_x_head)[:, None]
    y_start = (row.to(tl.int64) * HEAD_DIM)[:, None]
    mask = row_mask[:, None]
    in_table = ((position >= 0) & (position < max_position))[:, None]

    pair = tl.arange(0, HALF_BLOCK)[None, :]
    half_mask = mask & (pair < HALF)
    table_mask = in_table & (pair < HALF)
    nan = float("nan")
    c = tl.load(cos_ptr + (position * stride_cos_row)[:, None] + pair, mask=table_mask, other=nan).to(tl.float32)
    s = tl.load(sin_ptr + (position * stride_sin_row)[:, None] + pair, mask=table_mask, other=nan).to(tl.float32)
    if INVERSE:
        s = -s
    if INTERLEAVED:
        both = tl.arange(0, 2 * HALF_BLOCK)[None, :]
        both_mask = mask & (both < 2 * HALF)
        x = tl.load(x_ptr + x_start + both, mask=both_mask, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, [ROWS, HALF_BLOCK, 2]))
        y = tl.interleave(first * c - second * s, second * c + first * s)
        tl.store(y_ptr + y_start + both, y.to(y_ptr.dtype.element_ty), mask=both_mask)
    else:
        first = tl.load(x_ptr + x_start + pair, mask=half_mask, other=0.0).to(tl.float32)
        second = tl.load(x_ptr + x_start + HALF + pair, mask=half_mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + y_start + pair, (first * c - second * s).to(y_ptr.dtype.element_ty), mask=half_mask)
        tl.store(y_ptr + y_start + HALF + pair, (second * c + first * s).to(y_ptr.dtype.element_ty), mask=half_mask)
    if HEAD_DIM > 2 * HALF:  # what is not rotated
        tail = 2 * HALF + tl.arange(0, TAIL_BLOCK)[None, :]
        tail_mask = mask & (tail < HEAD_DIM)
        tl.store(y_ptr + y_start + tail, tl.load(x_ptr + x_start + tail, mask=tail_mask), mask=tail_mask)


def launch_rotary(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, *, interleaved: bool, inverse: bool
) -> Tensor:
    """Run the kernel.

    Args:
        x: ``[..., tokens, heads, head_dim]``.
        cos: ``[max_position, rotary_dim / 2]``.
        sin: Shaped like ``cos``.
        positions: ``[tokens]`` or ``x.shape[:-2]``.
        interleaved: Pairs are neighbors.
        inverse: Rotate back.

    Returns:
        Rotated heads, shaped like ``x`` and contiguous.
    """
    tokens, heads, head_dim = x.shape[-3:]
    y = alloc.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    outer, half = math.prod(x.shape[:-3]), cos.shape[1]
    x = last_dim_contiguous(x).reshape(outer, tokens, heads, head_dim)
    cos, sin = last_dim_contiguous(cos), last_dim_contiguous(sin)
    if positions is not None:
        positions = positions.expand(outer, tokens) if positions.dim() == 1 else positions.reshape(outer, tokens)
    rows, count = max(1, _TILE // next_power_of_2(head_dim)), outer * tokens * heads
    with on_device(x):
        _rotary_kernel[(cdiv(count, rows),)](
            x, cos, sin, positions, y, *x.stride()[:3], cos.stride(0), sin.stride(0),
            *((0, 0) if positions is None else positions.stride()), tokens, count, cos.shape[0],
            HEADS=heads, HEAD_DIM=head_dim, HALF=half, ROWS=rows, HALF_BLOCK=next_power_of_2(half),
            TAIL_BLOCK=next_power_of_2(head_dim - 2 * half), HAS_POSITIONS=positions is not None,
            INTERLEAVED=interleaved, INVERSE=inverse, num_warps=4,
        )  # fmt: skip
    return y
