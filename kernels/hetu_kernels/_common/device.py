"""The one place that asks torch and triton about devices, and decides between a kernel and its reference.

Operators never call ``torch.cuda`` themselves, so that all of them can be recorded for a device that is not there
(see :mod:`hetu_kernels._common.aot`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger("hetu_kernels")

MODE_VARIABLE = "LIGHTNING_HETU_KERNELS"
MODES = ("auto", "triton", "reference")
CHECK_VARIABLE = "LIGHTNING_HETU_CHECK"


@dataclass(frozen=True)
class Target:
    """A device that kernels are compiled for.

    Args:
        name: ``"sm_90"`` or ``"gfx942"``.
        backend: ``"cuda"`` or ``"hip"``.
        arch: What triton calls the architecture: 90 or ``"gfx942"``.
        warp_size: Threads per warp.
        shared_memory: Bytes of shared memory one thread block may use.
        multiprocessors: Streaming multiprocessors (NVIDIA) or compute units (AMD) of the largest such device.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_memory: int
    multiprocessors: int


# Shared memory: CUDA C++ programming guide (technical specifications, less what the system reserves), CDNA3 ISA.
TARGETS = {
    "sm_80": Target("sm_80", "cuda", 80, 32, 166_912, 108),
    "sm_90": Target("sm_90", "cuda", 90, 32, 232_448, 132),
    "sm_100": Target("sm_100", "cuda", 100, 32, 232_448, 148),
    "gfx942": Target("gfx942", "hip", "gfx942", 64, 65_536, 304),
}

# The interpreter has no multiprocessors. Few, so that a test's loops over rows really loop.
_INTERPRETED_MULTIPROCESSORS = 3

_recording: Target | None = None


@contextlib.contextmanager
def recording_for(target: Target) -> Iterator[None]:
    """Inside, every question about the device is answered for ``target``, and kernels are launched on any tensor."""
    global _recording
    before, _recording = _recording, target
    try:
        yield
    finally:
        _recording = before


def interpreting() -> bool:
    """Whether kernels run in triton's interpreter. Triton reads the variable when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


def arch(device: torch.device) -> str:
    """Architecture of a device: ``"sm_90"``, ``"gfx942"``, or ``"interpreter"`` off the GPU."""
    if _recording is not None:
        return _recording.name
    return _arch_of(device) if device.type == "cuda" else "interpreter"


def sm_count(device: torch.device) -> int:
    """Number of multiprocessors of a device."""
    if _recording is not None:
        return _recording.multiprocessors
    return _properties(device).multi_processor_count if device.type == "cuda" else _INTERPRETED_MULTIPROCESSORS


def smem_limit(device: torch.device) -> int:
    """Bytes of shared memory one thread block may use."""
    if _recording is not None:
        return _recording.shared_memory
    if device.type == "cuda":
        known = TARGETS.get(_arch_of(device))
        if known is not None:
            return known.shared_memory
        return int(getattr(_properties(device), "shared_memory_per_block_optin", 48 * 1024))
    return 2**62


def mode() -> str:
    """The value of ``LIGHTNING_HETU_KERNELS``.

    Raises:
        ValueError: If it is none of ``auto``, ``triton`` and ``reference``.
    """
    value = os.environ.get(MODE_VARIABLE, "auto").lower()
    if value not in MODES:
        raise ValueError(f"{MODE_VARIABLE}={value!r}: expected one of {', '.join(MODES)}.")
    return value


def use_triton(tensor: Tensor, *, needs_dot: bool = False) -> bool:
    """Decide whether an operator launches its kernel or runs its reference.

    Args:
        tensor: Any tensor of the call; it names the device.
        needs_dot: The kernel multiplies matrices. Below compute capability 8.0 triton does that without tensor cores.

    Raises:
        RuntimeError: If ``LIGHTNING_HETU_KERNELS=triton`` and the kernel cannot run here.
    """
    if _recording is not None:
        return True
    wanted = mode()
    if wanted == "reference":
        return False
    reason = _why_not(tensor.device, needs_dot)
    if tensor.dtype == torch.float64:  # a kernel would compute in float32
        reason = "there is no kernel for float64"
    if reason is None:
        return True
    if wanted == "triton":
        raise RuntimeError(f"{MODE_VARIABLE}=triton, but {reason}. Set it to auto or reference.")
    _tell_once(tensor.device.type, reason)
    return False


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that ``torch.autocast`` asks for on a device; None outside of it."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors as :func:`torch.nn.functional.linear` would multiply them: float64 and integers stay as they are."""
    return [
        t if dtype is None or not t.dtype.is_floating_point or t.dtype == torch.float64 else t.to(dtype)
        for t, dtype in ((t, autocast_dtype(t.device)) for t in tensors)
    ]


def may_read(tensor: Tensor) -> bool:
    """Whether a check may look at a tensor's values.

    On the CPU it may. Anywhere else that waits for the device, so it may only with ``LIGHTNING_HETU_CHECK=1``, and
    never while a CUDA graph is captured.
    """
    if _recording is not None or tensor.device.type == "meta":
        return False
    if tensor.device.type == "cpu":
        return True
    return os.environ.get(CHECK_VARIABLE) == "1" and not capturing(tensor.device)


def dot_precision(tensor: Tensor, *, allow_tf32: bool) -> str:
    """What float32 operands of a matrix product are multiplied in; other dtypes do not care.

    NVIDIA's matrix units know no float32: three products of TF32 parts come near it (``tf32x3``), one is TF32 itself.
    AMD's know it (``ieee``).
    """
    backend = _recording.backend if _recording is not None else "hip" if torch.version.hip is not None else "cuda"
    if interpreting() or backend == "hip":
        return "ieee"
    return "tf32" if allow_tf32 else "tf32x3"


def capturing(device: torch.device) -> bool:
    """Whether launches on a device are being captured into a CUDA graph."""
    return _recording is None and device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def on_device(tensor: Tensor) -> Iterator[None]:
    """Make the tensor's GPU the current one: triton launches there, whichever tensors it is given."""
    if tensor.device.type == "cuda" and _recording is None:
        with torch.cuda.device(tensor.device):
            yield
    else:
        yield


def _why_not(device: torch.device, needs_dot: bool) -> str | None:
    """Why a kernel cannot run on ``device``, or None where it can."""
    if not has_triton():
        return "triton is not installed"
    if interpreting():
        return None if device.type == "cpu" else f"TRITON_INTERPRET=1 runs on CPU tensors, not on {device.type}"
    if device.type != "cuda":
        return f"there is no kernel for {device.type} tensors (on the CPU, TRITON_INTERPRET=1 interprets them)"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        lowest = (8, 0) if needs_dot else (7, 0)
        if capability < lowest:
            return f"this kernel needs compute capability {lowest[0]}.{lowest[1]}, {device} has {capability}"
    return None


@functools.cache
def _tell_once(device_type: str, reason: str) -> None:
    """Falling back is expected on a CPU and a surprise on a GPU."""
    level = logging.WARNING if device_type == "cuda" else logging.INFO
    logger.log(level, "hetu_kernels runs its reference implementations: %s.", reason)


@functools.cache
def _properties(device: torch.device):  # type: ignore[no-untyped-def]  # a private class of torch
    return torch.cuda.get_device_properties(device)


@functools.cache
def _arch_of(device: torch.device) -> str:
    properties = _properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
