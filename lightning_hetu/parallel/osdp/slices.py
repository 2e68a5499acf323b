"""The modules that the slices of an operator are: each a small module with a forward of its own, for FSDP2's hooks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hetu.planning.osdp.operator import Cut


class _Slice:
    """A slice that also takes an anchor, a scalar that requires a gradient."""

    whole_fan_in = 0
    """Number of products in one output of the whole module; 0 where it has its own way to reset parameters."""

    def forward(self, input: Tensor, anchor: Tensor | None = None) -> Tensor:  # noqa: D102
        out: Tensor = super().forward(input)  # type: ignore[misc]
        return _anchored(out, anchor)

    def reset_parameters(self) -> None:
        """As the whole module does, whose products are more than those of an ``input`` slice."""
        if not self.whole_fan_in:
            super().reset_parameters()  # type: ignore[misc]
            return
        bound = 1 / math.sqrt(self.whole_fan_in)
        for parameter in self.parameters(recurse=False):  # type: ignore[attr-defined]
            nn.init.uniform_(parameter, -bound, bound)


class LinearSlice(_Slice, nn.Linear):
    """Some outputs of a linear layer, or its product with some inputs."""


class EmbeddingSlice(_Slice, nn.Embedding):
    """Some rows or some columns of an embedding."""


class Conv1dSlice(_Slice, nn.Conv1d):
    """Some output or input channels of a convolution."""


class Conv2dSlice(_Slice, nn.Conv2d):
    """Some output or input channels of a convolution."""


class Conv3dSlice(_Slice, nn.Conv3d):
    """Some output or input channels of a convolution."""


class TransposedLinearSlice(nn.Module):
    """Some outputs of a linear layer whose weight is [inputs, outputs]; the first slice runs last, and joins them."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, input: Tensor, anchor: Tensor | None, *rest: Tensor) -> Tensor:
        """Its own outputs, followed by ``rest``, plus the bias if it is here."""
        out = torch.mm(input, self.weight)
        if self.bias is not None:
            out = torch.cat([out, *rest], -1).add_(self.bias)
        return _anchored(out, anchor)


CONVOLUTIONS: dict[type[nn.Module], Any] = {nn.Conv1d: Conv1dSlice, nn.Conv2d: Conv2dSlice, nn.Conv3d: Conv3dSlice}


class _Anchored(torch.autograd.Function):
    """Its first argument, unchanged; the anchor's gradient comes along."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, anchor: Tensor) -> Tensor:
        if out._base is not None:
            return out.view_as(out)
        ctx.mark_dirty(out)  # so that the result is no view
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        # A tensor rather than None: it makes the anchor's node wait in the queue of this device, behind the products,
        # which were made later.
        return grads[0], grads[0].new_zeros(())


def _anchored(out: Tensor, anchor: Tensor | None) -> Tensor:
    if anchor is None:
        return out
    anchored: Tensor = _Anchored.apply(out, anchor)
    return anchored


def empty_slice(module: Any, kind: str, cut: Cut, start: int, length: int) -> nn.Module:
    """A slice without parameters yet."""
    piece: nn.Module
    output = cut == "output"
    if kind == "linear":
        inputs, outputs = (module.in_features, length) if output else (length, module.out_features)
        piece = LinearSlice(inputs, outputs, device="meta")
    elif kind == "embedding":
        rows, columns = (length, module.embedding_dim) if output else (module.num_embeddings, length)
        padding = module.padding_idx
        if padding is not None and output:
            padding = padding - start if start <= padding < start + length else None
        return EmbeddingSlice(rows, columns, padding, device="meta")
    elif kind == "conv":
        inputs, outputs = (module.in_channels, length) if output else (length, module.out_channels)
        piece = CONVOLUTIONS[type(module)](
            inputs,
            outputs,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            padding_mode=module.padding_mode,
            device="meta",
        )
    else:
        return TransposedLinearSlice()
    piece.whole_fan_in = math.prod(module.weight.shape[1:])
    return piece
