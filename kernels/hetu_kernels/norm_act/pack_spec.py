"""Cases, launches and benchmarks of :func:`hetu_kernels.pack`."""

from __future__ import annotations

from typing import Any

import torch

from hetu_kernels._common.registry import OpSpec
from hetu_kernels.norm_act._pack_cases import pack_aot_calls, pack_benchmarks, pack_cases, pack_example
from hetu_kernels.norm_act.pack import pack
from hetu_kernels.norm_act.pack_ref import pack_reference


def _eager(arguments: dict[str, Any]) -> Any:
    """``x[mask]``, which waits for the device to learn the number of tokens."""
    layout = arguments["layout"]
    mask = (layout.scatter_idx >= 0).view(layout.batch, layout.max_length)
    return lambda x, layout: x[mask]


def _index_select(arguments: dict[str, Any]) -> Any:
    return lambda x, layout: x.flatten(0, 1).index_select(0, layout.gather_idx)


SPEC = OpSpec(
    name="pack",
    function=pack,
    reference=pack_reference,
    custom_ops=("pack_fwd", "unpack_fwd"),
    differentiable=("x",),
    cases=lambda: pack_cases(unpack=False),
    example=lambda tokens: pack_example(tokens, unpack=False),
    aot=pack_aot_calls,
    benchmarks=lambda: pack_benchmarks(unpack=False),
    peers={
        "torch eager": _eager,
        "index_select": _index_select,
        "torch.compile": lambda _: torch.compile(pack_reference),
    },
    goal="forward and backward 0.85 of the copy limit from 64 MB; at least 1.0x index_select and torch.compile",
)
