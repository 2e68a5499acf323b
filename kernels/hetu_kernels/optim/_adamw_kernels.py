"""Kernels of :func:`adamw`: one program for each chunk of each tensor, whose addresses it finds in a table.

A row of the table, int64, is a tensor's addresses (parameter, gradient, both averages, master copy), its number of
elements, its first chunk and its step counter. With the gradient ``g``, times ``factor`` for scale, sign and clipping:

    m = m + (1 - b1) (g - m),    v = b2 v + (1 - b2) g^2,    p = p (1 - lr wd) - lr / c1 m / (sqrt(v / c2) + eps)

where ``c = 1 - b^t``. What depends on the step only is computed in float64, by one program, into a float32 buffer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hetu_kernels._common import alloc
from hetu_kernels._common.device import capturing, on_device, sm_count
from hetu_kernels._common.triton_utils import cdiv, next_power_of_2, tl, triton
from hetu_kernels.optim.adamw_ref import NORM_EPS, log_beta

_BLOCK = 1024
_MAX_CHUNK_BLOCKS = 64
_COLUMNS = 8
_PREPARE_BLOCK = 1024

_TYPES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float64: "float64",
    torch.int32: "int32",
    torch.int64: "int64",
}


@triton.jit
def _pointer(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An address from the table as a pointer; ``ALIGNED`` ones may be read four elements at a time.

    No more than four, whatever their width: threads then hold the same elements of all tensors.
    """
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, TYPE.primitive_bitwidth // 2)
    return pointer


@triton.jit
def _squares(grad_ptr, at, count, total, MASKED: tl.constexpr):
    """``total`` plus the squares of a block of gradients."""
    if MASKED:
        grad = tl.load(grad_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    else:
        grad = tl.load(grad_ptr + at).to(tl.float32)
    return total + grad * grad


@triton.jit(do_not_specialize=["base", "chunk_blocks"])
def _adamw_norm_kernel(
    table_ptr, chunk_ptr, partial_ptr, base, chunk_blocks,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, G_TYPE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Grid (chunks from ``base`` on,): sum of the squared gradients of a chunk."""
    program = base + tl.program_id(0)
    row_ptr = table_ptr + tl.load(chunk_ptr + program).to(tl.int64) * COLUMNS
    size = tl.cast(chunk_blocks, tl.int64) * BLOCK
    start = (program - tl.load(row_ptr + 6)) * size
    count = tl.minimum(tl.load(row_ptr + 5) - start, size).to(tl.int32)
    grad_ptr = _pointer(tl.load(row_ptr + 1), G_TYPE, ALIGNED) + start
    whole = count - count % BLOCK
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, whole, BLOCK):
        total = _squares(grad_ptr, first + tl.arange(0, BLOCK), count, total, False)
    if whole < count:
        total = _squares(grad_ptr, whole + tl.arange(0, BLOCK), count, total, True)
    tl.store(partial_ptr + program, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["num_partials", "num_steps"])
def _adamw_prepare_kernel(
    partial_ptr, steps_ptr, norm_ptr, scalars_ptr, lr_ptr, scale_ptr, found_inf_ptr,
    num_partials, num_steps, lr, weight_decay, log_beta1, log_beta2, sign, max_norm,
    norm_eps,
    BLOCK: tl.constexpr, STEP_TYPE: tl.constexpr,
    HAS_LR: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_FOUND_INF: tl.constexpr, HAS_MAX_NORM: tl.constexpr,
):  # fmt: skip
    """Grid (1,). Adds up the norm, counts the steps, and leaves in ``scalars`` the factor of the gradients and, of each
    counter, the decay, the step size and the factor of ``sqrt(v)``.
    """
    lanes = tl.arange(0, BLOCK)
    factor = tl.full((), 1.0, tl.float32) * sign
    if HAS_SCALE:
        factor /= tl.load(scale_ptr).to(tl.float32)
    if HAS_MAX_NORM:
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for first in range(0, num_partials, BLOCK):
            at = first + lanes
            total += tl.load(partial_ptr + at, mask=at < num_partials, other=0.0)
        norm = tl.sqrt(tl.sum(total, axis=0)) * tl.abs(factor)
        ratio = max_norm / (norm + norm_eps)
        factor *= tl.where(ratio > 1.0, 1.0, ratio)
        tl.store(norm_ptr, norm)
    tl.store(scalars_ptr, factor)
    if HAS_LR:
        rate = tl.load(lr_ptr).to(tl.float64)
    else:
        rate = tl.full((), 0.0, tl.float64) + lr
    counts = tl.full((), 1.0, tl.float64)
    if HAS_FOUND_INF:
        counts = tl.where(tl.load(found_inf_ptr).to(tl.float32) == 0.0, counts, 0.0)
    log1 = tl.full((), 0.0, tl.float64) + log_beta1
    log2 = tl.full((), 0.0, tl.float64) + log_beta2
    for first in range(0, num_steps, BLOCK):
        at = first + lanes
        mask = at < num_steps
        step_ptr = tl.load(steps_ptr + at, mask=mask, other=0).to(tl.pointer_type(STEP_TYPE))
        step = tl.load(step_ptr, mask=mask, other=0).to(tl.float64) + counts
        tl.store(step_ptr, step.to(STEP_TYPE), mask=mask)
        out_ptr = scalars_ptr + 1 + at.to(tl.int64) * 3
        tl.store(out_ptr, tl.zeros([BLOCK], dtype=tl.float32) + (1.0 - rate * weight_decay).to(tl.float32), mask=mask)
        tl.store(out_ptr + 1, (rate / (1.0 - tl.exp(step * log1))).to(tl.float32), mask=mask)
        tl.store(out_ptr + 2, (1.0 / tl.sqrt(1.0 - tl.exp(step * log2))).to(tl.float32), mask=mask)


@triton.jit
def _update_block(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr, at, count,
    factor, decay, step_size, root_scale, beta2, rest1, rest2, eps,
    HAS_MASTER: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Read, update and write a block of elements."""
    mask = None
    if MASKED:
        mask = at < count
    grad = tl.load(grad_ptr + at, mask=mask).to(tl.float32) * factor
    exp_avg = tl.load(exp_avg_ptr + at, mask=mask).to(tl.float32)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=mask).to(tl.float32)
    if HAS_MASTER:
        param = tl.load(master_ptr + at, mask=mask).to(tl.float32)
    else:
        param = tl.load(param_ptr + at, mask=mask).to(tl.float32)
    exp_avg += rest1 * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + rest2 * grad * grad
    param = param * decay - step_size * (exp_avg / (tl.sqrt(exp_avg_sq) * root_scale + eps))
    tl.store(exp_avg_ptr + at, exp_avg.to(exp_avg_ptr.dtype.element_ty), mask=mask)
    tl.store(exp_avg_sq_ptr + at, exp_avg_sq.to(exp_avg_sq_ptr.dtype.element_ty), mask=mask)
    tl.store(param_ptr + at, param.to(param_ptr.dtype.element_ty), mask=mask)
    if HAS_MASTER:
        tl.store(master_ptr + at, param.to(master_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["base", "chunk_blocks"])
def _adamw_update_kernel(
    table_ptr, chunk_ptr, scalars_ptr, found_inf_ptr, base, chunk_blocks, beta2, rest1, rest2, eps,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    P_TYPE: tl.constexpr, G_TYPE: tl.constexpr, M_TYPE: tl.constexpr, V_TYPE: tl.constexpr, MASTER_TYPE: tl.constexpr,
    HAS_MASTER: tl.constexpr, HAS_FOUND_INF: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Grid (chunks from ``base`` on,): update the elements of a chunk; none of them if an infinity was found."""
    program = base + tl.program_id(0)
    row_ptr = table_ptr + tl.load(chunk_ptr + program).to(tl.int64) * COLUMNS
    size = tl.cast(chunk_blocks, tl.int64) * BLOCK
    start = (program - tl.load(row_ptr + 6)) * size
    count = tl.minimum(tl.load(row_ptr + 5) - start, size).to(tl.int32)
    if HAS_FOUND_INF:
        count = tl.where(tl.load(found_inf_ptr).to(tl.float32) == 0.0, count, 0)
    param_ptr = _pointer(tl.load(row_ptr), P_TYPE, ALIGNED) + start
    grad_ptr = _pointer(tl.load(row_ptr + 1), G_TYPE, ALIGNED) + start
    exp_avg_ptr = _pointer(tl.load(row_ptr + 2), M_TYPE, ALIGNED) + start
    exp_avg_sq_ptr = _pointer(tl.load(row_ptr + 3), V_TYPE, ALIGNED) + start
    master_ptr = _pointer(tl.load(row_ptr + 4), MASTER_TYPE, ALIGNED) + start
    step_ptr = scalars_ptr + 1 + tl.load(row_ptr + 7) * 3
    factor = tl.load(scalars_ptr)
    decay = tl.load(step_ptr)
    step_size = tl.load(step_ptr + 1)
    root_scale = tl.load(step_ptr + 2)
    whole = count - count % BLOCK
    for first in range(0, whole, BLOCK):
        _update_block(
            param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr, first + tl.arange(0, BLOCK), count,
            factor, decay, step_size, root_scale, beta2, rest1, rest2, eps, HAS_MASTER, False,
        )  # fmt: skip
    if whole < count:
        _update_block(
            param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr, whole + tl.arange(0, BLOCK), count,
            factor, decay, step_size, root_scale, beta2, rest1, rest2, eps, HAS_MASTER, True,
        )  # fmt: skip


class _Group(NamedTuple):
    """What one launch needs to know at compile time: dtypes, and whether all addresses are multiples of 16."""

    param: torch.dtype
    grad: torch.dtype
    exp_avg: torch.dtype
    exp_avg_sq: torch.dtype
    master: torch.dtype | None
    aligned: bool


def launch_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    master_params: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    max_norm: float | None,
) -> Tensor:
    """Update all tensors: one launch for each combination of dtypes, one for the step, with clipping one more each.

    Args:
        params: Parameters of any strides.
        grads: Their gradients. What is not laid out like its parameter is copied, and back.
        exp_avgs: First moments.
        exp_avg_sqs: Second moments.
        steps: One counter for all or one for each, of one dtype.
        master_params: Float32 copies; may be empty.
        lr: Learning rate.
        betas: Decay of the moments.
        eps: Added to the root.
        weight_decay: Decay of the parameters, times ``lr``.
        maximize: Go up.
        grad_scale: What gradients are multiplied by.
        found_inf: Not 0 where nothing is to be done.
        max_norm: Bound of the norm of all gradients.

    Returns:
        The norm; empty without ``max_norm``.
    """
    device = steps[0].device
    slots: dict[int, int] = {}
    places = [slots.setdefault(step.data_ptr(), len(slots)) for step in steps]
    shared = len(steps) == 1
    copies: list[tuple[Tensor | None, Tensor]] = []  # kept until all is launched
    groups: dict[tuple[Any, ...], list[tuple[int, ...]]] = {}
    elements = 0
    # Plain loops over what may be thousands of tensors, at every step: this is what the host does meanwhile.
    for i, (param, grad, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        size = param.numel()
        if not size:
            continue
        master = master_params[i] if master_params else None
        if not (
            param.is_contiguous()
            and grad.is_contiguous()
            and exp_avg.is_contiguous()
            and exp_avg_sq.is_contiguous()
            and (master is None or master.is_contiguous())
        ):
            param, grad, exp_avg, exp_avg_sq, master = _laid_out_alike(
                (param, grad, exp_avg, exp_avg_sq, master), copies
            )
        p, g, m, v = param.data_ptr(), grad.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr()
        w = 0 if master is None else master.data_ptr()
        key = (
            param.dtype, grad.dtype, exp_avg.dtype, exp_avg_sq.dtype, None if master is None else master.dtype,
            (p | g | m | v | w) % 16 == 0,
        )  # fmt: skip
        groups.setdefault(key, []).append((p, g, m, v, w, size, places[0 if shared else i]))
        elements += size
    blocks = _chunk_blocks(elements, device)
    rows: list[int] = []
    counts: list[int] = []
    launches: list[tuple[_Group, int, int]] = []  # group, its first chunk, its chunks
    chunks = 0
    chunk = blocks * _BLOCK
    for key, members in groups.items():
        base = chunks
        for *tensor, slot in members:
            rows += tensor
            rows += (chunks, slot)
            counts.append(-(-tensor[5] // chunk))
            chunks += counts[-1]
        launches.append((_Group(*key), base, chunks - base))
    table, counters, chunk_map = _tables(tuple(rows), tuple(slots), tuple(counts), chunks, device)
    norm = alloc.empty(() if max_norm is not None else (0,), dtype=torch.float32, device=device)
    scalars = alloc.empty((1 + 3 * len(slots),), dtype=torch.float32, device=device)
    partials = alloc.empty((chunks if max_norm is not None else 0,), dtype=torch.float32, device=device)
    with on_device(steps[0]):
        if max_norm is not None:
            for group, base, count in launches:
                _adamw_norm_kernel[(count,)](
                    table, chunk_map, partials, base, blocks,
                    BLOCK=_BLOCK, COLUMNS=_COLUMNS, G_TYPE=_type(group.grad), ALIGNED=group.aligned, num_warps=8,
                )  # fmt: skip
        _adamw_prepare_kernel[(1,)](
            partials, counters, norm, scalars, lr if isinstance(lr, Tensor) else None, grad_scale, found_inf,
            chunks, len(slots), 0.0 if isinstance(lr, Tensor) else lr, weight_decay, *map(log_beta, betas),
            -1.0 if maximize else 1.0, 0.0 if max_norm is None else max_norm, NORM_EPS,
            BLOCK=_PREPARE_BLOCK, STEP_TYPE=_type(steps[0].dtype), HAS_LR=isinstance(lr, Tensor),
            HAS_SCALE=grad_scale is not None, HAS_FOUND_INF=found_inf is not None, HAS_MAX_NORM=max_norm is not None,
            num_warps=8,
        )  # fmt: skip
        for group, base, count in launches:
            _adamw_update_kernel[(count,)](
                table, chunk_map, scalars, found_inf, base, blocks, betas[1], 1.0 - betas[0], 1.0 - betas[1], eps,
                BLOCK=_BLOCK, COLUMNS=_COLUMNS, P_TYPE=_type(group.param), G_TYPE=_type(group.grad),
                M_TYPE=_type(group.exp_avg), V_TYPE=_type(group.exp_avg_sq),
                MASTER_TYPE=_type(group.master or group.param), HAS_MASTER=group.master is not None,
                HAS_FOUND_INF=found_inf is not None, ALIGNED=group.aligned, num_warps=8,
            )  # fmt: skip
    for original, copy in copies:
        if original is not None:
            original.copy_(copy)
    return norm


def _type(dtype: torch.dtype) -> Any:
    """Triton's name of a dtype."""
    return getattr(tl, _TYPES[dtype])


def _chunk_blocks(elements: int, device: torch.device) -> int:
    """Blocks of a chunk: several chunks for every multiprocessor, and few of them where there is much to do."""
    return min(next_power_of_2(cdiv(elements, 8 * sm_count(device) * _BLOCK)), _MAX_CHUNK_BLOCKS)


def _laid_out_alike(tensors: Sequence[Tensor | None], copies: list[tuple[Tensor | None, Tensor]]) -> list[Any]:
    """The tensors themselves if the same index means the same element of all of them; copies otherwise.

    Args:
        tensors: Parameter, gradient, moments and master copy, of one shape.
        copies: Gets the copies, each with where it is to be copied back to: None for gradients, which are only read.
    """
    param = tensors[0]
    assert param is not None
    strides = param.stride() if _dense(param) else torch.empty(param.shape, device="meta").stride()
    found: list[Tensor | None] = []
    for number, tensor in enumerate(tensors):
        if tensor is None or tensor.stride() == strides:
            found.append(tensor)
            continue
        # Freshly allocated memory, permuted into the order of the strides.
        order = sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim))
        buffer = alloc.empty([tensor.shape[dim] for dim in order], dtype=tensor.dtype, device=tensor.device)
        copy = buffer.permute([order.index(dim) for dim in range(tensor.dim())])
        found.append(copy.copy_(tensor))
        copies.append((None if number == 1 else tensor, copy))
    return found


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill a piece of memory without holes and without overlap."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


@functools.lru_cache(maxsize=8)
def _cached_tables(
    rows: tuple[int, ...], counters: tuple[int, ...], counts: tuple[int, ...], chunks: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values = torch.tensor([*rows, *counters, *counts], dtype=torch.int64)
    host = _pinned(values.numel()).copy_(values) if device.type == "cuda" else values
    on_gpu = host.to(device, non_blocking=True)
    table, rest = on_gpu[: len(rows)], on_gpu[len(rows) :]
    numbers = torch.arange(len(counts), dtype=torch.int32, device=device)
    chunk_map = torch.repeat_interleave(numbers, rest[len(counters) :], output_size=chunks)
    return table, rest[: len(counters)], chunk_map, host


def _tables(
    rows: tuple[int, ...], counters: tuple[int, ...], counts: tuple[int, ...], chunks: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The table of tensors, the addresses of the counters, and the row of each chunk, on the device.

    They are kept, and made again only where an address has changed. A CUDA graph that captures the launches reads them
    (and the pinned memory they are copied from) for as long as it exists, so those are kept forever.
    """
    made = _cached_tables(rows, counters, counts, chunks, device)
    if capturing(device):
        _kept.append(made)
    elif device.type == "cuda" and made[3].numel() not in _spare:
        # Capturing may not allocate pinned memory: have some ready, of the size that it will need.
        _spare[made[3].numel()] = torch.empty(made[3].numel(), dtype=torch.int64, pin_memory=True)
    return made[:3]


_kept: list[tuple[Tensor, ...]] = []
_spare: dict[int, Tensor] = {}


def _pinned(numel: int) -> Tensor:
    """Pinned memory for that many numbers."""
    spare = _spare.pop(numel, None)
    return torch.empty(numel, dtype=torch.int64, pin_memory=True) if spare is None else spare
