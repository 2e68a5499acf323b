"""Sends rows to the ranks of their experts and back: all-to-all with uneven splits, in one stage or in two.

The two-stage form is the hierarchical all-to-all of HetuMoE (arXiv 2203.14685, section 3.2) without its leader: first
inside of the nodes, each row to the mate with the local rank of its destination, then between ranks of equal local
rank. Fewer and larger messages cross the network, and all its adapters are used. Both forms give the same rows in the
same order. Every rank takes part with however many rows, none included, in forward and in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_hetu.parallel.expert_mesh import ExpertMesh


@dataclass(frozen=True)
class Exchange:
    """How many rows every rank sends to every other one, and on which way.

    Args:
        counts: ``counts[i][j]`` rows go from rank ``i`` of the expert group to rank ``j``.
        groups: The ranks.
        two_stage: Whether rows go by way of a mate in the same node.

    Raises:
        ValueError: If two stages are wanted, but the groups have no nodes.
    """

    counts: tuple[tuple[int, ...], ...]
    groups: ExpertMesh
    two_stage: bool = False

    def __post_init__(self) -> None:
        if self.two_stage and self.groups.nodes is None:
            raise ValueError("two_stage=True: the expert group is within one node; build it with devices_per_node.")

    @property
    def received(self) -> tuple[int, ...]:
        """Rows that this rank gets from each rank."""
        return tuple(row[self.groups.expert_rank] for row in self.counts)

    def send(self, rows: Tensor) -> Tensor:
        """Sends rows to their ranks; differentiable.

        Args:
            rows: ``[rows, ...]``, those for the first rank first.

        Returns:
            What this rank got, that from the first rank first.
        """
        return _AllToAll.apply(rows, self)  # type: ignore[no-any-return, no-untyped-call]

    def send_back(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`send`; differentiable."""
        return _AllToAll.apply(rows, self.reversed())  # type: ignore[no-any-return, no-untyped-call]

    def reversed(self) -> Exchange:
        """The exchange that brings everything back."""
        return Exchange(tuple(zip(*self.counts, strict=True)), self.groups, self.two_stage)

    def run(self, rows: Tensor) -> Tensor:
        """:meth:`send` without a graph."""
        if self.two_stage:
            return _two_stages(rows, self.counts, self.groups)
        return _all_to_all(rows, self.counts[self.groups.expert_rank], self.received, self.groups.expert)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.run(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.reversed().run(gradient), None


def _all_to_all(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), list(received), list(sent), group=group)
    return out


def _two_stages(rows: Tensor, counts: Sequence[Sequence[int]], groups: ExpertMesh) -> Tensor:
    assert groups.nodes is not None
    nodes, local = groups.nodes.size(1), groups.nodes.size(2)
    me = groups.expert_rank
    my_node, my_local = divmod(me, local)
    mates = [my_node * local + mate for mate in range(local)]
    rail = [node * local + my_local for node in range(nodes)]
    # By destination's local rank, then its node.
    order = [node * local + mate for mate in range(local) for node in range(nodes)]
    rows = _regroup(rows, counts[me], order)
    sent = [sum(counts[me][node * local + mate] for node in range(nodes)) for mate in range(local)]
    got = [sum(counts[mate][other] for other in rail) for mate in mates]
    rows = _all_to_all(rows, sent, got, groups.nodes.get_group("local"))
    # From mate-major to node-major: what came from the mates for one rank goes there together.
    sizes = [counts[mate][other] for mate in mates for other in rail]
    rows = _regroup(rows, sizes, [mate * nodes + node for node in range(nodes) for mate in range(local)])
    sent = [sum(counts[mate][other] for mate in mates) for other in rail]
    got = [sum(counts[node * local + mate][me] for mate in range(local)) for node in range(nodes)]
    return _all_to_all(rows, sent, got, groups.nodes.get_group("node"))


def _regroup(rows: Tensor, sizes: Sequence[int], order: Sequence[int]) -> Tensor:
    """Stretches of rows of these sizes in another order."""
    pieces = rows.split(list(sizes))
    return torch.cat([pieces[index] for index in order])
