"""Checks of arguments at an operator's door: one line that names the argument, its value and what is allowed.

Most of them look at no value of a tensor: they hold under ``torch.compile`` and for fake tensors, and wait for no
device. Those that do (:func:`offsets`, :func:`indices`) are called inside custom operators, where tensors are real, and
look only where :func:`~hetu_kernels._common.device.may_read` says so.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable, Sized
from typing import Any

import torch
from torch import Tensor

from hetu_kernels._common.device import may_read

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def tensors(op: str, **given: object) -> None:
    """All of them must be tensors; None is none.

    Raises:
        TypeError: Naming the argument and its type.
    """
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {_typed(name, value)}, expected a tensor.")


def tensor_list(op: str, name: str, value: object) -> None:
    """A value must be a sequence of tensors, not a tensor, whose rows would be taken for them.

    Raises:
        TypeError: Naming the argument, or which of them is no tensor.
    """
    if isinstance(value, Tensor) or not (isinstance(value, Sized) and isinstance(value, Iterable)):
        raise TypeError(f"{op}: {_typed(name, value)}, expected a list of tensors.")
    for i, member in enumerate(value):
        if not isinstance(member, Tensor):
            raise TypeError(f"{op}: {_typed(f'{name}[{i}]', member)}, expected a tensor.")


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
            raise TypeError(f"{op}: {_typed(name, tensor)}, expected a tensor.")
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


def all_or_no_float64(op: str, **dtypes: torch.dtype | None) -> None:
    """Either all dtypes are float64 or none is: a result in float64 of what is less would look exact.

    Raises:
        TypeError: Naming the two arguments that differ.
    """
    given = [(name, dtype) for name, dtype in dtypes.items() if dtype is not None]
    for name, dtype in given[1:]:
        if (dtype == torch.float64) != (given[0][1] == torch.float64):
            raise TypeError(
                f"{op}: {name} has dtype {dtype}, {given[0][0]} {given[0][1]}: float64 does not mix with others."
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


def flags(op: str, **values: object) -> None:
    """All of them must be True or False.

    Raises:
        TypeError: Naming the argument and its value.
    """
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{op}: {_shown(name, value)}, expected True or False.")


def whole(
    op: str, name: str, value: Any, *, at_least: int | None = None, at_most: int | None = None, meaning: str = ""
) -> int:
    """A value must be an integer, of Python or numpy; a tensor would cost a synchronization.

    Args:
        op: Operator.
        name: Argument.
        value: Its value.
        at_least: The smallest one allowed.
        at_most: The largest one allowed.
        meaning: What else to say of what is expected, such as ``", or None for no window"``.

    Returns:
        The integer, one of Python's.

    Raises:
        TypeError: If it is something else.
        ValueError: If it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        # Not of Python, perhaps of numpy. A tensor of one element has an index too, but reading it would wait.
        if isinstance(value, bool | Tensor) or not isinstance(value, numbers.Integral):
            hint = "; take .item() once per batch" if isinstance(value, Tensor) else ""
            raise TypeError(f"{op}: {_shown(name, value)}, expected an integer{meaning}{hint}.")
        value = operator.index(value)
    if (at_least is not None and value < at_least) or (at_most is not None and value > at_most):
        if at_most is None:
            want = f"at least {at_least}"
        else:
            want = f"at most {at_most}" if at_least is None else f"{at_least} to {at_most}"
        raise ValueError(f"{op}: {name}={value}, expected {want}{meaning}.")
    return value


def number(op: str, name: str, value: Any, *, sign: str = "", infinite: bool = False, meaning: str = "") -> float:
    """A value must be a number, of Python or numpy, not NaN; a tensor would cost a synchronization.

    Args:
        op: Operator.
        name: Argument.
        value: Its value.
        sign: ``"positive"``, or ``"0 or more"``; any without.
        infinite: Infinities are numbers too.
        meaning: What else to say of what is expected, such as ``", or None for no cap"``.

    Returns:
        The number, one of Python's.

    Raises:
        TypeError: If it is something else.
        ValueError: If it is out of range.
    """
    kind = "a positive number" if sign == "positive" else "0 or more" if sign else "a number"
    want = f"{kind}{'' if infinite else ' (finite)'}{meaning}"
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymInt | torch.SymFloat):
        if isinstance(value, bool | Tensor) or not isinstance(value, numbers.Real):
            raise TypeError(f"{op}: {_shown(name, value)}, expected {want}.")
        value = float(value)
    fits = value > 0 if sign == "positive" else value >= 0 if sign else value == value
    if not fits or not (infinite or -math.inf < value < math.inf):
        raise ValueError(f"{op}: {name}={value}, expected {want}.")
    return value


def offsets(op: str, name: str, starts: Tensor, tokens: int, longest_name: str, longest: int, of: str) -> None:
    """Offsets of packed sequences must begin with 0, never decrease, and end within the tokens.

    For the inside of a custom operator; nothing is checked where values may not be read.

    Args:
        op: Operator.
        name: Argument that has the offsets.
        starts: The offsets ``[sequences + 1]``.
        tokens: Rows of the packed tensor.
        longest_name: Argument that bounds the lengths.
        longest: Its value.
        of: Name of the packed tensor.

    Raises:
        ValueError: Naming the argument, what is wrong with it and what is allowed.
    """
    if not may_read(starts):
        return
    values: list[int] = starts.tolist()
    if values[0] != 0:
        raise ValueError(f"{op}: {name}[0] is {values[0]}, expected 0.")
    for i, (begin, end) in enumerate(zip(values, values[1:], strict=False), 1):
        if end < begin:
            raise ValueError(f"{op}: {name}[{i}] is {end}, expected at least {begin}, the entry before it.")
    if values[-1] > tokens:
        raise ValueError(
            f"{op}: {name}[{len(values) - 1}] is {values[-1]}, expected at most {tokens}, the rows of {of}."
        )
    length = max((end - begin for begin, end in zip(values, values[1:], strict=False)), default=0)
    if length > longest:
        raise ValueError(f"{op}: {longest_name}={longest}, expected at least {length}, the longest sequence of {name}.")


def indices(
    op: str, name: str, index: Tensor, size: int, of: str, *, lowest: int | None = 0, where: Tensor | None = None
) -> None:
    """Indices must be below a size.

    For the inside of a custom operator; nothing is checked where values may not be read.

    Args:
        op: Operator.
        name: Argument that has the indices.
        index: The indices, of any shape.
        size: They are below it.
        of: What they are indices of.
        lowest: The smallest one allowed; None for any.
        where: Which of them are used, a bool tensor of the same shape; all of them without.

    Raises:
        ValueError: Naming the argument, the place of the first wrong index, it, and what is allowed.
    """
    if not may_read(index):
        return
    wrong = index >= size
    if lowest is not None:
        wrong |= index < lowest
    if where is not None:
        wrong &= where
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        want = f"below {size}" if lowest is None else f"{lowest} to {size - 1}"
        raise ValueError(f"{op}: {name}{at} is {int(index[tuple(at)])}, expected {want}, {of}.")


def _typed(name: str, value: object) -> str:
    return f"{name} is None" if value is None else f"{name} is a {type(value).__name__}"


def _shown(name: str, value: object) -> str:
    """An argument and its value; its type where the value may not fit into a line."""
    return f"{name}={value!r}" if isinstance(value, bool | int | float | str | tuple | list) else _typed(name, value)


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
