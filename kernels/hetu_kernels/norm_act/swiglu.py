"""Gated linear units: the activation between the two matrix products of a transformer's feed-forward layer.

    y = act(gate + bias_gate) * (up + bias_up)                       (2002.05202)

with act the SiLU ``z * sigmoid(z)`` (SwiGLU) or GELU, exact or by tanh (GeGLU). Backward keeps the inputs and
recomputes the activation:

    dgate = dy * (up + bias_up) * act'(gate + bias_gate),    dup = dy * act(gate + bias_gate)

and the gradient of the bias is their sum over rows. The activation is not rounded before it is multiplied. Kernels:
``_act_kernels.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hetu_kernels._common import checks
from hetu_kernels._common.device import use_triton
from hetu_kernels.norm_act import swiglu_ref

_ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


@torch.library.custom_op("lightning_hetu::swiglu_fwd", mutates_args=())
def swiglu_fwd(gate: Tensor, up: Tensor | None, bias: Tensor | None, activation: str) -> Tensor:
    """Returns ``y``; ``gate`` is the packed tensor where there is no ``up``."""
    if use_triton(gate):
        from hetu_kernels.norm_act._act_kernels import launch_act_forward

        return launch_act_forward(*_halves(gate, up), bias, activation)
    return swiglu_ref.swiglu_reference(gate, up, bias=bias, activation=activation).contiguous()


@swiglu_fwd.register_fake
def _(gate, up, bias, activation):  # type: ignore[no-untyped-def]
    return gate.new_empty((*gate.shape[:-1], gate.shape[-1] // (2 if up is None else 1)))


@torch.library.custom_op("lightning_hetu::swiglu_bwd", mutates_args=())
def swiglu_bwd(
    dy: Tensor, gate: Tensor, up: Tensor | None, bias: Tensor | None, activation: str, has_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of ``gate``, of ``up`` (empty without), and of the bias (empty unless asked for)."""
    if use_triton(gate):
        from hetu_kernels.norm_act._act_kernels import launch_act_backward

        return launch_act_backward(
            dy, *_halves(gate, up), bias, activation, has_dbias=has_dbias, packed=up is None
        )  # fmt: skip
    dgate, dup, dbias = swiglu_ref.backward(dy, gate, up, bias, activation)
    return dgate.contiguous(), dup.contiguous(), dbias if has_dbias else dbias.new_empty(0)


@swiglu_bwd.register_fake
def _(dy, gate, up, bias, activation, has_dbias):  # type: ignore[no-untyped-def]
    dbias = gate.new_empty(
        2 * dy.shape[-1] if has_dbias else 0, dtype=torch.promote_types(gate.dtype, torch.float32)
    )  # fmt: skip
    return gate.new_empty(gate.shape), gate.new_empty((0,) if up is None else up.shape), dbias


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is not None:
        return gate, up
    n = gate.shape[-1] // 2
    return gate[..., :n], gate[..., n:]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, bias, ctx.activation = inputs
    ctx.save_for_backward(gate, up, bias)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    gate, up, bias = ctx.saved_tensors
    has_dbias = bias is not None and ctx.needs_input_grad[2]
    dgate, dup, dbias = swiglu_bwd(dy, gate, up, bias, ctx.activation, has_dbias)
    return dgate, None if up is None else dup, dbias.to(bias.dtype) if has_dbias else None, None


swiglu_fwd.register_autograd(_backward, setup_context=_setup)


def swiglu(gate: Tensor, up: Tensor | None = None, *, bias: Tensor | None = None, activation: str = "silu") -> Tensor:
    """Multiply one half of a feed-forward layer's first product by the activation of the other.

    Args:
        gate: ``[..., n]``, float32, float16 or bfloat16; any strides. Without ``up``, both halves beside each other:
            ``[..., 2n]``, the gate in the first ``n`` columns.
        up: What is gated, shaped like ``gate`` and in its dtype; None if ``gate`` is packed.
        bias: ``[2n]``, first that of the gate; what the linear layer before would have added.
        activation: ``"silu"`` for SwiGLU, ``"gelu"`` or ``"gelu_tanh"`` for GeGLU.

    Returns:
        ``act(gate + bias[:n]) * (up + bias[n:])``, ``[..., n]`` in the dtype of ``gate``, contiguous.

    Raises:
        ValueError: If shapes or devices do not fit together, or there is no such activation.
        TypeError: If an argument is not floating point, or ``up`` is of another dtype than ``gate``.
    """
    op = "swiglu"
    checks.tensors(op, gate=gate)
    checks.same_device(op, gate=gate, up=up, bias=bias)
    checks.not_distributed(op, gate=gate, up=up, bias=bias)
    checks.floating(op, gate=gate, up=up, bias=bias)
    checks.same_dtype(op, gate=gate, up=up)
    checks.one_of(op, "activation", activation, _ACTIVATIONS)
    if gate.dim() == 0 or gate.shape[-1] == 0:
        raise ValueError(f"{op}: gate has shape {list(gate.shape)}, expected rows of at least one element.")
    if up is None and gate.shape[-1] % 2:
        raise ValueError(f"{op}: gate has shape {list(gate.shape)}, expected an even number of columns without up.")
    if up is not None and up.shape != gate.shape:
        raise ValueError(f"{op}: up has shape {list(up.shape)}, expected that of gate, {list(gate.shape)}.")
    width = gate.shape[-1] * (1 if up is None else 2)
    checks.shape(op, "bias", bias, (width,), "one per column of gate and one of up")
    return swiglu_fwd(gate, up, bias, activation)
