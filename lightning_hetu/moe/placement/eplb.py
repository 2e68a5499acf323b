"""A placement from nothing: replicate what is hottest, then fill the emptiest rank with what is heaviest.

This is how DeepSeek's expert-parallelism load balancer (github.com/deepseek-ai/EPLB; DeepSeek-V3, arXiv 2412.19437,
section 3.4) makes placements, except that a rank here never has two slots for one expert: a replica that only fits
beside another one of its expert is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush, heapreplace


def constructed(loads: Sequence[float], num_ranks: int, num_slots: int, replicas: int | None = None) -> list[list[int]]:
    """Experts of each rank.

    Args:
        loads: Tokens of each expert.
        num_ranks: Number of ranks.
        num_slots: Slots of each, together at least as many as experts.
        replicas: How many experts to hold beyond the first of each, at most; by default as many as there are slots.
    """
    room = num_ranks * num_slots - len(loads)
    counts = _replicated(loads, room if replicas is None else min(replicas, room), num_ranks)
    items = [(-load / count, expert) for expert, (load, count) in enumerate(zip(loads, counts, strict=True))]
    items = sorted(item for item, count in zip(items, counts, strict=True) for _ in range(count))
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    # The emptiest rank first; of equal loads the one with more free slots, then the lowest.
    heap = [(0.0, 0, rank) for rank in range(num_ranks)]
    for load, expert in items:
        skipped = []
        while heap and expert in held[heap[0][2]]:
            skipped.append(heappop(heap))
        if heap:
            level, used, rank = heap[0]
            held[rank].append(expert)
            if used + 1 < num_slots:
                heapreplace(heap, (level - load, used + 1, rank))
            else:
                heappop(heap)
        for entry in skipped:
            heappush(heap, entry)
    return held


def _replicated(loads: Sequence[float], replicas: int, num_ranks: int) -> list[int]:
    """How many ranks should hold each expert: one more for that with the most tokens per holder, again and again."""
    counts = [1] * len(loads)
    heap = [(-load, expert) for expert, load in enumerate(loads) if load > 0]
    heapify(heap)
    for _ in range(replicas):
        while heap and counts[heap[0][1]] == num_ranks:
            heappop(heap)
        if not heap:
            break
        expert = heap[0][1]
        counts[expert] += 1
        heapreplace(heap, (-loads[expert] / counts[expert], expert))
    return counts
