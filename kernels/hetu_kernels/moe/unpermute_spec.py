"""Cases, launches and benchmarks of :func:`hetu_kernels.unpermute`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hetu_kernels._common.registry import OpSpec
from hetu_kernels.moe._permute_cases import permute_aot_calls, permute_benchmarks, permute_cases, permute_example
from hetu_kernels.moe.permute import unpermute
from hetu_kernels.moe.permute_ref import unpermute_reference


def _eager(_: dict[str, Any]) -> Callable[..., Any]:
    """Rows by index, as wide as there are choices, then their weighted sum; it needs a row for every assignment."""

    def eager(rows, position_of, weights):  # type: ignore[no-untyped-def]
        chosen = rows.index_select(0, position_of.flatten()).view(*position_of.shape, rows.shape[1])
        return (chosen * weights[:, :, None]).sum(1).to(rows.dtype)

    return eager


SPEC = OpSpec(
    name="unpermute",
    function=unpermute,
    reference=unpermute_reference,
    custom_ops=("unpermute_fwd", "unpermute_bwd"),
    differentiable=("rows", "weights"),
    cases=lambda: permute_cases(unpermute=True),
    example=lambda tokens: permute_example(tokens, unpermute=True),
    aot=permute_aot_calls,
    benchmarks=lambda: permute_benchmarks(unpermute=True),
    peers={
        "torch eager (index_select)": _eager,
        "torch.compile": lambda arguments: torch.compile(_eager(arguments)),
    },
    goal="forward and backward 0.70 of the copy limit; at least 1.5x torch eager (index_select)",
)
