"""The experts of one rank: feed-forward networks with their weights stacked in slots.

A slot holds one expert. Which one may change while training goes on (FlexMoE), so parameters are stacked once and for
all: an optimizer, DDP and checkpoints see three tensors, whatever the slots hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

Activation = Literal["swiglu", "relu", "gelu"]
Backend = Literal["auto", "loop", "torch", "triton"]


class Experts(nn.Module):
    """Feed-forward networks without biases, applied to rows that are sorted by slot.

    ``swiglu`` is ``(silu(x w1) * (x w3)) w2``; ``relu`` and ``gelu`` are ``activation(x w1) w2``. Weights start as
    those of linear layers do, every expert drawn anew.

    Args:
        num_slots: Number of experts.
        dim: Width of a row.
        hidden: Width between the two products.
        activation: The activation.
        backend: What multiplies: a ``loop`` over slots, ``torch``'s grouped_mm, ``triton``'s grouped GEMM; ``auto``
            takes ``triton`` on GPUs and the loop elsewhere.

    Raises:
        ValueError: If a size is not positive, or an option unknown.
    """

    def __init__(
        self, num_slots: int, dim: int, hidden: int, activation: Activation = "swiglu", backend: Backend = "auto"
    ) -> None:
        super().__init__()
        for name, value in (("num_slots", num_slots), ("dim", dim), ("hidden", hidden)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: expected an integer of at least 1.")
        for name, option, allowed in (("activation", activation, Activation), ("backend", backend, Backend)):
            if option not in get_args(allowed):
                raise ValueError(f"{name}={option!r}: expected one of {', '.join(get_args(allowed))}.")
        self.num_slots, self.dim, self.hidden = num_slots, dim, hidden
        self.activation: Activation = activation
        self.backend: Backend = backend
        self.w1 = nn.Parameter(torch.empty(num_slots, dim, hidden))
        self.w2 = nn.Parameter(torch.empty(num_slots, hidden, dim))
        self.w3 = nn.Parameter(torch.empty(num_slots, dim, hidden)) if activation == "swiglu" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all weights anew from the default generator."""
        with torch.no_grad():
            for weight in self.parameters():
                weight.uniform_(-1 / math.sqrt(weight.shape[1]), 1 / math.sqrt(weight.shape[1]))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Applies every expert to its rows.

        Args:
            rows: ``[rows, dim]``, sorted by slot.
            counts: int64 ``[num_slots]``: how many rows each slot has; on the host where the backend is ``loop``.

        Returns:
            ``[rows, dim]``. It hangs on the graph also where there are no rows, and then gives gradients of zero.
        """
        backend = self.product_of(rows)
        weights = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in self._weights()]
        if backend != "loop":
            return self._network(rows, weights, counts, backend)
        pieces = rows.split(counts.tolist())
        slots = zip(*(weight.unbind(0) for weight in weights), strict=True)
        found = [self._network(piece, slot, counts, backend) for piece, slot in zip(pieces, slots, strict=True)]
        return torch.cat([_Alone.apply(result) for result in found])  # type: ignore[no-untyped-call]

    def _weights(self) -> list[Tensor]:
        return [weight for weight in (self.w1, self.w2, self.w3) if weight is not None]

    def _network(self, rows: Tensor, weights: Sequence[Tensor], counts: Tensor, backend: str) -> Tensor:
        """All experts at once; where they run one after another, one of them."""
        hidden = self._product(rows, weights[0], counts, backend)
        if self.activation == "swiglu":
            hidden = F.silu(hidden) * self._product(rows, weights[2], counts, backend)
        else:
            hidden = F.relu(hidden) if self.activation == "relu" else F.gelu(hidden)
        return self._product(hidden, weights[1], counts, backend)

    def product_of(self, rows: Tensor) -> str:
        """What multiplies such rows: the backend, ``auto`` decided."""
        if self.backend != "auto":
            return self.backend
        return "triton" if rows.is_cuda and rows.dtype != torch.float64 else "loop"

    def _product(self, rows: Tensor, weight: Tensor, counts: Tensor, backend: str) -> Tensor:
        if torch.is_autocast_enabled(rows.device.type):
            dtype = torch.get_autocast_dtype(rows.device.type)
            rows, weight = rows.to(dtype), weight.to(dtype)
        if backend == "loop":
            return _aligned(rows) @ _aligned(weight)
        ends = counts.cumsum(0).to(device=rows.device, dtype=torch.int32)
        if backend == "torch":
            return F.grouped_mm(rows, weight, offs=ends)
        from hetu_kernels.moe.grouped_gemm import grouped_gemm

        return grouped_gemm(rows, weight, F.pad(ends, (1, 0)))

    def extra_repr(self) -> str:
        """Sizes, for printing the module."""
        return f"num_slots={self.num_slots}, dim={self.dim}, hidden={self.hidden}, activation={self.activation}"


class _Alone(torch.autograd.Function):
    """The result of one expert, whose gradient comes as a part of that of all."""

    @staticmethod
    def forward(ctx: Any, result: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _aligned(gradient)


def _aligned(part: Tensor) -> Tensor:
    """A part of a tensor, copied where its numbers begin between the boundaries of the processor's vectors.

    Processors would round differently there: what an expert computes would depend, in its last bit, on its slot.
    """
    return part if part.storage_offset() * part.element_size() % 64 == 0 else part.clone()
