"""Gradients that were computed before Lightning asked for them.

A pipeline schedule runs forward and backward in one call, while Lightning's automatic optimization first calls
``training_step``, then zeroes gradients, then calls ``backward`` on the loss. So the schedule's gradients are held back
and handed over by the backward of the loss that ``training_step`` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class HeldGradients:
    """Takes gradients out of parameters, and puts them back scaled.

    Use as: :meth:`set_aside` before the schedule, :meth:`hold` after it, :meth:`release` in backward.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._earlier: list[Tensor | None] = []
        self._new: list[Tensor | None] = []

    def set_aside(self) -> None:
        """Removes gradients of earlier batches of the accumulation window, so that new ones are kept apart."""
        self._earlier = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None

    def hold(self) -> None:
        """Removes the new gradients and puts the earlier ones back, where ``zero_grad`` can find them."""
        self._new = [parameter.grad for parameter in self.parameters]
        for parameter, earlier in zip(self.parameters, self._earlier, strict=True):
            parameter.grad = earlier
        self._earlier = []

    def release(self, scale: Tensor) -> None:
        """Adds the new gradients, times ``scale``, to whatever the parameters hold now."""
        factor = scale.item()
        for parameter, new in zip(self.parameters, self._new, strict=True):
            if new is None:
                continue
            if factor != 1.0:
                new.mul_(factor)
            if parameter.grad is None:
                parameter.grad = new
            else:
                parameter.grad.add_(new)
        self._new = []


class _ReleaseInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, loss: Tensor, release: Callable[[Tensor], None]) -> Tensor:
        ctx.release = release
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, None]:
        if ctx.release is None:
            raise RuntimeError("the loss of a pipeline step was differentiated twice; its gradients exist only once.")
        ctx.release(grad_outputs[0])
        ctx.release = None
        return None, None, None


def loss_that_releases(loss: Tensor, held: HeldGradients) -> Tensor:
    """The scalar ``loss`` with a backward that releases ``held``, times the incoming gradient."""
    anchor = torch.zeros((), device=loss.device, requires_grad=True)
    released: Tensor = _ReleaseInBackward.apply(anchor, loss, held.release)
    return released
