"""Moves activations from the layout of one layer to that of the next (spec: Galvatron's resharding, arXiv 2211.13878).

Going to fewer batch shards gathers in forward and slices in backward; going to more does the reverse. That is exact
because gradients are full on all ranks that hold a copy, which column-parallel layers on replicated input give.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_hetu.parallel.mesh import PlanMesh


def relayout(tensor: Tensor, mesh: PlanMesh, source_dp: int, target_dp: int) -> Tensor:
    """The rows of ``tensor`` that this rank needs under ``target_dp``, given those it has under ``source_dp``.

    Args:
        tensor: Local rows, shape ``[samples / source_dp, ...]``.
        mesh: Meshes of the plan.
        source_dp: Batch shards the tensor is cut into now.
        target_dp: Batch shards wanted.

    Returns:
        Shape ``[samples / target_dp, ...]``.
    """
    if source_dp == target_dp:
        return tensor
    source, target = mesh.placements(source_dp), mesh.placements(target_dp)
    distributed = DTensor.from_local(tensor.contiguous(), mesh.activation, source, run_check=False)
    # clone: a slice is a view of the larger tensor and would keep it alive, and pipeline stages detach in place
    return distributed.redistribute(placements=target).to_local(grad_placements=target).clone()


def relayout_shared(tensor: Tensor, mesh: PlanMesh, source_dp: int, target_dp: int) -> Tensor:
    """A tensor that is the same for all samples, as a layer with another data-parallel degree may use it.

    Its value is there already. Its gradient is a sum over samples of which every rank has its own; the ranks that made
    the tensor must, added up over their ``source_dp`` shards, have all of it once.

    Args:
        tensor: Any shape, the same on every rank of the stage.
        mesh: Meshes of the plan.
        source_dp: Batch shards of the layer that made it.
        target_dp: Batch shards of the layer that uses it.
    """
    if source_dp == target_dp:
        return tensor
    shared: Tensor = _Shared.apply(tensor, mesh, source_dp, target_dp)
    return shared


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mesh: PlanMesh, source_dp: int, target_dp: int) -> Tensor:
        ctx.mesh, ctx.factor = mesh, target_dp / (mesh.plan.devices_per_stage * source_dp)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        # Of the stage's ranks, those with the same samples have the same gradient.
        total = gradients[0].contiguous() * ctx.factor
        torch.distributed.all_reduce(total, group=ctx.mesh.stage_group)
        return total, None, None, None
