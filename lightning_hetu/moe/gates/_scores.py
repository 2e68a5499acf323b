"""Steps that gates have in common: logits, the best experts of a row, weights of what was chosen."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in float32 (float64 where one of the two is), autocast or not.

    Args:
        x: ``[T, D]``, any floating dtype.
        weight: ``[E, D]``.

    Returns:
        ``[T, E]``. Rows of ``x`` that are not finite give NaN, and no gradient: not even to ``weight``, which a product
        with such a row would make NaN.
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    broken = ~x.isfinite().all(dim=-1, keepdim=True)
    with torch.autocast(x.device.type, enabled=False):
        logits = F.linear(x.to(wide).masked_fill(broken, 0.0), weight.to(wide))
    return logits.masked_fill(broken, torch.nan)


def finite_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Widens logits to at least float32, and puts zeros into rows that have no softmax.

    Those are rows with NaN or positive infinity, or with nothing but negative infinity.

    Args:
        logits: ``[T, E]``, any floating dtype.

    Returns:
        ``(logits, valid)``, the latter bool ``[T]``: the rows that had a softmax.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    valid = wide.detach().amax(dim=-1).isfinite()
    return wide.masked_fill(~valid.unsqueeze(-1), 0.0), valid


def best_experts(scores: Tensor, k: int) -> Tensor:
    """The ``k`` largest of each row, largest first, equal ones by lower index: int64 ``[T, k]``.

    ``torch.topk`` leaves open which of equal elements it takes; a stable sort does not.
    """
    return scores.detach().argsort(dim=-1, descending=True, stable=True)[..., :k]


def weights_of(scores: Tensor, expert_ids: Tensor) -> Tensor:
    """Scores ``[T, E]`` at ``expert_ids`` ``[T, K]``; zero where there is no expert."""
    return scores.gather(1, expert_ids.clamp(min=0)).masked_fill(expert_ids < 0, 0.0)


def normalized(weights: Tensor) -> Tensor:
    """Weights ``[T, K]`` over their sum in each row; rows of zeros stay so."""
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def gumbel_like(logits: Tensor) -> Tensor:
    """Samples of the standard Gumbel distribution from torch's default generator."""
    return -torch.empty_like(logits, requires_grad=False).exponential_().log()
