"""Reference of :func:`hetu_kernels.varlen_attention` in plain torch, for any floating dtype: one sequence at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from hetu_kernels.attention.tiling_mask import TilingMask


def varlen_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    allow_tf32: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`hetu_kernels.varlen_attention`."""
    mask = TilingMask.of(causal=causal, window=window)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = attend(q, k, v, cu_seqlens_q, cu_seqlens_k, mask, scale, softcap, alibi_slopes, bias, sinks)
    return (out, lse) if return_lse else out


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    mask: TilingMask,
    scale: float,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs ``[tokens, heads, head_dim]`` in the dtype of ``q``; log-sum-exps ``[heads, tokens]``, at least float32.

    In a narrow dtype the weights are rounded before they meet the values, as on tensor cores.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    tokens, heads, head_dim = q.shape
    groups = heads // k.shape[1]
    starts_q = cu_seqlens_q.tolist()
    starts_k = starts_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    outs, lses = [], []
    for b, (begin_q, end_q, begin_k, end_k) in enumerate(
        zip(starts_q[:-1], starts_q[1:], starts_k[:-1], starts_k[1:], strict=True)
    ):
        len_q, len_k = end_q - begin_q, end_k - begin_k
        # [heads, len, head_dim]; each key head serves a group of query heads
        query = q[begin_q:end_q].transpose(0, 1).to(wide)
        key, value = (t[begin_k:end_k].transpose(0, 1).repeat_interleave(groups, 0).to(wide) for t in (k, v))
        scores = query @ key.transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if alibi_slopes is not None:
            own = torch.arange(len_q, device=q.device)[:, None] + len_k - len_q
            distance = (own - torch.arange(len_k, device=q.device)).abs()
            scores = scores - alibi_slopes.to(wide)[:, None, None] * distance
        if bias is not None:
            block = bias[b if bias.shape[0] > 1 else 0]
            block = block[:, : len_q if bias.shape[2] > 1 else 1, : len_k if bias.shape[3] > 1 else 1]
            scores = scores + block.to(wide)
        hidden = ~mask.dense(len_q, len_k, q.device)
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(wide)[:, None, None].expand(-1, len_q, 1)], dim=2)
        # Not torch.softmax: a row that sees nothing has output 0 and gradient 0, not NaN.
        largest = scores.detach().amax(2, keepdim=True) if scores.shape[2] else scores.new_zeros(*scores.shape[:2], 1)
        largest = largest.masked_fill(largest == float("-inf"), 0.0)
        weights = torch.exp(scores - largest)
        total = weights.sum(2)
        nothing = total == 0
        total = total.masked_fill(nothing, 1.0)
        lse = (total.log() + largest.squeeze(2)).masked_fill(nothing, float("-inf"))
        weights = (weights / total[:, :, None])[:, :, :len_k]
        outs.append((weights.to(q.dtype).to(wide) @ value).transpose(0, 1).to(q.dtype))
        lses.append(lse)
    # Rows behind the last sequence belong to nothing.
    rest = tokens - starts_q[-1]
    outs.append(q.new_zeros(rest, heads, head_dim))
    lses.append(q.new_full((heads, rest), float("-inf"), dtype=wide))
    return torch.cat(outs), torch.cat(lses, dim=1)
