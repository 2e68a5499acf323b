"""Gradient norm clipping when layers live on different meshes and stages.

torch's own function stacks the norms of all gradients, which DTensors of different meshes refuse
(pytorch/pytorch#180346). Norms are taken per mesh, made full, and combined.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
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
    groups: dict[object, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = parameter.grad
            groups[gradient.device_mesh if isinstance(gradient, DTensor) else None].append(parameter)
    device = next((p.grad.device for ps in groups.values() for p in ps if p.grad is not None), torch.device("cpu"))
    total = torch.zeros((), dtype=torch.float32, device=device)
    for members in groups.values():
        # A copy of a parameter that an earlier stage has too counts there.
        own = [p.grad for p in members if p.grad is not None and not hasattr(p, "_hetu_copy")]
        if not own:
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
