"""What one tensor-parallel rank computes, without the other ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_hetu.parallel.tensor import apply_tensor_parallel
from lightning_hetu.profiling._case import LayerCase

_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs")


@contextmanager
def one_of(case: LayerCase, tp: int, mesh: DeviceMesh | None = None) -> Iterator[None]:
    """Gives the layer the weights of the first of ``tp`` ranks for as long as the context lasts.

    Only what the plan splits gets smaller; norms and residuals do not, so the layer is slower than a ``tp``-th. Where
    a layer gathers its output, copies stand in for what the other ranks would send. Embedding tables stay whole: a
    lookup costs the same in a part of the table.

    Args:
        case: The layer.
        tp: Tensor-parallel degree.
        mesh: A mesh of this process alone. Given one, the layer runs on DTensors as it does in training, and so its
            time has their bookkeeping in it.
    """
    parameters = {
        part: dict(part._parameters) for name in case.plan for part in case.module.get_submodule(name).modules()
    }
    hooks = {part: [dict(getattr(part, name)) for name in _HOOKS] for part in case.module.modules()}

    def narrow(module: nn.Module, name: str, dimension: int) -> None:
        whole = getattr(module, name, None)
        if isinstance(whole, nn.Parameter):
            part = whole.detach().narrow(dimension, 0, whole.shape[dimension] // tp).contiguous()
            setattr(module, name, nn.Parameter(part, requires_grad=whole.requires_grad))

    def gathered(module: nn.Module, args: tuple[object, ...], output: Tensor) -> Tensor:
        return torch.cat([output] * tp, dim=-1)

    try:
        for name, style in case.plan.items():
            module = case.module.get_submodule(name)
            if style in ("colwise", "colwise_gather"):
                narrow(module, "weight", 0)
                narrow(module, "bias", 0)
            elif style == "rowwise":
                narrow(module, "weight", 1)
        if mesh is not None:
            apply_tensor_parallel(case.module, mesh, dict(case.plan))
        for name, style in case.plan.items():
            if style == "colwise_gather":
                case.module.get_submodule(name).register_forward_hook(gathered)
        yield
    finally:
        for part, before in parameters.items():
            part._parameters.update(before)
            part.__dict__.pop("_distribute_module_applied", None)  # torch distributes a module only once
        for part, kept in hooks.items():
            for name, before_hooks in zip(_HOOKS, kept, strict=True):
                current = getattr(part, name)
                current.clear()
                current.update(before_hooks)
