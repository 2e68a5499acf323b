"""The part of a pipelined model that one rank runs, and how torch's schedules drive it.

Schedules may split a backward in the gradients of the input and those of the weights (zero bubble, arXiv 2401.10241).
The second part runs without the hooks by which FSDP notices a backward, so what they do is done here. Parameters must
stay gathered between the parts: freed ones give wrong gradients (pytorch/pytorch#144530, #164756).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._backward import stage_backward, stage_backward_input, stage_backward_weight

from lightning_hetu.parallel.mesh import PlanMesh
from lightning_hetu.parallel.recompute import is_recomputed
from lightning_hetu.parallel.relayout import relayout
from lightning_hetu.parallel.sequence_attention import without_checks
from lightning_hetu.parallel.shard import fsdp_modules, prepare_backward
from lightning_hetu.planning.plan import HybridPlan

_COUNTS_TWICE = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)


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

    def forward(self, hidden: Tensor) -> Tensor:
        """Runs one microbatch of local rows, shape ``[samples / input_dp, ...]``."""
        with stage_autocast(hidden.device.type, self.autocast_dtype):
            current = self.input_dp
            for layer, dp in zip(self.layers, self.degrees, strict=True):
                hidden = layer(relayout(hidden, self.mesh, current, dp))
                current = dp
            return relayout(hidden, self.mesh, current, self.output_dp)


def stage_autocast(device_type: str, dtype: torch.dtype | None) -> torch.autocast:
    """The context that a stage runs under; ``None`` is no autocast.

    Without autocast's cache of cast weights: a cast that a later microbatch took from an earlier one has an older node
    in the graph, so its gradient would arrive after FSDP has already reduced those of the layer.
    """
    return torch.autocast(device_type, dtype=dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False)


class StageGroup(nn.Module):
    """The stages of a rank that has several, each a unit of its own for FSDP and for the schedule.

    Args:
        stages: The stages in model order.
    """

    def __init__(self, stages: list[StageModule]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.removed: Any = None

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What the stages compute in; ``None`` without autocast."""
        dtype: torch.dtype | None = self.stages[0].autocast_dtype  # type: ignore[assignment]
        return dtype

    @autocast_dtype.setter
    def autocast_dtype(self, dtype: torch.dtype | None) -> None:
        for stage in self.stages:
            stage.autocast_dtype = dtype  # type: ignore[assignment]


class UnmanagedStage(nn.Module):
    """A stage that schedules of several stages do not take for an FSDP module.

    They would gather all parameters of a stage ahead of its turn and free them behind it, whatever the layers say.

    Args:
        stage: The stage.
    """

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, hidden: Tensor) -> Tensor:
        """Forward of one microbatch."""
        output: Tensor = self.stage(hidden)
        return output.clone() if output._is_view() else output  # a split backward detaches it in place


class HybridPipelineStage(PipelineStage):
    """A pipeline stage whose layers each follow their own data-parallel policy.

    torch's stage keeps all gradients and gathered parameters of an FSDP stage until its last microbatch; that would
    take from ZeRO-2 and ZeRO-3 the memory they are chosen for. Here each layer says for itself what is kept.
    """

    split_checked = False
    """Whether a split backward has been found to reach all weights."""

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with without_checks():  # it runs the stage on memory that nobody has written to
            return super()._prepare_forward_infra(*args, **kwargs)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Forward of one microbatch."""
        self.submod.microbatch = fwd_chunk_id  # type: ignore[assignment]
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> tuple[tuple[Tensor | None, ...], list[dict[str, Any]] | None]:
        """Backward of one microbatch: ``full``, or one of its parts, ``input`` and ``weight``."""
        if backward_type == "input":
            return self._backward_of_input(**bwd_kwargs)
        prepare_backward(self.submod, last=last_backward)
        if backward_type == "weight":
            gradients = stage_backward_weight(self.submod.parameters(), bwd_kwargs["param_groups"])
            finish_backward(self.submod)
            return gradients, None
        gradients = stage_backward(bwd_kwargs["stage_output"], bwd_kwargs["output_grads"], bwd_kwargs["input_values"])
        return gradients, None

    def _backward_of_input(
        self, stage_output: Any, output_grads: Any, input_values: list[Any]
    ) -> tuple[tuple[Tensor | None, ...], list[dict[str, Any]]]:
        """The gradient of the input, and where to go on for those of the weights.

        Those of the weights come along where that is better: they are then only reduced later.
        """
        hold_backward(self.submod)
        # Behind frozen stages, torch would find no weights starting from the input, and leave out their gradients. A
        # recomputed layer would run its forward once more for each of its weights.
        frozen = not any(isinstance(value, Tensor) and value.requires_grad for value in input_values)
        if frozen or any(is_recomputed(module) for module in self.submod.modules()):
            # The loss comes as a tuple, of which a whole backward would take nothing without gradients for it.
            outputs = stage_output[0] if output_grads is None else stage_output
            return stage_backward(outputs, output_grads, input_values), []
        leaves = graph_leaves(stage_output) if not self.split_checked else set()
        gradients, groups = stage_backward_input(stage_output, output_grads, input_values, self.submod.parameters())
        if not self.split_checked:
            check_split(groups, leaves.intersection(self.submod.parameters()))
            self.split_checked = True
        return gradients, groups

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Gradients are reduced in the backward of the last microbatch, and scaled in the loss."""

    def scale_grads(self, grad_scale_factor: int) -> None:
        """Gradients are scaled in the loss."""


def hold_backward(root: nn.Module) -> None:
    """Makes the coming backward, which is only of the input, leave parameters gathered and reduce nothing."""
    for module in fsdp_modules(root):
        module.set_is_last_backward(False)
        module.set_requires_gradient_sync(False, recurse=False)
        module.set_reshard_after_backward(False, recurse=False)


def finish_backward(root: nn.Module) -> None:
    """Does what FSDP does at the end of a backward, as :func:`prepare_backward` has set it."""
    top = next(fsdp_modules(root))
    fully_shard.state(top)._root_post_backward_final_callback()  # type: ignore[attr-defined]  # as torch's stage does


def graph_leaves(outputs: Iterable[Tensor]) -> set[Tensor]:
    """The tensors without history that the outputs were computed from, and that get a gradient."""
    leaves: set[Tensor] = set()
    seen: set[Any] = set()
    stack = [output.grad_fn for output in outputs if output.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            leaves.add(variable)
        stack.extend(child for child, _ in node.next_functions if child is not None)
    return leaves


def check_split(groups: list[dict[str, Any]], weights: set[Tensor]) -> None:
    """Refuses a layer whose split backward would silently give wrong gradients.

    Args:
        groups: What torch found by going from the input to the outputs: weights, and where their gradients start.
        weights: The weights that a whole backward reaches.

    Raises:
        ValueError: If some were not found; or if one is used twice, and this torch, before 2.13, counts it too often.
    """
    found = {node.variable for group in groups for node in group["params"]}
    if weights - found:
        raise ValueError(
            "schedule='zero_bubble': the gradient of some weights does not depend on that of their stage's input, as"
            " where a layer detaches its input. Its backward cannot be split; use schedule='1f1b'."
        )
    if _COUNTS_TWICE and any(len(group["intermediates"]) > 1 for group in groups):
        raise ValueError(
            "schedule='zero_bubble': a layer uses a parameter more than once, which needs torch 2.13. Upgrade torch, or"
            " use schedule='1f1b'."
        )


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
