"""Gradient norm clipping when layers live on different meshes and stages.

torch's own function stacks the norms of all gradients, which DTensors of different meshes refuse
(pytorch/pytorch#180346). Norms are taken per mesh, made full, and combined.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def clip_gradients_by_norm(
    parameters: Iterable[Tensor], max_norm: float, pipeline_group: ProcessGroup | None = None
) -> Tensor:
    """Scales gradients in place so that their 2-norm over the whole model is at most ``max_norm``.

    Args:
        parameters: Parameters of this rank's stage.
        max_norm: Largest norm allowed.
        pipeline_group: Ranks that hold the other stages; ``None`` for a single stage.

    Returns:
        The norm before clipping, a float32 scalar, the same on every rank.
    """
    groups: dict[tuple[DeviceMesh | None, str], list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = parameter.grad
            mesh = gradient.device_mesh if isinstance(gradient, DTensor) else None
            groups[mesh, gradient.device.type].append(parameter)
    device = next((_home(p.grad) for ps in groups.values() for p in ps if p.grad is not None), torch.device("cpu"))
    total = torch.zeros((), dtype=torch.float32, device=device)
    for (mesh, where), members in groups.items():
        # A copy of a parameter that an earlier stage has too counts there.
        own = [p.grad for p in members if p.grad is not None and not hasattr(p, "_hetu_copy")]
        if not own:
            continue
        if mesh is not None and where != mesh.device_type:
            total += squared_norm_of_offloaded([cast(DTensor, gradient) for gradient in own])
            continue
        norm = get_total_norm(own)
        full = norm.full_tensor() if isinstance(norm, DTensor) else norm
        total += full.float() ** 2
    if pipeline_group is not None:
        torch.distributed.all_reduce(total, group=pipeline_group)
    total = total.sqrt()
    for members in groups.values():
        clip_grads_with_norm_(members, max_norm, total)
    return total


def squared_norm_of_offloaded(gradients: Sequence[DTensor]) -> Tensor:
    """Squared 2-norm of sharded gradients of one mesh that lie on the host, where its collectives cannot add them.

    Returns:
        A float32 scalar on the device of the mesh.
    """
    mesh = gradients[0].device_mesh
    total = torch.zeros((), dtype=torch.float32, device=_home(gradients[0]))
    for placements in dict.fromkeys(gradient.placements for gradient in gradients):
        alike = [gradient.to_local() for gradient in gradients if gradient.placements == placements]
        part = (get_total_norm(alike).float() ** 2).to(total.device)
        for dim, placement in enumerate(placements):
            if placement.is_shard():
                torch.distributed.all_reduce(part, group=mesh.get_group(dim))
        total += part
    return total


def _home(gradient: Tensor) -> torch.device:
    """The device that works on a gradient: that of its mesh, also where it lies on the host."""
    if not isinstance(gradient, DTensor) or gradient.device_mesh.device_type == gradient.device.type:
        return gradient.device
    return torch.device(gradient.device_mesh.device_type, torch.accelerator.current_device_index())
