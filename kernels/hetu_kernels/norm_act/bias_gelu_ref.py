"""Reference of :func:`hetu_kernels.bias_gelu` in plain torch, for any floating dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def bias_gelu_reference(x: Tensor, bias: Tensor | None = None, *, approximate: str = "none") -> Tensor:
    """See :func:`hetu_kernels.bias_gelu`."""
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    if bias is not None:
        z = z + bias.to(z.dtype)
    return gelu(z, approximate).to(x.dtype)


def gelu(z: Tensor, approximate: str) -> Tensor:
    """GELU; the exact one by its definition, because torch's makes NaN of +inf in float32 on a CPU."""
    if approximate == "tanh":
        return F.gelu(z, approximate="tanh")
    return z * (0.5 + 0.5 * torch.erf(z * math.sqrt(0.5)))


def backward(dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    """Gradients of x (its dtype) and of the bias (at least float32; empty without one)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x.to(wide) if bias is None else x.to(wide) + bias.to(wide)
    (dz,) = torch.func.vjp(lambda z: gelu(z, approximate), z)[1](dy.to(wide))
    dbias = dz.new_empty(0) if bias is None else dz.reshape(-1, dz.shape[-1]).sum(0)
    return dz.to(x.dtype, copy=True), dbias
