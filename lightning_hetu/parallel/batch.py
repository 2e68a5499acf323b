"""Which samples of a global batch a rank works on.

A global batch is cut into microbatches, each microbatch into contiguous data-parallel shards. A rank holds its shard of
every microbatch, microbatch after microbatch, so that cutting its rows into equal pieces gives its microbatches again.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_hetu.planning.plan import HybridPlan


def shard_rows(samples: int, microbatches: int, dp: int, index: int) -> list[int]:
    """Row numbers, in a global batch of ``samples``, of data-parallel shard ``index`` of ``dp``.

    Raises:
        ValueError: If the batch cannot be cut so.
    """
    if samples % (microbatches * dp):
        raise ValueError(
            f"a global batch of {samples} samples cannot be cut into {microbatches} microbatches of {dp} data-parallel"
            f" shards: use a multiple of {microbatches * dp}."
        )
    micro = samples // microbatches
    shard = micro // dp
    return [m * micro + index * shard + row for m in range(microbatches) for row in range(shard)]


def finer_rows(values: Any, samples: int, microbatches: int, parts: int, part: int) -> Any:
    """From local rows, those of piece ``part`` when every microbatch of them is cut into ``parts`` further pieces.

    Args:
        values: Tensors whose dimension 0 counts ``samples`` local rows, in any nesting; others are left alone.
        samples: Local rows.
        microbatches: Microbatches in them.
        parts: Pieces per microbatch.
        part: Which piece.
    """
    if parts == 1:
        return values
    rows = torch.tensor(shard_rows(samples, microbatches, parts, part))

    def pick(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or tensor.shape[0] != samples:
            return tensor
        return tensor.index_select(0, rows.to(tensor.device))

    return tree_map_only(torch.Tensor, pick, values)


def batch_samples(batch: Any) -> int:
    """Samples in a batch: the size of dimension 0 that most of its tensors have; of several, that of the first one.

    Raises:
        ValueError: If no tensor in it has dimensions.
    """
    sizes = Counter(int(leaf.shape[0]) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim)
    if not sizes:
        raise ValueError(f"a batch of type {type(batch).__name__} is without a tensor that has a batch dimension.")
    return sizes.most_common(1)[0][0]


def first_rows(values: Any, samples: int, count: int) -> Any:
    """The first ``count`` of ``samples`` rows of all tensors in a nesting; those of other sizes stay as they are."""
    return tree_map_only(Tensor, lambda x: x[:count] if x.ndim and x.shape[0] == samples else x, values)


def microbatches_of(values: Any, samples: int, count: int) -> list[Any]:
    """The values of each microbatch; tensors without the batch in dimension 0 go to all of them.

    Args:
        values: Tensors whose dimension 0 counts ``samples`` local rows, in any nesting.
        samples: Local rows.
        count: Microbatches in them.
    """
    size = samples // count

    def part(index: int) -> Any:
        def rows(tensor: Tensor) -> Tensor:
            if tensor.ndim == 0 or tensor.shape[0] != samples:
                return tensor
            return tensor[index * size : (index + 1) * size]

        return tree_map_only(Tensor, rows, values)

    return [part(index) for index in range(count)]


def local_dp(plan: HybridPlan) -> int:
    """Over how many shards a global batch is spread when handed to ``training_step``.

    The same in every stage, so that whatever Lightning weighs by the local batch size is weighed alike on every rank;
    a stage whose layers want fewer rows takes its part of them.
    """
    return min(plan.embedding.dp, plan.head.dp)


def training_microbatches(plan: HybridPlan, samples: int) -> int:
    """Microbatches for a training batch: those of the plan.

    Raises:
        ValueError: If the batch does not divide into them and their data-parallel shards.
    """
    dp = largest_dp(plan)
    unit = plan.num_microbatches * dp
    if samples % unit:
        raise ValueError(
            f"a training batch of {samples} samples does not divide into {plan.num_microbatches} microbatches of"
            f" {dp} data-parallel shards: give the dataloader a batch_size that is a multiple of {unit}, and"
            " drop_last=True."
        )
    return plan.num_microbatches


def largest_dp(plan: HybridPlan) -> int:
    """The finest batch sharding of any layer; the sharding of every other layer divides it."""
    return max(row.dp for _, row in plan.rows())


def evaluation_microbatches(plan: HybridPlan, samples: int) -> int:
    """Microbatches for an evaluation batch: as many as the plan has, or the most that still divide it.

    Raises:
        ValueError: If the batch does not divide over the data-parallel ranks at all.
    """
    dp = largest_dp(plan)
    for count in range(plan.num_microbatches, 0, -1):
        if samples % (count * dp) == 0:
            return count
    raise ValueError(
        f"a batch of {samples} samples does not divide into {dp} data-parallel shards: use a batch_size that is a"
        f" multiple of {dp}."
    )
