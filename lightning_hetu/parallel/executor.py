"""Runs one optimizer step's worth of forward and backward of a pipelined model under a plan."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

from lightning_hetu.parallel.batch import evaluation_microbatches, finer_rows, local_dp, training_microbatches
from lightning_hetu.parallel.forward_stage import ForwardStage
from lightning_hetu.parallel.gradients import HeldGradients, loss_that_releases
from lightning_hetu.parallel.mesh import PlanMesh
from lightning_hetu.parallel.pipeline_mixin import PipelineMixin
from lightning_hetu.parallel.stage import HybridPipelineStage, StageGroup, StageModule, UnmanagedStage, stage_autocast
from lightning_hetu.planning.plan import HybridPlan

# A head with gathered columns returns a view of a DTensor. FSDP warns of in-place operations on it; there are none.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)

Runner = PipelineScheduleSingle | PipelineScheduleMulti
_OF_SEVERAL_STAGES = {"interleaved_1f1b": ScheduleInterleaved1F1B, "zero_bubble": ScheduleInterleavedZeroBubble}

_SCHEDULES = 16
"""Schedules that are kept, each with the buffers of its shapes."""


class PipelineExecutor:
    """The engine behind :meth:`PipelineMixin.pipeline_step` under a plan.

    Every rank calls it with its local rows of the global batch, see :func:`lightning_hetu.parallel.batch.local_dp`.

    Args:
        module: The module, whose ``pipeline_loss`` is used.
        stage: This rank's layers, already parallelized; a group where the rank has several stages.
        plan: The plan.
        mesh: Its meshes.
        device: Where this rank computes.
    """

    def __init__(
        self,
        module: PipelineMixin,
        stage: StageModule | StageGroup | ForwardStage,
        plan: HybridPlan,
        mesh: PlanMesh,
        device: torch.device,
    ) -> None:
        self.module = module
        self.stage = stage
        self.plan = plan
        self.mesh = mesh
        self.device = device
        self.data_dp = local_dp(plan)
        self._schedules: dict[tuple[Any, ...], Runner] = {}
        self._outputs: Tensor | None = None
        self._loss_share: float | Tensor = 1.0
        self._window_ended = True
        self.steps = 0

    def end_accumulation(self) -> None:
        """To be called after the optimizer has stepped: the gradients in the parameters are used up."""
        self._window_ended = True

    def step(self, inputs: Tensor, target: Any, keep_outputs: bool = False) -> Tensor:
        """Loss of the global batch; in training its backward hands over the gradients that are already computed.

        Args:
            inputs: Local rows of the model's input.
            target: Local rows of the target, a tensor.
            keep_outputs: Whether :meth:`outputs` shall return the head's output afterwards.

        Raises:
            ValueError: If the local rows cannot be cut into microbatches, or the target is no tensor.
        """
        if not isinstance(target, Tensor):
            raise ValueError(f"pipeline_step(target=...) got {type(target).__name__}: expected one tensor.")
        self.steps += 1
        training = torch.is_grad_enabled() and cast(nn.Module, self.module).training
        microbatches = self._microbatches(len(inputs), training)
        if self.mesh.is_first_stage:
            inputs = self._cut(inputs, self.plan.embedding.dp, microbatches)
        if self.mesh.is_last_stage:
            target = self._cut(target, self.plan.head.dp, microbatches)
        self._loss_share = self._share_of_loss(target.chunk(microbatches))
        schedule = self._schedule(tuple(inputs.shape), microbatches, training=training, with_loss=True)

        def run(losses: list[Tensor]) -> None:
            self._outputs = self._run(schedule, inputs, target, losses, training=training, keep_outputs=keep_outputs)

        return self._loss_of(run, training)

    def _loss_of(self, run: Callable[[list[Tensor]], None], training: bool) -> Tensor:
        """Runs a schedule, which adds to a list of losses, and keeps its gradients until they are asked for."""
        losses: list[Tensor] = []
        held = HeldGradients(self.stage.parameters())
        if training:
            if self._window_ended:
                for parameter in held.parameters:
                    parameter.grad = None
                self._window_ended = False
            held.set_aside()
        run(losses)
        loss = self._sum_over_world(losses)
        if not training:
            return loss
        self._complete_gradients()
        held.hold()
        return loss_that_releases(loss, held)

    def _complete_gradients(self) -> None:
        """What is left to do for gradients when the schedule has ended."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Head output for the rows of this rank's head layout, in every stage; without gradients."""
        microbatches = self._microbatches(len(inputs), training=False)
        if self.mesh.is_first_stage:
            inputs = self._cut(inputs, self.plan.embedding.dp, microbatches)
        schedule = self._schedule(tuple(inputs.shape), microbatches, training=False, with_loss=False)
        return self._to_all_stages(self._run(schedule, inputs, None, None, training=False, keep_outputs=True))

    def _to_all_stages(self, output: Tensor | None) -> Tensor:
        """Tells all stages what the last one has."""
        if self.plan.pipeline_parallel_size == 1:
            assert output is not None
            return output
        group = self.mesh.pipeline.get_group()
        last = self.plan.pipeline_parallel_size - 1
        described = [None if output is None else (output.shape, output.dtype)]
        torch.distributed.broadcast_object_list(described, group_src=last, group=group, device=self.device)
        if output is None:
            assert described[0] is not None
            shape, dtype = described[0]
            output = torch.empty(shape, dtype=dtype, device=self.device)
        output = output.contiguous()
        torch.distributed.broadcast(output, group_src=last, group=group)
        return output

    def outputs(self) -> Tensor | None:
        """Head output of the last step that kept it; ``None`` outside the last stage."""
        return self._outputs

    def _microbatches(self, local_samples: int, training: bool) -> int:
        count = training_microbatches if training else evaluation_microbatches
        return count(self.plan, local_samples * self.data_dp)

    def _cut(self, values: Tensor, dp: int, microbatches: int) -> Tensor:
        """From local rows, those of this rank under ``dp`` batch shards."""
        parts = dp // self.data_dp
        rows: Tensor = finer_rows(values, len(values), microbatches, parts, self.mesh.data_index(dp) % parts)
        return rows

    def _share_of_loss(self, targets: Sequence[Any]) -> float | Tensor:
        """What the mean loss of a local microbatch, times its weight if it has one, counts in the global loss."""
        if not self.mesh.is_last_stage:
            return 1.0
        weights = [self.module.pipeline_loss_weight(target) for target in targets]
        if weights[0] is None:
            return 1.0 / (len(targets) * self.plan.head.dp)
        total = torch.stack([torch.as_tensor(w, dtype=torch.float32, device=self.device) for w in weights]).sum()
        torch.distributed.all_reduce(total, group=self.mesh.layout(self.plan.head).data.get_group())
        return 1.0 / total.clamp(min=torch.finfo(torch.float32).tiny)

    def _in_global_loss(self, loss: Tensor, target: Any) -> Tensor:
        """The mean loss of a local microbatch as a summand of the global loss."""
        weight = self.module.pipeline_loss_weight(target)
        return loss * (self._loss_share if weight is None else weight * self._loss_share)

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        with stage_autocast(output.device.type, self.stage.autocast_dtype):
            loss = self.module.pipeline_loss(output, target)
        return self._in_global_loss(loss, target)

    def _schedule(self, shapes: tuple[Any, ...], microbatches: int, *, training: bool, with_loss: bool) -> Runner:
        """A schedule for these shapes: stages exchange shapes when a schedule first runs, and keep to them."""
        key = (shapes, microbatches, training, with_loss, self.stage.autocast_dtype)
        if key not in self._schedules and len(self._schedules) >= _SCHEDULES:
            del self._schedules[next(iter(self._schedules))]  # lengths may differ from batch to batch
        if key not in self._schedules:
            loss = self._loss if with_loss else None
            several: type[Any] | None = _OF_SEVERAL_STAGES.get(self.plan.schedule) if training else None
            if self.plan.virtual_stages > 1 and several is None:
                several = ScheduleLoopedBFS  # all forwards, of any number of microbatches
            if several is not None:
                self._schedules[key] = several(self._stages(managed=False), microbatches, loss, scale_grads=False)
            else:
                kind = Schedule1F1B if training and self.plan.schedule == "1f1b" else ScheduleGPipe
                self._schedules[key] = kind(self._stages(managed=True)[0], microbatches, loss, scale_grads=False)
        return self._schedules[key]

    def _stages(self, managed: bool) -> list[Any]:
        """This rank's stages as torch's schedules take them."""
        modules = list(self.stage.stages) if isinstance(self.stage, StageGroup) else [self.stage]
        return [
            HybridPipelineStage(
                module if managed else UnmanagedStage(module),
                index,
                len(self.plan.stages),
                self.device,
                group=self.mesh.pipeline.get_group(),
            )
            for index, module in zip(self.plan.stages_of_rank(self.mesh.stage), modules, strict=True)
        ]

    def _run(
        self,
        schedule: Runner,
        inputs: Tensor,
        target: Tensor | None,
        losses: list[Tensor] | None,
        *,
        training: bool,
        keep_outputs: bool,
    ) -> Tensor | None:
        arguments: dict[str, Any] = {}
        if target is not None and self.mesh.is_last_stage:
            arguments = {"target": target, "losses": losses}
        run = schedule.step if training else schedule.eval
        if "return_outputs" in inspect.signature(run).parameters:
            arguments["return_outputs"] = keep_outputs
        device_type = self.device.type
        autocast = torch.is_autocast_enabled(device_type)
        self.stage.autocast_dtype = torch.get_autocast_dtype(device_type) if autocast else None
        # Autocast is entered per stage forward, so that backward inside the schedule does not run under it. FSDP cannot
        # gather parameters into inference tensors: evaluation under inference mode only goes without gradients.
        with (
            torch.autocast(device_type, dtype=torch.bfloat16, enabled=False),
            torch.inference_mode(False),
            torch.set_grad_enabled(training),
        ):
            output = run(*((inputs,) if self.mesh.is_first_stage else ()), **arguments)
        if not training:
            for module in self.stage.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # evaluation has no backward that would free gathered parameters
        return output.detach() if keep_outputs and output is not None else None

    def _sum_over_world(self, losses: list[Tensor]) -> Tensor:
        """Adds up the head's losses over its data-parallel ranks, and tells every rank."""
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        if self.mesh.is_last_stage and self.mesh.stage_rank % self.plan.head.tp == 0:
            total += torch.stack([loss.detach().float() for loss in losses]).sum()
        torch.distributed.all_reduce(total)
        return total
