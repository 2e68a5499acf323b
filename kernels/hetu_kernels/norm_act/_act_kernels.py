"""Kernels and launchers that :func:`bias_gelu` and :func:`swiglu` share.

    y = act(gate + bias)                                       one input
    y = act(gate + bias_gate) * (up + bias_up)                 gated

The arithmetic is in float32, rounded once at the store. Backward reads the inputs again and recomputes what it needs.
The bias gradient is summed per program into a row of a float32 buffer, then over the rows, in a fixed order: no
atomics, the same bits every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hetu_kernels._common import alloc
from hetu_kernels._common.checks import contiguous
from hetu_kernels._common.checks import rows as as_rows
from hetu_kernels._common.config import Config, row_block
from hetu_kernels._common.device import on_device, sm_count
from hetu_kernels._common.triton_utils import cdiv, tl, triton

# A program's tile is at most this wide. Backward's is smaller, 16 bytes a thread and tensor: it reads up to three of
# them and keeps sums of two, and waits for memory with the more warps the fewer registers each needs.
_COLUMNS = 1024
_FORWARD_TILE = 4096
_BACKWARD_TILE_BYTES = 4096
_WARPS = 8
# Programs per multiprocessor where each leaves a row of partial sums: enough to fill it with warps.
_PROGRAMS_PER_MULTIPROCESSOR = 4


@triton.jit
def _logistic(x, y):
    """``1 / (1 + exp(-x))`` and one minus it, given ``y = x * log2(e)``, for any ``x``: infinite powers vanish.

    ``exp2`` and ``rsqrt`` are one instruction each, ``exp`` and a division several.
    """
    e = tl.exp2(-y)
    r = tl.rsqrt(1.0 + e)
    s = r * r
    return s, tl.where(x >= 0.0, e * s, 1.0 - s)


@triton.jit
def _activate(g, ACTIVATION: tl.constexpr):
    """Value and slope of the activation; the compiler drops what is not used."""
    if ACTIVATION == "silu":
        s, t = _logistic(g, g * 1.4426950408889634)
        value = g * s
        slope = s * (1.0 + g * t)
    elif ACTIVATION == "gelu":
        # Phi(-a) = exp(-a^2 / 2) P(1 / (1 + a / 4)) for a >= 0. P was fitted so that Phi is off by less than 2e-8, and
        # by less than 2e-5 of itself where it is small: 1 + erf cancels there. One exponential serves Phi and phi.
        e = tl.exp2(g * g * -0.7213475204444817)
        r = tl.rsqrt(1.0 + 0.25 * tl.abs(g))
        t = r * r
        p = 0.33499905 - 0.09007534 * t
        p = -0.25531261 + p * t
        p = 0.27044685 + p * t
        p = 0.0301431 + p * t
        p = 0.11085112 + p * t
        p = 0.09894785 + p * t
        tail = e * (p * t)
        cdf = tl.where(g < 0.0, tail, 1.0 - tail)
        value = g * cdf
        slope = cdf + g * (0.3989422804014327 * e)
    else:
        # 1 + tanh(z) = 2 / (1 + exp(-2 z)). The square is capped where its factor has long been 0: 0 * inf is NaN.
        square = g * g
        s, t = _logistic(g, g * (2.302208198 + 0.102943240 * square))
        value = g * s
        slope = s + value * t * (1.5957691216057308 + 0.2140644488 * tl.minimum(square, 1e30))
    return value, slope


@triton.jit
def _load(ptr, offsets, mask):
    """A tile in float32.

    That of the bias has as many rows as any (``row * 0``): read from the cache, it is where the threads need it, while
    a single row would have to be exchanged between them.
    """
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def _act_fwd_kernel(
    gate_ptr, up_ptr, bias_ptr, y_ptr, stride_gate_row, stride_up_row, num_rows,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles x column blocks,), columns first. ``y`` is contiguous ``[rows, N]``; ``bias`` is ``[N]``, or
    twice as long if gated.
    """
    COLUMN_BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    pid = tl.program_id(0).to(tl.int64)
    row = ((pid // COLUMN_BLOCKS) * ROWS + tl.arange(0, ROWS))[:, None]
    cols = ((pid % COLUMN_BLOCKS) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (row < num_rows) & (cols < N)
    g = _load(gate_ptr, row * stride_gate_row + cols, mask)
    if HAS_BIAS:
        g += _load(bias_ptr, row * 0 + cols, mask)
    y, _ = _activate(g, ACTIVATION)
    if GATED:
        u = _load(up_ptr, row * stride_up_row + cols, mask)
        if HAS_BIAS:
            u += _load(bias_ptr, row * 0 + N + cols, mask)
        y *= u
    tl.store(y_ptr + row * N + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _act_bwd_kernel(
    dy_ptr, gate_ptr, up_ptr, bias_ptr, dgate_ptr, dup_ptr, dbias_ptr,
    stride_dy_row, stride_gate_row, stride_up_row, stride_out_row, num_rows,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DBIAS: tl.constexpr,
):  # fmt: skip
    """Grid (programs x column blocks,), columns first: each takes every ``programs``-th row tile of its columns and
    leaves its row of the partial sums ``dbias``, float32 ``[programs, N]`` or twice as wide if gated.
    """
    COLUMN_BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    program = tl.program_id(0) // COLUMN_BLOCKS
    c = (tl.program_id(0) % COLUMN_BLOCKS).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    cols = c[None, :]
    gate_sum = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    up_sum = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for tile in range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0) // COLUMN_BLOCKS):
        row = (tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        mask = (row < num_rows) & (cols < N)
        dy = _load(dy_ptr, row * stride_dy_row + cols, mask)
        g = _load(gate_ptr, row * stride_gate_row + cols, mask)
        if HAS_BIAS:
            g += _load(bias_ptr, row * 0 + cols, mask)
        value, slope = _activate(g, ACTIVATION)
        if GATED:
            u = _load(up_ptr, row * stride_up_row + cols, mask)
            if HAS_BIAS:
                u += _load(bias_ptr, row * 0 + N + cols, mask)
            dup = dy * value
            tl.store(dup_ptr + row * stride_out_row + cols, dup.to(dup_ptr.dtype.element_ty), mask=mask)
            if HAS_DBIAS:
                up_sum += dup  # 0 where there is nothing, as dy is
            dy *= u
        dgate = dy * slope
        tl.store(dgate_ptr + row * stride_out_row + cols, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
        if HAS_DBIAS:
            gate_sum += dgate
    if HAS_DBIAS:
        WIDTH: tl.constexpr = 2 * N if GATED else N
        out = program.to(tl.int64) * WIDTH + c
        tl.store(dbias_ptr + out, tl.sum(gate_sum, axis=0), mask=c < N)
        if GATED:
            tl.store(dbias_ptr + N + out, tl.sum(up_sum, axis=0), mask=c < N)


def _config(n: int, tile: int) -> Config:
    block = row_block(n, _COLUMNS)
    return Config({"ROWS": tile // block, "BLOCK": block}, num_warps=_WARPS, num_stages=1)


def launch_act_forward(gate: Tensor, up: Tensor | None, bias: Tensor | None, activation: str) -> Tensor:
    """Run the forward kernel.

    Args:
        gate: ``[..., n]``.
        up: Shaped like ``gate``; None for an activation without gate.
        bias: ``[n]``, ``[2n]`` with ``up``.
        activation: ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``.

    Returns:
        ``y``, shaped like ``gate`` and contiguous.
    """
    n = gate.shape[-1]
    (bias,) = contiguous(bias)
    y = alloc.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate_rows, up_rows = as_rows(gate), None if up is None else as_rows(up)
    count = gate_rows.shape[0]
    if count:
        config = _config(n, _FORWARD_TILE)
        grid = cdiv(count, config.blocks["ROWS"]) * cdiv(n, config.blocks["BLOCK"])
        with on_device(gate):
            _act_fwd_kernel[(grid,)](
                gate_rows, up_rows, bias, y,
                gate_rows.stride(0), 0 if up_rows is None else up_rows.stride(0), count,
                N=n, ACTIVATION=activation, GATED=up is not None, HAS_BIAS=bias is not None, **config.kwargs,
            )  # fmt: skip
    return y


def launch_act_backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    bias: Tensor | None,
    activation: str,
    *,
    has_dbias: bool,
    packed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward kernel.

    Args:
        dy: Gradient of ``y``.
        gate: As in forward.
        up: As in forward.
        bias: As in forward.
        activation: As in forward.
        has_dbias: Sum up the gradient of the bias.
        packed: Write the gradients of ``gate`` and ``up`` side by side into one tensor.

    Returns:
        The gradient of ``gate``, or of ``[gate | up]`` if packed; of ``up``, empty if packed or without; of the bias,
        float32, empty unless asked for.
    """
    n = gate.shape[-1]
    (bias,) = contiguous(bias)
    width = 2 * n if packed else n
    gated = up is not None
    dgate = alloc.empty((*gate.shape[:-1], width), dtype=gate.dtype, device=gate.device)
    dup = alloc.empty(gate.shape if gated and not packed else (0,), dtype=gate.dtype, device=gate.device)
    dy_rows, gate_rows, up_rows = as_rows(dy), as_rows(gate), None if up is None else as_rows(up)
    count = gate_rows.shape[0]
    bias_width = (2 * n if gated else n) if has_dbias else 0
    if not count:
        return dgate, dup, torch.zeros(bias_width, dtype=torch.float32, device=gate.device)
    config = _config(n, _BACKWARD_TILE_BYTES // gate.element_size())
    column_blocks = cdiv(n, config.blocks["BLOCK"])
    programs = cdiv(count, config.blocks["ROWS"])
    if has_dbias:
        programs = min(programs, cdiv(sm_count(gate.device) * _PROGRAMS_PER_MULTIPROCESSOR, column_blocks))
    dbias = alloc.empty((programs if has_dbias else 0, bias_width), dtype=torch.float32, device=gate.device)
    with on_device(gate):
        _act_bwd_kernel[(programs * column_blocks,)](
            dy_rows, gate_rows, up_rows, bias, dgate, dgate.view(-1, width)[:, n:] if packed else dup, dbias,
            dy_rows.stride(0), gate_rows.stride(0), 0 if up_rows is None else up_rows.stride(0), width, count,
            N=n, ACTIVATION=activation, GATED=gated, HAS_BIAS=bias is not None, HAS_DBIAS=has_dbias, **config.kwargs,
        )  # fmt: skip
    return dgate, dup, dbias.sum(0) if has_dbias else dbias.new_empty(0)
