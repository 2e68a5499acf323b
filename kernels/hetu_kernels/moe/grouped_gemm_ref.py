"""Reference of :func:`hetu_kernels.grouped_gemm` in plain torch, for any floating dtype: one expert at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def grouped_gemm_reference(
    x: Tensor, weight: Tensor, offsets: Tensor, *, bias: Tensor | None = None, allow_tf32: bool = False
) -> Tensor:
    """See :func:`hetu_kernels.grouped_gemm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    parts = []
    for expert, rows in groups(offsets):  # those of no rows too, whose weights then have a gradient of zeros
        matrix = weight[expert] if weight.dtype == x.dtype else _Rounded.apply(weight[expert], x.dtype)
        part = x[rows].to(wide) @ matrix.to(wide)
        parts.append((part if bias is None else part + bias[expert].to(wide)).to(x.dtype))
    rest = x.shape[0] - sum(part.shape[0] for part in parts)
    return torch.cat([*parts, x.new_zeros(rest, weight.shape[2])])


class _Rounded(torch.autograd.Function):
    """A matrix rounded to a narrower dtype, but kept in its own, so that its gradient is not rounded."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        return matrix.to(dtype).to(matrix.dtype)

    @staticmethod
    def backward(ctx: Any, dmatrix: Tensor) -> tuple[Tensor, None]:
        return dmatrix, None


def backward(
    dy: Tensor, x: Tensor | None, weight: Tensor, offsets: Tensor, want_x: bool, want_weight: bool, want_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``x``, of ``weight`` (in their dtypes) and of the bias (at least float32); None if not wanted.

    ``x`` is needed for that of the weight only.
    """
    wide = torch.promote_types(dy.dtype, torch.float32)
    dx = dy.new_zeros(dy.shape[0], weight.shape[1]) if want_x else None
    dweight = weight.new_zeros(weight.shape) if want_weight else None
    dbias = dy.new_zeros(weight.shape[0], weight.shape[2], dtype=wide) if want_bias else None
    for expert, rows in groups(offsets):
        part = dy[rows].to(wide)
        if dx is not None:
            dx[rows] = (part @ weight[expert].to(dy.dtype).to(wide).T).to(dx.dtype)
        if dweight is not None and x is not None:
            dweight[expert] = (x[rows].to(wide).T @ part).to(dweight.dtype)
        if dbias is not None:
            dbias[expert] = part.sum(0)
    return dx, dweight, dbias


def groups(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert and its rows."""
    ends = offsets.tolist()
    for expert, (begin, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        yield expert, slice(begin, end)
