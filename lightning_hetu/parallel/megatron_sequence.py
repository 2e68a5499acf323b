"""Megatron sequence parallelism (arXiv 2205.05198, section 4.2.2) of a tensor-parallel layer.

The ranks share out the sequence between the split products, so that norms, residuals and dropout work on a part of the
tokens. The all-reduce behind a product becomes a reduce-scatter, and the modules around the products gather their
input.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from lightning_hetu.parallel.sequence_cut import (
    SEQUENCE,
    PartDropout,
    SequenceCut,
    first_activation,
    with_first_activation,
)
from lightning_hetu.parallel.tensor import SharedInput, apply_tensor_parallel
from lightning_hetu.parallel.tensor_plan import tensor_parallel_plan

_NORM_OF_TOKENS = re.compile(r"(Layer|RMS)_?Norm")
"""Class names of norms that treat every token by itself, whoever wrote them."""


@dataclass(frozen=True)
class SequenceRegions:
    """Where a sequence-parallel block works on whole sequences, and what has weights outside of that.

    Args:
        whole: The modules around the split products, attention and MLP: their input is gathered. Relative names.
        norms: The norms outside of them, whose weights see the tokens of one rank only. Relative names.
    """

    whole: tuple[str, ...]
    norms: tuple[str, ...]


def sequence_regions(root: nn.Module, name: str) -> SequenceRegions:
    """How the block ``name`` can be run with Megatron sequence parallelism.

    Raises:
        ValueError: If it cannot: the message is one line that says what stands in the way.
    """
    block = root.get_submodule(name)
    plan = tensor_parallel_plan(root, name)
    if not plan:
        raise ValueError(f"{name} declares no tensor_parallel_plan, on which sequence parallelism builds.")
    parents: dict[str, set[str]] = {}
    for child, style in plan.items():
        if style not in ("colwise", "rowwise", "per_head"):
            raise ValueError(
                f"{name}.{child} is {style}: with sequence parallelism use colwise and rowwise in a block."
            )
        parents.setdefault(child.rpartition(".")[0], set()).add(style)
    # Elsewhere code may go by the shape of an input that is not gathered yet, without any error.
    for parent, styles in parents.items():
        if not parent:
            raise ValueError(
                f"{name} has split layers of its own: sequence parallelism needs them in submodules of it."
            )
        if not {"colwise", "rowwise"} <= styles:
            raise ValueError(
                f"{name}.{parent} has only {' and '.join(sorted(styles))} layers: sequence parallelism needs the"
                " colwise and the rowwise ones of a product in one module."
            )
        outer = next((other for other in parents if parent.startswith(f"{other}.")), None)
        if outer is not None:
            raise ValueError(f"{name}.{parent} is inside of {outer}: sequence parallelism cannot gather in both.")
    norms = []
    for child, module in block.named_modules():
        # What is behind a row-wise product sees a part of the sequence, what is before it all: here nothing tells.
        inside = any(child == parent or child.startswith(f"{parent}.") for parent in parents)
        own = [key for key, parameter in module._parameters.items() if parameter is not None]
        if not own or child in plan:
            continue
        if inside or not _is_norm_of_tokens(module):
            full = ".".join(part for part in (name, child, own[0]) if part)
            raise ValueError(
                f"parameter '{full}' is neither split nor of a LayerNorm or RMSNorm between the split products: its"
                " gradient under sequence parallelism is not known."
            )
        norms.append(child)
    return SequenceRegions(tuple(parents), tuple(norms))


def sequence_parallel_degrees(root: nn.Module, name: str, degrees: Iterable[int]) -> tuple[int, ...]:
    """Those of its tensor-parallel ``degrees`` that the block ``name`` can run with Megatron sequence parallelism."""
    try:
        sequence_regions(root, name)
    except ValueError:
        return ()
    return tuple(degree for degree in degrees if degree > 1)


def _is_norm_of_tokens(module: nn.Module) -> bool:
    known = isinstance(module, nn.LayerNorm | nn.RMSNorm) or _NORM_OF_TOKENS.search(type(module).__name__) is not None
    return known and all(parameter is None or parameter.ndim == 1 for parameter in module._parameters.values())


def apply_sequence_parallel(
    layer: nn.Module, mesh: DeviceMesh, plan: dict[str, str], regions: SequenceRegions, *, recompute: bool = False
) -> SequenceCut:
    """Makes a layer tensor- and sequence-parallel: every rank gives it a part of the sequence and gets one.

    Its forward then takes ``sequence_length`` besides, as :func:`~lightning_hetu.parallel.sequence_cut.cut_activation`
    gives it.

    Args:
        layer: The layer.
        mesh: 1-D tensor-parallel mesh.
        plan: Its tensor-parallel plan.
        regions: Where it works on whole sequences.
        recompute: Whether the layer is going to be recomputed. Elsewhere what it gathers is not kept for backward, but
            gathered again.

    Returns:
        How the sequence is to be cut.
    """
    cut = SequenceCut(mesh)
    shared = _GatheringInput(cut)
    apply_tensor_parallel(layer, mesh, plan, shared)
    for name in regions.whole:
        _WholeSequence(layer.get_submodule(name), name, shared, keep_part=not recompute)
    for name in regions.norms:
        _PartialNorm(layer.get_submodule(name), mesh)
    inner, dropout = layer.forward, PartDropout(cut)

    def forward(*args: Any, sequence_length: int, **kwargs: Any) -> Any:
        cut.length = sequence_length
        with dropout:
            return inner(*args, **kwargs)

    layer.forward = forward  # type: ignore[method-assign]
    return cut


class _GatheringInput(SharedInput):
    """Gathers what column-parallel modules are given."""

    def __init__(self, cut: SequenceCut) -> None:
        super().__init__(cut.mesh)
        self.cut = cut
        self.gathered: _GatheredInput | None = None

    def gather(self, part: Tensor, *, keep_part: bool) -> Tensor:
        """The whole sequence; column-parallel modules that are given it find the DTensor behind it.

        The sum over their gradients is then reduce-scattered at once.

        Args:
            part: This rank's part, ``[samples, sequence / ranks, hidden]``.
            keep_part: Whether :meth:`pack` keeps the part in the place of the whole.
        """
        self.replicated = self.cut.distributed(part, self.cut.length).redistribute(placements=(Replicate(),))
        self.gathered = None
        if keep_part and self.replicated.requires_grad:
            self.gathered = _GatheredInput(self.cut.distributed(part.detach(), self.cut.length))
            # Weakly: who keeps the loss keeps the graph and its hooks, but not what was saved for backward.
            self.replicated.register_hook(partial(_release, weakref.ref(self.gathered)))
        # Who else uses it computes the same on all ranks.
        whole = self.replicated.to_local(grad_placements=(Replicate(),))
        self.source = weakref.ref(whole)
        return whole

    def pack(self, tensor: Tensor) -> Any:
        """What is kept of a tensor for backward: of the gathered input this rank's part."""
        whole = self.replicated
        if self.gathered is None or whole is None or not isinstance(tensor, DTensor):
            return tensor
        same = tensor._local_tensor.untyped_storage()._cdata == whole._local_tensor.untyped_storage()._cdata
        if not same or tensor.numel() != whole.numel() or not tensor._local_tensor.is_contiguous():
            return tensor
        return self.gathered, tensor.shape

    def unpack(self, kept: Any) -> Tensor:
        """The tensor that :meth:`pack` was given."""
        if isinstance(kept, Tensor):
            return kept
        gathered, shape = kept
        local = gathered.whole().view(shape)
        return DTensor.from_local(local, self.mesh, (Replicate(),), run_check=False)

    def forget(self, module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        """Drops the activation; a hook behind what uses it."""
        super().forget(module, args, output)
        self.gathered = None


class _GatheredInput:
    """One rank's part of what was gathered; in backward it is gathered once more, for all products at once."""

    def __init__(self, part: DTensor) -> None:
        self.part = part
        self._whole: Tensor | None = None

    def whole(self) -> Tensor:
        """The whole sequence, local."""
        if self._whole is None:
            self._whole = self.part.redistribute(placements=(Replicate(),)).to_local()
        return self._whole


def _release(gathered: weakref.ref[_GatheredInput], gradient: Tensor) -> None:
    """Called with the gradient of the input, when all products have used it."""
    found = gathered()
    if found is not None:
        found._whole = None


class _WholeSequence:
    """Gathers the input of a module with split products, attention or MLP; its output is a part of the sequence.

    At the input of the module and not of the products, since the module goes by the shape of what it is given.

    Args:
        module: The module.
        name: Its name, for error messages.
        shared: The layer's.
        keep_part: Whether a part of the input is kept for backward, and not all of it. Not inside of recomputation,
            which decides itself what is kept.
    """

    def __init__(self, module: nn.Module, name: str, shared: _GatheringInput, *, keep_part: bool) -> None:
        self.name = name
        self.shared = shared
        self.length = 0
        self.saving: list[Any] = []
        self.keep_part = keep_part
        module.register_forward_pre_hook(self.enter, with_kwargs=True)
        module.register_forward_hook(self.leave)
        module.register_forward_hook(self.end_saving, always_call=True)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        part = first_activation((args, kwargs), self.name)
        self.length = part.shape[SEQUENCE]
        device = part.device.type
        if torch.is_autocast_enabled(device) and part.dtype == torch.float32:
            part = part.to(torch.get_autocast_dtype(device))  # the products would: now half as much is sent
        whole = self.shared.gather(part, keep_part=self.keep_part)
        if self.shared.gathered is not None:
            self.saving.append(torch.autograd.graph.saved_tensors_hooks(self.shared.pack, self.shared.unpack))
            self.saving[-1].__enter__()
        return with_first_activation((args, kwargs), whole)

    def end_saving(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.saving:
            self.saving.pop().__exit__()

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(first, Tensor) or first.ndim < 2 or first.shape[SEQUENCE] != self.length:
            found = list(first.shape) if isinstance(first, Tensor) else type(first).__name__
            raise ValueError(
                f"{self.name} returned {found} for {self.length} tokens of this rank: in a sequence-parallel layer its"
                " rowwise product must make its output. Plan the layer without -sequence."
            )


class _PartialNorm:
    """Lets a norm work on a part of the sequence.

    Its weights are DTensors with one copy per rank, so that whoever uses them past the norm fails; the norm itself
    computes on plain tensors, by any kernel. Their gradients are sums over the tokens of one rank, to be summed.
    """

    def __init__(self, norm: nn.Module, mesh: DeviceMesh) -> None:
        for name, parameter in list(norm.named_parameters(recurse=False)):
            copies = DTensor.from_local(parameter.detach(), mesh, (Replicate(),), run_check=False)
            norm.register_parameter(name, nn.Parameter(copies, requires_grad=parameter.requires_grad))
        norm.register_forward_pre_hook(self.enter)
        norm.register_forward_hook(self.leave, always_call=True)

    def enter(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        for name, parameter in norm._parameters.items():
            if isinstance(parameter, DTensor):
                # found before the parameter of this name
                norm.__dict__[name] = parameter.to_local(grad_placements=(Partial(),))

    def leave(self, norm: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for name in norm._parameters:
            norm.__dict__.pop(name, None)
