"""Reference of :func:`hetu_kernels.rotary` in plain torch, for any floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_reference(
    x: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | None = None, interleaved: bool = False
) -> Tensor:
    """See :func:`hetu_kernels.rotary`."""
    return rotate(x, cos.detach(), sin.detach(), positions, interleaved=interleaved, inverse=False)


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, *, interleaved: bool, inverse: bool
) -> Tensor:
    """Rotate forward, or back: the gradient of the rotation."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if positions is None:
        positions = torch.arange(x.shape[-3], device=x.device)
    c, s = (_rows(table.to(wide), positions).unsqueeze(-2) for table in (cos, sin))
    if inverse:
        s = -s
    rotary_dim = 2 * cos.shape[1]
    rotated, rest = x[..., :rotary_dim].to(wide), x[..., rotary_dim:]
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated.chunk(2, -1)
    halves = (first * c - second * s, second * c + first * s)
    joined = torch.stack(halves, -1).flatten(-2) if interleaved else torch.cat(halves, -1)
    return torch.cat([joined.to(x.dtype), rest], -1)


def _rows(table: Tensor, positions: Tensor) -> Tensor:
    """Rows of a table by position; NaN where there is no such row."""
    count = table.shape[0]
    outside = table.new_full((1, table.shape[1]), float("nan"))
    return torch.cat([table, outside])[torch.where((positions >= 0) & (positions < count), positions, count)]
