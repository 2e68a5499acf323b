"""The tiling mask of FastAttention (2410.16663, section 4.2): which blocks of a mask need no mask.

A sequence's mask is never built. Whether a block of rows and keys is kept whole (FULL), dropped whole (EMPTY) or needs
element-wise comparison (PARTIAL) follows from its position alone, for every mask that is a band around the diagonal:

    key j is visible to row i    <=>    -left <= j - (i + len_k - len_q) <= right

Causal attention is ``right = 0``; a sliding window of w keys is ``left = w - 1``; documents packed into one batch are
sequences of their own. Row 0 is aligned so that the last row sees the last key (bottom right), which is what a query
appended to a cache means. Kernels walk the keys of a block of rows in three phases: PARTIAL at the window's left edge,
FULL with no mask code at all, PARTIAL at the diagonal and the ragged end. EMPTY blocks are never visited. Memory: none.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from hetu_kernels._common import checks
from hetu_kernels._common.triton_utils import tl, triton

UNLIMITED = -1


class BlockClass(enum.Enum):
    """What a block of the mask needs."""

    EMPTY = "empty"
    PARTIAL = "partial"
    FULL = "full"


@dataclass(frozen=True)
class TilingMask:
    """A band mask around the bottom-right aligned diagonal.

    Args:
        left: Number of keys visible before a row's own position; -1 for all.
        right: Number of keys visible behind a row's own position; -1 for all, 0 for causal.

    Raises:
        ValueError: If one of them is below -1.
    """

    left: int = UNLIMITED
    right: int = UNLIMITED

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            if getattr(self, name) < UNLIMITED:
                raise ValueError(f"{name}={getattr(self, name)}: expected a number of keys, or -1 for all of them.")

    @classmethod
    def of(
        cls,
        *,
        causal: bool = False,
        window: int | tuple[int | None, int | None] | None = None,
        op: str = "TilingMask",
    ) -> TilingMask:
        """From the arguments of an attention function.

        Args:
            causal: A row sees no key behind its own position.
            window: An integer ``w``: of the keys up to its own position, a row sees the last ``w``, and all keys behind
                its own unless ``causal``. A pair ``(left, right)``: so many keys before and behind its own; None for
                all.
            op: Whose arguments they are, for errors.

        Raises:
            ValueError: If a window is not positive, or a side of it negative.
            TypeError: If a window is neither an integer nor a pair of them.
        """
        left, right = UNLIMITED, UNLIMITED
        if isinstance(window, tuple):
            if len(window) != 2:
                raise ValueError(f"{op}: window={window!r}, expected a pair (left, right), each at least 0 or None.")
            left, right = (
                UNLIMITED if side is None else checks.whole(op, f"window[{i}]", side, at_least=0, meaning=" or None")
                for i, side in enumerate(window)
            )
        elif window is not None:
            meaning = " (a token's own key), a pair (left, right) as a tuple, or None"
            left = checks.whole(op, "window", window, at_least=1, meaning=meaning) - 1
        return cls(left, 0 if causal else right)

    def dense(self, len_q: int, len_k: int, device: torch.device | None = None) -> Tensor:
        """The whole mask, bool ``[len_q, len_k]``, True where visible. For references and tests."""
        offset = torch.arange(len_k, device=device) - (torch.arange(len_q, device=device)[:, None] + len_k - len_q)
        visible = torch.ones(len_q, len_k, dtype=torch.bool, device=device)
        if self.left != UNLIMITED:
            visible &= offset >= -self.left
        if self.right != UNLIMITED:
            visible &= offset <= self.right
        return visible

    def block_class(self, rows: range, keys: range, len_q: int, len_k: int) -> BlockClass:
        """Class of the block of ``rows`` and ``keys``, by arithmetic; what lies outside the sequence is not visible.

        Args:
            rows: Consecutive rows, the first below ``len_q``.
            keys: Consecutive keys, the first below ``len_k``.
            len_q: Rows of the sequence.
            len_k: Keys of the sequence.
        """
        last_row, last_key = min(rows.stop, len_q) - 1, min(keys.stop, len_k) - 1
        shift = len_k - len_q
        # The offset j - (i + shift) of the block's corners: smallest at (last row, first key).
        smallest, largest = keys.start - last_row - shift, last_key - rows.start - shift
        left = -self.left if self.left != UNLIMITED else smallest
        right = self.right if self.right != UNLIMITED else largest
        if largest < left or smallest > right:
            return BlockClass.EMPTY
        # A row past the end may be computed, it is never stored; a key past the end would be counted.
        if smallest >= left and largest <= right and keys.stop <= len_k:
            return BlockClass.FULL
        return BlockClass.PARTIAL


@triton.jit
def key_phases(row_start, len_q, len_k, left, right,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
               HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):  # fmt: skip
    """Where the keys of rows ``[row_start, row_start + BLOCK_M)`` begin, are FULL, stop being FULL, and end.

    The first three are multiples of BLOCK_N; blocks before the second and from the third on are PARTIAL.
    """
    shift = len_k - len_q
    last_row = tl.minimum(row_start + BLOCK_M, len_q) - 1
    begin = 0
    full_begin = 0
    end = len_k
    full_end = len_k // BLOCK_N * BLOCK_N
    if HAS_RIGHT:
        end = tl.minimum(end, tl.maximum(last_row + shift + right + 1, 0))
        full_end = tl.minimum(full_end, tl.maximum(row_start + shift + right + 1, 0) // BLOCK_N * BLOCK_N)
    if HAS_LEFT:
        begin = tl.maximum(row_start + shift - left, 0) // BLOCK_N * BLOCK_N
        full_begin = tl.cdiv(tl.maximum(last_row + shift - left, 0), BLOCK_N) * BLOCK_N
        full_begin = tl.minimum(full_begin, tl.cdiv(end, BLOCK_N) * BLOCK_N)
    full_end = tl.maximum(full_end, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def row_phases(key_start, len_q, len_k, left, right,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
               HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):  # fmt: skip
    """As :func:`key_phases`, for the rows that see keys ``[key_start, key_start + BLOCK_N)``.

    Rows and keys past the end of the sequence need no mask here: such rows weigh nothing, such keys are not stored.
    """
    shift = len_k - len_q
    last_key = tl.minimum(key_start + BLOCK_N, len_k) - 1
    begin = 0
    full_begin = 0
    end = len_q
    full_end = tl.cdiv(len_q, BLOCK_M) * BLOCK_M
    if HAS_LEFT:
        end = tl.minimum(end, tl.maximum(last_key - shift + left + 1, 0))
        full_end = tl.minimum(full_end, tl.maximum(key_start - shift + left + 1, 0) // BLOCK_M * BLOCK_M)
    if HAS_RIGHT:
        begin = tl.maximum(key_start - shift - right, 0) // BLOCK_M * BLOCK_M
        full_begin = tl.cdiv(tl.maximum(last_key - shift - right, 0), BLOCK_M) * BLOCK_M
        full_begin = tl.minimum(full_begin, tl.cdiv(end, BLOCK_M) * BLOCK_M)
    full_end = tl.maximum(full_end, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def visible(i, j, len_q, len_k, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Element-wise mask of a PARTIAL block; ``i`` and ``j`` are row and key numbers that broadcast to the block."""
    offset = j - (i + len_k - len_q)
    mask = (j < len_k) & (i < len_q)
    if HAS_LEFT:
        mask = mask & (offset >= -left)
    if HAS_RIGHT:
        mask = mask & (offset <= right)
    return mask
