"""Gives modules that were built on the meta device their memory and initial weights, a few at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn


def on_meta(module: nn.Module) -> bool:
    """Whether any parameter or buffer is on the meta device."""
    return any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def check_can_be_materialized(module: nn.Module) -> None:
    """Refuses modules that have no way to draw their initial weights.

    Raises:
        ValueError: It names the class.
    """
    for name, part in module.named_modules():
        if any(tensor.is_meta for tensor in _direct(part)) and not hasattr(part, "reset_parameters"):
            raise ValueError(
                f"{name or 'the module'} is on the meta device, and {type(part).__name__} has no reset_parameters() to"
                " draw its initial weights: add one, or build the module on a real device."
            )


def materialize(
    root: nn.Module, parameters: Collection[nn.Parameter], device: torch.device, *, rest: bool = False
) -> dict[nn.Parameter, nn.Parameter]:
    """Allocates and initializes the modules that hold some of the parameters, in place.

    A module with several parameters is initialized as a whole, and every rank gets the weights of rank 0. Shared
    parameters stay shared.

    Args:
        root: The whole model.
        parameters: Parameters on the meta device.
        device: Where they are to be.
        rest: Whether modules that have buffers only are initialized as well.

    Returns:
        What has taken the place of each parameter.
    """
    wanted = set(parameters)
    new: dict[nn.Parameter, nn.Parameter] = {}
    touched = []
    for part in root.modules():
        own = [p for p in part._parameters.values() if p is not None]
        buffers = [b for b in part._buffers.values() if b is not None and b.is_meta]
        if wanted.isdisjoint(own) and not (rest and buffers and not own):
            continue
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_meta:
                if parameter not in new:
                    empty = torch.empty_like(parameter, device=device)
                    new[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                part._parameters[name] = new[parameter]
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_meta:
                part._buffers[name] = torch.empty_like(buffer, device=device)
        touched.append(part)
    for part in touched:
        part.reset_parameters()  # type: ignore[operator]
        for tensor in _direct(part):
            torch.distributed.broadcast(tensor.detach(), src=0)
    # Elsewhere the same parameter may be registered too.
    for part in root.modules():
        for name, parameter in part._parameters.items():
            if parameter in new:
                part._parameters[name] = new[parameter]  # type: ignore[index]
    return new


def _direct(part: nn.Module) -> Iterator[Tensor]:
    yield from part.parameters(recurse=False)
    yield from part.buffers(recurse=False)
