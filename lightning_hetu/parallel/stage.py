"""The part of a pipelined model that one rank runs, and how torch's schedules drive it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._backward import stage_backward

from lightning_hetu.parallel.mesh import PlanMesh
from lightning_hetu.parallel.relayout import relayout
from lightning_hetu.parallel.shard import prepare_backward
from lightning_hetu.planning.plan import HybridPlan


class StageModule(nn.Module):
    """The layers of one stage in a row, with the relayouts between them.

    Args:
        layers: Modules of this stage in the order they run, each with its data-parallel degree.
        mesh: Meshes of the plan.
        input_dp: Batch shards of what the stage is given.
        output_dp: Batch shards of what it returns.
    """

    def __init__(self, layers: list[tuple[nn.Module, int]], mesh: PlanMesh, input_dp: int, output_dp: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(module for module, _ in layers)
        self.degrees = [dp for _, dp in layers]
        self.mesh = mesh
        self.input_dp = input_dp
        self.output_dp = output_dp
        self.autocast_dtype: torch.dtype | None = None
        self.removed: Any = None

    def autocast(self, device_type: str) -> torch.autocast:
        """The context that layers and loss run under.

        Without autocast's cache of cast weights: a cast that a later microbatch took from an earlier one has an older
        node in the graph, so its gradient would arrive after FSDP has already reduced those of the layer.
        """
        return torch.autocast(
            device_type,
            dtype=self.autocast_dtype or torch.bfloat16,
            enabled=self.autocast_dtype is not None,
            cache_enabled=False,
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Runs one microbatch of local rows, shape ``[samples / input_dp, ...]``."""
        with self.autocast(hidden.device.type):
            current = self.input_dp
            for layer, dp in zip(self.layers, self.degrees, strict=True):
                hidden = layer(relayout(hidden, self.mesh, current, dp))
                current = dp
            return relayout(hidden, self.mesh, current, self.output_dp)


class HybridPipelineStage(PipelineStage):
    """A pipeline stage whose layers each follow their own data-parallel policy.

    torch's stage keeps all gradients and gathered parameters of an FSDP stage until its last microbatch; that would
    take from ZeRO-2 and ZeRO-3 the memory they are chosen for. Here each layer says for itself what is kept.
    """

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Forward of one microbatch."""
        self.submod.microbatch = fwd_chunk_id  # type: ignore[assignment]
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> tuple[tuple[Tensor | None, ...], None]:
        """Backward of one microbatch."""
        if backward_type != "full":
            raise NotImplementedError(f"{backward_type!r} backward: split-backward schedules are not supported.")
        prepare_backward(self.submod, last=last_backward)
        gradients = stage_backward(bwd_kwargs["stage_output"], bwd_kwargs["output_grads"], bwd_kwargs["input_values"])
        return gradients, None

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Gradients are reduced in the backward of the last microbatch, and scaled in the loss."""

    def scale_grads(self, grad_scale_factor: int) -> None:
        """Gradients are scaled in the loss."""


def boundary_dp(plan: HybridPlan, boundary: int) -> int:
    """Batch shards of the activations sent from stage ``boundary`` to the next one.

    Every rank sends to the same rank of the next stage. Sharding over all ranks of a stage sends every row once; where
    the microbatch does not divide so far, the finer of the two adjacent layouts is used.
    """
    end = plan.stage_bounds[boundary][1]
    size = plan.devices_per_stage
    if plan.microbatch_size % size == 0:
        return size
    return max(plan.layers[end - 1].dp, plan.layers[end].dp)
