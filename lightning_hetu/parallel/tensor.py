"""Tensor parallelism of one layer, from the plan it declares, by DTensor's parallel styles."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from lightning_hetu.parallel.sequence_cut import SEQUENCE
from lightning_hetu.parallel.tensor_plan import TENSOR_PARALLEL_STYLES


def apply_tensor_parallel(
    layer: nn.Module, mesh: DeviceMesh, plan: dict[str, str], scattered: SharedInput | None = None
) -> None:
    """Splits the modules that ``plan`` names over ``mesh``; everything else in ``layer`` is computed by all its ranks.

    Args:
        layer: The layer; its input and output are replicated over the mesh.
        mesh: 1-D tensor-parallel mesh.
        plan: Names relative to the layer, each with a style of ``TENSOR_PARALLEL_STYLES``.
        scattered: Given, the outputs of row-parallel modules are cut along the sequence, and this one gathers the
            inputs of column-parallel ones.

    Raises:
        ValueError: If the layer has no plan but more than one rank.
    """
    if not plan:
        raise ValueError(
            f"tp={mesh.size()} needs a tensor_parallel_plan on {type(layer).__name__}, and it has none: declare one, or"
            " use tp=1 for this layer."
        )
    styles = {name: _style(style, scatter=scattered is not None) for name, style in plan.items()}
    parallelize_module(layer, mesh, styles)
    shared = scattered or SharedInput(mesh)
    for name, style in plan.items():
        hook = shared.replicate if style in ("colwise", "colwise_gather") else shared.forget
        layer.get_submodule(name).register_forward_pre_hook(hook, prepend=True)
    layer.register_forward_hook(shared.forget)


class SharedInput:
    """Turns the input of several column-parallel modules (query, key and value, say) into one DTensor.

    Each would otherwise make its own, and backward would all-reduce the gradient of each instead of their sum.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.source: weakref.ref[Tensor] | None = None
        self.replicated: DTensor | None = None

    def replicate(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Pre-hook of a column-parallel module."""
        tensor = args[0]
        if isinstance(tensor, DTensor):
            return args
        if self.source is None or self.source() is not tensor:
            self.source = weakref.ref(tensor)
            self.replicated = DTensor.from_local(tensor, self.mesh, (Replicate(),), run_check=False)
        return (self.replicated, *args[1:])

    def forget(self, module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        """Drops the activation; a hook behind what uses it."""
        # It would keep the activation, and the graph behind it, beyond the layer.
        self.source = self.replicated = None


def _style(name: str, *, scatter: bool) -> ParallelStyle:
    if name == "colwise":
        return ColwiseParallel()
    if name == "colwise_gather":
        return ColwiseParallel(output_layouts=Replicate())
    if name == "rowwise":
        return RowwiseParallel(output_layouts=Shard(SEQUENCE) if scatter else Replicate())
    if name == "vocab_rowwise":
        return RowwiseParallel(input_layouts=Replicate())
    if name == "per_head":
        # Its weight works on heads [batch, sequence, heads, size], of which every rank has some.
        return SequenceParallel(sequence_dim=2, use_local_output=True)
    raise ValueError(f"tensor-parallel style {name!r}: expected one of {', '.join(TENSOR_PARALLEL_STYLES)}.")
