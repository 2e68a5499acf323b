"""Moves experts between slots while training goes on: weights between two steps, what optimizers keep meanwhile.

FlexMoE (arXiv 2304.03946) adjusts placements beside training. Here nothing of the numbers changes: a replica has the
weights that the step has made before anything uses them, and the optimizer's moments before the next step needs them.
Slots are rows of parameters that stay what they are, so optimizers, schedulers and wrappers see no change.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from lightning_hetu.moe.layer import MoELayer
from lightning_hetu.moe.placement.placement import FREE, Placement
from lightning_hetu.moe.placement.split import even_split
from lightning_hetu.parallel.expert_mesh import ExpertMesh

ELEMENTWISE: set[type[Optimizer]] = {SGD, Adam, AdamW, Adagrad, Adadelta, Adamax, ASGD, NAdam, RAdam, RMSprop, Rprop}
"""Optimizers that treat every number of a parameter by itself, so that rows can be moved with what is kept for them."""


def check_elementwise(optimizers: Iterable[Optimizer]) -> None:
    """Refuses optimizers whose states are not one number, or none, for each number of a parameter.

    Raises:
        ValueError: If one is not in :data:`ELEMENTWISE`.
    """
    for optimizer in optimizers:
        if not isinstance(optimizer, tuple(ELEMENTWISE)):
            known = ", ".join(sorted(kind.__name__ for kind in ELEMENTWISE))
            raise ValueError(
                f"optimizer={type(optimizer).__name__}: experts can move only with optimizers whose states are"
                f" element-wise, such as {known}; add yours to lightning_hetu.moe.relocate.ELEMENTWISE if it is."
            )


@dataclass(frozen=True)
class _Row:
    """What a slot of this rank gets: an expert from a rank, or from another slot of this one, or nothing."""

    slot: int
    expert: int
    source: int


@dataclass
class Relocation:
    """Experts on their way to new slots.

    Args:
        group: Ranks among which they move, with no other traffic on it.
        rank: This rank's place in it.
    """

    group: ProcessGroup
    rank: int
    num_bytes: int = 0
    """Bytes that this rank has sent or is sending."""
    _late: list[_Transfer] = field(default_factory=list)

    @classmethod
    def among(cls, groups: ExpertMesh, timeout: timedelta | None = None) -> Relocation:
        """Over the ranks that share out experts with this one; to be called by all ranks, it makes a group.

        Args:
            groups: The ranks.
            timeout: How long a rank waits for another; by default as torch has it.
        """
        group, _ = dist.new_subgroups_by_enumeration(groups.mesh.mesh.tolist(), timeout=timeout)
        assert group is not None
        return cls(group, groups.expert_rank)

    def move(self, layers: Sequence[MoELayer], after: Sequence[Placement], optimizers: Iterable[Optimizer]) -> None:
        """Brings weights to their new slots, and sends what optimizers keep on its way; all ranks call it.

        To be called between two optimizer steps, with no gradients to be kept.

        Args:
            layers: Layers with a placement, in the same order on all ranks.
            after: Their placements from now on; tokens are split evenly between holders until told otherwise.
            optimizers: Optimizers of their parameters.

        Raises:
            RuntimeError: If ranks do not agree on where experts are to go.
        """
        self.finish()
        self._agree(after)
        states = {id(p): state for optimizer in optimizers for p, state in optimizer.state.items()}
        weights, kept = _Transfer(self), _Transfer(self)
        for layer, placement in zip(layers, after, strict=True):
            assert layer.placement is not None
            rows = [_changes(layer.placement, placement, rank) for rank in range(placement.num_ranks)]
            for parameter in layer.experts.parameters():
                weights.add(parameter.data, layer.placement, rows)
                for value in _rows_of(states.get(id(parameter), {}), parameter):
                    kept.add(value, layer.placement, rows)
        weights.start()
        kept.start()
        weights.finish()
        self._late.append(kept)
        for layer, placement in zip(layers, after, strict=True):
            layer.placement = placement
            layer.fractions = even_split(np.ones(layer.num_experts), placement).fractions

    def finish(self) -> None:
        """Waits for what optimizers keep; to be called before any of them steps, and before a checkpoint."""
        for transfer in self._late:
            transfer.finish()
        self._late = []

    def _agree(self, placements: Sequence[Placement]) -> None:
        """Ranks that disagreed would wait for messages that nobody sends."""
        own = torch.tensor([hash(tuple(p.slots for p in placements)) % (1 << 52)])
        device = torch.device("cpu") if dist.get_backend(self.group) == "gloo" else torch.device("cuda")
        both = torch.cat([own, -own]).to(device)
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self.group)
        if int(both[0]) != -int(both[1]):
            raise RuntimeError("placement: ranks have planned different placements; their counts or settings differ.")


def _changes(before: Placement, after: Placement, rank: int) -> list[_Row]:
    """The slots of a rank whose experts change, in order. A copy comes from the nearest rank above, round the group."""
    found = []
    for slot, (old, new) in enumerate(zip(before.slots[rank], after.slots[rank], strict=True)):
        if old == new:
            continue
        source = rank
        if new != FREE and not before.holds(rank, new):
            ranks = before.num_ranks
            source = min(before.holders(new), key=lambda holder: (holder - rank) % ranks)
        found.append(_Row(slot, new, source))
    return found


def _rows_of(state: dict[str, object], parameter: Tensor) -> list[Tensor]:
    """What an optimizer keeps for each number of a parameter; a count of steps is the same for all rows.

    Raises:
        ValueError: If something has another shape.
    """
    found = []
    for name, value in sorted(state.items()):
        if not isinstance(value, Tensor) or value.numel() == 1:
            continue
        if value.shape != parameter.shape:
            raise ValueError(
                f"optimizer state {name!r} has shape {list(value.shape)}, expected {list(parameter.shape)}: it is not"
                " element-wise."
            )
        found.append(value)
    return found


class _Transfer:
    """Rows of several tensors on their way; one message for each pair of ranks."""

    def __init__(self, relocation: Relocation) -> None:
        self.group, self.rank, self.relocation = relocation.group, relocation.rank, relocation
        self._outgoing: dict[int, list[Tensor]] = {}
        self._incoming: dict[int, list[Tensor]] = {}
        self._arrived: dict[int, Tensor] = {}
        self._here: list[tuple[Tensor, Tensor]] = []
        self._works: list[dist.Work] = []
        self._kept: list[Tensor] = []

    def add(self, tensor: Tensor, before: Placement, rows: Sequence[Sequence[_Row]]) -> None:
        """Adds the rows of a tensor that change, on all ranks; they are read now, and written by :meth:`finish`."""
        for rank, changes in enumerate(rows):
            for row in changes:
                if row.expert == FREE:
                    if rank == self.rank:
                        self._here.append((tensor[row.slot], torch.zeros_like(tensor[row.slot])))
                    continue
                if row.source == self.rank:
                    content = tensor[before.slot_of(self.rank, row.expert)]
                    if rank == self.rank:
                        self._here.append((tensor[row.slot], content.clone()))
                    else:
                        self._outgoing.setdefault(rank, []).append(content.flatten())
                elif rank == self.rank:
                    self._incoming.setdefault(row.source, []).append(tensor[row.slot])

    def start(self) -> None:
        """Sends and receives, without waiting."""
        operations = []
        for peer in sorted({*self._outgoing, *self._incoming}):
            if peer in self._outgoing:
                message = _bytes(self._outgoing[peer])  # a copy: the next step changes what it was made of
                self._kept.append(message)
                self.relocation.num_bytes += message.numel()
                operations.append(dist.P2POp(dist.isend, message, group=self.group, group_peer=peer))
            if peer in self._incoming:
                targets = self._incoming[peer]
                size = sum(target.numel() * target.element_size() for target in targets)
                self._arrived[peer] = torch.empty(size, dtype=torch.uint8, device=targets[0].device)
                operations.append(dist.P2POp(dist.irecv, self._arrived[peer], group=self.group, group_peer=peer))
        self._works = dist.batch_isend_irecv(operations) if operations else []

    @torch.no_grad()
    def finish(self) -> None:
        """Waits, and writes all rows."""
        for work in self._works:
            work.wait()
        for target, content in self._here:
            target.copy_(content)
        for peer, message in self._arrived.items():
            start = 0
            for target in self._incoming[peer]:
                size = target.numel() * target.element_size()
                row = message[start : start + size].clone()  # which is aligned
                target.copy_(row.view(target.dtype).view_as(target))
                start += size
        self._works, self._kept, self._here, self._arrived = [], [], [], {}


def _bytes(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts])
