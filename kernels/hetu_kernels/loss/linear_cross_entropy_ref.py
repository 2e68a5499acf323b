"""Reference of :func:`linear_cross_entropy` in plain torch, and its row functions for devices without the kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    chunk_bytes: int = 256 * 2**20,
) -> Tensor:
    """See :func:`hetu_kernels.linear_cross_entropy`. All logits are in memory at once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if group is not None:
        x = _CopyToGroup.apply(x, group)  # type: ignore[no-untyped-call]
    labels = target.reshape(-1)
    ignored = labels == ignore_index
    logits = x.reshape(-1, x.shape[-1]).to(wide) @ weight.to(wide).T
    if bias is not None:
        logits = logits + bias.to(wide)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(ignored[:, None], 0.0)
    vocabulary = vocabulary_of(weight, group)
    loss = row_loss(
        *reduce_statistics(*row_statistics(logits, labels, class_weight, vocabulary), group),
        labels, class_weight, vocabulary, ignore_index, label_smoothing, z_loss,
    )  # fmt: skip
    if reduction == "none":
        return loss.reshape(target.shape)
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / denominator(labels, class_weight, ignore_index, wide)


def vocabulary_of(weight: Tensor, group: ProcessGroup | None) -> Tensor:
    """First row of this rank's slice of the vocabulary, and the size of all slices together: int64 ``[2]``."""
    size = weight.shape[0]
    if group is None:
        return torch.arange(2, device=weight.device) * size
    from torch import distributed as dist

    sizes = torch.zeros(group.size(), dtype=torch.int64, device=weight.device)
    sizes[group.rank()] = size
    dist.all_reduce(sizes, group=group)
    return torch.stack([sizes[: group.rank()].sum(), sizes.sum()])


def denominator(labels: Tensor, class_weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """What the mean divides by: the number, or the class weights, of the rows that count; 1 where that is nothing."""
    valid = labels != ignore_index
    if class_weight is None:
        total = valid.sum().to(dtype)
    else:
        weights = class_weight.to(dtype)[labels.clamp(0, class_weight.shape[0] - 1)]
        total = torch.where(valid, weights, 0.0).sum()
    return torch.where(total == 0, 1.0, total)


def row_statistics(
    logits: Tensor, labels: Tensor, class_weight: Tensor | None, vocabulary: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each row: its maximum, ``sum(exp(logit - maximum))``, the label's logit (0 where it is elsewhere), and the sum
    of all logits by class weight.
    """
    size = logits.shape[1]
    if size == 0:
        nothing = logits.sum(1)  # zeros that hang on the logits
        return torch.full_like(nothing, -torch.inf), nothing, nothing, nothing
    maximum = logits.detach().amax(1)
    total = (logits - _finite(maximum)[:, None]).exp().sum(1)
    local = labels - vocabulary[0]
    here = (local >= 0) & (local < size)
    chosen = torch.where(here, logits.gather(1, local.clamp(0, size - 1)[:, None])[:, 0], 0.0)
    if class_weight is None:
        return maximum, total, chosen, logits.sum(1)
    weights = _local_weights(class_weight, vocabulary, size, logits.dtype)
    return maximum, total, chosen, (logits * weights).sum(1)


def reduce_statistics(
    maximum: Tensor, total: Tensor, chosen: Tensor, weighted: Tensor, group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithm of the sum of exponentials, the label's logit and the weighted sum, over the slices of all ranks."""
    if group is not None:
        from torch import distributed as dist

        largest = maximum.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        total = total * (maximum - _finite(largest)).exp()
        total, chosen, weighted = _SumOverGroup.apply(  # type: ignore[no-untyped-call]
            torch.stack([total, chosen, weighted]), group
        )
        maximum = largest
    return _finite(maximum) + total.log(), chosen, weighted


def row_loss(
    lse: Tensor,
    chosen: Tensor,
    weighted: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    vocabulary: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """Loss of each row from its statistics; NaN, with NaN gradients, where the label is out of range."""
    outside = ((labels < 0) | (labels >= vocabulary[1])) & (labels != ignore_index)
    lse = torch.where(outside, torch.nan, 1.0) * lse
    loss = lse - chosen
    if class_weight is not None:
        loss = loss * class_weight.to(lse.dtype)[labels.clamp(0, class_weight.shape[0] - 1)]
    if label_smoothing:
        share, total = smoothing(label_smoothing, class_weight, vocabulary, lse.dtype)
        loss = (1.0 - label_smoothing) * loss + total * lse - share * weighted
    if z_loss:
        loss = loss + z_loss * lse.square()
    return torch.where(labels == ignore_index, 0.0, loss)


def smoothing(label_smoothing: float, class_weight: Tensor | None, vocabulary: Tensor, dtype: torch.dtype) -> Tensor:
    """What smoothing gives to every class, and that times the sum of all class weights: ``[2]``."""
    share = label_smoothing / vocabulary[1].to(dtype)
    total = torch.full_like(share, label_smoothing) if class_weight is None else share * class_weight.to(dtype).sum()
    return torch.stack([share, total])


def rows_forward(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    class_weight: Tensor | None,
    vocabulary: Tensor,
    ignore_index: int,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`row_statistics` of raw logits; rows to be ignored count as zeros."""
    z = _capped(logits, bias, softcap).masked_fill_((labels == ignore_index)[:, None], 0.0)
    return row_statistics(z, labels, class_weight, vocabulary)


def rows_backward(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    class_weight: Tensor | None,
    vocabulary: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    lse: Tensor,
    dloss: Tensor | None,
) -> Tensor:
    """Gradient of the loss of each row, times ``dloss``, by the raw logits."""
    size = logits.shape[1]
    z = _capped(logits, bias, softcap)
    if size == 0:
        return z
    local = labels - vocabulary[0]
    here = (local >= 0) & (local < size)
    lse = torch.where((labels < 0) | (labels >= vocabulary[1]), torch.nan, lse)
    hot = torch.full_like(lse, 1.0 - label_smoothing)
    if class_weight is not None:
        hot *= class_weight.to(lse.dtype)[labels.clamp(0, class_weight.shape[0] - 1)]
    factor = hot + 2.0 * z_loss * lse
    grad = (z - lse[:, None]).exp()
    if label_smoothing:
        share, total = smoothing(label_smoothing, class_weight, vocabulary, lse.dtype)
        weights = 1.0 if class_weight is None else _local_weights(class_weight, vocabulary, size, lse.dtype)
        grad = grad * (factor + total)[:, None] - share * weights
    else:
        grad *= factor[:, None]
    grad.scatter_add_(1, local.clamp(0, size - 1)[:, None], torch.where(here, -hot, 0.0)[:, None])
    if softcap is not None:
        grad *= 1.0 - (z / softcap).square()
    if dloss is not None:
        grad *= dloss[:, None]
    return grad.masked_fill_((labels == ignore_index)[:, None], 0.0)


def _capped(logits: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    z = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    if bias is not None:
        z += bias
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _local_weights(class_weight: Tensor, vocabulary: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Class weights of this rank's slice of the vocabulary."""
    return class_weight.to(dtype)[vocabulary[0] + torch.arange(size, device=class_weight.device)]


def _finite(maximum: Tensor) -> Tensor:
    """0 in place of -inf, from which -inf cannot be subtracted."""
    return torch.where(maximum == -torch.inf, 0.0, maximum)


class _CopyToGroup(torch.autograd.Function):
    """The same tensor on every rank; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        from torch import distributed as dist

        total = dx.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _SumOverGroup(torch.autograd.Function):
    """The sum over the ranks, from which all of them compute the same loss: its gradient is already complete."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        from torch import distributed as dist

        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return dx, None
