"""Room in experts: how much there is, and who comes first (GShard, arXiv 2006.16668, section 2.2).

First choices come first: the first choices of all tokens take their places in an expert before any second choice does.
HetuMoE (arXiv 2203.14685) adds to the positions of a choice the counts of the last choice only, so that two tokens can
get the same place; here the counts of all earlier choices are added.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

CapacityRounding = Literal["exact", "hetu"]


def expert_capacity(
    tokens: int,
    num_experts: int,
    slots: float,
    factor: float,
    minimum: int = 0,
    rounding: CapacityRounding = "exact",
) -> int:
    """Assignments that one expert has room for.

    Args:
        tokens: Number of tokens T.
        num_experts: Number of experts E.
        slots: Assignments per token k; a mean need not be whole.
        factor: Room over what even loads take, finite.
        minimum: The least room.
        rounding: ``exact`` is ceil(factor k T / E); ``hetu`` is k ceil(factor T / E), as in HetuMoE, rounded up where k
            is not whole.
    """
    # The decimal number that was written: in binary, 1.1 * 10 is more than 11 and would be rounded up to 12.
    share = Fraction(repr(float(factor))) * tokens / num_experts
    wanted = Fraction(slots) * (math.ceil(share) if rounding == "hetu" else share)
    return max(minimum, math.ceil(wanted))


def count_per_expert(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Number of times each expert occurs in ``expert_ids``, int64 ``[num_experts]``; -1 does not count."""
    bins = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_ids.device)
    flat = expert_ids.flatten()
    return bins.scatter_add_(0, torch.where(flat < 0, num_experts, flat), torch.ones_like(flat))[:num_experts]


def arrival_positions(expert_ids: Tensor, num_experts: int, confidence: Tensor | None = None) -> Tensor:
    """Number of assignments that reach an expert before each one.

    Args:
        expert_ids: int64 ``[T, K]``, -1 for none.
        num_experts: Number of experts.
        confidence: ``[T]``: tokens with more of it come first, of equal ones the earlier. Default: the earlier first.

    Returns:
        int64 ``[T, K]``: by choice, then by token; -1 without an expert.
    """
    tokens, slots = expert_ids.shape
    first = None if confidence is None else confidence.detach().argsort(descending=True, stable=True)
    queue = (expert_ids if first is None else expert_ids[first]).T.flatten()
    groups = torch.where(queue < 0, num_experts, queue)
    order = groups.argsort(stable=True)
    counts = count_per_expert(queue, num_experts)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    rank = torch.arange(len(queue), device=queue.device) - starts[groups[order]]
    position = torch.empty_like(queue).scatter_(0, order, rank).masked_fill_(queue < 0, -1)
    position = position.view(slots, tokens).T
    if first is not None:
        position = torch.empty_like(position).index_copy_(0, first, position)
    return position.contiguous()
