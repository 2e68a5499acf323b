"""Decisions about the tokens of all ranks, as one process with all of them would make them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_hetu.parallel.alone import is_alone


def joint_rows(rows: Tensor, group: ProcessGroup | None = None) -> tuple[Tensor, slice]:
    """The rows of all ranks, those of the first rank first, and where this rank's are among them.

    Args:
        rows: ``[T, ...]``; T may differ between ranks.
        group: The ranks; ``None`` for all. All of them call this.
    """
    if not dist.is_available() or not dist.is_initialized() or is_alone() or dist.get_world_size(group) == 1:
        return rows, slice(0, len(rows))
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    own = torch.tensor([len(rows)], device=rows.device)
    gathered = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(gathered, own, group=group)
    sizes = torch.cat(gathered).tolist()
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded, group=group)
    start = sum(sizes[:rank])
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]), slice(start, start + len(rows))
