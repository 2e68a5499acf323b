"""Attention of a few new tokens over a paged cache of keys and values: decoding, and checking a tree of drafts.

    o = softmax(mask(c tanh(scale q k^T / c) - slope |i - n|)) v

for the last ``T`` tokens of each sequence, whose keys and values are in the cache already. Key ``n`` of a sequence lies
in page ``block_table[n // P]`` at slot ``n % P``; query row ``t`` has index ``i = len - T + t``. A row sees keys up to
its own, or, among the ``T`` newest, those that its bits of the tree mask name (SpecInfer, 2305.09781; Medusa,
2401.10774). Everything else is read once and not masked at all.

One step reads the whole cache to produce a few rows, so the keys of a sequence are split among programs, each of which
leaves its normalized partial result in float32 and the logarithm of its sum of exponentials; a second kernel merges
them:

    lse = log sum_s exp(lse_s),    o = sum_s exp(lse_s - lse) o_s

The online softmax is FlashAttention's (2205.14135). The query heads that share a key-value head are rows of the same
matrix product. Scores, sums and results are in float32; weights are rounded to the dtype of ``v`` for its product.

Keys and values that no row sees are not read, or not used, whatever they are. A value that only some rows of a sequence
see has weight 0 in the others, as in torch's attention: if it is infinite or NaN, they are NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hetu_kernels._common import checks
from hetu_kernels._common.device import may_read, use_triton
from hetu_kernels.attention._decode_kernels import LONG_WINDOW, launch_paged_decode_attention
from hetu_kernels.attention.decode_ref import paged_decode_attention_reference

MAX_HEAD_DIM = 256
MAX_SPLITS = 256
_PAGE_SIZES = tuple(2**i for i in range(17))


@torch.library.custom_op("lightning_hetu::paged_decode_attention_fwd", mutates_args=())
def paged_decode_attention_fwd(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lens: Tensor,
    scale: float,
    tree_mask: Tensor | None,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    num_splits: int | None,
) -> tuple[Tensor, Tensor]:
    """Returns the result like ``q`` ``[B, T, H, D]`` and the log-sum-exp ``[B, T, H]``, at least float32."""
    if may_read(block_table):
        used = _pages_in_use(block_table, lens, k_cache.shape[1], q.shape[1], window)
        checks.indices(
            "paged_decode_attention", "block_table", block_table, k_cache.shape[0], "the pages of k_cache", where=used
        )
    if use_triton(q, needs_dot=True) and q.dtype != torch.float64:
        return launch_paged_decode_attention(
            q, k_cache, v_cache, block_table, lens, scale, tree_mask, window, softcap, alibi_slopes, num_splits
        )
    out, lse = paged_decode_attention_reference(
        q, k_cache, v_cache, block_table, lens,
        scale=scale, tree_mask=tree_mask, window=window, softcap=softcap, alibi_slopes=alibi_slopes, return_lse=True,
    )  # fmt: skip
    return out.contiguous(), lse.contiguous()


def _pages_in_use(block_table: Tensor, lens: Tensor, page_size: int, tokens: int, window: int | None) -> Tensor:
    """Which entries of the block table are read: those of pages with a key that is within the window of any row."""
    length = lens.long().clamp(0, block_table.shape[1] * page_size)[:, None]
    page = torch.arange(block_table.shape[1], device=lens.device)
    used = page * page_size < length
    if window is not None:
        used = used & ((page + 1) * page_size > length - tokens - min(window, LONG_WINDOW) + 1)
    return used


@paged_decode_attention_fwd.register_fake
def _(q, k_cache, v_cache, block_table, lens, scale, tree_mask, window, softcap, alibi_slopes, num_splits):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


def paged_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lens: Tensor,
    *,
    scale: float | None = None,
    tree_mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest tokens of each sequence over its pages of keys and values.

    For inference: it has no gradients. No value is read back from the device, so it can be captured in a CUDA graph.
    For the same reason the entries of ``block_table`` are checked on the CPU only, unless ``LIGHTNING_HETU_CHECK=1``;
    on a GPU, one that is no page of the cache reads beside it.

    Args:
        q: Queries of the ``T`` newest tokens of each sequence, ``[B, T, H, D]``; ``[B, H, D]`` for one token. ``D`` is
            at most 256.
        k_cache: Keys ``[pages, P, Hkv, D]`` in the dtype of ``q``, those of the newest tokens included. ``P`` is a
            power of two, ``H`` a multiple of ``Hkv``. Any strides; nothing is copied.
        v_cache: Values, shaped like ``k_cache``.
        block_table: Pages of each sequence in order ``[B, max_pages]``, int32 or int64. Entries behind a sequence's
            last page, and those of pages wholly before the window, are not read.
        lens: Tokens of each sequence in the cache, the newest included, ``[B]``, int32 or int64. More than
            ``max_pages * P`` counts as that many. Of a sequence with fewer than ``T``, the last rows of ``q`` are its
            tokens.
        scale: Factor of the scores; ``1 / sqrt(D)`` unless told.
        tree_mask: Which of the ``T`` newest tokens each of them sees: bit ``j`` of ``[B, T]`` int64 is set where row
            ``t`` sees token ``j``, its own included. ``[B, T, 2]`` for up to 128 tokens, the second word for tokens
            from 64. All older keys are seen. Without it, the newest tokens see each other causally.
        window: Of the keys up to its own, a row sees the last ``window``. Distances are those of positions in the
            cache, not of depths in a tree: a draft that is ``window`` or more slots behind is not seen even where the
            tree mask has its bit.
        softcap: Bound ``c`` of the scores, ``c * tanh(s / c)``; finite.
        alibi_slopes: Slope per head ``[H]``; each score loses the slope times the distance in the cache.
        num_splits: Parts that a sequence's keys are split into, 1 to 256. Unless told, enough for the device by ``B``,
            ``T``, ``Hkv`` and ``max_pages``. A number of one's own makes a sequence's result independent of the others
            in the batch, to the bit.
        return_lse: Return the logarithm of the sum of the exponentials of the scores, too.

    Returns:
        The result, shaped like ``q`` and contiguous. With ``return_lse``, also float32 ``[B, T, H]`` (``[B, H]``). A
        row that sees nothing gets 0 and ``-inf``.

    Raises:
        ValueError: If shapes, devices, options or (on the CPU) pages do not fit together.
        TypeError: If a dtype does not, or an argument is of the wrong type.
        RuntimeError: If a tensor requires a gradient.
    """
    op = "paged_decode_attention"
    checks.tensors(op, q=q, k_cache=k_cache, v_cache=v_cache, block_table=block_table, lens=lens)
    checks.same_device(
        op, q=q, k_cache=k_cache, v_cache=v_cache, block_table=block_table, lens=lens, tree_mask=tree_mask,
        alibi_slopes=alibi_slopes,
    )  # fmt: skip
    checks.not_distributed(op, q=q, k_cache=k_cache, v_cache=v_cache)
    checks.floating(op, q=q, alibi_slopes=alibi_slopes)
    checks.same_dtype(op, q=q, k_cache=k_cache, v_cache=v_cache)
    checks.integer(op, block_table=block_table, lens=lens)
    if q.dim() not in (3, 4) or not 1 <= q.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(
            f"{op}: q has shape {list(q.shape)}, expected [B, T, H, D] or [B, H, D] with D from 1 to {MAX_HEAD_DIM}."
        )
    if torch.is_grad_enabled():
        for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("alibi_slopes", alibi_slopes)):
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(f"{op}: {name} requires a gradient, there is none: call it under torch.no_grad().")
    one_token = q.dim() == 3
    queries = q.unsqueeze(1) if one_token else q
    batch, tokens, heads, dim = queries.shape
    _check_cache(op, k_cache, v_cache, heads, dim)
    checks.shape(op, "block_table", block_table, (batch, None), "pages of each sequence")
    checks.shape(op, "lens", lens, (batch,), "one per sequence")
    checks.shape(op, "alibi_slopes", alibi_slopes, (heads,), "one per head of q")
    if tree_mask is not None:
        _check_tree_mask(op, tree_mask, batch, tokens)
    if window is not None:
        window = checks.whole(op, "window", window, at_least=1, meaning=", or None for no window")
    if scale is not None:
        scale = checks.number(op, "scale", scale)
    if softcap is not None:
        softcap = checks.number(op, "softcap", softcap, sign="positive", meaning=", or None for no cap")
    if num_splits is not None:
        num_splits = checks.whole(
            op, "num_splits", num_splits, at_least=1, at_most=MAX_SPLITS, meaning=", or None to choose"
        )
    out, lse = paged_decode_attention_fwd(
        queries, k_cache, v_cache, block_table, lens, 1 / math.sqrt(dim) if scale is None else scale, tree_mask, window,
        softcap, alibi_slopes, num_splits,
    )  # fmt: skip
    if one_token:
        out, lse = out.squeeze(1), lse.squeeze(1)
    return (out, lse) if return_lse else out


def _check_cache(op: str, k_cache: Tensor, v_cache: Tensor, heads: int, dim: int) -> None:
    checks.shape(op, "k_cache", k_cache, (None, None, None, dim), "pages, tokens of a page, heads, D of q")
    checks.shape(op, "v_cache", v_cache, tuple(k_cache.shape), "that of k_cache")
    page_size, kv_heads = k_cache.shape[1:3]
    if page_size not in _PAGE_SIZES:
        raise ValueError(f"{op}: k_cache has pages of {page_size} tokens, expected a power of two.")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{op}: q has {heads} heads, expected a multiple of the {kv_heads} of k_cache.")


def _check_tree_mask(op: str, tree_mask: Tensor, batch: int, tokens: int) -> None:
    if tree_mask.dtype != torch.int64:
        raise TypeError(f"{op}: tree_mask has dtype {tree_mask.dtype}, expected int64.")
    if tree_mask.dim() == 3 and tree_mask.shape[2] in (1, 2):
        checks.shape(op, "tree_mask", tree_mask, (batch, tokens, None), "words of each token of q")
        bits = 64 * tree_mask.shape[2]
    else:
        checks.shape(op, "tree_mask", tree_mask, (batch, tokens), "one word per token of q")
        bits = 64
    if tokens > bits:
        raise ValueError(f"{op}: q has {tokens} tokens, expected at most the {bits} bits of tree_mask.")
