"""References of :func:`add_rms_norm` and :func:`add_layer_norm` in plain torch, for any floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def add_rms_norm_reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    zero_centered: bool = False,
    residual_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`hetu_kernels.add_rms_norm`."""
    z = add(x, residual, bias, output_dtype_of_z(x, residual, residual_dtype))
    y, _, _ = normalize(z, weight, None, eps, subtract_mean=False, zero_centered=zero_centered)
    return y.to(x.dtype), z


def add_layer_norm_reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    shift: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`hetu_kernels.add_layer_norm`."""
    z = add(x, residual, bias, output_dtype_of_z(x, residual, residual_dtype))
    y, _, _ = normalize(z, weight, shift, eps, subtract_mean=True, zero_centered=False)
    return y.to(x.dtype), z


def output_dtype_of_z(x: Tensor, residual: Tensor | None, residual_dtype: torch.dtype | None) -> torch.dtype:
    """The residual stream keeps its dtype, unless told."""
    return residual_dtype or (x if residual is None else residual).dtype


def add(x: Tensor, residual: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x + bias + residual``, added in at least float32 and rounded once."""
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    if bias is not None:
        z = z + bias
    if residual is not None:
        z = z + residual
    return z.to(dtype)


def normalize(
    z: Tensor, weight: Tensor, shift: Tensor | None, eps: float, *, subtract_mean: bool, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalized, scaled and shifted rows, their means ``[rows]`` (empty for RMSNorm) and ``rstd`` ``[rows]``."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    mean = z.mean(-1, keepdim=True) if subtract_mean else z.new_empty(0)
    centered = z - mean if subtract_mean else z
    rstd = torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    y = centered * rstd * (weight.to(z.dtype) + 1 if zero_centered else weight)
    if shift is not None:
        y = y + shift
    return y, mean.flatten(), rstd.flatten()


def backward(
    dy: Tensor,
    dz_in: Tensor | None,
    z: Tensor,
    weight: Tensor,
    eps: float,
    *,
    subtract_mean: bool,
    zero_centered: bool,
    has_shift: bool,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of z, weight, shift and bias, by differentiating :func:`normalize`."""
    wide = torch.promote_types(z.dtype, torch.float32)

    def forward(z: Tensor, weight: Tensor) -> Tensor:
        return normalize(z, weight, None, eps, subtract_mean=subtract_mean, zero_centered=zero_centered)[0]

    dy = dy.to(wide)
    dz, dweight = torch.func.vjp(forward, z.to(wide), weight.to(wide))[1](dy)
    if dz_in is not None:
        dz = dz + dz_in
    n = z.shape[-1]
    empty = dz.new_empty(0)
    dshift = dy.reshape(-1, n).sum(0) if has_shift else empty
    dbias = dz.reshape(-1, n).sum(0) if has_bias else empty.clone()
    return dz.to(z.dtype, copy=True), dweight.clone(), dshift, dbias
