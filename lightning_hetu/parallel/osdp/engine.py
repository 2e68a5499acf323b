"""Runs the steps of a module with pipeline support on plain data parallelism."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from lightning_hetu.parallel.pipeline_mixin import PipelineMixin


class DataParallelEngine:
    """The engine behind :meth:`PipelineMixin.pipeline_step` where every rank has the whole model.

    A step gives the loss of the global batch. Its gradient is that of this rank's rows times the number of ranks, as
    if all ranks had the same weight: their mean is the gradient of the global loss.

    Args:
        module: The module.
        group: The data-parallel ranks.
    """

    def __init__(self, module: PipelineMixin, group: ProcessGroup) -> None:
        self.module = module
        self.group = group

    def step(self, inputs: Any, target: Any, keep_outputs: bool = False) -> Tensor:
        """Loss of the global batch, from this rank's rows of it."""
        with self._alone():
            loss = self.module.pipeline_step(inputs, target, keep_outputs=keep_outputs)
            weight = self.module.pipeline_loss_weight(inputs if target is None else target)
        ranks = self.group.size()
        if weight is None:
            share: Tensor | float = 1.0 / ranks
        else:
            counted = torch.as_tensor(weight, dtype=torch.float32, device=loss.device)
            total = counted.clone()
            torch.distributed.all_reduce(total, group=self.group)
            # A mean over nothing is no number, and has no part in the sum.
            loss = torch.where(counted > 0, loss, torch.zeros_like(loss))
            share = counted / total.clamp(min=torch.finfo(torch.float32).tiny)
        part = loss * share
        whole = part.detach().float()
        torch.distributed.all_reduce(whole, group=self.group)
        part = part * ranks
        # The value of the global loss with the gradient of this rank's part.
        return part + (whole.to(part.dtype) - part.detach())

    def forward(self, inputs: Any) -> Tensor:
        """Output for this rank's rows."""
        with self._alone():
            return self.module.pipeline_forward(inputs)

    def outputs(self) -> Tensor | None:
        """Output of the last step that kept it."""
        with self._alone():
            return self.module.pipeline_outputs()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The module runs itself."""
        self.module._pipeline_engine = None
        try:
            yield
        finally:
            self.module._pipeline_engine = self


def reduce_plain_gradients(module: nn.Module, group: ProcessGroup) -> None:
    """Sums the gradients of parameters that every rank keeps whole, those that FSDP2 does not take.

    A parameter without a gradient counts as zero if another rank has one for it.
    """
    plain = [p for p in cast(Iterable[nn.Parameter], module.parameters()) if not isinstance(p, DTensor)]
    plain = [parameter for parameter in plain if parameter.requires_grad and parameter.numel()]
    if not plain:
        return
    used = torch.tensor([parameter.grad is not None for parameter in plain], dtype=torch.float32).to(plain[0].device)
    torch.distributed.all_reduce(used, group=group)
    for parameter, ranks in zip(plain, used.tolist(), strict=True):
        if ranks:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad, group=group)
