"""Reference of :func:`hetu_kernels.paged_decode_attention` in plain torch, for any floating dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def paged_decode_attention_reference(
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
    """See :func:`hetu_kernels.paged_decode_attention`; ``num_splits`` changes nothing here.

    Nothing is read back from the device here either. It gathers as many keys as the block table has room for.
    """
    one_token = q.dim() == 3
    queries = q.unsqueeze(1) if one_token else q
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, tokens, heads, dim = queries.shape
    if k_cache.shape[0] == 0:
        block_table = block_table[:, :0]
    visible, distance = visibility(tokens, block_table.shape[1] * k_cache.shape[1], lens, tree_mask, window)
    keys, values = (gathered(cache, block_table, visible.any(1)).to(wide) for cache in (k_cache, v_cache))
    kv_heads = keys.shape[2]
    grouped = queries.to(wide).unflatten(2, (kv_heads, heads // max(kv_heads, 1)))
    scores = torch.einsum("btkgd,bnkd->btkgn", grouped, keys).flatten(2, 3)
    scores = scores * (1 / math.sqrt(dim) if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(wide)[:, None] * distance.abs()[:, :, None]
    scores = scores.masked_fill(~visible[:, :, None], -math.inf)
    # A column of -inf gives rows that see nothing, and an empty cache, a maximum.
    peak = torch.nn.functional.pad(scores, (0, 1), value=-math.inf).amax(-1, keepdim=True)
    peak = torch.where(peak == -math.inf, 0.0, peak)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    weights = weights.to(q.dtype).to(wide).unflatten(2, (kv_heads, heads // max(kv_heads, 1)))
    out = torch.einsum("btkgn,bnkd->btkgd", weights, values).flatten(2, 3)
    out = (out / torch.where(total == 0, 1.0, total)).to(q.dtype)
    lse = (peak + torch.log(total)).squeeze(-1)
    if one_token:
        out, lse = out.squeeze(1), lse.squeeze(1)
    return (out, lse) if return_lse else out


def visibility(
    tokens: int, capacity: int, lens: Tensor, tree_mask: Tensor | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """Which of ``capacity`` keys each of the newest ``tokens`` sees, and how far they are behind it.

    Returns:
        A boolean and an int64 tensor, both ``[B, tokens, capacity]``.
    """
    length = lens.long().clamp(0, capacity)[:, None, None]
    key = torch.arange(capacity, device=lens.device)
    distance = length - tokens + torch.arange(tokens, device=lens.device)[:, None] - key
    visible = key < length
    if tree_mask is None:
        visible = visible & (distance >= 0)
    else:
        words = tree_mask if tree_mask.dim() == 3 else tree_mask.unsqueeze(-1)
        bits = (words[..., None] >> torch.arange(64, device=lens.device)) & 1
        bits = torch.nn.functional.pad(bits.flatten(2), (1, 0), value=1)  # the first one for all older keys
        draft = (key - (length - tokens) + 1).clamp(0, bits.shape[-1] - 1)
        visible = visible & bits.gather(2, draft.expand(-1, tokens, -1)).bool()
    if window is not None:
        visible = visible & (distance < window)
    return visible, distance


def gathered(cache: Tensor, block_table: Tensor, wanted: Tensor) -> Tensor:
    """The keys or values of each sequence, ``[B, capacity, heads, D]``; 0 where not wanted, whatever is in the cache.

    Args:
        cache: ``[pages, P, heads, D]``.
        block_table: ``[B, max_pages]``; an entry is not read where no key of its page is wanted.
        wanted: ``[B, max_pages * P]``.
    """
    pages = torch.where(wanted.unflatten(1, (block_table.shape[1], cache.shape[1])).any(2), block_table, 0)
    return cache[pages.long()].flatten(1, 2).masked_fill(~wanted[:, :, None, None], 0)
