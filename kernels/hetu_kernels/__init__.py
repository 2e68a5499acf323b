"""Triton kernels of lightning_hetu, with plain PyTorch reference implementations.

Importing this package is cheap: torch and triton are imported by the operator that needs them, at first use. It knows
nothing of Lightning or of ``lightning_hetu``, so an operator can be taken out and used by itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hetu_kernels.attention.decode import paged_decode_attention
    from hetu_kernels.attention.varlen import varlen_attention
    from hetu_kernels.loss.linear_cross_entropy import linear_cross_entropy
    from hetu_kernels.moe.grouped_gemm import grouped_gemm
    from hetu_kernels.moe.permute import Permuted, permute, unpermute
    from hetu_kernels.moe.topk_gate import topk_gate
    from hetu_kernels.norm_act.bias_gelu import bias_gelu
    from hetu_kernels.norm_act.layernorm import add_layer_norm, layer_norm
    from hetu_kernels.norm_act.pack import PaddingLayout, pack, padding_layout, unpack
    from hetu_kernels.norm_act.rmsnorm import add_rms_norm, rms_norm
    from hetu_kernels.norm_act.rotary import rotary
    from hetu_kernels.norm_act.swiglu import swiglu
    from hetu_kernels.optim.adamw import adamw
    from hetu_kernels.optim.optimizer import AdamW

# Public name and the module that has it.
_EXPORTS = {
    "adamw": "optim.adamw",
    "AdamW": "optim.optimizer",
    "add_layer_norm": "norm_act.layernorm",
    "add_rms_norm": "norm_act.rmsnorm",
    "bias_gelu": "norm_act.bias_gelu",
    "grouped_gemm": "moe.grouped_gemm",
    "layer_norm": "norm_act.layernorm",
    "linear_cross_entropy": "loss.linear_cross_entropy",
    "pack": "norm_act.pack",
    "padding_layout": "norm_act.pack",
    "PaddingLayout": "norm_act.pack",
    "paged_decode_attention": "attention.decode",
    "permute": "moe.permute",
    "Permuted": "moe.permute",
    "rms_norm": "norm_act.rmsnorm",
    "rotary": "norm_act.rotary",
    "swiglu": "norm_act.swiglu",
    "topk_gate": "moe.topk_gate",
    "unpack": "norm_act.pack",
    "unpermute": "moe.permute",
    "varlen_attention": "attention.varlen",
}

__all__ = [
    "AdamW",
    "PaddingLayout",
    "Permuted",
    "adamw",
    "add_layer_norm",
    "add_rms_norm",
    "bias_gelu",
    "grouped_gemm",
    "layer_norm",
    "linear_cross_entropy",
    "pack",
    "padding_layout",
    "paged_decode_attention",
    "permute",
    "rms_norm",
    "rotary",
    "swiglu",
    "topk_gate",
    "unpack",
    "unpermute",
    "varlen_attention",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
