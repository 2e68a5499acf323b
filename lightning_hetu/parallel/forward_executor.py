"""Runs the pipeline of a model that runs its own forward: every stage is given the whole batch."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_hetu.parallel.batch import batch_samples, microbatches_of
from lightning_hetu.parallel.executor import PipelineExecutor
from lightning_hetu.parallel.forward_stage import ForwardStage


class ForwardExecutor(PipelineExecutor):
    """The engine behind :meth:`PipelineMixin.pipeline_step` for a module that names its ``pipeline_model``."""

    stage: ForwardStage

    def step(self, inputs: Any, target: Any = None, keep_outputs: bool = False) -> Tensor:
        """Loss of the global batch; in training its backward hands over the gradients that are already computed.

        Args:
            inputs: Local rows of what the model takes, any nesting of tensors.
            target: Local rows of what ``pipeline_loss`` compares with; by default it is given the inputs.
            keep_outputs: Whether :meth:`outputs` shall return what ``pipeline_output`` makes of the model's output.

        Raises:
            ValueError: If the local rows cannot be cut into microbatches.
        """
        self.steps += 1
        training = torch.is_grad_enabled() and cast(nn.Module, self.module).training
        rows = batch_samples(inputs)
        microbatches = self._microbatches(rows, training)
        parts = microbatches_of(inputs, rows, microbatches)
        targets = parts if target is None else microbatches_of(target, rows, microbatches)
        self._loss_share = self._share_of_loss(targets)
        kept: list[Tensor | None] = [None] * microbatches

        def finish(output: Any, index: int) -> Tensor:
            loss = self.module.pipeline_loss(output, targets[index])
            if keep_outputs:
                kept[index] = self.module.pipeline_output(output).detach()
            return self._in_global_loss(loss, targets[index]).reshape(1)

        def run(losses: list[Tensor]) -> None:
            self._run_parts(parts, finish, losses, training)

        loss = self._loss_of(run, training)
        outputs = [output for output in kept if output is not None]
        self._outputs = torch.cat(outputs) if outputs else None
        return loss

    def forward(self, inputs: Any) -> Tensor:
        """The model's output tensor for the rows of this rank, in every stage; without gradients."""
        rows = batch_samples(inputs)
        microbatches = self._microbatches(rows, training=False)
        kept: list[Tensor | None] = [None] * microbatches

        def finish(output: Any, index: int) -> Tensor:
            kept[index] = self.module.pipeline_output(output).detach()
            return torch.zeros(1, device=self.device)

        self._run_parts(microbatches_of(inputs, rows, microbatches), finish, None, training=False)
        outputs = [output for output in kept if output is not None]
        return self._to_all_stages(torch.cat(outputs) if outputs else None)

    def _complete_gradients(self) -> None:
        self.stage.tied.add_up()

    def _run_parts(self, parts: list[Any], finish: Any, losses: list[Tensor] | None, training: bool) -> None:
        shapes = tuple(tuple(leaf.shape) for leaf in tree_leaves(parts[0]) if isinstance(leaf, Tensor))
        schedule = self._schedule(shapes, len(parts), training=training, with_loss=losses is not None)
        self.stage.microbatches, self.stage.finish, self.stage.microbatch = parts, finish, 0
        self.stage.shapes = shapes, training
        index = torch.arange(len(parts), device=self.device)  # stands for the inputs, which the stages have
        try:
            self._run(schedule, index, index, losses, training=training, keep_outputs=False)
        finally:
            self.stage.microbatches, self.stage.finish = [], None

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        # The last stage has made it in `finish`.
        return output.sum()
