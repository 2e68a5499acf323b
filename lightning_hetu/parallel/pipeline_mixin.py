"""What a LightningModule says about itself so that it can be cut into pipeline stages and microbatches.

The module stays an ordinary one: in plain Lightning :meth:`PipelineMixin.pipeline_step` is a forward pass and a loss.
Under :class:`lightning_hetu.AutoHybridParallelStrategy` the same call runs the pipeline schedule of the plan.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn


class PipelineEngine(Protocol):
    """What runs the pipeline behind a :class:`PipelineMixin`; implemented by the executor."""

    def step(self, inputs: Tensor, target: Any, keep_outputs: bool = False) -> Tensor:
        """See :meth:`PipelineMixin.pipeline_step`."""
        ...

    def forward(self, inputs: Tensor) -> Tensor:
        """See :meth:`PipelineMixin.pipeline_forward`."""
        ...

    def outputs(self) -> Tensor | None:
        """See :meth:`PipelineMixin.pipeline_outputs`."""
        ...


class PipelineMixin:
    """Mixin for a LightningModule that is an embedding, a list of equal-shaped blocks and a head, one after another.

    Each of the three takes one tensor and returns one tensor with the batch in dimension 0; a block returns the shape
    it was given. Name them with dotted paths, then use :meth:`pipeline_step` in the ordinary ``training_step``::

        class MyModule(PipelineMixin, LightningModule):
            pipeline_embedding = "model.embedding"
            pipeline_blocks = "model.blocks"
            pipeline_head = "model.head"

            def pipeline_loss(self, output, target):
                return torch.nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())

            def training_step(self, batch, batch_idx):
                inputs, target = batch
                loss = self.pipeline_step(inputs, target)
                self.log("train_loss", loss)
                return loss
    """

    pipeline_embedding: str
    pipeline_blocks: str
    pipeline_head: str

    _pipeline_engine: PipelineEngine | None = None
    _pipeline_last_output: Tensor | None = None

    def pipeline_loss(self, output: Tensor, target: Any) -> Tensor:
        """Mean loss over the samples of one microbatch, a scalar; to be implemented by the module."""
        raise NotImplementedError(f"{type(self).__name__} must implement pipeline_loss(output, target).")

    def pipeline_loss_weight(self, target: Any) -> Tensor | float | None:
        """Number of terms that :meth:`pipeline_loss` averages over, for losses that skip some (padding tokens).

        ``None`` says that every sample weighs the same. With weights, the loss of the global batch is
        ``sum(weight * loss) / sum(weight)``, as on one device.
        """
        return None

    def pipeline_modules(self) -> tuple[nn.Module, list[nn.Module], nn.Module]:
        """The embedding, the blocks and the head."""
        module: Any = self
        container = module.get_submodule(self.pipeline_blocks)
        # not children(), which leaves out a module that stands there a second time
        blocks = [block for block in container._modules.values() if block is not None]
        return module.get_submodule(self.pipeline_embedding), blocks, module.get_submodule(self.pipeline_head)

    def pipeline_forward(self, inputs: Tensor) -> Tensor:
        """Output of the head for ``inputs``, in every pipeline stage.

        Args:
            inputs: The local batch, batch in dimension 0.
        """
        if self._pipeline_engine is not None:
            return self._pipeline_engine.forward(inputs)
        embedding, blocks, head = self.pipeline_modules()
        hidden = embedding(inputs)
        for block in blocks:
            hidden = block(hidden)
        output: Tensor = head(hidden)
        return output

    def pipeline_step(self, inputs: Tensor, target: Any, *, keep_outputs: bool = False) -> Tensor:
        """Loss of the global batch, a scalar that ``training_step`` may log and return.

        Args:
            inputs: The local batch, batch in dimension 0.
            target: What :meth:`pipeline_loss` compares the output with: a tensor, batch in dimension 0.
            keep_outputs: Whether :meth:`pipeline_outputs` shall return the head's output afterwards. It then stays in
                memory for the whole batch.
        """
        if self._pipeline_engine is not None:
            return self._pipeline_engine.step(inputs, target, keep_outputs)
        output = self.pipeline_forward(inputs)
        self._pipeline_last_output = output.detach() if keep_outputs else None
        return self.pipeline_loss(output, target)

    def pipeline_outputs(self) -> Tensor | None:
        """Head output of the last :meth:`pipeline_step` that kept it; ``None`` outside the last stage."""
        if self._pipeline_engine is not None:
            return self._pipeline_engine.outputs()
        return self._pipeline_last_output


def uses_pipeline(module: nn.Module) -> bool:
    """Whether the module is a :class:`PipelineMixin` that names all three of its parts."""
    names = ("pipeline_embedding", "pipeline_blocks", "pipeline_head")
    return isinstance(module, PipelineMixin) and all(getattr(module, name, None) for name in names)
