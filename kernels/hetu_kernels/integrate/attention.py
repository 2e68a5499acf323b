"""Attention on ordinary batches ``[batch, heads, tokens, head_dim]``, padded or not, by the packed kernel.

A module can make its attention exchangeable by calling ``self.attention_function(query, key, value, causal=...)``, an
attribute of its class that holds such a function. :func:`~hetu_kernels.integrate.use_kernels` puts
:func:`padded_attention` there.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

import hetu_kernels
from hetu_kernels.attention.tiling_mask import TilingMask
from hetu_kernels.norm_act.pack import PaddingLayout

logger = logging.getLogger("hetu_kernels")

Window = int | tuple[int | None, int | None] | None


def padded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    padding: Tensor | None = None,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of a batch of sequences of one padded length.

    Args:
        query: ``[batch, heads, tokens_q, head_dim]``, any strides.
        key: ``[batch, kv_heads, tokens_k, head_dim]``. Queries are the last of the keys' positions.
        value: Shaped like ``key``.
        causal: A token sees none behind it.
        padding: bool ``[batch, tokens_k]``, False where there is no token; None where there are tokens everywhere. With
            it, ``tokens_q`` is ``tokens_k``, or rows of ``padding`` end with their queries (left padding).
        window: As for :func:`~hetu_kernels.varlen_attention`.
        scale: Factor of the products; ``head_dim ** -0.5`` unless told.
        softcap: Bound of the logits.
        sinks: Extra logit per head.
        dropout: Probability of dropping a weight. The kernel has none: torch's attention then runs on a dense mask.

    Returns:
        ``[batch, heads, tokens_q, head_dim]``; zeros for queries that are padding.
    """
    if dropout:
        return _with_dropout(query, key, value, causal, padding, window, scale, softcap, sinks, dropout)
    batch, _, tokens_q, _ = query.shape
    tokens_k = key.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    options: dict[str, Any] = {"causal": causal, "window": window, "scale": scale, "softcap": softcap, "sinks": sinks}
    if padding is None:
        starts = torch.arange(batch + 1, device=query.device, dtype=torch.int32)
        out: Tensor = hetu_kernels.varlen_attention(  # type: ignore[assignment]  # no log-sum-exps are asked for
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), starts * tokens_q, starts * tokens_k,
            max_seqlen_q=tokens_q, max_seqlen_k=tokens_k, **options,
        )  # fmt: skip
        return out.view(batch, tokens_q, *out.shape[1:]).transpose(1, 2)
    layout_k = _layout(padding)
    layout_q = layout_k if tokens_q == tokens_k else _layout(padding[:, -tokens_q:])
    out = hetu_kernels.varlen_attention(  # type: ignore[assignment]
        hetu_kernels.pack(q, layout_q), hetu_kernels.pack(k, layout_k), hetu_kernels.pack(v, layout_k),
        layout_q.cu_seqlens, layout_k.cu_seqlens, max_seqlen_q=tokens_q, max_seqlen_k=tokens_k, **options,
    )  # fmt: skip
    return hetu_kernels.unpack(out, layout_q).transpose(1, 2)


_layouts: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _layout(padding: Tensor) -> PaddingLayout:
    """The layout of a mask; all layers of a model are given the same one."""
    if torch.compiler.is_compiling():
        return hetu_kernels.padding_layout(padding)
    found = _layouts.get(padding)
    if found is None or found[0] != padding._version:
        found = _layouts[padding] = (padding._version, hetu_kernels.padding_layout(padding))
    return found[1]


def _with_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    padding: Tensor | None,
    window: Window,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """torch's attention on a dense mask."""
    if softcap is not None or sinks is not None:
        raise ValueError(
            f"padded_attention: dropout={dropout} together with softcap or sinks: torch's attention, which would"
            " drop, does not know them. Set the attention dropout to 0.0."
        )
    _tell_once("attention dropout is on: torch's attention runs instead of the kernel. Set it to 0.0 for the kernel.")
    visible = TilingMask.of(causal=causal, window=window).dense(query.shape[2], key.shape[2], query.device)
    if padding is not None:
        visible = visible & padding[:, None, None, :]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, dropout_p=dropout, scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


_told: set[str] = set()


def _tell_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        logger.warning(message)
