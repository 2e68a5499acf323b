"""Moves optimizers from the parameters of the whole model to the shards that a rank holds.

``configure_optimizers`` sees the whole, ordinary model: it may pick parameters from any layer, in any order and any
groups, whatever stage they end up in. Only then the model is cut, and the groups are given the shards instead. Names
are those of the whole model everywhere, also of operators that run in slices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_hetu.parallel.osdp.split import SlicePart, plain_name, slice_parts

GroupNames = list[list[str]]
"""Parameter names of every group of an optimizer, over the whole model, in the optimizer's order."""


def parameter_names(optimizers: Sequence[Optimizer], module: nn.Module) -> list[GroupNames] | None:
    """For each optimizer, for each group, the names of its parameters; ``None`` if one is not of ``module``."""
    names = dict.fromkeys(module.parameters())
    if any(p not in names for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]):
        return None
    return _own_names(module, optimizers)


def _own_names(module: nn.Module, optimizers: Sequence[Optimizer]) -> list[GroupNames]:
    """What the groups have of ``module``; a parameter in slices counts once, where its first slice is.

    Raises:
        ValueError: If a group has only some slices of a parameter.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    parts = slice_parts(module)
    whole = {part.name: name for name, slices in parts.items() for part in slices}
    found: list[GroupNames] = []
    for optimizer in optimizers:
        groups = []
        for group in optimizer.param_groups:
            members = Counter(whole.get(plain_name(names[p]), names[p]) for p in group["params"])
            for name, count in members.items():
                if name in parts and count != len(parts[name]):
                    raise ValueError(
                        f"{type(optimizer).__name__}: a parameter group has {count} of the {len(parts[name])} slices of"
                        f" {name!r}: put all of them into one group."
                    )
            groups.append(list(members))
        found.append(groups)
    return found


def parameter_groups(
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    all_names: Sequence[str],
    known: Sequence[GroupNames] | None = None,
) -> list[GroupNames] | None:
    """For each optimizer, for each group, the parameter names over all stages, in the order the optimizer has them.

    torch numbers optimizer states by that order. ``None`` where it cannot be told: with several stages whose parameters
    are not in the order of the model.

    Args:
        module: This rank's part of the model.
        optimizers: Its optimizers; the groups must be the same on every rank.
        all_names: Parameter names of the whole model, in order.
        known: What the optimizers had over the whole model when they were made; used for the groups that are still so.

    Raises:
        ValueError: If ranks have different numbers of groups, or a group has only some slices of a parameter.
    """
    own = _own_names(module, optimizers)
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, own)
    counts = {tuple(map(len, rank)) for rank in gathered}
    if len(counts) > 1:
        raise ValueError(
            f"the optimizers have {' or '.join(map(str, sorted(counts)))} parameter groups, depending on the pipeline"
            " stage: where a group is added later, add it in every stage, without parameters if need be."
        )
    position = {name: index for index, name in enumerate(all_names)}
    merged: list[GroupNames] = []
    for index, optimizer in enumerate(own):
        before = known[index] if known is not None else []
        groups = []
        for group in range(len(optimizer)):
            parts = [rank[index][group] for rank in gathered]
            members = {name for part in parts for name in part}
            if group < len(before) and members == set(before[group]) and all(_is_part(p, before[group]) for p in parts):
                groups.append(before[group])
                continue
            if all(set(part) == members for part in parts):
                groups.append(parts[0])  # one stage: the order of the optimizer itself
                continue
            if any(part != sorted(part, key=lambda name: position[name]) for part in parts):
                return None
            groups.append(sorted(members, key=lambda name: position[name]))
        merged.append(groups)
    return merged


def _is_part(part: Sequence[str], whole: Sequence[str]) -> bool:
    """Whether a rank has its parameters of a group in the order of the whole group."""
    own = set(part)
    return [name for name in whole if name in own] == list(part)


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


def rebind(
    optimizer: Optimizer,
    names: GroupNames,
    parameters: Mapping[str, nn.Parameter],
    slices: Mapping[str, Sequence[SlicePart]] | None = None,
) -> None:
    """Gives every group of an optimizer those of its parameters that this rank has.

    Args:
        optimizer: An optimizer that :func:`can_rebind`.
        names: Its parameters.
        parameters: What this rank has, by the names of the whole model; slices by their own.
        slices: The slices of the parameters that are cut, by name, as ``slice_parts`` gives them; a group is given all
            slices of its parameters.
    """
    parts = {name: [part.name for part in parts] for name, parts in (slices or {}).items()}
    for group, members in zip(optimizer.param_groups, names, strict=True):
        own = [name for member in members for name in parts.get(member, [member])]
        group["params"] = [parameters[name] for name in own if name in parameters]
