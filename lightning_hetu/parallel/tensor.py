"""Tensor parallelism of one layer, from the plan it declares, by DTensor's parallel styles.

With sequence parallelism (Megatron-LM, arXiv 2205.05198, section 4.2.2) the ranks share out the sequence between the
split products, so that norms, residuals and dropout work on a part of the tokens. The all-reduce behind a product
becomes a reduce-scatter, and the modules around the products gather their input.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from lightning_hetu.parallel.structure import TENSOR_PARALLEL_STYLES, SequenceRegions

_SEQUENCE = 1  # activations are [samples, sequence, hidden]


def apply_tensor_parallel(
    layer: nn.Module,
    mesh: DeviceMesh,
    plan: dict[str, str],
    sequence: SequenceRegions | None = None,
    *,
    recompute: bool = False,
) -> None:
    """Splits the modules that ``plan`` names over ``mesh``; everything else in ``layer`` is computed by all its ranks.

    Args:
        layer: The layer; its input and output are replicated over the mesh.
        mesh: 1-D tensor-parallel mesh.
        plan: Names relative to the layer, each with a style of ``TENSOR_PARALLEL_STYLES``.
        sequence: Given, the layer is made sequence-parallel: every rank gives it a part of the sequence and gets one,
            see :func:`cut_sequence`.
        recompute: Whether the layer is going to be recomputed. Elsewhere what a sequence-parallel layer gathers is not
            kept for backward, but gathered again.

    Raises:
        ValueError: If the layer has no plan but more than one rank.
    """
    if not plan:
        raise ValueError(
            f"tp={mesh.size()} needs a tensor_parallel_plan on {type(layer).__name__}, and it has none: declare one, or"
            " use tp=1 for this layer."
        )
    styles = {name: _style(style, scatter=sequence is not None) for name, style in plan.items()}
    parallelize_module(layer, mesh, styles)
    shared = _SharedInput(mesh)
    for name, style in plan.items():
        hook = shared.replicate if style in ("colwise", "colwise_gather") else shared.forget
        layer.get_submodule(name).register_forward_pre_hook(hook, prepend=True)
    layer.register_forward_hook(shared.forget)
    if sequence is not None:
        for name in sequence.whole:
            _WholeSequence(layer.get_submodule(name), name, shared, keep_part=not recompute)
        for name in sequence.norms:
            _PartialNorm(layer.get_submodule(name), mesh)
        for name in sequence.dropouts:
            dropout = layer.get_submodule(name)
            dropout.forward = partial(_drop_in_part, dropout, mesh)  # type: ignore[method-assign]


def cut_sequence(layer: nn.Module, mesh: DeviceMesh, name: str) -> None:
    """Makes a layer that takes and returns a part of the sequence take and return all of it.

    ``layer.forward`` is replaced on the instance, so that hooks (FSDP's, relayouts) see whole sequences, whenever they
    are registered.

    Args:
        layer: A layer that :func:`apply_tensor_parallel` has made sequence-parallel.
        mesh: Its 1-D tensor-parallel mesh.
        name: Its name, for error messages.
    """
    inner = layer.forward
    ranks = mesh.size()

    def forward(*args: Any, **kwargs: Any) -> Any:
        tensor = _first_activation(args, kwargs, name)
        length = tensor.shape[_SEQUENCE]
        if length % ranks:
            raise ValueError(
                f"{name} is given sequences of {length} tokens, which tp={ranks} ranks cannot share out equally: pad"
                f" them to a multiple of {ranks}, or plan this layer without -sequence."
            )
        whole = DTensor.from_local(tensor, mesh, (Replicate(),), run_check=False)
        # contiguous: a slice is a view of the whole and would keep it alive
        part = whole.redistribute(placements=(Shard(_SEQUENCE),)).to_local().contiguous()
        args, kwargs = _with_first_activation(args, kwargs, part)
        return _map_first(inner(*args, **kwargs), partial(join, length=length))

    def join(part: Any, length: int) -> Tensor:
        if not isinstance(part, Tensor) or part.ndim < 2 or part.shape[_SEQUENCE] * ranks != length:
            found = list(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(
                f"{name} returned {found} for {length // ranks} of {length} tokens: outside of attention and MLP a"
                " sequence-parallel layer must treat every token by itself. Plan it without -sequence."
            )
        cut = DTensor.from_local(part, mesh, (Shard(_SEQUENCE),), run_check=False)
        whole = cut.redistribute(placements=(Replicate(),))
        # What follows computes the same on all ranks, so each has all of the gradient.
        return whole.to_local(grad_placements=(Replicate(),))

    layer.forward = forward  # type: ignore[method-assign]


class _SharedInput:
    """Turns the input of several column-parallel modules (query, key and value, say) into one DTensor.

    Each would otherwise make its own, and backward would all-reduce the gradient of each instead of their sum.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.source: weakref.ref[Tensor] | None = None
        self.replicated: DTensor | None = None
        self.gathered: _GatheredInput | None = None

    def replicate(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        tensor = args[0]
        if isinstance(tensor, DTensor):
            return args
        if self.source is None or self.source() is not tensor:
            self.source = weakref.ref(tensor)
            self.replicated = DTensor.from_local(tensor, self.mesh, (Replicate(),), run_check=False)
        return (self.replicated, *args[1:])

    def gather(self, part: Tensor, *, keep_part: bool) -> Tensor:
        """The whole sequence; column-parallel modules that are given it find the DTensor behind it.

        The sum over their gradients is then reduce-scattered at once.

        Args:
            part: This rank's part, ``[samples, sequence / ranks, hidden]``.
            keep_part: Whether :meth:`pack` keeps the part in the place of the whole.
        """
        cut = DTensor.from_local(part, self.mesh, (Shard(_SEQUENCE),), run_check=False)
        self.replicated = cut.redistribute(placements=(Replicate(),))
        self.gathered = None
        if keep_part and self.replicated.requires_grad:
            self.gathered = _GatheredInput(part.detach(), self.mesh)
            self.replicated.register_hook(self.gathered.release)
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
        # It would keep the activation, and the graph behind it, beyond the layer.
        self.source = self.replicated = self.gathered = None


class _GatheredInput:
    """One rank's part of what was gathered; in backward it is gathered once more, for all products at once."""

    def __init__(self, part: Tensor, mesh: DeviceMesh) -> None:
        self.part = DTensor.from_local(part, mesh, (Shard(_SEQUENCE),), run_check=False)
        self._whole: Tensor | None = None

    def whole(self) -> Tensor:
        """The whole sequence, local."""
        if self._whole is None:
            self._whole = self.part.redistribute(placements=(Replicate(),)).to_local()
        return self._whole

    def release(self, gradient: Tensor) -> None:
        """Called with the gradient of the input, when all products have used it."""
        self._whole = None


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

    def __init__(self, module: nn.Module, name: str, shared: _SharedInput, *, keep_part: bool) -> None:
        self.name = name
        self.shared = shared
        self.length = 0
        self.saving: list[Any] = []
        self.keep_part = keep_part
        module.register_forward_pre_hook(self.enter, with_kwargs=True)
        module.register_forward_hook(self.leave)
        module.register_forward_hook(self.end_saving, always_call=True)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        part = _first_activation(args, kwargs, self.name)
        self.length = part.shape[_SEQUENCE]
        device = part.device.type
        if torch.is_autocast_enabled(device) and part.dtype == torch.float32:
            part = part.to(torch.get_autocast_dtype(device))  # the products would: now half as much is sent
        whole = self.shared.gather(part, keep_part=self.keep_part)
        if self.shared.gathered is not None:
            self.saving.append(torch.autograd.graph.saved_tensors_hooks(self.shared.pack, self.shared.unpack))
            self.saving[-1].__enter__()
        return _with_first_activation(args, kwargs, whole)

    def end_saving(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.saving:
            self.saving.pop().__exit__()

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(first, Tensor) or first.ndim < 2 or first.shape[_SEQUENCE] != self.length:
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


def _drop_in_part(dropout: nn.Module, mesh: DeviceMesh, part: Tensor) -> Tensor:
    """Dropout of a part of the sequence, with this part of the mask that one process would draw for the whole.

    All tensor-parallel ranks have one random state: each would otherwise drop the same places of its part.
    """
    probability = float(dropout.p)  # type: ignore[arg-type]
    if not dropout.training or probability == 0.0:
        return part
    shape = list(part.shape)
    shape[_SEQUENCE] *= mesh.size()
    whole = torch.empty(shape, dtype=part.dtype, device=part.device).bernoulli_(1 - probability)
    mask = whole.chunk(mesh.size(), _SEQUENCE)[mesh.get_local_rank()]
    # a mask of zeros only where everything is dropped
    return part * mask.div(1 - probability) if probability < 1.0 else part * mask


def _is_activation(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _first_activation(args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Tensor:
    """The first floating-point tensor among the arguments: the tokens."""
    tensor: Tensor | None = next((value for value in (*args, *kwargs.values()) if _is_activation(value)), None)
    if tensor is None or tensor.ndim != 3:
        found = "nothing" if tensor is None else f"a tensor of shape {list(tensor.shape)}"
        raise ValueError(
            f"{name} is given {found} first: a sequence-parallel layer takes [samples, sequence, hidden]. Plan it"
            " without -sequence."
        )
    return tensor


def _with_first_activation(
    args: tuple[Any, ...], kwargs: dict[str, Any], tensor: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with another first floating-point tensor."""
    for index, value in enumerate(args):
        if _is_activation(value):
            return (*args[:index], tensor, *args[index + 1 :]), kwargs
    name = next(key for key, value in kwargs.items() if _is_activation(value))
    return args, {**kwargs, name: tensor}


def _map_first(output: Any, change: Any) -> Any:
    """Changes what a layer returned, the first of it where it is several."""
    if isinstance(output, tuple | list) and output:
        return type(output)((change(output[0]), *output[1:]))
    return change(output)


def _style(name: str, *, scatter: bool) -> ParallelStyle:
    if name == "colwise":
        return ColwiseParallel()
    if name == "colwise_gather":
        return ColwiseParallel(output_layouts=Replicate())
    if name == "rowwise":
        return RowwiseParallel(output_layouts=Shard(_SEQUENCE) if scatter else Replicate())
    if name == "vocab_rowwise":
        return RowwiseParallel(input_layouts=Replicate())
    if name == "per_head":
        # Its weight works on heads [batch, sequence, heads, size], of which every rank has some.
        return SequenceParallel(sequence_dim=2, use_local_output=True)
    raise ValueError(f"tensor-parallel style {name!r}: expected one of {', '.join(TENSOR_PARALLEL_STYLES)}.")
