"""Slices of a tensor under the name and shape of the whole one, for checkpoints that know nothing of slices.

torch.distributed.checkpoint (DCP) asks a tensor which boxes of the whole one this rank has, and writes or fills those.
A DTensor has one; :class:`MergedSlices` has one per slice. Nothing is communicated, and whoever reads the checkpoint,
cut otherwise or not at all, finds an ordinary tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from lightning_hetu.parallel.osdp.split import SlicePart, slice_parts


class _Box(NamedTuple):
    """What this rank has of one slice, and where it is in the whole tensor."""

    chunk: ChunkStorageMetadata
    values: Tensor


class MergedSlices(torch.Tensor):
    """A tensor that is there in slices. DCP saves and loads it; it cannot be computed with.

    Slices that several ranks have are written by one of them. Ranks without a share of a slice are fine.

    Args:
        slices: The slices in order, as DTensors or plain tensors.
        dim: The dimension along which they follow one another.
    """

    slices: tuple[Tensor, ...]
    along: int

    def __new__(cls, slices: Sequence[Tensor], dim: int) -> MergedSlices:  # noqa: D102
        shape = list(slices[0].shape)
        shape[dim] = sum(part.shape[dim] for part in slices)
        # DCP looks up boxes only of what is a tensor.
        merged: MergedSlices = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=slices[0].dtype, device=slices[0].device
        )
        merged.slices = tuple(slices)
        merged.along = dim
        return merged

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuses everything.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(f"{func}: a tensor in slices is only saved and loaded; its slices are in .slices.")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"MergedSlices(shape={tuple(self.shape)}, slices={len(self.slices)}, dim={self.along})"

    def _boxes(self) -> Iterator[_Box]:
        start = 0
        for part in self.slices:
            chunks = [ChunkStorageMetadata(torch.Size([0] * part.ndim), part.shape)]
            if isinstance(part, DTensor):
                # A rank outside of the mesh has nothing.
                inside = part.device_mesh.get_coordinate() is not None
                chunks = part.__create_chunk_list__() if inside else []
            for chunk in chunks:
                if 0 not in chunk.sizes:  # it would begin where the next slice does
                    offsets = list(chunk.offsets)
                    offsets[self.along] += start
                    values = part.to_local() if isinstance(part, DTensor) else part
                    yield _Box(ChunkStorageMetadata(torch.Size(offsets), chunk.sizes), values)
            start += part.shape[self.along]

    # What DCP asks of tensors that are not ordinary; DTensor answers it in the same way.

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, box.chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(box.chunk, TensorProperties.create_from_tensor(box.values), self.size()),
            )
            for box in self._boxes()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [box.chunk for box in self._boxes()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(box.values for box in self._boxes() if box.chunk.offsets == index.offset)


class SlicedState:
    """Turns states by the names of slices into states by the names of whole parameters, and back.

    A module without sliced operators has the same states either way.

    Args:
        module: The model.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parts = slice_parts(module)
        self._whole = {
            part.name: (name, number) for name, parts in self.parts.items() for number, part in enumerate(parts)
        }

    def merge(self, state: Mapping[str, Any], kinds: Sequence[str] = ("",)) -> dict[str, Any]:
        """Entries of slices joined to one of the whole parameter; what slices have in common is that of the first.

        Args:
            state: Parameters and buffers, or a flat optimizer state, by name.
            kinds: What comes before the name of a parameter.

        Raises:
            ValueError: If the entries of slices cannot be joined, because the optimizer keeps other shapes.
        """
        merged: dict[str, Any] = {}
        found: dict[str, tuple[str, dict[int, Any]]] = {}
        for key, value in state.items():
            kind, name, rest = _parse(key, kinds, self._whole)
            if name is None:
                merged[key] = value
                continue
            whole, number = self._whole[name]
            key = f"{kind}{whole}{rest}"
            merged[key] = None  # to keep the order
            found.setdefault(key, (whole, {}))[1][number] = value
        for key, (whole, values) in found.items():
            merged[key] = _joined(key, self.parts[whole], values)
        return merged

    def split(self, state: Mapping[str, Any], kinds: Sequence[str] = ("",)) -> dict[str, Any]:
        """The entries of slices, from those of whole parameters.

        Args:
            state: As :meth:`merge` gives it, or with whole tensors.
            kinds: What comes before the name of a parameter.

        Raises:
            ValueError: If an entry cannot be cut, because the optimizer keeps other shapes.
        """
        out: dict[str, Any] = {}
        for key, value in state.items():
            kind, name, rest = _parse(key, kinds, self.parts)
            if name is None:
                out[key] = value
                continue
            parts = self.parts[name]
            for number, part in enumerate(parts):
                out[f"{kind}{part.name}{rest}"] = _cut(key, value, parts, number)
        return out

    def names(self, whole: Sequence[str]) -> list[str]:
        """Names of the slices of all these parameters, in order."""
        return [name for item in whole for name in self.names_of(item)]

    def names_of(self, whole: str) -> list[str]:
        """Names of the slices of a parameter, or its own."""
        return [part.name for part in self.parts[whole]] if whole in self.parts else [whole]


OPTIMIZER_KINDS = ("state.", "param_groups.")
"""What comes before the name of a parameter in a flat optimizer state."""


def _parse(key: str, kinds: Sequence[str], names: Mapping[str, Any]) -> tuple[str, str | None, str]:
    """``key`` as kind, name of a parameter out of ``names`` and the rest; the name is ``None`` if there is no such."""
    for kind in kinds:
        if names and key.startswith(kind):
            name = key.removeprefix(kind)
            rest = ""
            while name:
                if name in names:
                    return kind, name, rest
                name, _, last = name.rpartition(".")
                rest = f".{last}{rest}"
    return "", None, ""


def _joined(key: str, parts: Sequence[SlicePart], values: Mapping[int, Any]) -> Any:
    first = next(iter(values.values()))
    if len(values) != len(parts):
        raise ValueError(f"{key!r} is there for {len(values)} of {len(parts)} slices: expected none or all.")
    if len(parts) == 1 or not isinstance(first, Tensor) or first.ndim == 0:
        return first
    dim, shape = parts[0].dim, tuple(first.shape)
    for number, part in enumerate(parts):
        expected = (*shape[:dim], part.length, *shape[dim + 1 :])
        if len(shape) <= dim or tuple(values[number].shape) != expected:
            raise ValueError(
                f"{key!r}: slices of shapes {', '.join(str(tuple(value.shape)) for value in values.values())} cannot be"
                " joined: use an optimizer whose states have the shapes of the parameters, or no slices."
            )
    return MergedSlices([values[number] for number in range(len(parts))], dim)


def _cut(key: str, value: Any, parts: Sequence[SlicePart], number: int) -> Any:
    """What slice ``number`` has of a value."""
    if len(parts) == 1 or not isinstance(value, Tensor):
        return value
    if isinstance(value, MergedSlices):
        return value.slices[number]
    if value.ndim == 0:
        return value.clone()  # an optimizer counts its steps in place, once per slice
    part, size = parts[number], parts[-1].start + parts[-1].length
    if value.ndim <= part.dim or value.shape[part.dim] != size:
        raise ValueError(
            f"{key!r} of shape {tuple(value.shape)} cannot be cut into slices: use an optimizer whose states have the"
            " shapes of the parameters, or no slices."
        )
    return value.narrow(part.dim, part.start, part.length)
