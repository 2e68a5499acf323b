"""Triton kernels of lightning_hetu, with plain PyTorch reference implementations.

Importing this package is cheap: torch and triton are imported by the operator that needs them, at first use. It knows
nothing of Lightning or of ``lightning_hetu``, so an operator can be taken out and used by itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hetu_kernels.norm_act.layernorm import add_layer_norm, layer_norm
    from hetu_kernels.norm_act.rmsnorm import add_rms_norm, rms_norm

# Public name and the module that has it.
_EXPORTS = {
    "add_layer_norm": "norm_act.layernorm",
    "add_rms_norm": "norm_act.rmsnorm",
    "layer_norm": "norm_act.layernorm",
    "rms_norm": "norm_act.rmsnorm",
}

__all__ = ["add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
