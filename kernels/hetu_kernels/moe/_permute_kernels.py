"""Kernels and launchers that move the rows of :func:`permute` and :func:`unpermute`.

Tokens are read once and written to all of their rows, not gathered row by row: with k choices that moves 1 + k rows a
token instead of 2k. Copies are of integers of the elements' size: bits arrive as they were, and one binary serves all
dtypes of a size. Sums are in float32, over ascending choices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hetu_kernels._common import alloc
from hetu_kernels._common.checks import contiguous, last_dim_contiguous
from hetu_kernels._common.config import Config, row_config
from hetu_kernels._common.device import on_device
from hetu_kernels._common.triton_utils import cdiv, tl, triton

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
_COLUMNS = 2048
_TILE = 4096
_UNROLL = 8  # choices whose rows are on their way at the same time


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _permute_rows_kernel(
    x_ptr, position_ptr, offsets_ptr, rows_ptr, stride_x_row, num_tokens, num_rows,
    N: tl.constexpr, E: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (token tiles x column blocks,), columns first. ``rows`` is contiguous ``[num_rows, N]``; those behind the
    last assignment are set to 0, every program its share.
    """
    COLUMN_BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    tile = tl.program_id(0).to(tl.int64) // COLUMN_BLOCKS
    token = tile * ROWS + tl.arange(0, ROWS)
    c = (tl.program_id(0) % COLUMN_BLOCKS).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    cols = c[None, :]
    value = tl.load(x_ptr + token[:, None] * stride_x_row + cols, mask=(token < num_tokens)[:, None] & (cols < N))
    for j in range(0, K):
        position = tl.load(position_ptr + token * K + j, mask=token < num_tokens, other=-1).to(tl.int64)[:, None]
        tl.store(rows_ptr + position * N + cols, value, mask=(position >= 0) & (cols < N))
    taken = tl.load(offsets_ptr + E)
    for row in range(taken + tile, num_rows, tl.num_programs(0) // COLUMN_BLOCKS):
        zeros = tl.zeros([BLOCK], dtype=rows_ptr.dtype.element_ty)
        tl.store(rows_ptr + tl.cast(row, tl.int64) * N + c, zeros, mask=c < N)


@triton.jit(do_not_specialize=["num_tokens"])
def _unpermute_fwd_kernel(
    rows_ptr, position_ptr, weights_ptr, y_ptr, stride_rows_row, num_tokens,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    UNROLL: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Grid (token tiles x column blocks,), columns first. ``y`` is contiguous ``[num_tokens, N]``: sums of rows, with
    weights or without.
    """
    COLUMN_BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    pid = tl.program_id(0).to(tl.int64)
    token = (pid // COLUMN_BLOCKS) * ROWS + tl.arange(0, ROWS)
    cols = ((pid % COLUMN_BLOCKS) * BLOCK + tl.arange(0, BLOCK))[None, :]
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for j in tl.range(0, K, loop_unroll_factor=UNROLL):
        position = tl.load(position_ptr + token * K + j, mask=token < num_tokens, other=-1).to(tl.int64)
        there = (position >= 0)[:, None]
        value = tl.load(rows_ptr + position[:, None] * stride_rows_row + cols, mask=there & (cols < N), other=0.0).to(
            tl.float32
        )
        if HAS_WEIGHTS:
            value *= tl.load(weights_ptr + token * K + j, mask=position >= 0, other=0.0)[:, None]
        total += value
    mask = (token < num_tokens)[:, None] & (cols < N)
    tl.store(y_ptr + token[:, None] * N + cols, total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_slots"])
def _unpermute_bwd_kernel(
    dy_ptr, rows_ptr, position_ptr, weights_ptr, drows_ptr, dweights_ptr, named_ptr,
    stride_dy_row, stride_rows_row, num_slots,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of assignments,). ``drows`` is contiguous ``[num_rows, N]``; ``named`` is set to 1 where a row of it
    is written.
    """
    slot = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    position = tl.load(position_ptr + slot, mask=slot < num_slots, other=-1).to(tl.int64)
    there = position >= 0
    weight = tl.load(weights_ptr + slot, mask=there, other=0.0)[:, None]
    row, token = position[:, None], (slot // K)[:, None]
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for first in range(0, N, BLOCK):
        cols = (first + tl.arange(0, BLOCK))[None, :]
        mask = there[:, None] & (cols < N)
        dy = tl.load(dy_ptr + token * stride_dy_row + cols, mask=mask, other=0.0).to(tl.float32)
        total += dy * tl.load(rows_ptr + row * stride_rows_row + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(drows_ptr + row * N + cols, (weight * dy).to(drows_ptr.dtype.element_ty), mask=mask)
    tl.store(dweights_ptr + slot, tl.sum(total, axis=1), mask=slot < num_slots)
    tl.store(named_ptr + position, tl.full([ROWS], 1, dtype=tl.int32), mask=there)


@triton.jit(do_not_specialize=["num_rows"])
def _unpermute_zero_kernel(named_ptr, drows_ptr, num_rows, N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (row tiles x column blocks,), columns first. Sets the rows of ``[num_rows, N]`` to 0 that are not named."""
    COLUMN_BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    pid = tl.program_id(0).to(tl.int64)
    row = (pid // COLUMN_BLOCKS) * ROWS + tl.arange(0, ROWS)
    cols = ((pid % COLUMN_BLOCKS) * BLOCK + tl.arange(0, BLOCK))[None, :]
    named = tl.load(named_ptr + row, mask=row < num_rows, other=1)
    zeros = tl.zeros([ROWS, BLOCK], dtype=drows_ptr.dtype.element_ty)
    tl.store(drows_ptr + row[:, None] * N + cols, zeros, mask=(named == 0)[:, None] & (cols < N))


def _config(n: int) -> Config:
    return row_config(n, limit=_COLUMNS, tile=_TILE)


def _grid(count: int, n: int, config: Config) -> tuple[int]:
    return (cdiv(count, config.blocks["ROWS"]) * cdiv(n, config.blocks["BLOCK"]),)


def launch_permute_rows(x: Tensor, position_of: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
    """Copy tokens to their rows.

    Args:
        x: ``[tokens, n]``.
        position_of: Rows of each token, int32 ``[tokens, choices]``, contiguous; -1 for none.
        offsets: Int32; its last entry is the number of rows that are taken.
        num_rows: Rows of the result.

    Returns:
        ``[num_rows, n]``; zeros where no token goes.
    """
    tokens, n = x.shape
    rows = alloc.empty((num_rows, n), dtype=x.dtype, device=x.device)
    if not tokens:
        return rows.zero_()
    if rows.numel():
        integer = _INTEGERS[x.element_size()]
        source, config = last_dim_contiguous(x).view(integer), _config(n)
        with on_device(x):
            _permute_rows_kernel[_grid(tokens, n, config)](
                source, position_of, offsets, rows.view(integer), source.stride(0), tokens, num_rows,
                N=n, E=offsets.shape[0] - 1, K=position_of.shape[1], **config.kwargs,
            )  # fmt: skip
    return rows


def launch_gather_sum(rows: Tensor, position_of: Tensor, weights: Tensor | None) -> Tensor:
    """Sum up the rows of each token.

    Args:
        rows: ``[num_rows, n]``.
        position_of: Rows of each token, ``[tokens, choices]``; negative for none.
        weights: What each is multiplied by, float32 ``[tokens, choices]``; None for 1.

    Returns:
        ``[tokens, n]`` in the dtype of ``rows``.
    """
    (tokens, choices), n = position_of.shape, rows.shape[1]
    y = alloc.empty((tokens, n), dtype=rows.dtype, device=rows.device)
    if y.numel():
        config = _config(n)
        rows = last_dim_contiguous(rows)
        position_of, weights = contiguous(position_of, weights)
        with on_device(rows):
            _unpermute_fwd_kernel[_grid(tokens, n, config)](
                rows, position_of, weights, y, rows.stride(0), tokens,
                N=n, K=choices, UNROLL=min(choices, _UNROLL), HAS_WEIGHTS=weights is not None, **config.kwargs,
            )  # fmt: skip
    return y


def launch_unpermute_backward(dy: Tensor, rows: Tensor, position_of: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Run the backward kernels of :func:`unpermute`.

    Args:
        dy: Gradient of the sums, ``[tokens, n]``.
        rows: As in forward.
        position_of: As in forward.
        weights: As in forward.

    Returns:
        The gradients of ``rows``, in their dtype, and of ``weights``.
    """
    count, n = rows.shape
    drows = alloc.empty((count, n), dtype=rows.dtype, device=rows.device)
    dweights = alloc.empty(weights.shape, dtype=torch.float32, device=rows.device)
    named = alloc.empty((count,), dtype=torch.int32, device=rows.device).zero_()
    config = _config(n)
    dy, rows = last_dim_contiguous(dy), last_dim_contiguous(rows)
    position_of, weights = contiguous(position_of, weights)
    with on_device(rows):
        if weights.numel():
            _unpermute_bwd_kernel[(cdiv(weights.numel(), config.blocks["ROWS"]),)](
                dy, rows, position_of, weights, drows, dweights, named, dy.stride(0), rows.stride(0), weights.numel(),
                N=n, K=weights.shape[1], **config.kwargs,
            )  # fmt: skip
        if drows.numel():
            _unpermute_zero_kernel[_grid(count, n, config)](named, drows, count, N=n, **config.kwargs)
    return drows, dweights
