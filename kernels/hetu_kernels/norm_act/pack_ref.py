"""References of :func:`hetu_kernels.pack` and :func:`hetu_kernels.unpack` in plain torch, for any dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hetu_kernels.norm_act.pack import PaddingLayout


def pack_reference(x: Tensor, layout: PaddingLayout) -> Tensor:
    """See :func:`hetu_kernels.pack`."""
    return pack_rows(x, layout.gather_idx)


def unpack_reference(packed: Tensor, layout: PaddingLayout, *, fill: float = 0.0) -> Tensor:
    """See :func:`hetu_kernels.unpack`."""
    return unpack_rows(packed, layout.scatter_idx, layout.batch, layout.max_length, fill)


def pack_rows(x: Tensor, gather_idx: Tensor) -> Tensor:
    """Rows of ``[batch, length, ...]`` by index; zeros where it is negative."""
    return _take(x.flatten(0, 1), gather_idx, 0.0)


def unpack_rows(packed: Tensor, scatter_idx: Tensor, batch: int, max_length: int, fill: float) -> Tensor:
    """``[batch, max_length, ...]`` of rows by index; ``fill`` where it is negative."""
    return _take(packed, scatter_idx, fill).view(batch, max_length, *packed.shape[1:])


def _take(source: Tensor, index: Tensor, fill: float) -> Tensor:
    filler = source.new_full((1, *source.shape[1:]), fill)
    return torch.cat([source, filler]).index_select(0, torch.where(index < 0, source.shape[0], index))
