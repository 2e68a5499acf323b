"""What a LightningModule says about itself so that it can be cut into pipeline stages and microbatches.

The module stays an ordinary one: in plain Lightning :meth:`PipelineMixin.pipeline_step` is a forward pass and a loss.
Under :class:`lightning_hetu.AutoHybridParallelStrategy` the same call runs the pipeline schedule of the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from lightning_hetu.parallel.transformers_compat import counted_labels


class PipelineEngine(Protocol):
    """What runs the pipeline behind a :class:`PipelineMixin`; implemented by the executor."""

    def step(self, inputs: Any, target: Any, keep_outputs: bool = False) -> Tensor:
        """See :meth:`PipelineMixin.pipeline_step`."""
        ...

    def forward(self, inputs: Any) -> Tensor:
        """See :meth:`PipelineMixin.pipeline_forward`."""
        ...

    def outputs(self) -> Tensor | None:
        """See :meth:`PipelineMixin.pipeline_outputs`."""
        ...


class PipelineMixin:
    """Mixin for a LightningModule whose model is a chain of blocks.

    Either the model runs its own forward, as those of Hugging Face transformers do. Name it, and give
    :meth:`pipeline_step` what it takes; the loss is the one it computes, or that of :meth:`pipeline_loss`::

        class MyModule(PipelineMixin, LightningModule):
            pipeline_model = "model"

            def __init__(self):
                super().__init__()
                self.model = AutoModelForCausalLM.from_config(config)

            def training_step(self, batch, batch_idx):
                return self.pipeline_step(batch)  # self.model(**batch).loss

    Its blocks, what runs before and what runs behind them are found by running it once without computing.

    Or it is an embedding, a list of equal-shaped blocks and a head, one after another. Each of the three takes one
    tensor and returns one tensor with the batch in dimension 0; a block returns the shape it was given. The three may
    then be laid out each in its own way::

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

    pipeline_model: str
    pipeline_embedding: str
    pipeline_blocks: str
    pipeline_head: str

    _pipeline_engine: PipelineEngine | None = None
    _pipeline_last_output: Tensor | None = None

    def pipeline_loss(self, output: Any, target: Any) -> Tensor:
        """Mean loss over the samples of one microbatch, a scalar.

        To be implemented by the module, except where the model returns its ``loss``.

        Args:
            output: What head or model returned.
            target: What :meth:`pipeline_step` was given; where it was given none, the model's inputs.
        """
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if runs_own_forward(self) and isinstance(loss, Tensor):
            return loss
        raise NotImplementedError(f"{type(self).__name__} must implement pipeline_loss(output, target).")

    def pipeline_output(self, output: Any) -> Tensor:
        """The tensor that :meth:`pipeline_forward` returns, of what the model returned: its ``logits`` by default."""
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
        if not isinstance(logits, Tensor):
            raise NotImplementedError(f"{type(self).__name__} must implement pipeline_output(output).")
        return logits

    def pipeline_loss_weight(self, target: Any) -> Tensor | float | None:
        """Number of terms that :meth:`pipeline_loss` averages over, for losses that skip some (padding tokens).

        ``None`` says that every sample weighs the same. With weights, the loss of the global batch is
        ``sum(weight * loss) / sum(weight)``, as on one device. By default a model that runs its own forward weighs by
        its labels other than -100, everything else not at all.
        """
        if not runs_own_forward(self):
            return None
        module: Any = self
        counted: Tensor | None = counted_labels(module.get_submodule(self.pipeline_model), target)
        return counted

    def pipeline_modules(self) -> tuple[nn.Module, list[nn.Module], nn.Module]:
        """The embedding, the blocks and the head."""
        module: Any = self
        container = module.get_submodule(self.pipeline_blocks)
        # not children(), which leaves out a module that stands there a second time
        blocks = [block for block in container._modules.values() if block is not None]
        return module.get_submodule(self.pipeline_embedding), blocks, module.get_submodule(self.pipeline_head)

    def pipeline_forward(self, inputs: Any) -> Tensor:
        """Output of the head, or the model's, for ``inputs``, in every pipeline stage.

        Args:
            inputs: The local batch, batch in dimension 0: a tensor, or whatever nesting of tensors the model takes.
        """
        if self._pipeline_engine is not None:
            return self._pipeline_engine.forward(inputs)
        if runs_own_forward(self):
            return self.pipeline_output(self._call_model(inputs))
        embedding, blocks, head = self.pipeline_modules()
        hidden = embedding(inputs)
        for block in blocks:
            hidden = block(hidden)
        output: Tensor = head(hidden)
        return output

    def pipeline_step(self, inputs: Any, target: Any = None, *, keep_outputs: bool = False) -> Tensor:
        """Loss of the global batch, a scalar that ``training_step`` may log and return.

        Args:
            inputs: The local batch, batch in dimension 0: a tensor, or what the model takes (a mapping of names to
                tensors is given as keyword arguments).
            target: What :meth:`pipeline_loss` compares the output with: a tensor, batch in dimension 0. A model that
                runs its own forward needs none where the inputs hold its labels.
            keep_outputs: Whether :meth:`pipeline_outputs` shall return the head's output afterwards. It then stays in
                memory for the whole batch.
        """
        if self._pipeline_engine is not None:
            return self._pipeline_engine.step(inputs, target, keep_outputs)
        if runs_own_forward(self):
            returned = self._call_model(inputs)
            self._pipeline_last_output = self.pipeline_output(returned).detach() if keep_outputs else None
            return self.pipeline_loss(returned, inputs if target is None else target)
        output = self.pipeline_forward(inputs)
        self._pipeline_last_output = output.detach() if keep_outputs else None
        return self.pipeline_loss(output, target)

    def _call_model(self, inputs: Any) -> Any:
        module: Any = self
        return call_model(module.get_submodule(self.pipeline_model), inputs)

    def pipeline_outputs(self) -> Tensor | None:
        """Head output of the last :meth:`pipeline_step` that kept it; ``None`` outside the last stage."""
        if self._pipeline_engine is not None:
            return self._pipeline_engine.outputs()
        return self._pipeline_last_output


def uses_pipeline(module: nn.Module) -> bool:
    """Whether the module is a :class:`PipelineMixin` that names its model, or all three of its parts."""
    names = ("pipeline_embedding", "pipeline_blocks", "pipeline_head")
    named = all(getattr(module, name, None) for name in names)
    return isinstance(module, PipelineMixin) and (named or runs_own_forward(module))


def runs_own_forward(module: object) -> bool:
    """Whether the module is a :class:`PipelineMixin` whose model runs its own forward."""
    return isinstance(module, PipelineMixin) and bool(getattr(module, "pipeline_model", None))


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Calls a model with a batch: a mapping gives keyword arguments, a tuple or list positional ones."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)
