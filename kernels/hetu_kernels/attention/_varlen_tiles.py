"""What forward and backward of :func:`hetu_kernels.varlen_attention` share: tiles, logits, options, configurations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hetu_kernels._common.config import Config, bucket, tuned
from hetu_kernels._common.device import arch
from hetu_kernels._common.triton_utils import LOG2E, dotf, next_power_of_2, tanh, tl, triton
from hetu_kernels.attention.tiling_mask import UNLIMITED, TilingMask, visible

NEVER_SPECIALIZE = [
    "num_sequences", "blocks_per_sequence", "num_tokens_q", "num_tokens_k", "left", "right",
    "bias_rows", "bias_keys", "max_q", "max_k",
]  # fmt: skip


@triton.jit
def load_tile(base_ptr, stride_token, rows, num_rows, cols, D: tl.constexpr, BLOCK_D: tl.constexpr,
               BOUNDED: tl.constexpr):  # fmt: skip
    """Rows of a ``[tokens, D]`` matrix as ``[rows, BLOCK_D]``, zeros outside; BOUNDED rows are known to exist."""
    pointers = base_ptr + (rows.to(tl.int64) * stride_token)[:, None] + cols[None, :]
    if BOUNDED:
        if D == BLOCK_D:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(cols < D)[None, :], other=0.0)
    else:
        if D == BLOCK_D:
            return tl.load(pointers, mask=(rows < num_rows)[:, None], other=0.0)
        else:
            return tl.load(pointers, mask=(rows < num_rows)[:, None] & (cols < D)[None, :], other=0.0)


@triton.jit
def store_tile(base_ptr, stride_token, rows, num_rows, cols, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The reverse of :func:`load_tile`, converted to the dtype of the destination."""
    mask = (rows < num_rows)[:, None]
    if D != BLOCK_D:
        mask = mask & (cols < D)[None, :]
    pointers = base_ptr + (rows.to(tl.int64) * stride_token)[:, None] + cols[None, :]
    tl.store(pointers, tile.to(base_ptr.dtype.element_ty), mask=mask)


@triton.jit
def products(a, b, a_ptr, stride_a, rows_a, num_rows_a, b_ptr, stride_b, rows_b, num_rows_b,
             D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``a b^T`` of two tiles. CHUNK_D < BLOCK_D loads them again, by that many columns, and keeps none in registers."""
    acc = tl.zeros([rows_a.shape[0], rows_b.shape[0]], dtype=tl.float32)
    if CHUNK_D == BLOCK_D:
        return dotf(a, tl.trans(b), acc, PRECISION)
    else:
        for col in range(0, BLOCK_D, CHUNK_D):
            cols = col + tl.arange(0, CHUNK_D)
            part_a = load_tile(a_ptr, stride_a, rows_a, num_rows_a, cols, D, BLOCK_D, False)
            part_b = load_tile(b_ptr, stride_b, rows_b, num_rows_b, cols, D, BLOCK_D, False)
            acc = dotf(part_a, tl.trans(part_b), acc, PRECISION)
        return acc


@triton.jit
def logits(product, i, j, len_q, len_k, left, right, scale, softcap, slope,
            bias_ptr, stride_bias_q, stride_bias_k,
            MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
            HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr):  # fmt: skip
    """Logits in units of log 2 from the products q.k, and the derivative of the soft cap (1 without one).

    ``i`` and ``j`` are row and key numbers that broadcast to the shape of ``product``, in either order.
    """
    derivative = 1.0
    if HAS_SOFTCAP:
        capped = tanh(product * (scale / softcap))
        derivative = 1.0 - capped * capped
        s = capped * (softcap * LOG2E)
    else:
        s = product * (scale * LOG2E)
    if HAS_ALIBI:
        s -= slope * LOG2E * tl.abs(i + len_k - len_q - j).to(tl.float32)
    if HAS_BIAS:
        pointers = bias_ptr + tl.cast(i, tl.int64) * stride_bias_q + tl.cast(j, tl.int64) * stride_bias_k
        s += tl.load(pointers, mask=(i < len_q) & (j < len_k), other=0.0).to(tl.float32) * LOG2E
    if MASKED:
        s = tl.where(visible(i, j, len_q, len_k, left, right, HAS_LEFT, HAS_RIGHT), s, float("-inf"))
    return s, derivative


@dataclass(frozen=True)
class Options:
    """What an attention call does besides multiplying: everything that is neither a tensor nor a size."""

    scale: float
    mask: TilingMask
    softcap: float | None
    precision: str

    @property
    def runtime(self) -> tuple[int, int, float, float]:
        """Arguments ``left, right, scale, softcap`` of a kernel."""
        return self.mask.left, self.mask.right, self.scale, 1.0 if self.softcap is None else self.softcap

    @property
    def flags(self) -> dict[str, object]:
        """Compile-time arguments of a kernel."""
        return {
            "HAS_LEFT": self.mask.left != UNLIMITED,
            "HAS_RIGHT": self.mask.right != UNLIMITED,
            "HAS_SOFTCAP": self.softcap is not None,
            "PRECISION": self.precision,
        }


def bias_strides(bias: Tensor | None) -> tuple[int, int, int, int]:
    """Strides over sequences, heads, rows and keys: 0 where the bias is broadcast."""
    if bias is None:
        return 0, 0, 0, 0
    a, b, c, d = (0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True))
    return a, b, c, d


def padded_head_dim(head_dim: int) -> int:
    return max(16, next_power_of_2(head_dim))


def chunk_of_head_dim(q: Tensor) -> int:
    """Columns that products load at a time: all, but of wide float32, whose parts in TF32 take twice the registers."""
    block_d = padded_head_dim(q.shape[-1])
    return 64 if block_d > 64 and q.element_size() > 2 else block_d


def config_of(kernel: str, q: Tensor, longest: int, launch: object, *, heavy: bool) -> Config:
    """Block sizes of a kernel, by dtype, head dimension, what it does to logits, and architecture."""
    block_d = padded_head_dim(q.shape[-1])
    padded = block_d != q.shape[-1]
    default = default_config(kernel, block_d, q.dtype, arch(q.device), heavy=heavy, padded=padded)
    candidates = [] if launch is None else _candidates(kernel, default)
    key = (q.dtype, q.shape[-1], heavy, bucket(longest))
    return tuned(kernel, key, q.device, default, candidates, launch)  # type: ignore[arg-type]


def default_config(kernel: str, block_d: int, dtype: torch.dtype, arch: str, *, heavy: bool, padded: bool) -> Config:
    """Large tiles that spill nothing on sm_90 and fit into the shared memory of ``arch``.

    Args:
        kernel: Name of the kernel.
        block_d: Head dimension, padded.
        dtype: Dtype of the operands.
        arch: Architecture.
        heavy: Logits get a bias, a slope or a soft cap. The 64-bit addresses of a tile of the bias alone take as many
            registers as two tiles of logits.
        padded: The head dimension is none of the padded ones.
    """
    if arch == "interpreter":  # small, so that short sequences have blocks of every class
        blocks = {"BLOCK_M": 16, "BLOCK_N": 32 if kernel == "varlen_fwd" else 16}
        config = Config(blocks, num_warps=4, num_stages=1)
    else:
        m, n, warps, stages = _default_tiles(kernel, max(64, block_d), dtype, arch, heavy)
        if padded:  # the masks of columns take registers
            if kernel == "varlen_bwd_dkv":
                n, stages = (min(n, 64) if arch == "sm_90" else n), 1
            elif kernel == "varlen_fwd" and heavy:
                n = min(n, 32)
        config = Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)
    if kernel == "varlen_fwd":
        return Config({**config.blocks, "SUBTILES": 1}, config.num_warps, config.num_stages)
    return config


def _default_tiles(kernel: str, size: int, dtype: torch.dtype, arch: str, heavy: bool) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_N, warps and stages, found with ``python -m hetu_kernels.aot``."""
    if dtype == torch.float32:
        if kernel == "varlen_bwd_dkv":
            return (16, 32, 8, 1) if size == 256 else (32, 16, 8, 1)
        if kernel == "varlen_bwd_dbias" and size <= 128:
            return 32, 16, 8, 1
        return (32, 32, 8, 1) if size == 64 else (16, 32, 8, 1)
    if kernel == "varlen_bwd_dbias":
        return (64, 64, 8, 1) if size <= 128 else (16, 32, 8, 1)
    if arch.startswith("gfx"):  # 512 registers a thread with 4 warps, 256 with 8
        return {
            ("varlen_fwd", 64): (128, 64, 4, 1),
            ("varlen_fwd", 128): (64, 64, 4, 1),
            ("varlen_fwd", 256): (64, 32, 4, 1),
            ("varlen_bwd_dkv", 64): (64, 64, 4, 1),
            ("varlen_bwd_dkv", 128): (32, 128, 4, 1),
            ("varlen_bwd_dkv", 256): (32, 64, 4, 1),
            ("varlen_bwd_dq", 64): (64, 64, 4, 1),
            ("varlen_bwd_dq", 128): (64, 32, 4, 1),
            ("varlen_bwd_dq", 256): (32, 32, 4, 1),
        }[kernel, size]
    if heavy:
        return {
            ("varlen_fwd", 64): (64, 64, 8, 1),
            ("varlen_fwd", 128): (64, 64, 8, 1),
            ("varlen_fwd", 256): (32, 32, 8, 1),
            ("varlen_bwd_dkv", 64): (32, 128, 8, 1),
            ("varlen_bwd_dkv", 128): (16, 64, 8, 1),
            ("varlen_bwd_dkv", 256): (64, 16, 8, 1),
            ("varlen_bwd_dq", 64): (64, 32, 8, 1),
            ("varlen_bwd_dq", 128): (64, 32, 8, 1),
            ("varlen_bwd_dq", 256): (32, 32, 8, 1),
        }[kernel, size]
    if (
        kernel == "varlen_bwd_dkv" and arch != "sm_90"
    ):  # operands of their products lie in registers, or in other memory
        if arch == "sm_100":
            return (32, 64, 8, 1) if size == 256 else (32, 128, 8, 1)
        return (32, 64, 8, 2) if size <= 128 else (32, 64, 8, 1)
    return {
        ("varlen_fwd", 64): (128, 64, 4, 3),
        ("varlen_fwd", 128): (128, 64, 8, 3),
        ("varlen_fwd", 256): (64, 32, 8, 2),
        ("varlen_bwd_dkv", 64): (32, 128, 8, 2),
        ("varlen_bwd_dkv", 128): (32, 128, 8, 2),
        ("varlen_bwd_dkv", 256): (64, 32, 8, 1),
        ("varlen_bwd_dq", 64): (128, 64, 8, 2),
        ("varlen_bwd_dq", 128): (128, 64, 8, 2),
        ("varlen_bwd_dq", 256): (64, 16, 8, 2),
    }[kernel, size]


def _candidates(kernel: str, default: Config) -> list[Config]:
    """What tuning may try besides the default."""
    subtiles = [1, 2] if kernel == "varlen_fwd" else [None]
    return [
        Config(
            {"BLOCK_M": m, "BLOCK_N": n, **({} if subtile is None else {"SUBTILES": subtile})},
            num_warps=w,
            num_stages=s,
        )
        for m, n in ((64, 64), (128, 64), (128, 128), (64, 128), (32, 128))
        for w in (4, 8)
        for s in (1, 2, 3)
        for subtile in subtiles
    ] + [default]
