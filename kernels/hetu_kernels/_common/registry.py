"""What the harness knows of an operator. Every operator has an :class:`OpSpec` in ``<op>_spec.py`` beside it.

Tests, the ahead-of-time check and the benchmark all go through this list, so an operator that is entered here is held
to all of them, and one that is not fails the checklist of ``tests/kernels/test_checklist.py``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

LOW_AND_FULL = (torch.float32, torch.float16, torch.bfloat16)

# What the cases of every operator must include, and those of attention besides.
REQUIRED_TAGS = frozenset({"empty", "ragged", "strided", "inf", "nan"})
REQUIRED_ATTENTION_TAGS = REQUIRED_TAGS | {
    *(f"head_dim_{d}" for d in (64, 80, 96, 128, 256)),
    *(f"gqa_{g}" for g in (1, 3, 8)),
    "one_head",
}


@dataclass(frozen=True)
class Case:
    """One set of arguments that the kernel must get right.

    Args:
        name: Short name, unique in its operator.
        make: Builds the keyword arguments on the CPU for a dtype, from the given generator. Floating tensors that are
            of another dtype whatever happens (a float32 weight beside bfloat16 rows) are made so here.
        tags: What it covers, among :data:`REQUIRED_TAGS` and :data:`REQUIRED_ATTENTION_TAGS`.
        dtypes: Dtypes it is run for.
        contiguous: Arguments are contiguous. Otherwise every floating tensor is a slice of a larger one whose other
            elements are NaN: wrong strides and missing masks then show.
        grads: Compare gradients as well.
        slow: Left to ``make test-all``.
    """

    name: str
    make: Callable[[torch.dtype, torch.Generator], dict[str, Any]]
    tags: frozenset[str] = frozenset()
    dtypes: tuple[torch.dtype, ...] = LOW_AND_FULL
    contiguous: bool = False
    grads: bool = True
    slow: bool = False


@dataclass(frozen=True)
class AotCall:
    """A call of an operator's launchers with the shapes, strides and dtypes of real use, for compiling only.

    Args:
        name: What it stands for, ``"fwd bf16 n=4096"``.
        launch: Calls the launchers on meta tensors.
        wgmma: Names of kernels in which sm_90's warp-group instruction (HGMMA) is expected, not just HMMA.
        same_as: Another launch that differs in token counts only. It must need no new compilation.
        tuning: Not a default configuration: it may spill, within the committed baseline.
        slow: Left to ``make test-all``.
    """

    name: str
    launch: Callable[[], object]
    wgmma: tuple[str, ...] = ()
    same_as: Callable[[], object] | None = None
    tuning: bool = False
    slow: bool = False


@dataclass(frozen=True)
class Benchmark:
    """One shape to time.

    Args:
        name: ``"bf16 8192x4096"``.
        make: Builds the keyword arguments on a device; ``tiny`` asks for a shape that runs anywhere in no time.
        bytes: Bytes that forward and backward must read and write at least, given the arguments; 0 where time is not
            bound by memory.
        flops: Floating-point operations of forward and backward.
        backward: Time gradients too, where the operator has any; False for the shapes of inference.
    """

    name: str
    make: Callable[[torch.device, bool], dict[str, Any]]
    bytes: Callable[[dict[str, Any]], tuple[int, int]] | None = None
    flops: Callable[[dict[str, Any]], tuple[int, int]] | None = None
    backward: bool = True


@dataclass(frozen=True)
class OpSpec:
    """One operator.

    Args:
        name: Its public name in :mod:`hetu_kernels`.
        function: The public function; for an operator that works in place, a function that calls it and returns what it
            has changed.
        reference: Plain torch, the same signature, any floating dtype.
        custom_ops: Its operators in ``torch.ops.lightning_hetu``: forward and backward.
        differentiable: Arguments that have gradients; empty for an operator without backward.
        cases: What it must get right.
        example: Keyword arguments for a number of tokens, float32, small: for ``opcheck``, ``torch.compile``, meta and
            fake tensors.
        aot: Launches to compile ahead of time.
        benchmarks: Shapes to time.
        peers: Other implementations by name: each takes the benchmark's arguments and returns a function of the same
            arguments, or raises :class:`ImportError` or :class:`RuntimeError` with the reason why it cannot run here.
        goal: What the benchmark should reach, in words.
        attention: Its cases must include those every attention must.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    custom_ops: tuple[str, ...]
    differentiable: tuple[str, ...]
    cases: Callable[[], Sequence[Case]]
    example: Callable[[int], dict[str, Any]]
    aot: Callable[[], Sequence[AotCall]]
    benchmarks: Callable[[], Sequence[Benchmark]]
    peers: dict[str, Callable[[dict[str, Any]], Callable[..., Any]]] = field(default_factory=dict)
    goal: str = ""
    attention: bool = False


# Name of the operator and the module that has its SPEC.
_SPECS = {
    "varlen_attention": "hetu_kernels.attention.varlen_spec",
    "paged_decode_attention": "hetu_kernels.attention.decode_spec",
    "add_rms_norm": "hetu_kernels.norm_act.rmsnorm_spec",
    "add_layer_norm": "hetu_kernels.norm_act.layernorm_spec",
    "linear_cross_entropy": "hetu_kernels.loss.linear_cross_entropy_spec",
    "adamw": "hetu_kernels.optim.adamw_spec",
    "bias_gelu": "hetu_kernels.norm_act.bias_gelu_spec",
    "swiglu": "hetu_kernels.norm_act.swiglu_spec",
    "rotary": "hetu_kernels.norm_act.rotary_spec",
    "pack": "hetu_kernels.norm_act.pack_spec",
    "unpack": "hetu_kernels.norm_act.unpack_spec",
    "topk_gate": "hetu_kernels.moe.topk_gate_spec",
    "permute": "hetu_kernels.moe.permute_spec",
    "unpermute": "hetu_kernels.moe.unpermute_spec",
    "grouped_gemm": "hetu_kernels.moe.grouped_gemm_spec",
}


def op_names() -> tuple[str, ...]:
    """All operators, in the order of the list."""
    return tuple(_SPECS)


def ops_in_folder(name: str) -> tuple[str, ...]:
    """The operators in a folder such as ``moe``, in the order of the list; none if there is no such folder."""
    return tuple(op for op, module in _SPECS.items() if module.startswith(f"hetu_kernels.{name}."))


def op_spec(name: str) -> OpSpec:
    """The spec of one operator.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in _SPECS:
        raise ValueError(f"op={name!r}: expected one of {', '.join(_SPECS)}.")
    return importlib.import_module(_SPECS[name]).SPEC
