"""Kernels and launcher that order assignments by expert: a counting sort, stable and without atomics.

Assignments are numbered ``slot = t * choices + j`` and taken in blocks. The first kernel counts each block's by expert;
the second replaces the counts of each expert by those of earlier blocks; the third adds an assignment's rank within its
block, from the running sum of a block's matches with an expert. What comes before it is then known, and with it its
row: the start of its expert, plus its rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hetu_kernels._common import alloc
from hetu_kernels._common.device import on_device
from hetu_kernels._common.triton_utils import cdiv, next_power_of_2, tl, triton

# Matches of a block of slots with a block of experts are in registers: 4096 of them are 32 for each of 128 threads, and
# twice as many do not fit beside their running sums.
_SLOTS = 256
_EXPERTS = 16
_SCAN = 1024  # blocks of slots that are summed at a time
_WARPS = 4
_ANY = 2**31 - 1  # capacity of an expert without one


@triton.jit(do_not_specialize=["num_slots", "num_blocks"])
def _permute_count_kernel(
    ids_ptr, counts_ptr, num_slots, num_blocks, E: tl.constexpr, SLOTS: tl.constexpr, EXPERTS: tl.constexpr
):
    """Grid (blocks of slots,). ``counts`` is int32 ``[E, num_blocks]``."""
    block = tl.program_id(0).to(tl.int64)
    slot = block * SLOTS + tl.arange(0, SLOTS)
    ids = tl.load(ids_ptr + slot, mask=slot < num_slots, other=-1)
    for first in range(0, E, EXPERTS):
        expert = first + tl.arange(0, EXPERTS)
        count = tl.sum((ids[:, None] == expert[None, :]).to(tl.int32), axis=0)
        tl.store(counts_ptr + expert.to(tl.int64) * num_blocks + block, count, mask=expert < E)


@triton.jit(do_not_specialize=["num_blocks"])
def _permute_scan_kernel(counts_ptr, totals_ptr, num_blocks, BLOCK: tl.constexpr):
    """Grid (experts,). Replaces each count by the sum of those before it; ``totals`` is int32 ``[experts]``."""
    expert = tl.program_id(0).to(tl.int64)
    total = tl.cast(0, tl.int32)
    for first in range(0, num_blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        at = counts_ptr + expert * num_blocks + block
        count = tl.load(at, mask=block < num_blocks, other=0)
        tl.store(at, total + tl.cumsum(count, axis=0) - count, mask=block < num_blocks)
        total += tl.sum(count, axis=0)
    tl.store(totals_ptr + expert, total)


@triton.jit(do_not_specialize=["num_slots", "num_blocks", "num_rows", "capacity"])
def _permute_place_kernel(
    ids_ptr, before_ptr, totals_ptr, position_ptr, token_ptr, offsets_ptr, num_slots, num_blocks, num_rows, capacity,
    E: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of slots,). ``before`` and ``totals`` are what the scan made; the first program stores ``offsets``,
    int32 ``[E + 1]``. Tokens of rows behind the last are left as they are.
    """
    block = tl.program_id(0).to(tl.int64)
    slot = block * SLOTS + tl.arange(0, SLOTS)
    ids = tl.load(ids_ptr + slot, mask=slot < num_slots, other=-1)
    position = tl.full([SLOTS], -1, dtype=tl.int32)
    start = tl.cast(0, tl.int32)  # of the experts at hand
    for first in range(0, E, EXPERTS):
        expert = first + tl.arange(0, EXPERTS)
        kept = tl.minimum(tl.load(totals_ptr + expert, mask=expert < E, other=0), capacity)
        begin = start + tl.cumsum(kept, axis=0) - kept
        if block == 0:
            tl.store(offsets_ptr + expert, tl.minimum(begin, num_rows), mask=expert < E)
        before = tl.load(before_ptr + expert.to(tl.int64) * num_blocks + block, mask=expert < E, other=0)
        hit = ids[:, None] == expert[None, :]
        rank = before[None, :] + tl.cumsum(hit.to(tl.int32), axis=0) - 1
        row = begin[None, :] + rank
        placed = hit & (rank < capacity) & (row < num_rows)
        position += tl.sum(tl.where(placed, row + 1, 0), axis=1)  # one hit at most; -1 if it is not placed
        start += tl.sum(kept, axis=0)
    tl.store(position_ptr + slot, position, mask=slot < num_slots)
    tl.store(token_ptr + position.to(tl.int64), (slot // K).to(tl.int32), mask=position >= 0)
    if block == 0:
        tl.store(offsets_ptr + E, tl.minimum(start, num_rows))


def launch_route(
    expert_ids: Tensor, num_experts: int, capacity: int | None, num_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the three kernels.

    Args:
        expert_ids: ``[tokens, choices]``.
        num_experts: Number of experts.
        capacity: Assignments that one expert takes; None for all.
        num_rows: Rows there are.

    Returns:
        Token of each row, row of each assignment and offsets of the experts: int32 ``[num_rows]``, like
        ``expert_ids``, and ``[num_experts + 1]``.
    """
    device, slots = expert_ids.device, expert_ids.numel()
    token_of = alloc.empty((num_rows,), dtype=torch.int32, device=device).fill_(-1)
    position_of = alloc.empty(expert_ids.shape, dtype=torch.int32, device=device)
    offsets = alloc.empty((num_experts + 1,), dtype=torch.int32, device=device)
    if not slots:
        return token_of, position_of, offsets.zero_()
    blocks = cdiv(slots, _SLOTS)
    counts = alloc.empty((num_experts, blocks), dtype=torch.int32, device=device)
    totals = alloc.empty((num_experts,), dtype=torch.int32, device=device)
    expert_ids = expert_ids.contiguous()
    sizes = {"E": num_experts, "SLOTS": _SLOTS, "EXPERTS": min(_EXPERTS, next_power_of_2(num_experts))}
    with on_device(expert_ids):
        _permute_count_kernel[(blocks,)](expert_ids, counts, slots, blocks, **sizes, num_warps=_WARPS)
        _permute_scan_kernel[(num_experts,)](counts, totals, blocks, BLOCK=_SCAN, num_warps=_WARPS)
        _permute_place_kernel[(blocks,)](
            expert_ids, counts, totals, position_of, token_of, offsets, slots, blocks, num_rows,
            _ANY if capacity is None else min(capacity, _ANY), K=expert_ids.shape[1], **sizes, num_warps=_WARPS,
        )  # fmt: skip
    return token_of, position_of, offsets
