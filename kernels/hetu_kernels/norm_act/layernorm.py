"""LayerNorm, fused with the addition of a bias and of the residual stream that precede it.

    z = x + bias + residual,    y = (z - mean(z)) * rsqrt(var(z) + eps) * weight + shift        (1607.06450)

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
from hetu_kernels.norm_act.rmsnorm import check_norm_arguments


@torch.library.custom_op("lightning_hetu::add_layer_norm_fwd", mutates_args=())
def add_layer_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    bias: Tensor | None,
    eps: float,
    z_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns ``y``, ``z`` (empty where it would equal ``x``), ``mean`` and ``rstd``, float32 ``[rows]``."""
    if use_triton(x):
        from hetu_kernels.norm_act._norm_kernels import launch_norm_forward

        return launch_norm_forward(
            x, residual, weight, shift, bias, eps, subtract_mean=True, zero_centered=False, z_dtype=z_dtype
        )
    z = norm_ref.add(x, residual, bias, z_dtype)
    y, mean, rstd = norm_ref.normalize(z, weight, shift, eps, subtract_mean=True, zero_centered=False)
    has_z = residual is not None or bias is not None
    return y.to(x.dtype).contiguous(), z.contiguous() if has_z else x.new_empty(0, dtype=z_dtype), mean, rstd


@add_layer_norm_fwd.register_fake
def _(x, residual, weight, shift, bias, eps, z_dtype):  # type: ignore[no-untyped-def]
    has_z = residual is not None or bias is not None
    statistic = x.new_empty(math.prod(x.shape[:-1]), dtype=torch.promote_types(x.dtype, torch.float32))
    z = x.new_empty(x.shape if has_z else (0,), dtype=z_dtype)
    return x.new_empty(x.shape), z, statistic, torch.empty_like(statistic)


@torch.library.custom_op("lightning_hetu::add_layer_norm_bwd", mutates_args=())
def add_layer_norm_bwd(
    dy: Tensor,
    dz_in: Tensor | None,
    z: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    has_shift: bool,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of ``z`` (its dtype), weight, shift and bias (at least float32; empty without one)."""
    flags = {"subtract_mean": True, "zero_centered": False, "has_shift": has_shift, "has_bias": has_bias}
    if use_triton(z):
        from hetu_kernels.norm_act._norm_kernels import launch_norm_backward

        return launch_norm_backward(dy, dz_in, z, weight, mean, rstd, **flags)
    return norm_ref.backward(dy, dz_in, z, weight, eps, **flags)


@add_layer_norm_bwd.register_fake
def _(dy, dz_in, z, weight, mean, rstd, eps, has_shift, has_bias):  # type: ignore[no-untyped-def]
    n = z.shape[-1]
    sizes = (n, n if has_shift else 0, n if has_bias else 0)
    return z.new_empty(z.shape), *(rstd.new_empty(size) for size in sizes)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, shift, bias, ctx.eps, _ = inputs
    _, z, mean, rstd = output
    ctx.x_dtype = x.dtype
    ctx.residual_dtype, ctx.shift_dtype, ctx.bias_dtype = (
        None if tensor is None else tensor.dtype for tensor in (residual, shift, bias)
    )
    # z is made by the operator only where it differs from x.
    ctx.has_z = residual is not None or bias is not None
    ctx.save_for_backward(z if ctx.has_z else x, weight, mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dy: Tensor | None, dz_in: Tensor | None, _dmean: Tensor | None, _drstd: Tensor | None
) -> tuple[Tensor | None, ...]:
    z, weight, mean, rstd = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(z, dtype=ctx.x_dtype)
    dz, dweight, dshift, dbias = add_layer_norm_bwd(
        dy, dz_in if ctx.has_z else None, z, weight, mean, rstd, ctx.eps,
        ctx.shift_dtype is not None, ctx.bias_dtype is not None,
    )  # fmt: skip
    return (
        dz.to(ctx.x_dtype),
        None if ctx.residual_dtype is None else dz.to(ctx.residual_dtype),
        dweight.to(weight.dtype),
        None if ctx.shift_dtype is None else dshift.to(ctx.shift_dtype),
        None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype),
        None,
        None,
    )


add_layer_norm_fwd.register_autograd(_backward, setup_context=_setup)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    shift: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add bias and residual to ``x``, then normalize each row to mean 0 and variance 1.

    Args:
        x: ``[..., n]``, float32, float16 or bfloat16; any strides.
        residual: The residual stream, shaped like ``x``, in its own dtype; None for nothing to add.
        weight: Scale ``[n]``.
        shift: Added after scaling, ``[n]``: what :class:`torch.nn.LayerNorm` calls its bias.
        bias: ``[n]``, added to ``x``; what the linear layer before would have added.
        eps: Constant under the root, 0 or more.
        residual_dtype: Dtype of the returned residual stream; that of ``residual`` (or ``x``) unless told. ``x``,
            ``residual`` and this are all float64, or none is.

    Returns:
        ``y`` in the dtype of ``x``, and ``z = x + bias + residual``, the residual stream for the next layer. Both
        shaped like ``x`` and contiguous, but that ``z`` is ``x`` itself where there is nothing to add or convert.

    Raises:
        ValueError: If shapes, devices or ``eps`` do not fit.
        TypeError: If an argument is of the wrong type, not floating point, or float64 beside others.
    """
    op, n = "add_layer_norm", check_norm_arguments("add_layer_norm", x, residual, weight, bias, residual_dtype)
    eps = checks.number(op, "eps", eps, sign="0 or more")
    checks.same_device(op, x=x, shift=shift)
    checks.floating(op, shift=shift)
    checks.shape(op, "weight", weight, (n,), "one per column of x")
    checks.shape(op, "shift", shift, (n,), "one per column of x")
    z_dtype = norm_ref.output_dtype_of_z(x, residual, residual_dtype)
    y, z, _, _ = add_layer_norm_fwd(x, residual, weight, shift, bias, eps, z_dtype)
    return y, z if residual is not None or bias is not None else x.to(z_dtype)


def layer_norm(x: Tensor, weight: Tensor, shift: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Normalize each row of ``x`` to mean 0 and variance 1: :func:`add_layer_norm` with nothing to add.

    Args:
        x: ``[..., n]``.
        weight: Scale ``[n]``.
        shift: Added after scaling, ``[n]``.
        eps: Constant under the root, 0 or more.

    Returns:
        Normalized rows, shaped like ``x`` and in its dtype.
    """
    return add_layer_norm(x, None, weight, shift, eps=eps)[0]
