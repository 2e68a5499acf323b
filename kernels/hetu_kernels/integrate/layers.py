"""Subclasses of torch's layers whose ``forward`` calls a kernel, and which type is exchanged for which."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import hetu_kernels
from hetu_kernels._common.device import autocast_dtype


@dataclass(frozen=True)
class Exchange:
    """What a type of module is exchanged for.

    Args:
        cls: A subclass of that type. Only ``forward`` differs, so an object can change over and back.
        kind: ``"norm"``, ``"activation"`` or ``"loss"``.
        what: Name of the operator it calls.
    """

    cls: type[nn.Module]
    kind: str
    what: str


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether none of them is a tensor subclass that an operator does not know, such as a DTensor."""
    return all(t is None or type(t) in (Tensor, nn.Parameter) or not hasattr(t, "device_mesh") for t in tensors)


def can_be_bypassed(module: nn.Module) -> bool:
    """Whether nobody notices that a module's ``forward`` is not called: it has no hooks and no ``forward`` of its own.

    Looked at in each call: hooks come and go.
    """
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return not any(hooks) and "forward" not in vars(module)


def as_autocast_norm(x: Tensor) -> Tensor:
    """Autocast normalizes in float32 and returns float32; on the CPU it leaves norms alone."""
    if x.device.type == "cpu" or x.dtype == torch.float64 or autocast_dtype(x.device) is None:
        return x
    return x.float()


def default_eps(x: Tensor) -> float:
    """What :class:`torch.nn.RMSNorm` adds where it was given no ``eps``: it computes narrow dtypes in float32."""
    return torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps


class KernelRMSNorm(nn.RMSNorm):
    """:class:`torch.nn.RMSNorm` by :func:`~hetu_kernels.rms_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        if not is_plain(x, self.weight):
            return super().forward(x)
        x = as_autocast_norm(x)
        return hetu_kernels.rms_norm(x, self.weight, eps=default_eps(x) if self.eps is None else self.eps)


class KernelLayerNorm(nn.LayerNorm):
    """:class:`torch.nn.LayerNorm` by :func:`~hetu_kernels.layer_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize the last dimension."""
        if not is_plain(input, self.weight):
            return super().forward(input)
        return hetu_kernels.layer_norm(as_autocast_norm(input), self.weight, self.bias, eps=self.eps)


class KernelGELU(nn.GELU):
    """:class:`torch.nn.GELU` by :func:`~hetu_kernels.bias_gelu`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation."""
        if not is_plain(input) or input.dim() == 0 or input.shape[-1] == 0:
            return super().forward(input)
        return hetu_kernels.bias_gelu(input, approximate=self.approximate)


def normalizes_rows(module: Any) -> bool:
    """Kernels normalize the last dimension, and scale it."""
    return len(module.normalized_shape) == 1 and module.weight is not None


def exchange_for(module: nn.Module) -> Exchange | None:
    """What a module is exchanged for; None for what no kernel does.

    Decided by the exact type: a subclass may compute something else, and so may a ``forward`` of the object's own.
    """
    kind = type(module)
    if "forward" in vars(module):
        return None
    if kind is nn.RMSNorm and normalizes_rows(module):
        return Exchange(KernelRMSNorm, "norm", "add_rms_norm")
    if kind is nn.LayerNorm and normalizes_rows(module):
        return Exchange(KernelLayerNorm, "norm", "add_layer_norm")
    if kind is nn.GELU:
        return Exchange(KernelGELU, "activation", "bias_gelu")
    if "transformers" in sys.modules and kind.__module__.startswith("transformers."):
        from hetu_kernels.integrate.transformers import exchange_for as exchange_for_transformers

        return exchange_for_transformers(module)
    return None
