"""The operators that OSDP decides on, and how they are cut into slices (operator splitting of arXiv 2209.13258)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Cut = Literal["output", "input"]


@dataclass(frozen=True)
class Operator:
    """A module that owns parameters: what is replicated or sharded as a whole, or in slices.

    Args:
        name: Name of the module in the model; names are unique.
        parameters: Number of parameters; may be left out where ``shapes`` are given. 0 costs nothing.
        shapes: Shapes of the parameters, if known. Sharding pads the first dimension of each to a multiple of the
            ranks, and slices are cut along dimensions; without shapes there is no padding and slices are even.
        dtype_bytes: Bytes per parameter as it is stored.
        trained: Whether the parameters are trained; frozen ones have neither gradients nor optimizer states.
        forward_seconds: Seconds of computation per sample in forward.
        backward_seconds: Seconds of computation per sample in backward.
        activation_bytes: Bytes per sample kept for backward.
        cuts: How it may be cut into slices, most wanted first: ``output`` along the first dimension of all parameters,
            ``input`` along the second of those that have one. Empty: not splittable.
        max_slices: Largest number of slices.
        split_seconds: Seconds per micro-step that every slice beyond the first adds.
        kind: What people call operators like this one, for the text table.
        tied: Name of a group of operators that share parameters. They have one mode and are not split. Parameters
            that they share count for one of them; the others list only their own.
        excluded: Modes that it cannot have.

    Raises:
        ValueError: If a number is out of range, or ``shapes`` contradict ``parameters`` or ``max_slices``.
    """

    name: str
    parameters: int = -1
    shapes: tuple[tuple[int, ...], ...] = ()
    dtype_bytes: int = 4
    trained: bool = True
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    activation_bytes: float = 0.0
    cuts: tuple[Cut, ...] = ()
    max_slices: int = 1
    split_seconds: float = 0.0
    kind: str = ""
    tied: str = ""
    excluded: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shapes = tuple(tuple(shape) for shape in self.shapes)
        object.__setattr__(self, "shapes", shapes)
        object.__setattr__(self, "cuts", tuple(self.cuts))
        object.__setattr__(self, "excluded", tuple(self.excluded))
        where = f"operator {self.name!r}"
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"operator.name={self.name!r}: expected a text.")
        if any(isinstance(d, bool) or not isinstance(d, int) or d < 0 for shape in shapes for d in shape):
            raise ValueError(f"{where}: shapes={shapes}: expected integers of at least 0.")
        if shapes:
            count = sum(map(math.prod, shapes))
            if self.parameters not in (-1, count):
                raise ValueError(f"{where}: parameters={self.parameters}: expected {count}, the size of its shapes.")
            object.__setattr__(self, "parameters", count)
        for name, least in (("parameters", 0), ("dtype_bytes", 1), ("max_slices", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{where}: {name}={value!r}: expected an integer of at least {least}.")
        for name in ("forward_seconds", "backward_seconds", "activation_bytes", "split_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{where}: {name}={getattr(self, name)!r}: expected a number of at least 0.")
        for cut in self.cuts:
            if cut not in get_args(Cut):
                raise ValueError(f"{where}: cut {cut!r}: expected one of {', '.join(get_args(Cut))}.")
        self._check_slices(where)

    def _check_slices(self, where: str) -> None:
        if self.max_slices == 1:
            return
        if not self.cuts or self.tied:
            reason = "a tied operator is not split" if self.tied else "cuts is empty"
            raise ValueError(f"{where}: max_slices={self.max_slices}: expected 1, since {reason}.")
        largest = self.parameters
        if self.shapes:
            dim = self.cuts[0] == "input"
            largest = min((shape[dim] for shape in self.shapes if len(shape) > dim), default=1)
        if self.max_slices > largest:
            raise ValueError(f"{where}: max_slices={self.max_slices}: expected at most {largest}, its size in the cut.")

    @property
    def slice_counts(self) -> tuple[int, ...]:
        """Numbers of slices to choose from: powers of two, and the largest one."""
        powers = (2**i for i in range(self.max_slices.bit_length()))
        return tuple(sorted({*powers, self.max_slices}))

    def slice_shapes(self, slices: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Shapes of the parameters in each slice, the larger ones first; one dimension each where shapes are unknown.

        A parameter without the dimension that is cut, such as the bias under an ``input`` cut, is in the first slice.
        """
        if slices == 1:
            return (self.shapes or ((self.parameters,),),)
        dim = int(bool(self.shapes) and self.cuts[0] == "input")
        out = []
        for i in range(slices):
            piece = []
            for shape in self.shapes or ((self.parameters,),):
                if len(shape) > dim:
                    base, extra = divmod(shape[dim], slices)
                    piece.append((*shape[:dim], base + (i < extra), *shape[dim + 1 :]))
                elif i == 0:
                    piece.append(shape)
            out.append(tuple(piece))
        return tuple(out)
