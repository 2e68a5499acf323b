"""GELU, fused with the addition of a bias that precedes it.

    y = z * Phi(z)                                                   z = x + bias        (1606.08415)
    y = z / 2 * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 z^3)))        approximately

with Phi the distribution function of the normal distribution. The fusion of bias and activation is ByteTransformer's
(2210.03052, section III.C). Backward keeps ``x``, not ``z`` or ``y``, and recomputes the rest:

    dz = dy * (Phi(z) + z * phi(z)),    dbias = sum of dz over rows

Kernels: ``_act_kernels.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hetu_kernels._common import checks
from hetu_kernels._common.device import use_triton
from hetu_kernels.norm_act import bias_gelu_ref

_ACTIVATIONS = {"none": "gelu", "tanh": "gelu_tanh"}


@torch.library.custom_op("lightning_hetu::bias_gelu_fwd", mutates_args=())
def bias_gelu_fwd(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """Returns ``y``."""
    if use_triton(x):
        from hetu_kernels.norm_act._act_kernels import launch_act_forward

        return launch_act_forward(x, None, bias, _ACTIVATIONS[approximate])
    return bias_gelu_ref.bias_gelu_reference(x, bias, approximate=approximate).contiguous()


@bias_gelu_fwd.register_fake
def _(x, bias, approximate):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@torch.library.custom_op("lightning_hetu::bias_gelu_bwd", mutates_args=())
def bias_gelu_bwd(
    dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str, has_dbias: bool
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of ``x`` (its dtype) and of the bias (at least float32; empty unless asked for)."""
    if use_triton(x):
        from hetu_kernels.norm_act._act_kernels import launch_act_backward

        dx, _, dbias = launch_act_backward(dy, x, None, bias, _ACTIVATIONS[approximate], has_dbias=has_dbias)
        return dx, dbias
    dx, dbias = bias_gelu_ref.backward(dy, x, bias, approximate)
    return dx.contiguous(), dbias if has_dbias else dbias.new_empty(0)


@bias_gelu_bwd.register_fake
def _(dy, x, bias, approximate, has_dbias):  # type: ignore[no-untyped-def]
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape[-1] if has_dbias else 0, dtype=wide)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    has_dbias = bias is not None and ctx.needs_input_grad[1]
    dx, dbias = bias_gelu_bwd(dy, x, bias, ctx.approximate, has_dbias)
    return dx, dbias.to(bias.dtype) if has_dbias else None, None


bias_gelu_fwd.register_autograd(_backward, setup_context=_setup)


def bias_gelu(x: Tensor, bias: Tensor | None = None, *, approximate: str = "none") -> Tensor:
    """Add a bias, then apply GELU, in one pass over memory.

    Args:
        x: ``[..., n]``, float32, float16 or bfloat16; any strides.
        bias: ``[n]``, added to ``x``; what the linear layer before would have added. None for nothing to add.
        approximate: ``"none"`` for the definition by the error function, ``"tanh"`` for its approximation.

    Returns:
        ``gelu(x + bias)``, shaped like ``x`` and in its dtype, contiguous. The sum is not rounded in between.

    Raises:
        ValueError: If shapes or devices do not fit together, or ``approximate`` is neither.
        TypeError: If an argument is not floating point.
    """
    op = "bias_gelu"
    checks.tensors(op, x=x)
    checks.same_device(op, x=x, bias=bias)
    checks.not_distributed(op, x=x, bias=bias)
    checks.floating(op, x=x, bias=bias)
    checks.one_of(op, "approximate", approximate, tuple(_ACTIVATIONS))
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, expected rows of at least one element.")
    checks.shape(op, "bias", bias, (x.shape[-1],), "one per column of x")
    return bias_gelu_fwd(x, bias, approximate)
