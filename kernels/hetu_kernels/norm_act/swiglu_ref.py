"""Reference of :func:`hetu_kernels.swiglu` in plain torch, for any floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hetu_kernels.norm_act.bias_gelu_ref import gelu


def swiglu_reference(
    gate: Tensor, up: Tensor | None = None, *, bias: Tensor | None = None, activation: str = "silu"
) -> Tensor:
    """See :func:`hetu_kernels.swiglu`."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    first, second = gate.chunk(2, -1) if up is None else (gate, up)
    return _gated(first.to(wide), second.to(wide), None if bias is None else bias.to(wide), activation).to(gate.dtype)


def backward(
    dy: Tensor, gate: Tensor, up: Tensor | None, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate (or of the packed tensor), of up (empty if packed) and of the bias (empty without one)."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    first, second = gate.chunk(2, -1) if up is None else (gate, up)
    first, second = first.to(wide), second.to(wide)
    n = first.shape[-1]
    if bias is not None:
        first, second = first + bias[:n].to(wide), second + bias[n:].to(wide)
    dfirst, dsecond = torch.func.vjp(lambda a, b: _gated(a, b, None, activation), first, second)[1](dy.to(wide))
    both = torch.cat([dfirst, dsecond], -1)
    dbias = both.new_empty(0) if bias is None else both.reshape(-1, 2 * n).sum(0)
    if up is None:
        return both.to(gate.dtype, copy=True), gate.new_empty(0), dbias
    return dfirst.to(gate.dtype, copy=True), dsecond.to(gate.dtype, copy=True), dbias


def _gated(gate: Tensor, up: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    if bias is not None:
        gate_bias, up_bias = bias.chunk(2)
        gate, up = gate + gate_bias, up + up_bias
    if activation == "silu":
        return F.silu(gate) * up
    return gelu(gate, "none" if activation == "gelu" else "tanh") * up
