"""Times the whole step of a model on the device where it is."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_hetu.profiling._isolation import untouched
from lightning_hetu.profiling._measure import Stopwatch


class StepSeconds(NamedTuple):
    """Seconds of forward and of backward."""

    forward: float
    backward: float


def time_step(
    module: nn.Module,
    run: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    device: torch.device,
    *,
    repeats: int = 3,
) -> StepSeconds:
    """Median times of a model's step, after one that is not counted; the module is left as it was.

    Args:
        module: The model.
        run: Forward pass and loss: ``run(module, batch)`` gives a scalar.
        batch: A local batch on the device.
        device: The device.
        repeats: Timed runs.
    """
    watch, found = Stopwatch(device), []
    with untouched(module, device):
        for _ in range(repeats + 1):
            watch.start()
            loss = run(module, batch)
            forward = watch.stop()
            watch.start()
            loss.backward()
            found.append(StepSeconds(forward, watch.stop()))
            for parameter in module.parameters():
                parameter.grad = None
    return StepSeconds(*(median(times) for times in zip(*found[1:], strict=True)))
