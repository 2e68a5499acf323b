"""Allocation of the buffers that kernels write.

Launchers allocate here and nowhere else, so that tests can surround every buffer with NaN and look whether a kernel
wrote outside of it or left part of it unwritten (see :func:`hetu_kernels._common.testing.guarded_buffers`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Allocator = Callable[[Sequence[int], torch.dtype, torch.device], Tensor]


def _torch_empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=device)


_allocator: Allocator = _torch_empty


def set_allocator(allocator: Allocator | None) -> None:
    """Use another allocator; None for torch's own. For tests."""
    global _allocator
    _allocator = allocator or _torch_empty


def empty(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized contiguous tensor."""
    return _allocator(shape, dtype, device)


def empty_like(tensor: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialized contiguous tensor of the same shape; of the same dtype unless told."""
    return _allocator(tensor.shape, dtype or tensor.dtype, tensor.device)
