"""What one tensor-parallel rank computes, without the other ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_hetu.profiling._case import LayerCase


@contextmanager
def one_of(case: LayerCase, tp: int) -> Iterator[None]:
    """Gives the layer the weights of the first of ``tp`` ranks for as long as the context lasts.

    Only what the plan splits gets smaller; norms and residuals do not, so the layer is slower than a ``tp``-th. Where
    a layer gathers its output, copies stand in for what the other ranks would send. Embedding tables stay whole: a
    lookup costs the same in a part of the table.
    """
    before: list[tuple[nn.Module, str, nn.Parameter]] = []
    handles = []

    def narrow(module: nn.Module, name: str, dimension: int) -> None:
        whole = getattr(module, name, None)
        if not isinstance(whole, nn.Parameter):
            return
        before.append((module, name, whole))
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
            if style == "colwise_gather":
                handles.append(module.register_forward_hook(gathered))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, name, whole in before:
            setattr(module, name, whole)
