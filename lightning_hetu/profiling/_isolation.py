"""Lets a profiler run a module for real and leave no trace of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

AutocastFactory = Callable[[], AbstractContextManager[object]]


@contextmanager
def untouched(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Runs the body with ``module`` in training mode, and puts back what running it changes.

    Gradients are set aside (the body starts without any), buffers, training flags and random number generators are
    restored. Parameters are the body's own duty: running forward and backward does not change them.
    """
    parameters = list(module.parameters())
    gradients = [parameter.grad for parameter in parameters]
    modes = [(part, part.training) for part in module.modules()]
    buffers = [
        (part, name, buffer, None if buffer is None or buffer.is_meta else buffer.detach().clone())
        for part in module.modules()
        for name, buffer in part._buffers.items()
    ]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad():
        try:
            for parameter in parameters:
                parameter.grad = None
            if not module.training:
                module.train()
            yield
        finally:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            for part, mode in modes:
                part.training = mode
            with torch.no_grad():
                for part, name, buffer, copy in buffers:
                    if buffer is not None and copy is not None:
                        buffer.copy_(copy)
                    part._buffers[name] = buffer


def autocast_factory(precision: str, device: torch.device, autocast: AutocastFactory | None) -> AutocastFactory:
    """What forward runs under: the given context, else autocast to bfloat16 for ``bf16-mixed``, else nothing."""
    if autocast is not None:
        return autocast
    if precision == "bf16-mixed":
        # Without the cache of converted weights, like the stages of a plan.
        return lambda: torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
    return nullcontext
