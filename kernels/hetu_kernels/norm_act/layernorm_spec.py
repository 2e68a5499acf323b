"""Cases, launches and benchmarks of :func:`hetu_kernels.add_layer_norm`."""

from __future__ import annotations

from typing import Any

import torch

from hetu_kernels._common.registry import OpSpec
from hetu_kernels.norm_act._norm_cases import norm_aot_calls, norm_benchmarks, norm_cases, norm_example, norm_peers
from hetu_kernels.norm_act.layernorm import add_layer_norm
from hetu_kernels.norm_act.norm_ref import add_layer_norm_reference


def _eager(arguments: dict[str, Any]) -> Any:
    def eager(x, residual, weight, shift, eps):  # type: ignore[no-untyped-def]
        z = x + residual
        return torch.nn.functional.layer_norm(z, weight.shape, weight, shift, eps), z

    return eager


def _liger(arguments: dict[str, Any]) -> Any:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    def liger(x, residual, weight, shift, eps):  # type: ignore[no-untyped-def]
        z = x + residual  # Liger has no LayerNorm that adds
        return LigerLayerNormFunction.apply(z, weight, shift, eps), z

    return liger


SPEC = OpSpec(
    name="add_layer_norm",
    function=add_layer_norm,
    reference=add_layer_norm_reference,
    custom_ops=("add_layer_norm_fwd", "add_layer_norm_bwd"),
    differentiable=("x", "residual", "weight", "shift", "bias"),
    cases=lambda: norm_cases(has_shift=True),
    example=lambda tokens: norm_example(tokens, has_shift=True),
    aot=lambda: norm_aot_calls(subtract_mean=True),
    benchmarks=lambda: norm_benchmarks(has_shift=True),
    peers=norm_peers(add_layer_norm_reference, _eager, _liger),
    goal="forward 0.88, backward 0.75 of the copy limit from 64 MB; at least 1.0x torch.compile",
)
