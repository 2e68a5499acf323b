"""Kernel and launchers of :func:`pack` and :func:`unpack`: both gather rows by index, a constant where there is none.

Rows are moved as integers of their elements' size: bits arrive as they were, and one binary serves all dtypes of a
size.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from hetu_kernels._common import alloc
from hetu_kernels._common.checks import last_dim_contiguous
from hetu_kernels._common.config import row_config
from hetu_kernels._common.device import on_device
from hetu_kernels._common.triton_utils import cdiv, tl, triton

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
_COLUMNS = 2048
_TILE = 4096


@triton.jit(do_not_specialize=["inner", "num_rows", "fill"])
def _gather_rows_kernel(
    source_ptr, index_ptr, out_ptr, stride_source_outer, stride_source_row, inner, num_rows, fill,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles x column blocks,), columns first. ``out`` is contiguous ``[rows, N]``; row ``i`` of it is row
    ``index[i]`` of the source, which if nested is ``[outer, inner, N]``, and ``fill`` where the index is negative.
    """
    COLUMN_BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    pid = tl.program_id(0).to(tl.int64)
    row = (pid // COLUMN_BLOCKS) * ROWS + tl.arange(0, ROWS)
    cols = ((pid % COLUMN_BLOCKS) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (row < num_rows)[:, None] & (cols < N)
    index = tl.load(index_ptr + row, mask=row < num_rows, other=-1)
    if NESTED:
        outer = (index // inner).to(tl.int64)
        start = outer * stride_source_outer + (index % inner).to(tl.int64) * stride_source_row
    else:
        start = index.to(tl.int64) * stride_source_row
    there = (index >= 0)[:, None]
    other = tl.cast(fill, source_ptr.dtype.element_ty)
    value = tl.load(source_ptr + start[:, None] + cols, mask=mask & there, other=other)
    tl.store(out_ptr + row[:, None] * N + cols, value, mask=mask)


def launch_pack(x: Tensor, gather_idx: Tensor) -> Tensor:
    """Gather rows of ``[batch, length, ...]`` into ``[rows, ...]``; zeros where the index is negative."""
    out = alloc.empty((gather_idx.shape[0], *x.shape[2:]), dtype=x.dtype, device=x.device)
    return _launch(x.unsqueeze(-1) if x.dim() == 2 else x.flatten(2), gather_idx, out, 0)


def launch_unpack(packed: Tensor, scatter_idx: Tensor, batch: int, max_length: int, fill: float) -> Tensor:
    """Gather rows of ``[rows, ...]`` into ``[batch, max_length, ...]``; ``fill`` where the index is negative."""
    out = alloc.empty((batch, max_length, *packed.shape[1:]), dtype=packed.dtype, device=packed.device)
    source = packed.unsqueeze(-1) if packed.dim() == 1 else packed.flatten(1)
    plain_zero = fill == 0 and math.copysign(1, fill) > 0
    return _launch(source.unsqueeze(0), scatter_idx, out, 0 if plain_zero else _bits(fill, packed.dtype))


def _launch(source: Tensor, index: Tensor, out: Tensor, fill: int) -> Tensor:
    """Gather rows of ``[outer, inner, n]``."""
    _, inner, n = source.shape
    if out.numel() == 0:
        return out
    integer = INTEGERS[source.element_size()]
    rows = last_dim_contiguous(source).view(integer)
    nested = source.shape[0] > 1 and rows.stride(0) != inner * rows.stride(1)
    config = row_config(n, limit=_COLUMNS, tile=_TILE)
    grid = cdiv(index.shape[0], config.blocks["ROWS"]) * cdiv(n, config.blocks["BLOCK"])
    with on_device(source):
        _gather_rows_kernel[(grid,)](
            rows, index.contiguous(), out.view(integer), rows.stride(0) if nested else 0, rows.stride(1),
            max(inner, 1), index.shape[0], fill, N=n, NESTED=nested, **config.kwargs,
        )  # fmt: skip
    return out


@functools.lru_cache(maxsize=256)
def _bits(value: float, dtype: torch.dtype) -> int:
    """The bits of a number in a dtype, as a signed integer; never asked for 0.0, which would be taken for -0.0."""
    made = torch.tensor(value if dtype.is_floating_point else int(value), dtype=dtype)
    return int(made.view(INTEGERS[dtype.itemsize]).item())
