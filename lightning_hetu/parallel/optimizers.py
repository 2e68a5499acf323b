"""Moves optimizers from the parameters of the whole model to the shards that a rank holds.

``configure_optimizers`` sees the whole, ordinary model: it may pick parameters from any layer, in any order and any
groups, whatever stage they end up in. Only then the model is cut, and the groups are given the shards instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

GroupNames = list[list[str]]
"""Parameter names of every group of an optimizer, over the whole model, in the optimizer's order."""


def parameter_names(optimizers: Sequence[Optimizer], module: nn.Module) -> list[GroupNames] | None:
    """For each optimizer, for each group, the names of its parameters; ``None`` if one is not of ``module``."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    if any(p not in names for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]):
        return None
    return [[[names[p] for p in group["params"]] for group in optimizer.param_groups] for optimizer in optimizers]


def can_rebind(optimizer: Optimizer) -> bool:
    """Whether an optimizer keeps parameters in its groups only: no states yet, no lists or optimizers of its own."""
    own = [value for name, value in vars(optimizer).items() if name not in ("param_groups", "defaults", "state")]
    return not optimizer.state and not any(map(_holds_tensors, own))


def _holds_tensors(value: object, depth: int = 4) -> bool:
    """Whether tensors or optimizers can be reached from ``value`` through containers and attributes."""
    if isinstance(value, torch.Tensor | Optimizer | nn.Module):
        return True
    if depth == 0 or callable(value):
        return False
    if isinstance(value, Mapping):
        parts = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set | frozenset):
        parts = list(value)
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    return any(_holds_tensors(part, depth - 1) for part in parts)


def rebind(optimizer: Optimizer, names: GroupNames, parameters: Mapping[str, nn.Parameter]) -> None:
    """Gives every group of an optimizer those of its parameters that this rank has.

    Args:
        optimizer: An optimizer that :func:`can_rebind`.
        names: Its parameters.
        parameters: What this rank has, by the names of the whole model.
    """
    for group, members in zip(optimizer.param_groups, names, strict=True):
        group["params"] = [parameters[name] for name in members if name in parameters]
