"""Auxiliary losses of gates, without coefficients.

``balance`` is the one of Switch Transformer (arXiv 2101.03961, section 2.2), ``z`` that of ST-MoE (arXiv 2202.08906),
``alignment`` that of SAM in HetuMoE (arXiv 2203.14685).

Every loss is a sum over tokens times :attr:`BatchShare.per_token`. For ``micro`` this is 1 / T, and the fractions of
tokens that experts get are those of the batch at hand. For ``global``, over the R ranks of a group with T_r tokens
each, fractions are those of all ranks' tokens together, without a gradient, and ``per_token`` is R / sum of T_r. A loss
of a rank then holds its own probabilities only, and the mean over ranks, which is what data parallelism makes of
gradients, is the gradient on one process with all tokens, however unequal the T_r are. The mean over ranks of the
losses' values is the joint value too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_hetu.parallel.alone import is_alone

BalanceScope = Literal["micro", "global"]


@dataclass(frozen=True, eq=False)
class BatchShare:
    """How the tokens of a batch are counted; none of it has a gradient.

    Attributes:
        fractions: ``[E]``: assignments of each expert over the number of tokens.
        per_token: Scalar: what the sum of a loss over this process's tokens is multiplied by.
    """

    fractions: Tensor
    per_token: Tensor


def batch_share(
    assigned: Tensor,
    valid: Tensor,
    dtype: torch.dtype,
    scope: BalanceScope = "micro",
    group: ProcessGroup | None = None,
) -> BatchShare:
    """Counts tokens, over the ranks of a group for ``global``: one all-reduce of E + 1 integers.

    Args:
        assigned: int64 ``[E]``: assignments of each expert.
        valid: bool ``[T]``: tokens that count.
        dtype: Of the result.
        scope: ``micro`` or ``global``.
        group: Ranks that share the tokens of a step; ``None`` for all.
    """
    totals = torch.cat([assigned, valid.sum().view(1)])
    ranks = 1
    if scope == "global" and dist.is_available() and dist.is_initialized() and not is_alone():
        dist.all_reduce(totals, group=group)
        ranks = dist.get_world_size(group)
    tokens = totals[-1].clamp(min=1).to(dtype)
    return BatchShare(totals[:-1].to(dtype) / tokens, ranks / tokens)


def balance_loss(probabilities: Tensor, share: BatchShare, scale: float) -> Tensor:
    """``scale`` times the sum over experts of their fraction of tokens times their mean probability.

    Args:
        probabilities: ``[T, E]``; zero in rows that do not count.
        share: The fractions.
        scale: E over the number of choices that the fractions are of, for a loss of 1 where all is even.
    """
    return scale * (share.fractions * (share.per_token * probabilities.sum(dim=0))).sum()


def z_loss(logits: Tensor, valid: Tensor, share: BatchShare) -> Tensor:
    """Mean over tokens of the squared logarithm of the softmax's denominator.

    Args:
        logits: ``[T, E]``, or ``[T, k, E / k]`` for softmaxes over k parts, whose mean is taken.
        valid: bool ``[T]``: rows that count; the others must be finite.
        share: The number of tokens.
    """
    squares = logits.logsumexp(dim=-1).square()
    if squares.dim() == 2:
        squares = squares.mean(dim=1)
    return share.per_token * torch.where(valid, squares, 0.0).sum()


def alignment_loss(probabilities: Tensor, threshold: Tensor, inside: Tensor, share: BatchShare) -> Tensor:
    """Mean over tokens of how much experts outside of the chosen group exceed the last chosen one.

    Args:
        probabilities: ``[T, E]``; zero in rows that do not count.
        threshold: ``[T, 1]``: probability of the last chosen expert.
        inside: bool ``[T, E]``: experts of the chosen group.
        share: The number of tokens.
    """
    excess = (probabilities - threshold).relu()  # without a gradient where both are equal; clamp has one
    return share.per_token * torch.where(inside, 0.0, excess).sum()
