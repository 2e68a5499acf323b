"""Rotary position embedding: each pair of a head's elements is rotated by an angle that grows with the position.

    y_a = x_a * cos - x_b * sin
    y_b = x_b * cos + x_a * sin                                      (2104.09864)

Pair ``i`` is ``(a, b) = (i, i + rotary_dim / 2)`` in the half-split form of GPT-NeoX and Llama, ``(2 i, 2 i + 1)`` in
the interleaved form of GPT-J. The gradient is the rotation by the negative angle, so backward needs nothing of ``x``.
The arithmetic is in float32, rounded once. Kernel: ``_rotary_kernels.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hetu_kernels._common import checks
from hetu_kernels._common.device import use_triton
from hetu_kernels.norm_act import rotary_ref


def _rotate(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, *, interleaved: bool, inverse: bool
) -> Tensor:
    if use_triton(x):
        from hetu_kernels.norm_act._rotary_kernels import launch_rotary

        return launch_rotary(x, cos, sin, positions, interleaved=interleaved, inverse=inverse)
    return rotary_ref.rotate(x, cos, sin, positions, interleaved=interleaved, inverse=inverse).contiguous()


@torch.library.custom_op("lightning_hetu::rotary_fwd", mutates_args=())
def rotary_fwd(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool) -> Tensor:
    """Returns ``y``."""
    return _rotate(x, cos, sin, positions, interleaved=interleaved, inverse=False)


@torch.library.custom_op("lightning_hetu::rotary_bwd", mutates_args=())
def rotary_bwd(dy: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool) -> Tensor:
    """Returns the gradient of ``x``."""
    return _rotate(dy, cos, sin, positions, interleaved=interleaved, inverse=True)


def _fake(x, cos, sin, positions, interleaved):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, positions, ctx.interleaved = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return rotary_bwd(dy, *ctx.saved_tensors, ctx.interleaved), None, None, None, None


rotary_fwd.register_fake(_fake)
rotary_bwd.register_fake(_fake)
rotary_fwd.register_autograd(_backward, setup_context=_setup)


def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | None = None, interleaved: bool = False
) -> Tensor:
    """Rotate the heads of queries or keys by their positions.

    Args:
        x: ``[..., tokens, heads, head_dim]`` with any number of leading dimensions (none for packed sequences),
            float32, float16 or bfloat16; any strides, so ``[batch, heads, tokens, head_dim]`` is given transposed.
        cos: Table ``[max_position, rotary_dim / 2]``, float32 or the dtype of ``x``. ``rotary_dim`` is at most
            ``head_dim``; the rest of each head is copied. Tables get no gradients.
        sin: Shaped like ``cos``.
        positions: Row of the table for each token, int32 or int64, ``[tokens]`` or ``x.shape[:-2]``; None for 0 to
            ``tokens - 1``. A position outside of the table makes what would be rotated NaN.
        interleaved: Pairs are neighbors (GPT-J) rather than half a head apart (GPT-NeoX, Llama).

    Returns:
        Rotated heads, shaped like ``x`` and in its dtype, contiguous.

    Raises:
        ValueError: If shapes or devices do not fit together.
        TypeError: If a dtype is not one of those above, or an argument is of the wrong type.
    """
    op = "rotary"
    checks.tensors(op, x=x, cos=cos, sin=sin)
    checks.flags(op, interleaved=interleaved)
    checks.same_device(op, x=x, cos=cos, sin=sin, positions=positions)
    checks.not_distributed(op, x=x, cos=cos, sin=sin, positions=positions)
    checks.floating(op, x=x, cos=cos, sin=sin)
    checks.same_dtype(op, cos=cos, sin=sin)
    if cos.dtype not in (torch.float32, x.dtype):
        raise TypeError(f"{op}: cos has dtype {cos.dtype}, expected torch.float32 or that of x, {x.dtype}.")
    if x.dim() < 3:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, expected [..., tokens, heads, head_dim].")
    if cos.dim() != 2 or not 1 <= cos.shape[1] <= x.shape[-1] // 2:
        raise ValueError(
            f"{op}: cos has shape {list(cos.shape)}, expected [max_position, 1 to {x.shape[-1] // 2}] (head_dim / 2)."
        )
    if sin.shape != cos.shape:
        raise ValueError(f"{op}: sin has shape {list(sin.shape)}, expected that of cos, {list(cos.shape)}.")
    if positions is not None:
        checks.integer(op, positions=positions)
        if positions.shape != x.shape[:-2] and positions.shape != x.shape[-3:-2]:
            raise ValueError(
                f"{op}: positions has shape {list(positions.shape)}, expected {list(x.shape[-3:-2])} or "
                f"{list(x.shape[:-2])} (one per token)."
            )
    return rotary_fwd(x, cos, sin, positions, interleaved)
