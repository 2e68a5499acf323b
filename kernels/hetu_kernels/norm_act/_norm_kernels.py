"""Kernels and launchers that RMSNorm and LayerNorm share.

    z = x + bias + residual
    y = (z - mean) * rstd * weight + shift        mean = 0 for RMSNorm, shift for LayerNorm only
    rstd = rsqrt(mean((z - mean)^2) + eps)

and backward, with ``xhat = (z - mean) * rstd`` and ``g = weight * dy``:

    dz = rstd * (g - xhat * mean(g * xhat) - mean(g)) + dz_in        the last mean for LayerNorm only

All arithmetic is in float32. ``z`` is rounded as it is stored before it is normalized, so that backward, which reads it
again, differentiates what forward computed. The variance is taken in two passes (mean first, then squared deviations):
the shortcut E[z^2] - E[z]^2 cancels where the mean is large. Weight gradients are summed per program into rows of a
float32 buffer, then over the rows, in a fixed order: no atomics, the same bits every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hetu_kernels._common import alloc
from hetu_kernels._common.checks import contiguous
from hetu_kernels._common.checks import rows as as_rows
from hetu_kernels._common.config import row_config
from hetu_kernels._common.device import on_device, sm_count
from hetu_kernels._common.triton_utils import cdiv, tl, triton

# Longest row that one program can hold beside its weight gradients without spilling on sm_90 (16 warps): three sums of
# gradients (weight, shift, bias) take the registers of half a row more than two.
_FUSED_BACKWARD_LIMIT = 8192
_FUSED_BACKWARD_LIMIT_THREE_SUMS = 4096


@triton.jit
def _load_z(x_ptr, residual_ptr, bias_ptr, x_start, residual_start, cols, mask, col_mask,
            HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, Z_TYPE: tl.constexpr):  # fmt: skip
    """``x + bias + residual`` for a tile of rows, in float32 but rounded as it is stored."""
    z = tl.load(x_ptr + x_start + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        z += tl.load(residual_ptr + residual_start + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL or HAS_BIAS:
        z = z.to(Z_TYPE).to(tl.float32)
    return z


@triton.jit
def _store_y(y_ptr, weight_ptr, shift_ptr, start, cols, xhat, mask, col_mask,
             ZERO_CENTERED: tl.constexpr, HAS_SHIFT: tl.constexpr):  # fmt: skip
    """Scale, shift and store a tile of normalized rows."""
    weight = tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
    if ZERO_CENTERED:
        weight += 1.0
    y = xhat * weight
    if HAS_SHIFT:
        y += tl.load(shift_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + start + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, shift_ptr, bias_ptr, y_ptr, z_ptr, mean_ptr, rstd_ptr,
    stride_x_row, stride_residual_row, num_rows, eps,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SUBTRACT_MEAN: tl.constexpr, ZERO_CENTERED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_BIAS: tl.constexpr, STORE_Z: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles,). ``y``, ``z`` are contiguous ``[rows, N]``; ``mean``, ``rstd`` float32 ``[rows]``."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = row < num_rows
    cols = tl.arange(0, BLOCK)[None, :]
    x_start = (row * stride_x_row)[:, None]
    residual_start = (row * stride_residual_row)[:, None]
    out_start = (row * N)[:, None]
    if N <= BLOCK:
        col_mask = cols < N
        mask = row_mask[:, None] & col_mask
        z = _load_z(x_ptr, residual_ptr, bias_ptr, x_start, residual_start, cols, mask, col_mask,
                    HAS_RESIDUAL, HAS_BIAS, z_ptr.dtype.element_ty)  # fmt: skip
        if STORE_Z:
            tl.store(z_ptr + out_start + cols, z.to(z_ptr.dtype.element_ty), mask=mask)
        if SUBTRACT_MEAN:
            mean = tl.sum(z, axis=1) / N
            z = tl.where(col_mask, z - mean[:, None], 0.0)
            tl.store(mean_ptr + row, mean, mask=row_mask)
        rstd = tl.rsqrt(tl.sum(z * z, axis=1) / N + eps)
        tl.store(rstd_ptr + row, rstd, mask=row_mask)
        _store_y(y_ptr, weight_ptr, shift_ptr, out_start, cols, z * rstd[:, None], mask, col_mask,
                 ZERO_CENTERED, HAS_SHIFT)  # fmt: skip
    else:
        tl.static_assert(ROWS == 1, "a row that takes several blocks has a program of its own")
        total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        mean = tl.zeros([ROWS], dtype=tl.float32)
        if SUBTRACT_MEAN:
            for start in range(0, N, BLOCK):
                c = start + cols
                col_mask = c < N
                mask = row_mask[:, None] & col_mask
                total += _load_z(x_ptr, residual_ptr, bias_ptr, x_start, residual_start, c, mask, col_mask,
                                 HAS_RESIDUAL, HAS_BIAS, z_ptr.dtype.element_ty)  # fmt: skip
            mean = tl.sum(total, axis=1) / N
            tl.store(mean_ptr + row, mean)
            total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        for start in range(0, N, BLOCK):
            c = start + cols
            col_mask = c < N
            mask = row_mask[:, None] & col_mask
            z = _load_z(x_ptr, residual_ptr, bias_ptr, x_start, residual_start, c, mask, col_mask,
                        HAS_RESIDUAL, HAS_BIAS, z_ptr.dtype.element_ty)  # fmt: skip
            if STORE_Z:
                tl.store(z_ptr + out_start + c, z.to(z_ptr.dtype.element_ty), mask=mask)
            z = tl.where(col_mask, z - mean[:, None], 0.0)
            total += z * z
        rstd = tl.rsqrt(tl.sum(total, axis=1) / N + eps)
        tl.store(rstd_ptr + row, rstd)
        for start in range(0, N, BLOCK):
            c = start + cols
            col_mask = c < N
            mask = row_mask[:, None] & col_mask
            z = _load_z(x_ptr, residual_ptr, bias_ptr, x_start, residual_start, c, mask, col_mask,
                        HAS_RESIDUAL, HAS_BIAS, z_ptr.dtype.element_ty)  # fmt: skip
            _store_y(y_ptr, weight_ptr, shift_ptr, out_start, c, (z - mean[:, None]) * rstd[:, None], mask, col_mask,
                     ZERO_CENTERED, HAS_SHIFT)  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _norm_bwd_kernel(
    dy_ptr, dz_in_ptr, z_ptr, weight_ptr, mean_ptr, rstd_ptr, dz_ptr, dweight_ptr, dshift_ptr, dbias_ptr,
    stride_dy_row, stride_dz_in_row, stride_z_row, num_rows,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SUBTRACT_MEAN: tl.constexpr, ZERO_CENTERED: tl.constexpr,
    HAS_DZ_IN: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Grid (programs,): each takes every ``programs``-th row tile and leaves one row of partial sums, float32."""
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)[None, :]
    col_mask = cols < N
    weight = tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
    if ZERO_CENTERED:
        weight += 1.0
    dweight = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    dshift = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for tile in range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        row_mask = row < num_rows
        mask = row_mask[:, None] & col_mask
        dy = tl.load(dy_ptr + (row * stride_dy_row)[:, None] + cols, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + (row * stride_z_row)[:, None] + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row_mask, other=0.0)[:, None]
        g = dy * weight
        if SUBTRACT_MEAN:
            mean = tl.load(mean_ptr + row, mask=row_mask, other=0.0)[:, None]
            xhat = tl.where(mask, (z - mean) * rstd, 0.0)
            dz = g - xhat * (tl.sum(g * xhat, axis=1) / N)[:, None] - (tl.sum(g, axis=1) / N)[:, None]
        else:
            xhat = z * rstd
            dz = g - xhat * (tl.sum(g * xhat, axis=1) / N)[:, None]
        dz = dz * rstd
        if HAS_DZ_IN:
            dz += tl.load(dz_in_ptr + (row * stride_dz_in_row)[:, None] + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(dz_ptr + (row * N)[:, None] + cols, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        dweight += dy * xhat
        if HAS_SHIFT:
            dshift += dy
        if HAS_BIAS:
            dbias += tl.where(mask, dz, 0.0)
    out = program.to(tl.int64) * N + tl.arange(0, BLOCK)
    out_mask = tl.arange(0, BLOCK) < N
    tl.store(dweight_ptr + out, tl.sum(dweight, axis=0), mask=out_mask)
    if HAS_SHIFT:
        tl.store(dshift_ptr + out, tl.sum(dshift, axis=0), mask=out_mask)
    if HAS_BIAS:
        tl.store(dbias_ptr + out, tl.sum(dbias, axis=0), mask=out_mask)


@triton.jit
def _norm_bwd_wide_kernel(
    dy_ptr, dz_in_ptr, z_ptr, weight_ptr, mean_ptr, rstd_ptr, dz_ptr,
    stride_dy_row, stride_dz_in_row, stride_z_row,
    N: tl.constexpr, BLOCK: tl.constexpr, SUBTRACT_MEAN: tl.constexpr, ZERO_CENTERED: tl.constexpr,
    HAS_DZ_IN: tl.constexpr,
):  # fmt: skip
    """Grid (rows,): ``dz`` of one row that is too long to be held, in two passes over its columns."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    rstd = tl.load(rstd_ptr + row)
    mean = 0.0
    if SUBTRACT_MEAN:
        mean = tl.load(mean_ptr + row)
    sum_g = tl.zeros([BLOCK], dtype=tl.float32)
    sum_g_xhat = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, N, BLOCK):
        c = start + cols
        mask = c < N
        g = tl.load(dy_ptr + row * stride_dy_row + c, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + c, mask=mask, other=0.0).to(tl.float32)
        if ZERO_CENTERED:
            weight += 1.0
        g *= weight
        z = tl.load(z_ptr + row * stride_z_row + c, mask=mask, other=0.0).to(tl.float32)
        sum_g += g
        sum_g_xhat += tl.where(mask, g * (z - mean) * rstd, 0.0)
    mean_g_xhat = tl.sum(sum_g_xhat, axis=0) / N
    mean_g = 0.0
    if SUBTRACT_MEAN:
        mean_g = tl.sum(sum_g, axis=0) / N
    for start in range(0, N, BLOCK):
        c = start + cols
        mask = c < N
        g = tl.load(dy_ptr + row * stride_dy_row + c, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + c, mask=mask, other=0.0).to(tl.float32)
        if ZERO_CENTERED:
            weight += 1.0
        z = tl.load(z_ptr + row * stride_z_row + c, mask=mask, other=0.0).to(tl.float32)
        dz = (g * weight - (z - mean) * rstd * mean_g_xhat - mean_g) * rstd
        if HAS_DZ_IN:
            dz += tl.load(dz_in_ptr + row * stride_dz_in_row + c, mask=mask, other=0.0).to(tl.float32)
        tl.store(dz_ptr + row * N + c, dz.to(dz_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _norm_weight_grad_kernel(
    dy_ptr, z_ptr, mean_ptr, rstd_ptr, dz_ptr, dweight_ptr, dshift_ptr, dbias_ptr,
    stride_dy_row, stride_z_row, num_rows,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SUBTRACT_MEAN: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Grid (column blocks, programs): partial weight gradients of long rows."""
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    cols = c[None, :]
    col_mask = cols < N
    dweight = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    dshift = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(num_rows, ROWS), tl.num_programs(1)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        row_mask = row < num_rows
        mask = row_mask[:, None] & col_mask
        dy = tl.load(dy_ptr + (row * stride_dy_row)[:, None] + cols, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + (row * stride_z_row)[:, None] + cols, mask=mask, other=0.0).to(tl.float32)
        if SUBTRACT_MEAN:
            z -= tl.load(mean_ptr + row, mask=row_mask, other=0.0)[:, None]
        dweight += dy * z * tl.load(rstd_ptr + row, mask=row_mask, other=0.0)[:, None]
        if HAS_SHIFT:
            dshift += dy
        if HAS_BIAS:
            dbias += tl.load(dz_ptr + (row * N)[:, None] + cols, mask=mask, other=0.0).to(tl.float32)
    out = tl.program_id(1).to(tl.int64) * N + c
    tl.store(dweight_ptr + out, tl.sum(dweight, axis=0), mask=c < N)
    if HAS_SHIFT:
        tl.store(dshift_ptr + out, tl.sum(dshift, axis=0), mask=c < N)
    if HAS_BIAS:
        tl.store(dbias_ptr + out, tl.sum(dbias, axis=0), mask=c < N)


def launch_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    subtract_mean: bool,
    zero_centered: bool,
    z_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the forward kernel.

    Returns:
        ``y`` like ``x``; ``z`` like ``x`` in ``z_dtype``, empty where it would equal ``x``; ``mean`` (empty for
        RMSNorm) and ``rstd``, float32 ``[rows]``.
    """
    n = x.shape[-1]
    weight, shift, bias = contiguous(weight, shift, bias)
    x_rows = as_rows(x)
    residual_rows = None if residual is None else as_rows(residual)
    count = x_rows.shape[0]
    store_z = residual is not None or bias is not None
    y = alloc.empty(x.shape, dtype=x.dtype, device=x.device)
    z = alloc.empty(x.shape if store_z else (0,), dtype=z_dtype, device=x.device)
    mean = alloc.empty((count if subtract_mean else 0,), dtype=torch.float32, device=x.device)
    rstd = alloc.empty((count,), dtype=torch.float32, device=x.device)
    if count:
        config = row_config(n)
        with on_device(x):
            _norm_fwd_kernel[(cdiv(count, config.blocks["ROWS"]),)](
                x_rows, residual_rows, weight, shift, bias, y, z, mean, rstd,
                x_rows.stride(0), 0 if residual_rows is None else residual_rows.stride(0), count, eps,
                N=n, SUBTRACT_MEAN=subtract_mean, ZERO_CENTERED=zero_centered,
                HAS_RESIDUAL=residual is not None, HAS_SHIFT=shift is not None, HAS_BIAS=bias is not None,
                STORE_Z=store_z, **config.kwargs,
            )  # fmt: skip
    return y, z, mean, rstd


def launch_norm_backward(
    dy: Tensor,
    dz_in: Tensor | None,
    z: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *,
    subtract_mean: bool,
    zero_centered: bool,
    has_shift: bool,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the backward kernels.

    Returns:
        ``dz`` like ``z``; the gradients of weight, shift and bias, float32 ``[n]`` (empty where there is none).
    """
    n = z.shape[-1]
    weight, mean, rstd = contiguous(weight, mean, rstd)
    dz = alloc.empty(z.shape, dtype=z.dtype, device=z.device)
    z_rows, dy_rows = as_rows(z), as_rows(dy)
    dz_in_rows = None if dz_in is None else as_rows(dz_in)
    count = z_rows.shape[0]
    if not count:
        zeros = [
            torch.zeros(n if has else 0, dtype=torch.float32, device=z.device) for has in (True, has_shift, has_bias)
        ]
        return dz, zeros[0], zeros[1], zeros[2]
    limit = _FUSED_BACKWARD_LIMIT_THREE_SUMS if has_shift and has_bias else _FUSED_BACKWARD_LIMIT
    config = row_config(n, limit=limit)
    tiles = cdiv(count, config.blocks["ROWS"])
    programs = min(tiles, sm_count(z.device) * max(1, 16 // config.num_warps))

    def partial(has: bool) -> Tensor:
        return alloc.empty((programs if has else 0, n), dtype=torch.float32, device=z.device)

    dweight, dshift, dbias = partial(True), partial(has_shift), partial(has_bias)
    dz_in_stride = 0 if dz_in_rows is None else dz_in_rows.stride(0)
    flags = {"SUBTRACT_MEAN": subtract_mean, "N": n}
    with on_device(z):
        if n <= config.blocks["BLOCK"]:
            _norm_bwd_kernel[(programs,)](
                dy_rows, dz_in_rows, z_rows, weight, mean, rstd, dz, dweight, dshift, dbias,
                dy_rows.stride(0), dz_in_stride, z_rows.stride(0), count,
                ZERO_CENTERED=zero_centered, HAS_DZ_IN=dz_in is not None, HAS_SHIFT=has_shift, HAS_BIAS=has_bias,
                **flags, **config.kwargs,
            )  # fmt: skip
        else:
            _norm_bwd_wide_kernel[(count,)](
                dy_rows, dz_in_rows, z_rows, weight, mean, rstd, dz,
                dy_rows.stride(0), dz_in_stride, z_rows.stride(0),
                BLOCK=config.blocks["BLOCK"], ZERO_CENTERED=zero_centered, HAS_DZ_IN=dz_in is not None,
                num_warps=config.num_warps, **flags,
            )  # fmt: skip
            block, tile_rows = 256, 8
            _norm_weight_grad_kernel[(cdiv(n, block), programs)](
                dy_rows, z_rows, mean, rstd, dz, dweight, dshift, dbias,
                dy_rows.stride(0), z_rows.stride(0), count,
                ROWS=tile_rows, BLOCK=block, HAS_SHIFT=has_shift, HAS_BIAS=has_bias, num_warps=4, **flags,
            )  # fmt: skip
    return dz, dweight.sum(0), _sum_rows(dshift), _sum_rows(dbias)


def _sum_rows(partial: Tensor) -> Tensor:
    """Sum of the partial rows; an empty tensor where there are none."""
    return partial.sum(0) if partial.shape[0] else partial.new_empty(0)
