"""Operator splitting: a large operator computed in slices, each gathered and freed on its own (arXiv 2209.13258).

A sharded weight is gathered whole before it is used. Cut into g slices that are modules of their own, and so groups of
their own for FSDP2, only about 1/g of it is alive. The slices are cut from the weight that is there, so the model
computes what it did before, up to rounding: products are summed in another order, in the forward pass of a cut that
divides the input features and in the gradient of the input otherwise.

The paper's ``input`` cut gives every slice a bias and drops what is left over by the division; here there is one bias,
and the first slices are one larger.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lightning_hetu.parallel.osdp.slices import CONVOLUTIONS, empty_slice
from lightning_hetu.planning.osdp.operator import Cut

# Names in a module's __dict__ that hold hooks: all but these are empty or None in a module that nobody has changed.
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_compiled_call_impl",
)


@dataclass(frozen=True)
class SlicePart:
    """Where a slice of a parameter is, and which part of the whole one.

    Args:
        name: Name of the slice in the model.
        dim: Dimension along which the parameter is cut.
        start: Index of its first element in that dimension.
        length: Its size in that dimension.
    """

    name: str
    dim: int
    start: int
    length: int


def cuts_of(module: nn.Module) -> tuple[Cut, ...]:
    """How a module can be cut, most wanted first; empty if it cannot.

    Of ``nn.Linear`` and convolutions without groups, ``output`` divides the outputs and ``input`` the inputs; of
    ``nn.Embedding`` they divide the vocabulary and the embedding dimension. The ``Conv1D`` of transformers has its
    weight the other way around: cut along the second dimension, ``input``, it divides the outputs.

    Only modules with the forward of these types are cut, and only if they carry no hooks, parametrizations or tensors
    besides weight and bias.
    """
    kind = _kind(module)
    if kind is None:
        return ()
    weight: Tensor = module.weight  # type: ignore[assignment]
    if kind == "conv1d":
        wanted: tuple[Cut, ...] = ("input",)
    elif kind == "embedding":
        wanted = ("input", "output")  # a slice of the vocabulary has to look at all indices
    else:
        wanted = ("output", "input") if weight.shape[0] >= weight.shape[1] else ("input", "output")
    return tuple(cut for cut in wanted if weight.shape[_dim(cut)] > 1)


def split_operator(module: nn.Module, slices: int, cut: Cut) -> SlicedOperator:
    """Cuts a module into slices.

    The module is used up: the slices are copies of its parameters, whose memory is freed.

    Args:
        module: A module that :func:`cuts_of` can cut, on any device.
        slices: Number of slices; where it does not divide the size, the first ones are one larger.
        cut: ``output`` along the first dimension of all parameters, ``input`` along the second of those that have one.

    Raises:
        ValueError: If it cannot be cut so.
    """
    _check(f"{type(module).__name__}({module.extra_repr()})", module, slices, cut)
    return SlicedOperator(module, slices, cut)


def split_modules(root: nn.Module, wanted: Mapping[str, tuple[int, Cut]]) -> dict[str, list[SlicePart]]:
    """Replaces modules by sliced ones, in place.

    Args:
        root: The model.
        wanted: Number of slices and cut, by the names of modules below ``root``.

    Returns:
        For the name of every parameter that was there, its slices.

    Raises:
        ValueError: If one cannot be cut so; the model is unchanged then.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    uses = Counter(id(parameter) for _, parameter in root.named_parameters(remove_duplicate=False))
    modules = {name: module for module, its in names.items() for name in its}
    for name, (slices, cut) in wanted.items():
        if not name or name not in modules:
            raise ValueError(f"{name!r} cannot be split: expected the name of a module below the model.")
        module = modules[name]
        if len(names[module]) > 1:
            raise ValueError(f"{name!r} cannot be split: it is used under several names, {', '.join(names[module])}.")
        for own, parameter in module.named_parameters():
            if uses[id(parameter)] > 1:
                raise ValueError(f"{name!r} cannot be split: its {own} is tied to another parameter of the model.")
        _check(repr(name), module, slices, cut)
    for name, (slices, cut) in wanted.items():
        parent, _, leaf = name.rpartition(".")
        setattr(root.get_submodule(parent), leaf, SlicedOperator(modules[name], slices, cut))
    new = {plain_name(name) for name in wanted}
    return {name: parts for name, parts in slice_parts(root).items() if name.rpartition(".")[0] in new}


def slice_parts(root: nn.Module) -> dict[str, list[SlicePart]]:
    """For the original name of every parameter that is cut, its slices in order."""
    found: dict[str, list[SlicePart]] = {}
    for path, module in root.named_modules():
        if isinstance(module, SlicedOperator):
            prefix = plain_name(f"{path}.") if path else ""
            for name, parts in module.parts().items():
                found[prefix + name] = [
                    SlicePart(prefix + part.name, part.dim, part.start, part.length) for part in parts
                ]
    return found


def plain_name(name: str) -> str:
    """A name as checkpoints have it: without what the wrappers of torch put into it."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


class SlicedOperator(nn.Module):
    """What a module computed, computed by ``slices`` one after another. Made by :func:`split_operator`.

    The attributes of the module, such as ``in_features``, are there; its parameters are those of the slices.
    """

    slices: nn.ModuleList

    def __init__(self, module: nn.Module, slices: int, cut: Cut) -> None:
        super().__init__()
        for name, value in vars(module).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        kind = _kind(module)
        assert kind is not None
        self.kind, self.cut = kind, cut
        weight: Tensor = module.weight  # type: ignore[assignment]
        self._features = 1 - weight.ndim if kind == "conv" else -1  # dimension of input and output, batched or not
        self._whole = f"{type(module).__name__}({module.extra_repr()})"
        dim = _dim(cut)
        base, extra = divmod(weight.shape[dim], slices)
        self.sizes = [base + (index < extra) for index in range(slices)]
        starts = [0, *accumulate(self.sizes)]
        self.slices = nn.ModuleList()
        self._parts: dict[str, list[SlicePart]] = {}
        for index, (start, length) in enumerate(zip(starts, self.sizes, strict=False)):
            piece = empty_slice(module, kind, cut, start, length)
            for name, parameter in module._parameters.items():
                if parameter is None or (parameter.ndim <= dim and index > 0):
                    piece.register_parameter(name, None)
                    continue
                part = SlicePart(f"slices.{index}.{name}", dim, start, length)
                if parameter.ndim <= dim:
                    part = SlicePart(part.name, 0, 0, parameter.shape[0])
                values = parameter.detach().narrow(part.dim, part.start, part.length)
                values = values.clone(memory_format=torch.contiguous_format)
                piece.register_parameter(name, nn.Parameter(values, requires_grad=parameter.requires_grad))
                self._parts.setdefault(name, []).append(part)
            self.slices.append(piece)
        for parameter in module.parameters():
            # Whoever still has the parameter, an optimizer for example, would keep its memory.
            parameter.data = parameter.data.new_empty(0)
        self.train(module.training)

    def parts(self) -> dict[str, list[SlicePart]]:
        """For every parameter of the whole module, its slices; names are those below this module."""
        return self._parts

    def extra_repr(self) -> str:
        """The module that was cut, and how."""
        return f"{self._whole}, slices={len(self.slices)}, cut={self.cut!r}"

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_parts", ()):
            raise AttributeError(f"{name!r} of {self._whole} is cut into {len(self.slices)} slices: do not split it.")
        return super().__getattr__(name)

    def forward(self, input: Tensor) -> Tensor:
        """What the whole module returns for ``input``."""
        if self.kind == "embedding":
            anchor = self._anchor(input)
            return (
                self._rows(input, anchor) if self.cut == "output" else self._concatenate(input, anchor, self._features)
            )
        input = _as_autocast(input)
        anchor = self._anchor(input)
        if self.kind == "conv":
            if self.cut == "output":
                return self._concatenate(input, anchor, self._features)
            return self._accumulate(input, anchor, self._features)
        # With one dimension for all samples, no slice returns a view: FSDP2 loses its hooks on views changed in place.
        flat = input if input.ndim == 2 else input.reshape(-1, input.shape[-1])
        if self.kind == "conv1d":
            rest = [piece(flat, anchor) for piece in self.slices[1:]]
            out = self.slices[0](flat, anchor, *rest)
        elif self.cut == "output":
            out = self._concatenate(flat, anchor, self._features)
        else:
            out = self._accumulate(flat, anchor, self._features)
        return out if input.ndim == 2 else out.view(*input.shape[:-1], out.shape[-1])

    def _concatenate(self, input: Tensor, anchor: Tensor | None, dim: int) -> Tensor:
        return torch.cat([piece(input, anchor) for piece in self.slices], dim)

    def _accumulate(self, input: Tensor, anchor: Tensor | None, dim: int) -> Tensor:
        # One split for all: its gradient is one concatenation, that of a narrow would be as large as the input each.
        pieces = input.split(self.sizes, dim)
        total = self.slices[0](pieces[0], anchor)
        for piece, part in zip(self.slices[1:], pieces[1:], strict=True):
            total = _add(total, piece(part, anchor))
        return total

    def _rows(self, indices: Tensor, anchor: Tensor | None) -> Tensor:
        """Every slice looks up the indices of its own rows, and gives zeros for the others."""
        total: Tensor | None = None
        last = len(self.slices) - 1
        start = 0
        for number, (piece, size) in enumerate(zip(self.slices, self.sizes, strict=True)):
            local = indices - start
            start += size
            # What is below the first or above the last row is looked up, and an error there as in the whole table.
            outside = torch.zeros_like(local, dtype=torch.bool)
            if number > 0:
                outside |= local < 0
            if number < last:
                outside |= local >= size
            found = piece(local.masked_fill_(outside, 0), anchor).masked_fill_(outside.unsqueeze(-1), 0.0)
            total = found if total is None else _add(total, found)
        assert total is not None
        return total

    def _anchor(self, input: Tensor) -> Tensor | None:
        """A scalar that requires a gradient where the input does not.

        FSDP2 frees a group in backward when the gradients of its inputs are there. Without any it would free all slices
        of an embedding, or of a model's first layer, only when the whole backward is done.
        """
        if input.requires_grad or not torch.is_grad_enabled() or not any(p.requires_grad for p in self.parameters()):
            return None
        return torch.zeros((), device=input.device, requires_grad=True)


def _add(total: Tensor, part: Tensor) -> Tensor:
    # Out of place on views: FSDP2 has its hooks on what a slice returns.
    return total + part if total._base is not None else total.add_(part)


def _as_autocast(tensor: Tensor) -> Tensor:
    """``tensor`` as autocast would have it in products: converted once, not kept for backward by every slice."""
    device = tensor.device.type
    eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
    if eligible and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


def _dim(cut: Cut) -> int:
    return 0 if cut == "output" else 1


_KINDS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Embedding: "embedding",
    **dict.fromkeys(CONVOLUTIONS, "conv"),
}


def _kind(module: nn.Module) -> str | None:
    """What the module computes; ``None`` if it is nothing that can be cut."""
    of = type(module)
    # A class of its own may draw other initial weights, but not compute something else.
    kinds = [kind for base, kind in _KINDS.items() if issubclass(of, base) and of.forward is base.forward]
    if of.__name__ == "Conv1D" and of.__module__ == "transformers.pytorch_utils":
        kinds = ["conv1d"]
    return None if not kinds or any(_obstacles(module, kinds[0])) else kinds[0]


def _obstacles(module: nn.Module, kind: str) -> Iterator[bool]:
    """What slices would not do as the whole module does."""
    # A forward of the instance is some library's hook.
    yield from (bool(vars(module).get(name)) for name in (*_HOOKS, "forward", "_modules", "_buffers"))
    parameters, attributes = module._parameters, vars(module)
    yield parameters.get("weight") is None or not set(parameters) <= {"weight", "bias"}
    # DTensors, lazy and quantized ones have types of their own.
    yield any(type(p) is not nn.Parameter for p in parameters.values() if p is not None)
    yield any(bool(p._backward_hooks or p._post_accumulate_grad_hooks) for p in parameters.values() if p is not None)
    if kind == "embedding":
        yield attributes["max_norm"] is not None or attributes["scale_grad_by_freq"] or attributes["sparse"]
    if kind == "conv":
        yield attributes["groups"] != 1
    if kind == "conv1d":
        yield parameters.get("bias") is None


def _check(what: str, module: nn.Module, slices: int, cut: Cut) -> None:
    cuts = cuts_of(module)
    if cut not in get_args(Cut):
        raise ValueError(f"{what}: cut={cut!r}: expected one of {', '.join(get_args(Cut))}.")
    if not cuts:
        raise ValueError(
            f"{what} cannot be split: expected a linear, embedding or ungrouped convolution layer of exactly torch's"
            f" type without hooks, got {type(module).__name__}."
        )
    if cut not in cuts:
        raise ValueError(f"{what}: cut={cut!r}: expected one of {', '.join(cuts)}.")
    size = module.weight.shape[_dim(cut)]  # type: ignore[union-attr, index]
    if isinstance(slices, bool) or not isinstance(slices, int) or not 1 <= slices <= size:
        raise ValueError(f"{what}: slices={slices!r}: expected an integer from 1 to {size}, its size in the cut.")
