"""Cases, launches and benchmarks of :func:`hetu_kernels.permute`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hetu_kernels._common.registry import OpSpec
from hetu_kernels.moe._permute_cases import permute_aot_calls, permute_benchmarks, permute_cases, permute_example
from hetu_kernels.moe.permute import permute
from hetu_kernels.moe.permute_ref import permute_reference


def _eager(_: dict[str, Any]) -> Callable[..., Any]:
    """A stable sort, and rows by index; assignments that are skipped, and capacities, it does not know."""

    def eager(x, expert_ids, num_experts, num_rows):  # type: ignore[no-untyped-def]
        ordered, order = expert_ids.flatten().sort(stable=True)
        token_of = order // expert_ids.shape[1]
        position_of = torch.empty_like(order).scatter_(0, order, torch.arange(num_rows, device=order.device))
        offsets = torch.searchsorted(ordered, torch.arange(num_experts + 1, device=order.device))
        return x.index_select(0, token_of), token_of, position_of.view(expert_ids.shape), offsets

    return eager


SPEC = OpSpec(
    name="permute",
    function=permute,
    reference=permute_reference,
    custom_ops=("permute_fwd", "permute_bwd"),
    differentiable=("x",),
    cases=lambda: permute_cases(unpermute=False),
    example=lambda tokens: permute_example(tokens, unpermute=False),
    aot=permute_aot_calls,
    benchmarks=lambda: permute_benchmarks(unpermute=False),
    peers={
        "torch eager (sort, index_select)": _eager,
        "torch.compile": lambda arguments: torch.compile(_eager(arguments)),
    },
    goal="forward and backward 0.70 of the copy limit; at least 1.5x torch eager (sort, index_select)",
)
