"""Matrix products of groups of rows, each with a matrix of its own: the linear layers of a mixture of experts.

    y_i = x_i W_e + b_e        for the rows i of expert e, offsets_e <= i < offsets_(e+1)

Rows are sorted by expert and neither padded nor dropped, as in MegaBlocks (2211.15841), but without its block-sparse
matrices: the kernels find the tiles of each expert in the offsets, on the device. Backward is two more grouped
products,

    dx_i = dy_i W_e^T,    dW_e = sum of x_i^T dy_i    and    db_e = sum of dy_i    over the rows of e

the first by the kernel of forward. Sums are float32 and rounded once. Kernels: ``_grouped_gemm_kernels.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hetu_kernels._common import checks
from hetu_kernels._common.device import autocast, autocast_dtype, dot_precision, use_triton
from hetu_kernels.moe import grouped_gemm_ref as ref


@torch.library.custom_op("lightning_hetu::grouped_gemm_fwd", mutates_args=())
def grouped_gemm_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, allow_tf32: bool) -> Tensor:
    """Returns ``y``, contiguous; ``weight`` is multiplied in the dtype of ``x``."""
    # What is wrong here would read and write beside a tensor. Backward is given the same.
    checks.offsets("grouped_gemm", "offsets", offsets, x.shape[0], "x", x.shape[0], "x")
    if use_triton(x, needs_dot=True):
        from hetu_kernels.moe._grouped_gemm_kernels import launch_products

        return launch_products(x, weight.to(x.dtype), bias, offsets, dot_precision(x, allow_tf32=allow_tf32))
    with torch.autocast(x.device.type, enabled=False):
        return ref.grouped_gemm_reference(x, weight, offsets, bias=bias)


@grouped_gemm_fwd.register_fake
def _(x, weight, bias, offsets, allow_tf32):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], weight.shape[2]))


@torch.library.custom_op("lightning_hetu::grouped_gemm_bwd", mutates_args=())
def grouped_gemm_bwd(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    offsets: Tensor,
    want_x: bool,
    want_weight: bool,
    want_bias: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns gradients of ``x``, of ``weight``, and of the bias (at least float32), each empty unless wanted.

    That of a weight that is a transposed view is one too: what it is a view of then gets a contiguous gradient.
    """
    dx = dweight = dbias = None
    if use_triton(dy, needs_dot=True):
        from hetu_kernels.moe._grouped_gemm_kernels import launch_bias_gradient, launch_products, launch_weight_gradient

        precision = dot_precision(dy, allow_tf32=allow_tf32)
        dy = checks.last_dim_contiguous(dy)  # once for all
        if want_x:
            dx = launch_products(dy, weight.to(dy.dtype).transpose(1, 2), None, offsets, precision)
        if want_weight and x is not None:
            operands = (dy, x) if _is_transposed(weight) else (x, dy)
            dweight = launch_weight_gradient(*operands, offsets, weight.dtype, precision)
        if want_bias:
            dbias = launch_bias_gradient(dy, offsets)
    else:
        with torch.autocast(dy.device.type, enabled=False):
            dx, dweight, dbias = ref.backward(dy, x, weight, offsets, want_x, want_weight, want_bias)
        if dweight is not None:
            dweight = (dweight.transpose(1, 2) if _is_transposed(weight) else dweight).contiguous()
    if dweight is not None and _is_transposed(weight):
        dweight = dweight.transpose(1, 2)
    wide = torch.promote_types(dy.dtype, torch.float32)
    return (
        dy.new_empty((0, weight.shape[1])) if dx is None else dx,
        weight.new_empty((0, *weight.shape[1:])) if dweight is None else dweight,
        dy.new_empty((0, weight.shape[2]), dtype=wide) if dbias is None else dbias,
    )


@grouped_gemm_bwd.register_fake
def _(dy, x, weight, offsets, want_x, want_weight, want_bias, allow_tf32):  # type: ignore[no-untyped-def]
    experts, depth, width = weight.shape
    if want_weight and _is_transposed(weight):
        dweight = weight.new_empty((experts, width, depth)).transpose(1, 2)
    else:
        dweight = weight.new_empty((experts if want_weight else 0, depth, width))
    wide = torch.promote_types(dy.dtype, torch.float32)
    dbias = dy.new_empty((experts if want_bias else 0, width), dtype=wide)
    return dy.new_empty((dy.shape[0] if want_x else 0, depth)), dweight, dbias


def _is_transposed(weight: Tensor) -> bool:
    """Whether columns, not rows, of each expert's matrix are contiguous."""
    return weight.stride(1) == 1 and weight.stride(2) != 1


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, offsets, ctx.allow_tf32 = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    # Of frozen weights the rows need not be kept.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, offsets)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, offsets = ctx.saved_tensors
    want_x, want_weight, want_bias = ctx.needs_input_grad[:3]
    dx, dweight, dbias = grouped_gemm_bwd(dy, x, weight, offsets, want_x, want_weight, want_bias, ctx.allow_tf32)
    return (
        dx if want_x else None,
        dweight if want_weight else None,
        dbias.to(ctx.bias_dtype) if want_bias else None,
        None,
        None,
    )


grouped_gemm_fwd.register_autograd(_backward, setup_context=_setup)


def grouped_gemm(
    x: Tensor, weight: Tensor, offsets: Tensor, *, bias: Tensor | None = None, allow_tf32: bool = False
) -> Tensor:
    """Multiply the rows of each expert by its matrix.

    Rows behind those of the last expert are zero in the result and have a gradient of zero, whatever they contain.
    Experts without rows have gradients of zero. The same arguments give the same bits: no sum depends on timing.

    The values of ``offsets`` are checked on the CPU only: looking at them on a GPU would wait for it. There, rows
    before ``offsets[0]`` get whatever was in memory, and offsets that decrease or exceed ``M`` read and write beside
    the tensors. ``LIGHTNING_HETU_CHECK=1`` checks there too.

    Under :class:`torch.autocast`, ``x`` and ``weight`` are multiplied in its dtype, but float64 is left as it is. The
    gradient of a float32 weight is float32 then too, without having been rounded.

    Args:
        x: Rows sorted by expert, ``[M, K]``, float32, float16 or bfloat16; any strides.
        weight: A matrix per expert, ``[E, K, N]``, in the dtype of ``x``, or float32, which is rounded to it. Any
            strides: of weights stored as ``[E, N, K]``, pass ``weight.transpose(1, 2)``. ``K`` and ``N`` should be
            multiples of 16: others are correct, but slow.
        offsets: Where the rows of each expert begin, and where those of the last one end: int32 or int64 ``[E + 1]``.
            The first entry is 0, none is smaller than the one before it.
        bias: Added to the rows of each expert, ``[E, N]``, any floating dtype.
        allow_tf32: Multiply float32 in TF32 on NVIDIA. Otherwise three TF32 products make up nearly float32.

    Returns:
        ``[M, N]`` in the dtype of ``x`` (of autocast within it), contiguous.

    Raises:
        ValueError: If shapes, devices or (on the CPU) offsets do not fit together.
        TypeError: If a dtype does not fit, a tensor is distributed, or an argument is of the wrong type.
    """
    op = "grouped_gemm"
    checks.tensors(op, x=x, weight=weight, offsets=offsets)
    checks.same_device(op, x=x, weight=weight, offsets=offsets, bias=bias)
    checks.not_distributed(op, x=x, weight=weight, offsets=offsets, bias=bias)
    checks.floating(op, x=x, weight=weight, bias=bias)
    checks.integer(op, offsets=offsets)
    checks.flags(op, allow_tf32=allow_tf32)
    checks.all_or_no_float64(op, x=x.dtype, weight=weight.dtype, bias=None if bias is None else bias.dtype)
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, expected [M, K], rows of at least one element.")
    checks.shape(op, "weight", weight, (None, x.shape[1], None), "experts, columns of x, columns of the result")
    if weight.shape[2] == 0:
        raise ValueError(f"{op}: weight has shape {list(weight.shape)}, expected at least one column.")
    checks.shape(op, "offsets", offsets, (weight.shape[0] + 1,), "one per matrix of weight, and the end")
    checks.shape(op, "bias", bias, (weight.shape[0], weight.shape[2]), "experts, columns of the result")
    if autocast_dtype(x.device) is not None:
        (x,) = autocast(x)
        if weight.dtype != torch.float32:  # which backward would rather have whole
            (weight,) = autocast(weight)
    if weight.dtype not in (x.dtype, torch.float32):
        raise TypeError(
            f"{op}: weight has dtype {weight.dtype}, x {x.dtype}: convert weight to that of x, or to float32."
        )
    return grouped_gemm_fwd(x, weight, bias, offsets, allow_tf32)
