"""Kernels of :func:`hetu_kernels.grouped_gemm`, and their launchers.

The number of rows an expert has is known to the device only. So as many programs are started as run at once, and each
walks the tiles of all experts in turn: which tile belongs to which expert follows from the offsets, of which every
program makes the running number of tiles. There is no table to build and no row of padding. Neighboring tiles of an
expert share rows of ``x`` and columns of its weight, which are then in the level-2 cache.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from hetu_kernels._common import alloc, checks
from hetu_kernels._common.config import Config, bucket, tuned
from hetu_kernels._common.device import arch, on_device, sm_count, smem_limit
from hetu_kernels._common.triton_utils import cdiv, dotf, next_power_of_2, tl, triton

# Another batch, or other experts on this rank, need no other binary.
_NEVER_SPECIALIZE = ["num_rows", "num_experts"]

_GROUP_M = 8  # row tiles in a band: those of 1024 rows, which share the columns of a weight while these are in cache
_ALIGNMENT = 16  # elements; triton vectorizes where it knows that a stride is a multiple of 16


@triton.jit
def _tiles_so_far(offsets_ptr, num_experts, num_rows, tiles_n, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Per expert, the tiles of its rows and of those before it; the last "expert" is the rows that belong to none."""
    e = tl.arange(0, BLOCK_E)
    begin = tl.load(offsets_ptr + e, mask=e <= num_experts, other=0).to(tl.int32)
    end = tl.load(offsets_ptr + e + 1, mask=e < num_experts, other=0).to(tl.int32)
    end = tl.where(e == num_experts, num_rows, end)
    return tl.cumsum(tl.cdiv(end - begin, BLOCK_M) * tiles_n, 0)


@triton.jit
def _tile_at(tile, num_rows, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of a tile of a matrix, whose tiles are walked in bands of GROUP_M, down within a band."""
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(width, BLOCK_N).to(tl.int64)
    band = tile // (GROUP_M * tiles_n)
    inside = tile - band * (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    return (band * GROUP_M + inside % height) * BLOCK_M, (inside // height) * BLOCK_N


@triton.jit(do_not_specialize=_NEVER_SPECIALIZE, do_not_specialize_on_alignment=_NEVER_SPECIALIZE)
def _grouped_gemm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, offsets_ptr, y_ptr,
    stride_x_row, stride_w_expert, stride_w_k, stride_w_n, stride_bias_expert, stride_y_row,
    num_rows, num_experts, depth, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_E: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (programs,), any number of them; ``y`` is ``[num_rows, width]``, zero behind the last expert's rows."""
    so_far = _tiles_so_far(offsets_ptr, num_experts, num_rows, tl.cdiv(width, BLOCK_N), BLOCK_M, BLOCK_E)
    ms, ns, ks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    w_offsets = (ks.to(tl.int64) * stride_w_k)[:, None] + (ns.to(tl.int64) * stride_w_n)[None, :]
    step_w = tl.cast(stride_w_k, tl.int64) * BLOCK_K
    for tile in range(tl.program_id(0), tl.max(so_far, 0), tl.num_programs(0)):
        expert = tl.sum((so_far <= tile).to(tl.int32), 0)  # the first that has more
        begin = tl.load(offsets_ptr + expert).to(tl.int32)
        end = num_rows
        terms = 0
        if expert < num_experts:
            end = tl.load(offsets_ptr + expert + 1).to(tl.int32)
            terms = depth
        first = tl.max(tl.where(so_far <= tile, so_far, 0), 0)
        row, col = _tile_at(tile - first, end - begin, width, BLOCK_M, BLOCK_N, GROUP_M)
        rows_left, cols_left = (end - begin - row).to(tl.int32), (width - col).to(tl.int32)
        row += begin
        # Rows past the end repeat the last one, and are not stored: that is cheaper than a mask.
        x_ptrs = x_ptr + row * stride_x_row
        x_ptrs += (tl.minimum(ms, rows_left - 1).to(tl.int64) * stride_x_row)[:, None] + ks[None, :]
        w_ptrs = weight_ptr + tl.cast(expert, tl.int64) * stride_w_expert + col * stride_w_n + w_offsets
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for k in range(0, terms, BLOCK_K):
            if EVEN_K:
                x = tl.load(x_ptrs)
            else:
                x = tl.load(x_ptrs, mask=(ks < depth - k)[None, :], other=0.0)
            if EVEN_K and EVEN_N:
                w = tl.load(w_ptrs)
            elif EVEN_K:
                w = tl.load(w_ptrs, mask=(ns < cols_left)[None, :], other=0.0)
            else:
                w = tl.load(w_ptrs, mask=(ks < depth - k)[:, None] & (ns < cols_left)[None, :], other=0.0)
            acc = dotf(x, w, acc, PRECISION)
            x_ptrs += BLOCK_K
            w_ptrs += step_w
        if HAS_BIAS:
            bias_ptrs = bias_ptr + tl.cast(expert, tl.int64) * stride_bias_expert + col + ns
            bias = tl.load(bias_ptrs, mask=ns < tl.where(expert < num_experts, cols_left, 0), other=0.0)
            acc += bias.to(tl.float32)[None, :]
        y_ptrs = y_ptr + row * stride_y_row + col + (ms.to(tl.int64) * stride_y_row)[:, None] + ns[None, :]
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(ms < rows_left)[:, None] & (ns < cols_left)[None, :])


@triton.jit(do_not_specialize=_NEVER_SPECIALIZE, do_not_specialize_on_alignment=_NEVER_SPECIALIZE)
def _grouped_gemm_wgrad_kernel(
    a_ptr, b_ptr, offsets_ptr, out_ptr, stride_a_row, stride_b_row, stride_out_expert, stride_out_row,
    num_experts, height, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (programs,), any number of them; ``out`` is ``[num_experts, height, width]``, ``a^T b`` of each's rows.

    BLOCK_M and BLOCK_N are of ``out``; BLOCK_K rows of ``a`` and ``b`` are multiplied at a time.
    """
    ms, ns, ks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    tiles = tl.cdiv(height, BLOCK_M).to(tl.int64) * tl.cdiv(width, BLOCK_N)  # of an expert
    for tile in range(tl.program_id(0), num_experts * tiles, tl.num_programs(0)):
        expert = tile // tiles
        row, col = _tile_at(tile % tiles, height, width, BLOCK_M, BLOCK_N, GROUP_M)
        rows_left, cols_left = (height - row).to(tl.int32), (width - col).to(tl.int32)
        begin = tl.load(offsets_ptr + expert).to(tl.int32)
        end = tl.load(offsets_ptr + expert + 1).to(tl.int32)
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for k in range(begin, end, BLOCK_K):
            mask_a, mask_b = (ks < end - k)[None, :], (ks < end - k)[:, None]
            if not EVEN_M:
                mask_a = mask_a & (ms < rows_left)[:, None]
            if not EVEN_N:
                mask_b = mask_b & (ns < cols_left)[None, :]
            these = tl.cast(k, tl.int64) + ks
            a = tl.load(a_ptr + (these * stride_a_row)[None, :] + row + ms[:, None], mask=mask_a, other=0.0)
            b = tl.load(b_ptr + (these * stride_b_row)[:, None] + col + ns[None, :], mask=mask_b, other=0.0)
            acc = dotf(a, b, acc, PRECISION)
        out_ptrs = out_ptr + tl.cast(expert, tl.int64) * stride_out_expert + row * stride_out_row + col
        out_ptrs += (ms.to(tl.int64) * stride_out_row)[:, None] + ns[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(ms < rows_left)[:, None] & (ns < cols_left)[None, :])


@triton.jit(do_not_specialize=_NEVER_SPECIALIZE, do_not_specialize_on_alignment=_NEVER_SPECIALIZE)
def _grouped_gemm_dbias_kernel(dy_ptr, offsets_ptr, out_ptr, stride_dy_row, stride_out_expert, blocks, width,
                               ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Grid (experts times blocks of columns,); ``out`` is float32 ``[experts, width]``."""
    expert = tl.program_id(0) // blocks
    cols = tl.cast(tl.program_id(0) % blocks, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(offsets_ptr + expert).to(tl.int32)
    end = tl.load(offsets_ptr + expert + 1).to(tl.int32)
    acc = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for row in range(begin, end, ROWS):
        rows = row + tl.arange(0, ROWS)
        dy_ptrs = dy_ptr + (rows.to(tl.int64) * stride_dy_row)[:, None] + cols[None, :]
        acc += tl.load(dy_ptrs, mask=(rows < end)[:, None] & (cols < width)[None, :], other=0.0).to(tl.float32)
    tl.store(out_ptr + tl.cast(expert, tl.int64) * stride_out_expert + cols, tl.sum(acc, 0), mask=cols < width)


def launch_products(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, precision: str) -> Tensor:
    """Run the forward kernel, which is also that of the gradient of ``x``, with the weight transposed.

    Args:
        x: ``[M, K]``, last dimension of stride 1 (or a copy is made).
        weight: ``[E, K, N]`` in the dtype of ``x``, any strides.
        bias: ``[E, N]``, any floating dtype.
        offsets: ``[E + 1]``.
        precision: See :func:`~hetu_kernels._common.device.dot_precision`.

    Returns:
        ``[M, N]`` in the dtype of ``x``.
    """
    num_rows, (experts, depth, width) = x.shape[0], weight.shape
    y = alloc.empty((num_rows, width), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return y
    x, offsets = checks.last_dim_contiguous(x), offsets.contiguous()
    bias = None if bias is None else checks.last_dim_contiguous(bias)

    def launch(config: Config) -> None:
        block_m, block_n, block_k = (config.blocks[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        tiles = (cdiv(num_rows, block_m) + experts) * cdiv(width, block_n)  # or fewer
        with on_device(x):
            _grouped_gemm_fwd_kernel[(min(tiles, _programs(config, x)),)](
                x, weight, bias, offsets, y, x.stride(0), *weight.stride(),
                0 if bias is None else bias.stride(0), y.stride(0), num_rows, experts, depth, width,
                BLOCK_E=next_power_of_2(experts + 1), EVEN_K=depth % block_k == 0, EVEN_N=width % block_n == 0,
                HAS_BIAS=bias is not None, PRECISION=precision, **config.kwargs,
            )  # fmt: skip

    rows = cdiv(num_rows, max(1, experts))
    key = (x.dtype, depth, width, bucket(rows))
    aligned = depth % _ALIGNMENT == 0 and width % _ALIGNMENT == 0
    default = default_config("grouped_gemm_fwd", x, rows, aligned=aligned)
    fits = functools.partial(_fits, x)
    launch(tuned("grouped_gemm_fwd", key, x.device, default, _candidates(default), launch, fits))
    return y


def launch_weight_gradient(a: Tensor, b: Tensor, offsets: Tensor, dtype: torch.dtype, precision: str) -> Tensor:
    """Run the kernel of the gradient of the weight.

    Args:
        a: ``[M, P]``, last dimension of stride 1 (or a copy is made).
        b: ``[M, Q]`` in the dtype of ``a``, likewise.
        offsets: ``[E + 1]``.
        dtype: Of the result, which is summed up in float32 in any case.
        precision: See :func:`~hetu_kernels._common.device.dot_precision`.

    Returns:
        ``a^T b`` of each expert's rows, contiguous ``[E, P, Q]``; zeros for an expert without rows.
    """
    experts, height, width = offsets.shape[0] - 1, a.shape[1], b.shape[1]
    out = alloc.empty((experts, height, width), dtype=dtype, device=a.device)
    if experts == 0:
        return out
    a, b, offsets = checks.last_dim_contiguous(a), checks.last_dim_contiguous(b), offsets.contiguous()

    def launch(config: Config) -> None:
        block_m, block_n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
        tiles = experts * cdiv(height, block_m) * cdiv(width, block_n)
        with on_device(a):
            _grouped_gemm_wgrad_kernel[(min(tiles, _programs(config, a)),)](
                a, b, offsets, out, a.stride(0), b.stride(0), *out.stride()[:2], experts, height, width,
                EVEN_M=height % block_m == 0, EVEN_N=width % block_n == 0, PRECISION=precision, **config.kwargs,
            )  # fmt: skip

    rows = cdiv(a.shape[0], experts)
    key = (a.dtype, height, width, bucket(rows))
    aligned = height % _ALIGNMENT == 0 and width % _ALIGNMENT == 0
    default = default_config("grouped_gemm_wgrad", a, rows, aligned=aligned)
    fits = functools.partial(_fits, a)
    launch(tuned("grouped_gemm_wgrad", key, a.device, default, _candidates(default), launch, fits))
    return out


def launch_bias_gradient(dy: Tensor, offsets: Tensor) -> Tensor:
    """Sums of ``dy`` ``[M, N]`` over each expert's rows, float32 ``[E, N]``."""
    experts, width = offsets.shape[0] - 1, dy.shape[1]
    out = alloc.empty((experts, width), dtype=torch.float32, device=dy.device)
    if experts == 0:
        return out
    dy, offsets = checks.last_dim_contiguous(dy), offsets.contiguous()
    block = min(128, next_power_of_2(width))
    blocks = cdiv(width, block)
    with on_device(dy):
        _grouped_gemm_dbias_kernel[(experts * blocks,)](
            dy, offsets, out, dy.stride(0), out.stride(0), blocks, width, ROWS=16, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out


def default_config(kernel: str, x: Tensor, rows: int, *, aligned: bool) -> Config:
    """Large tiles that spill nothing on any target and fit into the device's shared memory.

    Args:
        kernel: ``"grouped_gemm_fwd"`` or ``"grouped_gemm_wgrad"``.
        x: An operand; its dtype and device count.
        rows: Mean number of rows of an expert.
        aligned: Rows begin where vectors may. Otherwise elements are loaded one by one, each with its address.
    """
    where = arch(x.device)
    if where == "interpreter":  # small, so that short groups have several tiles
        blocks = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 2}
        return Config(blocks, num_warps=4, num_stages=1)
    m, n, k, warps, stages = _default_tiles(kernel, x.dtype, where, rows, aligned)
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": _GROUP_M}
    while stages > 1 and not _fits(x, Config(blocks, warps, stages)):
        stages -= 1  # some devices of an architecture have less
    return Config(blocks, warps, stages)


def _default_tiles(
    kernel: str, dtype: torch.dtype, arch: str, rows: int, aligned: bool
) -> tuple[int, int, int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K, warps and stages, found with ``python -m hetu_kernels.aot``."""
    if not aligned:
        return 64, 64, 16 if dtype == torch.float32 else 32, 8, 2
    if dtype == torch.float32:  # three parts of each operand lie in registers
        return 64, 64, 32, 4, 2
    if kernel == "grouped_gemm_fwd" and rows <= 16:  # bound by reading weights
        return 16, 128, 128, 4, 4
    if kernel == "grouped_gemm_fwd" and rows <= 64:
        return 64, 128, 64, 4, 4
    if arch.startswith("gfx"):
        return 128, 128, 64, 8, 2
    if arch == "sm_90":
        return 128, 256, 64, 8, 3
    return 128, 128, 64, 8, 3


def shared_bytes(config: Config, element_size: int, arch: str) -> int:
    """An upper bound of the shared memory: tiles of both operands in every buffer, and after them one of the result.

    Only Hopper and Blackwell multiply in place: elsewhere the tiles of one stage have been copied to registers.
    """
    m, n, k = (config.blocks[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    buffers = config.num_stages if arch in ("sm_90", "sm_100") else max(1, config.num_stages - 1)
    return max(buffers * (m + n) * k, m * n) * element_size + 1024


def _fits(x: Tensor, config: Config) -> bool:
    return shared_bytes(config, x.element_size(), arch(x.device)) <= smem_limit(x.device)


def _candidates(default: Config) -> Sequence[Config]:
    """What tuning may try besides the default."""
    return [
        Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": _GROUP_M}, num_warps=warps, num_stages=stages)
        for m, n in ((16, 128), (64, 128), (64, 256), (128, 128), (128, 256))
        for k in (32, 64, 128)
        for warps in (4, 8)
        for stages in (2, 3, 4)
    ] + [default]


def _programs(config: Config, x: Tensor) -> int:
    """How many run at once: one of 8 warps on each multiprocessor, or two of 4 where shared memory suffices."""
    each = shared_bytes(config, x.element_size(), arch(x.device))
    return sm_count(x.device) * max(1, min(smem_limit(x.device) // each, 8 // config.num_warps))
