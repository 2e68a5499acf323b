"""Layers whose ranks share out the sequence: what a layer is given is cut, what it returns is put together again.

Between layers every rank has whole sequences, so that layers of any kind can follow each other. Cutting is free in
forward and gathers in backward; putting together does the reverse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

SEQUENCE = 1  # activations are [samples, sequence, hidden]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class SequenceCut:
    """How the ranks of a mesh share out sequences.

    Parts are of equal length where that is possible, else the last ones are shorter.

    Args:
        mesh: 1-D mesh of the ranks.
        folds: With ``n`` above 1 the sequence is first cut into ``2 n`` pieces and the first one put next to the last
            one, the second one next to the last but one, and so on: of causal attention, parts then have the same work.
    """

    def __init__(self, mesh: DeviceMesh, folds: int = 1) -> None:
        self.mesh = mesh
        self.folds = folds
        self.ranks = mesh.size()
        self.length = 0
        """Tokens of the whole sequence that the layer is working on."""

    def lengths(self, length: int) -> list[int]:
        """Tokens of every rank."""
        size = -(-length // self.ranks)
        return [max(min(size, length - size * rank), 0) for rank in range(self.ranks)]

    def mine(self, length: int) -> int:
        """Tokens of this rank."""
        return self.lengths(length)[self.mesh.get_local_rank()]

    def part(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor ``[samples, sequence, ...]`` that all ranks have."""
        shared = DTensor.from_local(self._folded(whole), self.mesh, (Replicate(),), run_check=False)
        # contiguous: a slice is a view of the whole and would keep it alive
        return shared.redistribute(placements=(Shard(SEQUENCE),)).to_local().contiguous()

    def shared(self, tensor: Tensor) -> Tensor:
        """A tensor that all ranks have and that is not cut: each makes a summand of its gradient."""
        if not tensor.requires_grad:
            return tensor
        same = DTensor.from_local(tensor, self.mesh, (Replicate(),), run_check=False)
        return same.to_local(grad_placements=(Partial(),))

    def distributed(self, part: Tensor, length: int) -> DTensor:
        """The sequence of ``length`` tokens of which this rank has ``part``."""
        shape = torch.Size((part.shape[0], length, *part.shape[SEQUENCE + 1 :]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            part.contiguous(), self.mesh, (Shard(SEQUENCE),), run_check=False, shape=shape, stride=stride
        )

    def whole(self, part: Tensor, length: int) -> Tensor:
        """The reverse of :meth:`part`, for what is computed alike on all ranks from there on."""
        gathered = self.distributed(part, length).redistribute(placements=(Replicate(),))
        # What follows computes the same on all ranks, so each has all of the gradient.
        return self._unfolded(gathered.to_local(grad_placements=(Replicate(),)))

    def _folded(self, whole: Tensor) -> Tensor:
        if self.folds == 1:
            return whole
        first, last = whole.unflatten(SEQUENCE, (2, self.folds, -1)).unbind(SEQUENCE)
        return torch.stack((first, last.flip(SEQUENCE)), SEQUENCE + 1).flatten(SEQUENCE, SEQUENCE + 2)

    def _unfolded(self, folded: Tensor) -> Tensor:
        if self.folds == 1:
            return folded
        first, last = folded.unflatten(SEQUENCE, (self.folds, 2, -1)).unbind(SEQUENCE + 1)
        return torch.stack((first, last.flip(SEQUENCE)), SEQUENCE).flatten(SEQUENCE, SEQUENCE + 2)


def cut_activation(layer: nn.Module, cut: SequenceCut, name: str) -> None:
    """Makes a layer that takes and returns a part of the sequence take and return all of it.

    Only the first floating-point tensor among the arguments is cut. ``layer.forward`` is replaced on the instance, so
    that hooks (FSDP's, relayouts) see whole sequences, whenever they are registered; the replaced forward is called
    with the additional argument ``sequence_length``.

    Args:
        layer: The layer.
        cut: How the sequence is shared out.
        name: Its name, for error messages.
    """
    inner = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        tensor = first_activation((args, kwargs), name)
        length = tensor.shape[SEQUENCE]
        args, kwargs = with_first_activation((args, kwargs), cut.part(tensor))
        return map_first(inner(*args, **kwargs, sequence_length=length), lambda part: join(cut, part, length, name))

    layer.forward = forward  # type: ignore[method-assign]


class PartDropout(TorchFunctionMode):
    """Makes dropout of a part of the sequence that of the whole, see :func:`drop_in_part`."""

    def __init__(self, cut: SequenceCut) -> None:
        super().__init__()
        self.cut = cut

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._drop(*args, **(kwargs or {})) if func is F.dropout else func(*args, **(kwargs or {}))

    def _drop(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        mine, whole = self.cut.mine(self.cut.length), self.cut.length
        if training and p > 0.0 and input.ndim > SEQUENCE and input.shape[SEQUENCE] == mine != whole:
            return drop_in_part(input, p, self.cut)
        return F.dropout(input, p, training, inplace)


def drop_in_part(part: Tensor, probability: float, cut: SequenceCut) -> Tensor:
    """Dropout of a part of the sequence, with this part of the mask that one process would draw for the whole.

    All ranks of the cut have one random state: each would otherwise drop the same places of its part, and with parts of
    different lengths the states would come apart.

    Args:
        part: ``[samples, tokens of this rank, ...]``.
        probability: Of an element to be dropped.
        cut: How the sequence is shared out.
    """
    shape = (part.shape[0], cut.length, *part.shape[SEQUENCE + 1 :])
    mask = cut.part(torch.empty(shape, dtype=part.dtype, device=part.device).bernoulli_(1 - probability))
    # a mask of zeros only where everything is dropped
    return part * mask.div(1 - probability) if probability < 1.0 else part * mask


def join(cut: SequenceCut, part: Any, length: int, name: str) -> Tensor:
    """Puts together what a layer returned for the parts of ``length`` tokens.

    Raises:
        ValueError: If it is no part of a sequence.
    """
    mine = cut.mine(length)
    if not isinstance(part, Tensor) or part.ndim < 2 or part.shape[SEQUENCE] != mine:
        found = list(part.shape) if isinstance(part, Tensor) else type(part).__name__
        raise ValueError(
            f"{name} returned {found} for {mine} of {length} tokens: outside of attention and MLP a layer whose"
            " sequence is cut must treat every token by itself. Plan it without -sequence, sp or cp."
        )
    return cut.whole(part, length)


def is_activation(value: Any) -> bool:
    """Whether a value is a floating-point tensor."""
    return isinstance(value, Tensor) and value.is_floating_point()


def first_activation(arguments: Arguments, name: str) -> Tensor:
    """The first floating-point tensor among the arguments of a layer: the tokens.

    Raises:
        ValueError: If it is not of the shape ``[samples, sequence, hidden]``.
    """
    args, kwargs = arguments
    tensor: Tensor | None = next((value for value in (*args, *kwargs.values()) if is_activation(value)), None)
    if tensor is None or tensor.ndim != 3:
        found = "nothing" if tensor is None else f"a tensor of shape {list(tensor.shape)}"
        raise ValueError(
            f"{name} is given {found} first: a layer whose sequence is cut takes [samples, sequence, hidden]. Plan it"
            " without -sequence, sp or cp."
        )
    return tensor


def with_first_activation(arguments: Arguments, tensor: Tensor) -> Arguments:
    """The arguments with another first floating-point tensor."""
    args, kwargs = arguments
    for index, value in enumerate(args):
        if is_activation(value):
            return (*args[:index], tensor, *args[index + 1 :]), kwargs
    name = next(key for key, value in kwargs.items() if is_activation(value))
    return args, {**kwargs, name: tensor}


def map_first(output: Any, change: Callable[[Any], Any]) -> Any:
    """Changes what a layer returned, the first of it where it is several."""
    if isinstance(output, tuple | list) and output:
        return like(output, (change(output[0]), *output[1:]))
    return change(output)


def like(output: tuple[Any, ...] | list[Any], values: tuple[Any, ...]) -> Any:
    """Values as a tuple, named tuple or list, as ``output`` is."""
    return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
