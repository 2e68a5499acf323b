"""The hot experts of a step on all ranks (FasterMoE: He et al., PPoPP 2022, section 4.2).

FasterMoE sends the weights of a hot expert to all ranks for one step, where each computes its own tokens; gradients are
summed up afterwards, and the optimizer's states never move. Experts are tried by descending load, for as long as the
step gets faster. Here a shadow takes a slot, so there are as many as every rank has slots free. The plan leads from the
shadows of the last step to those of this one: as expands and shrinks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_hetu.moe.placement.placement import Placement


def homes(placement: Placement) -> list[int]:
    """The rank on which each expert stays when it has no shadows.

    That is where it is at the start (see :meth:`Placement.contiguous`), or its lowest holder where that has moved: so
    shadows that come and go leave the experts where they were.
    """
    ranks, experts = placement.num_ranks, placement.num_experts
    first = {
        expert: rank
        for rank in range(ranks)
        for expert in range(rank * experts // ranks, (rank + 1) * experts // ranks)
    }
    return [
        first[expert] if first[expert] in holders else holders[0]
        for expert, holders in enumerate(placement.all_holders)
    ]


def shadowed(placement: Placement, loads: Sequence[float], price: Callable[[int], float]) -> list[list[int]]:
    """Experts of each rank: every expert at home, and the hot ones everywhere.

    Args:
        placement: Where experts are.
        loads: Tokens of each expert, relative to the mean load of a rank.
        price: What shadowing an expert costs, in the same unit.
    """
    ranks = placement.num_ranks
    held: list[list[int]] = [[] for _ in range(ranks)]
    levels = [0.0] * ranks
    home = homes(placement)
    for expert, rank in enumerate(home):
        held[rank].append(expert)
        levels[rank] += loads[expert]
    for expert in sorted(range(len(home)), key=lambda expert: (-loads[expert], expert)):
        others = [rank for rank in range(ranks) if rank != home[expert]]
        if not others or any(len(held[rank]) == placement.num_slots for rank in others):
            continue
        after = [level + loads[expert] / ranks for level in levels]
        after[home[expert]] -= loads[expert]
        if max(after) + price(expert) >= max(levels):
            break
        levels = after
        for rank in others:
            held[rank].append(expert)
    return held
