"""Assigns tokens to experts in equal numbers, with the largest sum of scores up to a known bound.

The auction algorithm for transportation problems (Bertsekas and Castanon, Annals of Operations Research 20, 1989):
tokens bid for places. Expert e has n places, the price of which is its lowest accepted bid once it is full. A token
without a place bids for the expert that leaves it the most (score less price) so much that this expert would still be
within eps of its second best one; the expert keeps its n highest bids. When all have a place, no token can gain more
than eps elsewhere, so the sum of scores is at most tokens times eps below the best possible.

In BASE layers (arXiv 2103.16716) experts bid for tokens, and after 100 rounds the bound is given up. Kept up, that took
2592 rounds of sorting [E, T] for 4096 tokens with normal random scores for 64 experts and the same eps. For these
scores tokens' bids took 48 rounds, each of which sorts [T].
"""

from __future__ import annotations

import torch
from torch import Tensor

_RELATIVE_EPS = 1 / 50  # of the range of scores, as in the code of BASE layers
_ROUNDS_PER_CHECK = 8  # between two checks for the end, for which the host waits for the device


def balanced_assignment(scores: Tensor) -> Tensor:
    """Gives every token an expert such that experts' numbers of tokens differ by at most one.

    Where E does not divide T, tokens that cost nothing fill the places that are left, at most one in each expert.

    The result is the same on every run. Up to rounding it does not depend on scores' offset or scale. The sum of
    scores is at most T (max - min) / 50 below the largest possible.

    Args:
        scores: ``[T, E]``, any floating dtype. Infinities count as the largest and smallest finite scores, NaN as the
            smallest.

    Returns:
        Expert of each token, int64 ``[T]``.
    """
    tokens, experts = scores.shape
    if tokens == 0 or experts == 1:
        return torch.zeros(tokens, dtype=torch.int64, device=scores.device)
    auction = _Auction(_unit_range(scores.detach()))
    rounds = 0
    while rounds % _ROUNDS_PER_CHECK or (auction.owner == experts).any():
        auction.round()
        rounds += 1
    return auction.owner[:tokens]


def _unit_range(scores: Tensor) -> Tensor:
    """Scores moved and scaled to [0, 1], where eps is far above rounding, whatever they were."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    finite = wide.isfinite()
    low = torch.where(finite, wide, torch.inf).amin().nan_to_num(posinf=0.0)
    high = torch.where(finite, wide, -torch.inf).amax().nan_to_num(neginf=0.0)
    wide = wide.nan_to_num(nan=-torch.inf).clamp(low, high) / 2  # halves, so that the range does not overflow
    span = (high / 2 - low / 2).clamp(min=torch.finfo(wide.dtype).tiny)
    return (wide - low / 2) / span


class _Auction:
    """State of an auction: who has a place, what was bid for it, and what places cost.

    Rows of ``owner`` and ``bid`` are tokens, then fillers; an owner of E is none. A round without a bidder changes
    nothing.
    """

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores
        self.tokens, self.experts = scores.shape
        self.places = -(-self.tokens // self.experts)
        self.fillers = self.places * self.experts - self.tokens
        bidders = self.tokens + self.fillers
        # All bidders may be eps away from their best place, fillers too: together no more than T times the bound.
        self.eps = _RELATIVE_EPS * self.tokens / bidders
        self.owner = torch.full((bidders,), self.experts, dtype=torch.int64, device=scores.device)
        self.bid = scores.new_zeros(bidders)
        self.price = scores.new_zeros(self.experts)
        self._index = torch.arange(bidders, device=scores.device)

    def round(self) -> None:
        """Lets all bid that have no place."""
        idle = self.owner == self.experts
        target, bid = self._bids_of_tokens()
        if self.fillers:
            filler_target, filler_bid = self._bids_of_fillers(idle[self.tokens :])
            target, bid = torch.cat([target, filler_target]), torch.cat([bid, filler_bid])
        target, bid = torch.where(idle, target, self.owner), torch.where(idle, bid, self.bid)
        if self.fillers:
            target = self._one_filler_each(target, bid)
        self._accept(target, bid)

    def _bids_of_tokens(self) -> tuple[Tensor, Tensor]:
        profit = self.scores - self.price
        best, target = profit.max(dim=1)
        second = profit.scatter(1, target.unsqueeze(1), -torch.inf).amax(dim=1)
        return target, self.price[target] + (best - second) + self.eps

    def _bids_of_fillers(self, idle: Tensor) -> tuple[Tensor, Tensor]:
        """Each takes a cheapest expert of its own; those for whom there is none wait, without a target."""
        held = self._highest_filler(self.owner, self.bid)
        cost, order = torch.maximum(self.price, held).sort(stable=True, dim=0)
        turn = idle.cumsum(0) - 1
        may_bid = idle & (turn < (cost == cost[0]).sum())
        target = torch.where(may_bid, order[turn.clamp(0, self.experts - 1)], self.experts)
        return target, (cost[1] + self.eps).expand(self.fillers)

    def _highest_filler(self, target: Tensor, bid: Tensor) -> Tensor:
        """What the best filler bids for each expert, negative infinity where there is none: ``[E]``."""
        highest = bid.new_full((self.experts + 1,), -torch.inf)
        return highest.scatter_reduce(0, target[self.tokens :], bid[self.tokens :], "amax")[: self.experts]

    def _one_filler_each(self, target: Tensor, bid: Tensor) -> Tensor:
        """Sends away fillers that are outbid by another one; two never bid the same in one round."""
        highest = torch.cat([self._highest_filler(target, bid), bid.new_full((1,), -torch.inf)])
        outbid = bid < highest[target]
        outbid[: self.tokens] = False
        return target.masked_fill(outbid, self.experts)

    def _accept(self, target: Tensor, bid: Tensor) -> None:
        """Every expert keeps its highest bids, of equal ones the first."""
        by_bid = bid.argsort(descending=True, stable=True)
        order = by_bid[target[by_bid].argsort(stable=True)]
        counts = torch.zeros(self.experts + 1, dtype=torch.int64, device=target.device)
        counts.scatter_add_(0, target, torch.ones_like(target))
        starts = counts.cumsum(0) - counts
        wanted = target[order]
        kept = self._index - starts[wanted] < self.places
        self.owner = torch.empty_like(target).scatter_(0, order, torch.where(kept, wanted, self.experts))
        self.bid = bid
        last = order[(starts[:-1] + self.places - 1).clamp(max=len(order) - 1)]
        self.price = torch.where(counts[:-1] >= self.places, bid[last], self.price)
