"""With which degrees the sequence of a block can be cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_hetu.parallel.megatron_sequence import sequence_parallel_degrees
from lightning_hetu.parallel.tokenwise import attention_degrees
from lightning_hetu.parallel.transformers_compat import collects_router_logits
from lightning_hetu.profiling._case import LayerCase


def with_sequence_degrees(
    case: LayerCase, root: nn.Module, name: str, arguments: tuple[tuple[Any, ...], dict[str, Any]], limit: int
) -> LayerCase:
    """The case of a block with its degrees of Megatron, Ulysses and context parallelism.

    Args:
        case: The block.
        root: The whole model.
        name: Full name of the block.
        arguments: Positional and keyword arguments that the block is called with.
        limit: Largest degree of interest.
    """
    if collects_router_logits(root):
        return case
    rows = case.rows or case.batch

    def one_sample(value: Any) -> Any:
        along_batch = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == rows
        return value[: max(rows // case.batch, 1)] if along_batch else value

    given = tree_map(one_sample, arguments)
    with case.autocast():
        found = attention_degrees(case.module, given, name, limit)
    if found is None:
        return case
    megatron = sequence_parallel_degrees(root, name, case.tp_degrees)
    return replace(case, sequence_degrees=megatron, ulysses_degrees=found.ulysses, context_degrees=found.context)
