"""Checkpoints with all experts under the names and shapes of the whole model, wherever experts were.

A rank knows its share of the experts only. Before a checkpoint is written, shares are put together along the first
dimension of the stacked weights, and the same is done for what optimizers keep of the weights' shape; a loading rank
cuts out its share. So any number of ranks reads what any other number wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_hetu.moe.gradients import expert_parameters, moe_layers
from lightning_hetu.parallel.expert_mesh import ExpertMesh

_KEY = "expert_states"
"""In a checkpoint: for each optimizer, the numbers of its parameters that are stacked experts."""


def gather_experts(module: nn.Module, checkpoint: dict[str, Any], optimizers: Sequence[Optimizer]) -> None:
    """Puts all experts into a checkpoint in place; to be called by all ranks.

    Args:
        module: The model.
        checkpoint: With ``state_dict`` and, if wanted, ``optimizer_states``, both of this rank.
        optimizers: The optimizers of these states.
    """
    groups = _groups_of(module)
    if groups is not None:
        for name, _ in expert_parameters(module):
            checkpoint["state_dict"][name] = _whole(checkpoint["state_dict"][name], groups)
    numbers: list[list[int]] = []
    known = {id(parameter) for layer in moe_layers(module) for parameter in layer.experts.parameters()}
    for optimizer, state in zip(optimizers, checkpoint.get("optimizer_states", ()), strict=False):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        numbers.append([number for number, parameter in enumerate(parameters) if id(parameter) in known])
        if groups is None:
            continue
        # The values are those of the optimizer itself, which goes on with its own.
        state["state"] = dict(state["state"])
        for number in numbers[-1]:
            values = dict(state["state"].get(number, {}))
            for key, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameters[number].shape:
                    values[key] = _whole(value, groups)
            state["state"][number] = values
    checkpoint[_KEY] = numbers


def scatter_experts(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Cuts this rank's share out of a checkpoint that has all experts, in place.

    Args:
        module: The model.
        checkpoint: What :func:`gather_experts` made, or one of a model that was whole.

    Raises:
        ValueError: If the checkpoint has another number of experts.
    """
    groups = _groups_of(module)
    if groups is None:
        return
    sizes = {}
    for name, parameter in expert_parameters(module):
        whole = checkpoint["state_dict"].get(name)
        if whole is None:  # strict loading says so itself
            continue
        expected = parameter.shape[0] * groups.expert_size
        if whole.shape[0] != expected:
            raise ValueError(f"checkpoint: {name!r} has {whole.shape[0]} experts, expected {expected}.")
        sizes[whole.shape] = parameter.shape
        checkpoint["state_dict"][name] = _share(whole, groups)
    for numbers, state in zip(checkpoint.get(_KEY, ()), checkpoint.get("optimizer_states", ()), strict=False):
        for number in numbers:
            values = state["state"].get(number, {})
            for key, value in values.items():
                if isinstance(value, Tensor) and value.shape in sizes:
                    values[key] = _share(value, groups)


def _groups_of(module: nn.Module) -> ExpertMesh | None:
    """The ranks with the other shares; ``None`` where parameters know of all experts, whole or as DTensors."""
    for layer in moe_layers(module):
        if layer.groups is not None and not isinstance(layer.experts.w1, DTensor):
            return layer.groups
    return None


def _whole(share: Tensor, groups: ExpertMesh) -> Tensor:
    """All experts, on the host: a checkpoint must not need the memory of the device."""
    parts = [torch.empty_like(share) for _ in range(groups.expert_size)]
    dist.all_gather(parts, share.contiguous(), group=groups.expert)
    return torch.cat([part.cpu() for part in parts])


def _share(whole: Tensor, groups: ExpertMesh) -> Tensor:
    return whole.chunk(groups.expert_size)[groups.expert_rank].clone()
