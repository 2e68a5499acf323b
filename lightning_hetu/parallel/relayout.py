"""Moves activations from the layout of one layer to that of the next (spec: Galvatron's resharding, arXiv 2211.13878).

Going to fewer batch shards gathers in forward and slices in backward; going to more does the reverse. That is exact
because gradients are full on all ranks that hold a copy, which column-parallel layers on replicated input give.
"""

from __future__ import annotations

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
