"""Gradients of experts that several ranks hold: the sum over all of them, with the same bits on each.

Few holders send each other what they have and add it up in the order of their ranks (FlexMoE, arXiv 2304.03946, has
groups for that; groups for all sets of ranks that may come would be many). Experts on many ranks share one all-reduce,
to which ranks without them add zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_hetu.moe.layer import MoELayer

_MOST_PEERS = 4
"""Holders of an expert up to which they send each other everything."""


class _Replica(NamedTuple):
    """An expert with several holders.

    Args:
        layer: Its layer.
        expert: Its number.
        holders: Their ranks, ascending.
    """

    layer: MoELayer
    expert: int
    holders: tuple[int, ...]


@torch.no_grad()
def sum_over_replicas(layers: Sequence[MoELayer]) -> None:
    """Adds up gradients over the holders of each expert; all ranks call it, each gradient being there.

    Args:
        layers: Layers with a placement, shared out over the same groups.
    """
    if not layers:
        return
    groups = layers[0].groups
    assert groups is not None
    found = [
        _Replica(layer, expert, layer.placement.holders(expert))
        for layer in layers
        if layer.placement is not None and _gradients(layer)  # not where all is frozen
        for expert in range(layer.num_experts)
    ]
    few = [item for item in found if 1 < len(item.holders) <= _MOST_PEERS]
    _exchange([item for item in few if groups.expert_rank in item.holders], groups.expert, groups.expert_rank)
    _reduce([item for item in found if len(item.holders) > _MOST_PEERS], groups.expert, groups.expert_rank)


def _exchange(mine: Sequence[_Replica], group: ProcessGroup, rank: int) -> None:
    """Every pair of holders sends each other what it has of the experts that both hold, in one message."""
    own = [_read(item, rank) for item in mine]
    messages: dict[int, list[int]] = {}
    for number, item in enumerate(mine):
        for peer in item.holders:
            if peer != rank:
                messages.setdefault(peer, []).append(number)
    operations, arriving = [], {}
    for peer, numbers in sorted(messages.items()):
        message = torch.cat([own[number] for number in numbers])
        arriving[peer] = torch.empty_like(message)
        operations.append(dist.P2POp(dist.isend, message, group=group, group_peer=peer))
        operations.append(dist.P2POp(dist.irecv, arriving[peer], group=group, group_peer=peer))
    if not operations:
        return
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    parts = {
        (peer, number): part
        for peer, numbers in messages.items()
        for number, part in zip(numbers, arriving[peer].split([len(own[n]) for n in numbers]), strict=True)
    }
    for number, item in enumerate(mine):
        addends = [own[number] if holder == rank else parts[holder, number] for holder in item.holders]
        total = addends[0].clone()
        for addend in addends[1:]:  # in the order of ranks, so that all holders get the same bits
            total += addend
        _write(item, rank, total)


def _reduce(items: Sequence[_Replica], group: ProcessGroup, rank: int) -> None:
    """One all-reduce over the whole group."""
    if not items:
        return
    buffers = [_read(item, rank) if rank in item.holders else torch.zeros_like(_flat(item, 0)) for item in items]
    sizes = [len(buffer) for buffer in buffers]
    together = torch.cat(buffers)
    dist.all_reduce(together, group=group)
    for item, total in zip(items, together.split(sizes), strict=True):
        if rank in item.holders:
            _write(item, rank, total)


def _gradients(layer: MoELayer) -> list[Tensor]:
    return [parameter.grad for parameter in layer.experts.parameters() if parameter.grad is not None]


def _flat(item: _Replica, slot: int) -> Tensor:
    return torch.cat([gradient[slot].flatten() for gradient in _gradients(item.layer)])


def _read(item: _Replica, rank: int) -> Tensor:
    """The gradients of an expert on this rank, ``[numbers of all its weights]``."""
    assert item.layer.placement is not None
    return _flat(item, item.layer.placement.slot_of(rank, item.expert))


def _write(item: _Replica, rank: int, values: Tensor) -> None:
    assert item.layer.placement is not None
    slot, start = item.layer.placement.slot_of(rank, item.expert), 0
    for gradient in _gradients(item.layer):
        row = gradient[slot]
        row.copy_(values[start : start + row.numel()].view_as(row))
        start += row.numel()
