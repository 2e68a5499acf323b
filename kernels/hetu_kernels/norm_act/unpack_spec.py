"""Cases, launches and benchmarks of :func:`hetu_kernels.unpack`."""

from __future__ import annotations

from typing import Any

import torch

from hetu_kernels._common.registry import OpSpec
from hetu_kernels.norm_act._pack_cases import pack_aot_calls, pack_benchmarks, pack_cases, pack_example
from hetu_kernels.norm_act.pack import unpack
from hetu_kernels.norm_act.pack_ref import unpack_reference


def _index_put(arguments: dict[str, Any]) -> Any:
    def put(packed, layout):  # type: ignore[no-untyped-def]
        padded = packed.new_zeros(layout.batch * layout.max_length, *packed.shape[1:])
        padded = padded.index_put((layout.gather_idx.long(),), packed)
        return padded.view(layout.batch, layout.max_length, *packed.shape[1:])

    return put


SPEC = OpSpec(
    name="unpack",
    function=unpack,
    reference=unpack_reference,
    custom_ops=("pack_fwd", "unpack_fwd"),
    differentiable=("packed",),
    cases=lambda: pack_cases(unpack=True),
    example=lambda tokens: pack_example(tokens, unpack=True),
    aot=pack_aot_calls,
    benchmarks=lambda: pack_benchmarks(unpack=True),
    peers={
        "torch eager (index_put)": _index_put,
        "torch.compile": lambda _: torch.compile(unpack_reference),
    },
    goal="forward and backward 0.85 of the copy limit from 64 MB; at least 1.0x index_put and torch.compile",
)
