"""RMSNorm, fused with the addition of a bias and of the residual stream that precede it.

    z = x + bias + residual,    y = z * rsqrt(mean(z^2) + eps) * weight        (1910.07467)

The arithmetic is in float32 whatever the dtypes; ``y`` is rounded once, to the dtype of ``x``. The fusion of
bias, residual and normalization is ByteTransformer's (2210.03052, section III.C). Kernels: ``_norm_kernels.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hetu_kernels._common import checks
from hetu_kernels._common.device import use_triton
from hetu_kernels.norm_act import norm_ref


@torch.library.custom_op("lightning_hetu::add_rms_norm_fwd", mutates_args=())
def add_rms_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    zero_centered: bool,
    z_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``y``, ``z`` (empty where it would equal ``x``) and ``rstd`` float32 ``[rows]``."""
    if use_triton(x):
        from hetu_kernels.norm_act._norm_kernels import launch_norm_forward

        y, z, _, rstd = launch_norm_forward(
            x, residual, weight, None, bias, eps, subtract_mean=False, zero_centered=zero_centered, z_dtype=z_dtype
        )
        return y, z, rstd
    z = norm_ref.add(x, residual, bias, z_dtype)
    y, _, rstd = norm_ref.normalize(z, weight, None, eps, subtract_mean=False, zero_centered=zero_centered)
    has_z = residual is not None or bias is not None
    return y.to(x.dtype).contiguous(), z.contiguous() if has_z else x.new_empty(0, dtype=z_dtype), rstd


@add_rms_norm_fwd.register_fake
def _(x, residual, weight, bias, eps, zero_centered, z_dtype):  # type: ignore[no-untyped-def]
    has_z = residual is not None or bias is not None
    y = x.new_empty(x.shape)
    z = x.new_empty(x.shape if has_z else (0,), dtype=z_dtype)
    return y, z, x.new_empty(math.prod(x.shape[:-1]), dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("lightning_hetu::add_rms_norm_bwd", mutates_args=())
def add_rms_norm_bwd(
    dy: Tensor,
    dz_in: Tensor | None,
    z: Tensor,
    weight: Tensor,
    rstd: Tensor,
    eps: float,
    zero_centered: bool,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of ``z`` (its dtype), of weight and of bias (empty without one), at least float32."""
    if use_triton(z):
        from hetu_kernels.norm_act._norm_kernels import launch_norm_backward

        dz, dweight, _, dbias = launch_norm_backward(
            dy, dz_in, z, weight, rstd, rstd,
            subtract_mean=False, zero_centered=zero_centered, has_shift=False, has_bias=has_bias,
        )  # fmt: skip
        return dz, dweight, dbias
    dz, dweight, _, dbias = norm_ref.backward(
        dy, dz_in, z, weight, eps,
        subtract_mean=False, zero_centered=zero_centered, has_shift=False, has_bias=has_bias,
    )  # fmt: skip
    return dz, dweight, dbias


@add_rms_norm_bwd.register_fake
def _(dy, dz_in, z, weight, rstd, eps, zero_centered, has_bias):  # type: ignore[no-untyped-def]
    n = z.shape[-1]
    return z.new_empty(z.shape), rstd.new_empty(n), rstd.new_empty(n if has_bias else 0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, ctx.eps, ctx.zero_centered, _ = inputs
    _, z, rstd = output
    ctx.x_dtype = x.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    # z is made by the operator only where it differs from x.
    ctx.has_z = residual is not None or bias is not None
    ctx.save_for_backward(z if ctx.has_z else x, weight, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dz_in: Tensor | None, _drstd: Tensor | None) -> tuple[Tensor | None, ...]:
    z, weight, rstd = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(z, dtype=ctx.x_dtype)
    dz, dweight, dbias = add_rms_norm_bwd(
        dy, dz_in if ctx.has_z else None, z, weight, rstd, ctx.eps, ctx.zero_centered, ctx.bias_dtype is not None
    )
    return (
        dz.to(ctx.x_dtype),
        None if ctx.residual_dtype is None else dz.to(ctx.residual_dtype),
        dweight.to(weight.dtype),
        None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype),
        None,
        None,
        None,
    )


add_rms_norm_fwd.register_autograd(_backward, setup_context=_setup)


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    zero_centered: bool = False,
    residual_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add bias and residual to ``x``, then normalize each row by its root mean square.

    Args:
        x: ``[..., n]``, float32, float16 or bfloat16; any strides.
        residual: The residual stream, shaped like ``x``, in its own dtype; None for nothing to add.
        weight: Scale ``[n]``.
        bias: ``[n]``, added to ``x``; what the linear layer before would have added.
        eps: Constant under the root, 0 or more.
        zero_centered: Scale by ``weight + 1`` (Gemma's convention).
        residual_dtype: Dtype of the returned residual stream; that of ``residual`` (or ``x``) unless told. ``x``,
            ``residual`` and this are all float64, or none is.

    Returns:
        ``y`` in the dtype of ``x``, and ``z = x + bias + residual``, the residual stream for the next layer. Both
        shaped like ``x`` and contiguous, but that ``z`` is ``x`` itself where there is nothing to add or convert.

    Raises:
        ValueError: If shapes, devices or ``eps`` do not fit.
        TypeError: If an argument is of the wrong type, not floating point, or float64 beside others.
    """
    op, n = "add_rms_norm", check_norm_arguments("add_rms_norm", x, residual, weight, bias, residual_dtype)
    eps = checks.number(op, "eps", eps, sign="0 or more")
    checks.flags(op, zero_centered=zero_centered)
    checks.shape(op, "weight", weight, (n,), "one per column of x")
    z_dtype = norm_ref.output_dtype_of_z(x, residual, residual_dtype)
    y, z, _ = add_rms_norm_fwd(x, residual, weight, bias, eps, zero_centered, z_dtype)
    return y, z if residual is not None or bias is not None else x.to(z_dtype)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, zero_centered: bool = False) -> Tensor:
    """Normalize each row of ``x`` by its root mean square: :func:`add_rms_norm` with nothing to add.

    Args:
        x: ``[..., n]``.
        weight: Scale ``[n]``.
        eps: Constant under the root, 0 or more.
        zero_centered: Scale by ``weight + 1``.

    Returns:
        Normalized rows, shaped like ``x`` and in its dtype.
    """
    return add_rms_norm(x, None, weight, eps=eps, zero_centered=zero_centered)[0]


def check_norm_arguments(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual_dtype: torch.dtype | None,
) -> int:
    """Checks that both norms share; returns the length of a row."""
    checks.tensors(op, x=x, weight=weight)
    checks.same_device(op, x=x, residual=residual, weight=weight, bias=bias)
    checks.floating(op, x=x, residual=residual, weight=weight, bias=bias)
    checks.one_of(op, "residual_dtype", residual_dtype, (*checks.FLOATING, None))
    # Of a mixture the reference would add in float64, and the kernel in float32 what it then calls float64.
    residual_type = None if residual is None else residual.dtype
    checks.all_or_no_float64(op, x=x.dtype, residual=residual_type, residual_dtype=residual_dtype)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, expected rows of at least one element.")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"{op}: residual has shape {list(residual.shape)}, expected that of x, {list(x.shape)}.")
    checks.shape(op, "bias", bias, (x.shape[-1],), "one per column of x")
    return x.shape[-1]
