"""Reference of :func:`hetu_kernels.topk_gate` in plain torch, for any floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def topk_gate_reference(
    logits: Tensor,
    k: int,
    *,
    renormalize: bool = False,
    score: str = "softmax",
    return_scores: bool = False,
) -> tuple[Tensor, ...]:
    """See :func:`hetu_kernels.topk_gate`."""
    expert_ids, counts = choose(logits, k, score)
    weights, scores = weigh(logits, expert_ids, renormalize, score)
    return (weights, expert_ids, counts, scores) if return_scores else (weights, expert_ids, counts)


def choose(logits: Tensor, k: int, score: str) -> tuple[Tensor, Tensor]:
    """The chosen experts, int32 ``[tokens, k]``, and how often each was chosen, int32 ``[experts]``."""
    ranked = logits.detach().masked_fill(_undefined(logits, score), -torch.inf)
    values, order = ranked.sort(dim=-1, descending=True, stable=True)  # stable: the lowest id of equals is first
    expert_ids = torch.where(values > -torch.inf, order, -1)[:, :k]
    counts = torch.bincount(expert_ids.flatten() + 1, minlength=logits.shape[1] + 1)[1:]
    return expert_ids.to(torch.int32), counts.to(torch.int32)


def weigh(logits: Tensor, expert_ids: Tensor, renormalize: bool, score: str) -> tuple[Tensor, Tensor]:
    """Weights of chosen experts and the scores of all, differentiable in the logits and at least float32."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    undefined = _undefined(x, score)
    x = x.masked_fill(undefined, 0.0)
    if score == "softmax":
        nothing = (x == -torch.inf).all(-1, keepdim=True)
        scores = x.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    else:
        scores = x.sigmoid()
    chosen = expert_ids >= 0
    weights = torch.where(chosen, scores.gather(-1, torch.where(chosen, expert_ids, 0).long()), 0.0)
    if renormalize:
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1.0)
    return weights, scores.masked_fill(undefined, torch.nan)


def backward(
    dweights: Tensor | None, dscores: Tensor | None, logits: Tensor, expert_ids: Tensor, renormalize: bool, score: str
) -> Tensor:
    """Gradient of the logits; None for results that have no gradient."""
    results, vjp = torch.func.vjp(lambda x: weigh(x, expert_ids, renormalize, score), logits)[:2]
    incoming = [
        torch.zeros_like(result) if grad is None else grad.to(result.dtype)
        for grad, result in zip((dweights, dscores), results, strict=True)
    ]
    return vjp(tuple(incoming))[0]


def _undefined(logits: Tensor, score: str) -> Tensor:
    """Rows whose scores are no numbers, ``[tokens, 1]``: those with a NaN, and for the softmax with +inf."""
    wrong = logits.isnan()
    if score == "softmax":
        wrong = wrong | (logits == torch.inf)
    return wrong.any(-1, keepdim=True)
