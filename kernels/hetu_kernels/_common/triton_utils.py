"""Triton, where it is installed, and the device functions that several kernels share.

Kernels must run compiled and in the interpreter (``TRITON_INTERPRET=1``). The interpreter computes on the raw bits of
bfloat16 and rounds to it by truncation, so all arithmetic is in float32 and conversion happens at the store.
"""

from __future__ import annotations

from typing import Any

from hetu_kernels._common.device import has_triton, interpreting

if has_triton():
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
else:  # references still work; kernels can be defined, never launched

    class _Absent:
        """Stands for triton on platforms that have none: a decorator that returns the function, names that exist."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return args[0] if len(args) == 1 and callable(args[0]) else self

    triton = tl = libdevice = _Absent()

INTERPRET = tl.constexpr(interpreting())
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


@triton.jit
def dotf(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in float32; ``PRECISION`` is what float32 operands are multiplied in (``ieee`` or ``tf32``)."""
    if INTERPRET:  # its dot is wrong on bfloat16; the operands are already rounded, so this loses nothing
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def sigmoid(x):
    """Logistic function in float32, without overflow for large ``|x|``."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def tanh(x):
    """Hyperbolic tangent in float32: ``libdevice`` has none for AMD and none in the interpreter."""
    return 2.0 * sigmoid(2.0 * x) - 1.0


@triton.jit
def popc32(x):
    """Number of set bits of each int32."""
    if INTERPRET:
        v = x.to(tl.uint32, bitcast=True)
        v = v - ((v >> 1) & 0x55555555)
        v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
        v = (v + (v >> 4)) & 0x0F0F0F0F
        return ((v * 0x01010101) >> 24).to(tl.int32)
    else:
        return libdevice.popc(x)
