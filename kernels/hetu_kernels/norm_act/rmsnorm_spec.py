"""Cases, launches and benchmarks of :func:`hetu_kernels.add_rms_norm`."""

from __future__ import annotations

from typing import Any

import torch

from hetu_kernels._common.registry import OpSpec
from hetu_kernels.norm_act._norm_cases import norm_aot_calls, norm_benchmarks, norm_cases, norm_example, norm_peers
from hetu_kernels.norm_act.norm_ref import add_rms_norm_reference
from hetu_kernels.norm_act.rmsnorm import add_rms_norm


def _eager(arguments: dict[str, Any]) -> Any:
    def eager(x, residual, weight, eps):  # type: ignore[no-untyped-def]
        z = x + residual
        return torch.nn.functional.rms_norm(z, weight.shape, weight, eps), z

    return eager


def _liger(arguments: dict[str, Any]) -> Any:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    def liger(x, residual, weight, eps):  # type: ignore[no-untyped-def]
        # The last arguments: offset 0, casting mode, no reuse of dy's memory for the result.
        return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "gemma", False)

    return liger


SPEC = OpSpec(
    name="add_rms_norm",
    function=add_rms_norm,
    reference=add_rms_norm_reference,
    custom_ops=("add_rms_norm_fwd", "add_rms_norm_bwd"),
    differentiable=("x", "residual", "weight", "bias"),
    cases=lambda: norm_cases(has_shift=False),
    example=lambda tokens: norm_example(tokens, has_shift=False),
    aot=lambda: norm_aot_calls(subtract_mean=False),
    benchmarks=lambda: norm_benchmarks(has_shift=False),
    peers=norm_peers(add_rms_norm_reference, _eager, _liger),
    goal="forward 0.88, backward 0.75 of the copy limit from 64 MB; at least 1.0x Liger and torch.compile",
)
