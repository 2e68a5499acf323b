"""One layer, ready to be run on any number of samples: what the timer and the memory tracker both work on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from lightning_hetu.parallel.experts import stacked_parameters
from lightning_hetu.planning.profile import ExpertProfile


@dataclass(frozen=True)
class LayerCase:
    """A layer and how to call it.

    Args:
        name: Name of the layer type.
        module: The layer; its parameters and buffers are not counted as activations.
        call: Takes ``arguments`` cut to the wanted samples and gives the layer's output, or a scalar loss.
        arguments: What the layer gets for ``batch`` samples: any nesting of tensors and other values. Tensors with
            ``rows`` entries in dimension 0 are cut; all others are shared by all samples.
        batch: Samples in ``arguments``.
        rows: Entries in dimension 0 that ``batch`` samples make; ``None`` is one each.
        input_requires_grad: Whether something before the layer is trained, so that its input needs a gradient; ``None``
            goes by each tensor's own ``requires_grad``.
        plan: Tensor-parallel plan of the layer: names relative to ``module``, each with a style.
        tp_degrees: Tensor-parallel degrees the layer can run with.
        sequence_degrees: Those of them with which it can run with Megatron sequence parallelism.
        ulysses_degrees: Ulysses degrees above 1 it can run with.
        context_degrees: Context-parallel degrees above 1 it can run with.
        operators: ``{name: bytes}`` of the modules inside that can be sharded on their own.
        boundary_bytes: Bytes per sample of the layer's input.
        experts: Experts inside that are shared out, whose parameters the layer does not own.
        parameters: What the layer owns; ``None`` is ``module``'s. Names relative to ``module``.
        autocast: What forward runs under.
    """

    name: str
    module: nn.Module
    call: Callable[[Any], Any]
    arguments: Any
    batch: int
    rows: int | None = None
    input_requires_grad: bool | None = True
    plan: Mapping[str, str] = field(default_factory=dict)
    tp_degrees: tuple[int, ...] = (1,)
    sequence_degrees: tuple[int, ...] = ()
    ulysses_degrees: tuple[int, ...] = ()
    context_degrees: tuple[int, ...] = ()
    operators: Mapping[str, int] = field(default_factory=dict)
    boundary_bytes: float = 0.0
    experts: ExpertProfile | None = None
    parameters: Mapping[str, nn.Parameter] | None = None
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext

    def owned(self) -> dict[str, nn.Parameter]:
        """The parameters by name."""
        parameters = dict(self.module.named_parameters()) if self.parameters is None else dict(self.parameters)
        shared = stacked_parameters(self.module)
        return {name: parameter for name, parameter in parameters.items() if parameter not in shared}

    def forward(self, samples: int) -> Tensor | None:
        """Runs the layer and keeps nothing but what backward needs.

        Returns:
            A scalar to call ``backward`` on; ``None`` where nothing is trained.
        """
        with self.autocast():
            return gradient_sink(self.call(self.prepare(samples)))

    def prepare(self, samples: int) -> Any:
        """Fresh arguments for ``samples``, as a preceding layer would give them: nobody but their users holds them.

        Beyond ``batch`` the rows are repeated.
        """
        rows = self.rows or self.batch
        wanted = max(samples * rows // self.batch, 1)

        def convert(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != rows:
                return value
            required = value.requires_grad if self.input_requires_grad is None else self.input_requires_grad
            value = value.detach()
            if wanted > rows:
                value = value[torch.arange(wanted, device=value.device) % rows]
            value = value[:wanted]
            if required and value.is_floating_point():
                return _Produce.apply(torch.zeros((), device=value.device, requires_grad=True), value)
            return value.clone()

        return tree_map(convert, self.arguments)

    def clear_gradients(self) -> None:
        """Drops the gradients of a backward pass."""
        for parameter in self.module.parameters():
            parameter.grad = None


class _Produce(torch.autograd.Function):
    """Gives a tensor out as if an earlier layer had computed it: nobody but its users keeps it alive."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


class _Consume(torch.autograd.Function):
    """Takes a tensor as a later layer would: keeps nothing, and its backward makes a gradient of the same shape."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.like = (tensor.shape, tensor.dtype, tensor.device)
        return torch.zeros((), device=tensor.device)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        shape, dtype, device = ctx.like
        return torch.full(shape, 1.0 / max(shape.numel(), 1), dtype=dtype, device=device)


def gradient_sink(output: Any) -> Tensor | None:
    """A scalar behind every tensor of ``output`` that has a gradient; a scalar output is returned as it is."""
    if isinstance(output, Tensor) and output.ndim == 0 and output.requires_grad:
        return output
    if not isinstance(output, Tensor | tuple | list | dict) and hasattr(output, "__dict__"):
        output = vars(output)
    tensors = [value for value in tree_flatten(output)[0] if isinstance(value, Tensor)]
    sinks = [_Consume.apply(tensor) for tensor in tensors if tensor.requires_grad]
    return torch.stack(sinks).sum() if len(sinks) > 1 else (sinks[0] if sinks else None)


def tensor_bytes(value: Any, batch: int) -> float:
    """Bytes per row of all tensors in ``value`` whose dimension 0 is ``batch``."""
    tensors = [item for item in tree_flatten(value)[0] if isinstance(item, Tensor) and item.ndim]
    return sum(item.numel() * item.element_size() for item in tensors if item.shape[0] == batch) / batch
