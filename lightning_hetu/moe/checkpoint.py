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
from lightning_hetu.moe.layer import MoELayer

_KEY = "expert_states"
"""In a checkpoint: for each optimizer, the numbers of its parameters that are stacked experts, with their names."""


def gather_experts(module: nn.Module, checkpoint: dict[str, Any], optimizers: Sequence[Optimizer]) -> None:
    """Puts all experts into a checkpoint in place; to be called by all ranks.

    Args:
        module: The model.
        checkpoint: With ``state_dict`` and, if wanted, ``optimizer_states``, both of this rank.
        optimizers: The optimizers of these states.
    """
    spread = _spread_layers(module)
    for name, layer in _by_name(module, spread).items():
        if name in checkpoint["state_dict"]:  # or the module leaves it out, on all ranks alike
            checkpoint["state_dict"][name] = _whole(checkpoint["state_dict"][name], layer)
    numbers: list[dict[int, str]] = []
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    known = {id(parameter): layer for layer in moe_layers(module) for parameter in layer.experts.parameters()}
    for optimizer, state in zip(optimizers, checkpoint.get("optimizer_states", ()), strict=False):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        numbers.append({number: names[id(p)] for number, p in enumerate(parameters) if id(p) in known})
        if not spread:
            continue
        # The values are those of the optimizer itself, which goes on with its own.
        state["state"] = dict(state["state"])
        for number in numbers[-1]:
            values = dict(state["state"].get(number, {}))
            for key, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameters[number].shape:
                    values[key] = _whole(value, known[id(parameters[number])])
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
    spread = _spread_layers(module)
    if not spread:
        return
    layers = _by_name(module, spread)
    for name, layer in layers.items():
        whole = checkpoint["state_dict"].get(name)
        if whole is None:  # strict loading says so itself
            continue
        if whole.shape[0] != layer.num_experts:
            raise ValueError(f"checkpoint: {name!r} has {whole.shape[0]} experts, expected {layer.num_experts}.")
        checkpoint["state_dict"][name] = _share(whole, layer)
    for numbers, state in zip(checkpoint.get(_KEY, ()), checkpoint.get("optimizer_states", ()), strict=False):
        for number, name in numbers.items():
            values = state["state"].get(number, {})
            for key, value in values.items():
                # Not a count of steps, which all rows have in common.
                if isinstance(value, Tensor) and value.dim() and name in layers:
                    values[key] = _share(value, layers[name])


def _spread_layers(module: nn.Module) -> list[MoELayer]:
    """Layers of whose experts this rank has a share; elsewhere parameters know of all, whole or as DTensors."""
    layers = [layer for layer in moe_layers(module) if layer.groups is not None]
    return [layer for layer in layers if not isinstance(layer.experts.w1, DTensor)]


def _by_name(module: nn.Module, layers: Sequence[MoELayer]) -> dict[str, MoELayer]:
    """The layers by the names of their stacked parameters."""
    known = {id(parameter): layer for layer in layers for parameter in layer.experts.parameters()}
    return {name: known[id(parameter)] for name, parameter in expert_parameters(module) if id(parameter) in known}


def _whole(share: Tensor, layer: MoELayer) -> Tensor:
    """All experts, on the host: a checkpoint must not need the memory of the device."""
    assert layer.groups is not None
    gathered = [torch.empty_like(share) for _ in range(layer.groups.expert_size)]
    dist.all_gather(gathered, share.contiguous(), group=layer.groups.expert)
    parts = [part.cpu() for part in gathered]
    if layer.placement is None:
        return torch.cat(parts)
    holders = [layer.placement.holders(expert)[0] for expert in range(layer.num_experts)]
    slots = [layer.placement.slot_of(rank, expert) for expert, rank in enumerate(holders)]
    return torch.stack([parts[rank][slot] for rank, slot in zip(holders, slots, strict=True)])


def _share(whole: Tensor, layer: MoELayer) -> Tensor:
    """What this rank has of all experts; zero in slots that are free."""
    assert layer.groups is not None
    rank = layer.groups.expert_rank
    if layer.placement is None:
        return whole.chunk(layer.groups.expert_size)[rank].clone()
    row = torch.tensor(layer.placement.slots[rank], device=whole.device)
    free = (row < 0).view(-1, *[1] * (whole.dim() - 1))
    return whole[row.clamp(min=0)].masked_fill(free, 0)
