"""Checks of arguments at an operator's door: one line that names the argument, its value and what is allowed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def same_device(op: str, **tensors: Tensor | None) -> None:
    """All tensors must be on one device: a kernel given a CPU pointer fails far away with an obscure message.

    Raises:
        ValueError: Naming the two arguments that differ.
    """
    first: tuple[str, Tensor] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} is a {type(tensor).__name__}, expected a tensor.")
        if first is None:
            first = (name, tensor)
        elif tensor.device != first[1].device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device}, {first[0]} on {first[1].device}. Move one of them to the other."
            )


def not_distributed(op: str, **tensors: Tensor | None) -> None:
    """No tensor may be a DTensor: a kernel sees the local shard only, and would take it for the whole.

    Raises:
        TypeError: Naming the argument.
    """
    for name, tensor in tensors.items():
        if hasattr(tensor, "to_local"):
            raise TypeError(f"{op}: {name} is a DTensor, expected a plain tensor: pass {name}.to_local().")


def floating(op: str, **tensors: Tensor | None) -> None:
    """All tensors must be float32, float16, bfloat16 or (for the reference) float64.

    Raises:
        TypeError: Naming the argument and its dtype.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATING:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected float32, float16 or bfloat16.")


def same_dtype(op: str, **tensors: Tensor | None) -> None:
    """All tensors must have one dtype.

    Raises:
        TypeError: Naming the two arguments that differ.
    """
    given = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    for name, tensor in given[1:]:
        if tensor.dtype != given[0][1].dtype:
            raise TypeError(
                f"{op}: {name} has dtype {tensor.dtype}, {given[0][0]} {given[0][1].dtype}: they must agree."
            )


def integer(op: str, **tensors: Tensor | None) -> None:
    """All tensors must be int32 or int64.

    Raises:
        TypeError: Naming the argument and its dtype.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected int32 or int64.")


def shape(op: str, name: str, tensor: Tensor | None, expected: tuple[int | None, ...], meaning: str) -> None:
    """A tensor must have the expected shape; None in ``expected`` allows any size.

    Raises:
        ValueError: Naming the argument, its shape and the expected one.
    """
    if tensor is None:
        return
    if tensor.dim() != len(expected) or any(
        want is not None and have != want for have, want in zip(tensor.shape, expected, strict=True)
    ):
        want = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, expected [{want}] ({meaning}).")


def one_of(op: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    """A value must be among the allowed ones.

    Raises:
        ValueError: Naming the argument, its value and the allowed ones.
    """
    if value not in allowed:
        raise ValueError(f"{op}: {name}={value!r}, expected one of {', '.join(map(repr, allowed))}.")


def last_dim_contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension has stride 1, a contiguous copy otherwise."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """Contiguous versions of small tensors (vectors, tables of offsets), which kernels read without strides."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def rows(tensor: Tensor) -> Tensor:
    """``[..., n]`` as ``[rows, n]`` with stride 1 in the last dimension; copied only where no view can do it."""
    n = tensor.shape[-1]
    flat = tensor if tensor.dim() == 2 else tensor.reshape(tensor.numel() // n if n else 0, n)
    return flat if flat.stride(-1) == 1 or n == 1 else flat.contiguous()
