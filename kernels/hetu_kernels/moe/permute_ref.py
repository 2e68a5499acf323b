"""References of :func:`hetu_kernels.permute` and :func:`hetu_kernels.unpermute` in plain torch, for any dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hetu_kernels.moe.permute import Permuted


def permute_reference(
    x: Tensor, expert_ids: Tensor, num_experts: int, *, capacity: int | None = None, num_rows: int | None = None
) -> Permuted:
    """See :func:`hetu_kernels.permute`."""
    from hetu_kernels.moe.permute import Permuted  # which imports this module

    if num_rows is None:
        num_rows = count_rows(expert_ids, num_experts, capacity)
    token_of, position_of, offsets = route(expert_ids, num_experts, capacity, num_rows)
    wide = torch.promote_types(x.dtype, torch.float32)  # what the copies of a token add to its gradient is summed so
    return Permuted(take(x.to(wide), token_of).to(x.dtype), token_of, position_of, offsets)


def unpermute_reference(rows: Tensor, position_of: Tensor, weights: Tensor) -> Tensor:
    """See :func:`hetu_kernels.unpermute`."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    y = torch.zeros((position_of.shape[0], rows.shape[1]), dtype=wide, device=rows.device)
    for j in range(position_of.shape[1]):
        weight = torch.where(position_of[:, j] >= 0, weights[:, j].to(wide), 0.0)
        y = y + weight[:, None] * take(rows, position_of[:, j]).to(wide)
    return y.to(rows.dtype)


def count_rows(expert_ids: Tensor, num_experts: int, capacity: int | None) -> int:
    """How many assignments are kept; waits for the device."""
    counts = _histogram(_known(expert_ids, num_experts), num_experts + 1)[:num_experts]
    return int((counts if capacity is None else counts.clamp(max=capacity)).sum().item())


def route(expert_ids: Tensor, num_experts: int, capacity: int | None, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token of each row, row of each assignment, and where each expert's rows start, by a stable sort; int32."""
    ids = _known(expert_ids, num_experts)
    ordered, order = ids.sort(stable=True)
    counts = _histogram(ids, num_experts + 1)
    rank = torch.arange(ids.numel(), device=ids.device) - (counts.cumsum(0) - counts)[ordered]
    kept = counts if capacity is None else counts.clamp(max=capacity)
    starts = torch.nn.functional.pad(kept[:num_experts].cumsum(0), (1, 0))
    row = starts[ordered] + rank
    keep = (ordered < num_experts) & (rank < kept[ordered]) & (row < num_rows)
    position_of = torch.empty_like(ids).scatter_(0, order, torch.where(keep, row, -1))
    token_of = torch.full((num_rows + 1,), -1, device=ids.device)  # what is not kept goes into one row more
    token_of.scatter_(0, torch.where(keep, row, num_rows), order // max(expert_ids.shape[1], 1))
    offsets = starts.clamp(max=num_rows)
    return tuple(t.to(torch.int32) for t in (token_of[:-1], position_of.view(expert_ids.shape), offsets))  # type: ignore[return-value]


def _known(expert_ids: Tensor, num_experts: int) -> Tensor:
    """All ids in one dimension, int64; ``num_experts`` stands for those that are skipped."""
    ids = expert_ids.flatten().long()
    return torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)


def _histogram(ids: Tensor, size: int) -> Tensor:
    """How often each id occurs; unlike ``bincount`` it does not wait for the device."""
    return torch.zeros(size, dtype=torch.int64, device=ids.device).scatter_add_(0, ids, torch.ones_like(ids))


def take(source: Tensor, index: Tensor) -> Tensor:
    """Rows by index; zeros where it is negative."""
    filler = source.new_zeros((1, source.shape[1]))
    return torch.cat([source, filler]).index_select(0, torch.where(index < 0, source.shape[0], index))


def permute_backward(drows: Tensor, position_of: Tensor) -> Tensor:
    """Gradient of the tokens: the sum over their rows, in at least float32."""
    wide = torch.promote_types(drows.dtype, torch.float32)
    dx = torch.zeros((position_of.shape[0], drows.shape[1]), dtype=wide, device=drows.device)
    for j in range(position_of.shape[1]):
        dx += take(drows, position_of[:, j])
    return dx.to(drows.dtype)


def unpermute_backward(dy: Tensor, rows: Tensor, position_of: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and of the weights."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    drows = torch.zeros(rows.shape, dtype=rows.dtype, device=rows.device)
    dweights = torch.zeros(position_of.shape, dtype=weights.dtype, device=rows.device)
    for j in range(position_of.shape[1]):
        token = (position_of[:, j] >= 0).nonzero()[:, 0]
        row = position_of[token, j].long()
        given = dy[token].to(wide)
        drows[row] = (weights[token, j, None].to(wide) * given).to(rows.dtype)
        dweights[token, j] = (given * rows[row].to(wide)).sum(1).to(weights.dtype)
    return drows, dweights
