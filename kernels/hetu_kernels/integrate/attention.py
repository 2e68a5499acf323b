"""Attention on ordinary batches ``[batch, heads, tokens, head_dim]``, padded or not, by the packed kernel.

A module can make its attention exchangeable by calling ``self.attention_function(query, key, value, causal=...)``, an
attribute of its class that holds such a function. :func:`~hetu_kernels.integrate.use_kernels` puts
:func:`padded_attention` there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

import hetu_kernels
from hetu_kernels.attention.tiling_mask import TilingMask
from hetu_kernels.attention.varlen import MAX_HEAD_DIM
from hetu_kernels.integrate.layers import is_plain
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

    What the kernel cannot do runs torch's attention on a dense mask, with a warning: dropout, heads wider than the
    kernel's, values of another width than keys, and a window over padding that has tokens on both of its sides.

    Args:
        query: ``[batch, heads, tokens_q, head_dim]``, any strides.
        key: ``[batch, kv_heads, tokens_k, head_dim]``. Queries are the last of the keys' positions.
        value: Shaped like ``key``.
        causal: A token sees none behind it.
        padding: bool ``[batch, tokens_k]``, False where there is no token; None where there are tokens everywhere. With
            it and ``causal`` or a ``window``, rows of ``padding`` end with their queries.
        window: As for :func:`~hetu_kernels.varlen_attention`. With ``padding``, the host waits for the device once per
            mask to see where the padding is.
        scale: Factor of the products; ``head_dim ** -0.5`` unless told.
        softcap: Bound of the logits.
        sinks: Extra logit per head.
        dropout: Probability of dropping a weight.

    Returns:
        ``[batch, heads, tokens_q, head_dim]``; zeros for queries that are padding, with ``causal`` or a ``window``.

    Raises:
        ValueError: If torch's attention would have to run with a ``softcap`` or ``sinks``, which it does not know.
    """
    reason = f"dropout={dropout}" if dropout else why_no_kernel(query, key, value)
    if reason is None and window is not None and padding is not None and has_gaps(padding):
        reason = f"window={window} over padding between tokens"
    options: dict[str, Any] = {"causal": causal, "padding": padding, "window": window, "scale": scale}
    if reason is None:
        return packed_attention(query, key, value, **options, softcap=softcap, sinks=sinks)
    if softcap is not None or sinks is not None:
        raise ValueError(
            f"padded_attention: {reason} together with softcap or sinks, expected neither: the kernel does not know the"
            " first and torch's attention not the others."
        )
    tell_once(f"{reason}: torch's attention runs instead of the kernel.")
    return _torch_attention(query, key, value, **options, dropout=dropout)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    padding: Tensor | None,
    window: Window,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """:func:`padded_attention` by the kernel, for what :func:`why_no_kernel` and :func:`has_gaps` let pass."""
    tokens_q, tokens_k = query.shape[2], key.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    if padding is None:
        k, v, starts_k = k.flatten(0, 1), v.flatten(0, 1), _starts(k)
    else:
        layout = _layout(padding, tokens_k)
        k, v, starts_k = hetu_kernels.pack(k, layout), hetu_kernels.pack(v, layout), layout.cu_seqlens
    # Only an order relates queries to keys. Without one they may be other tokens altogether (cross attention), which
    # the padding of the keys does not speak of: all of them are computed.
    layout_q = None if padding is None or (not causal and window is None) else _layout(padding, tokens_q)
    if layout_q is None:
        rows, starts_q = q.flatten(0, 1), _starts(q)
    else:
        rows, starts_q = hetu_kernels.pack(q, layout_q), layout_q.cu_seqlens
    out: Tensor = hetu_kernels.varlen_attention(  # type: ignore[assignment]  # no log-sum-exps are asked for
        rows, k, v, starts_q, starts_k, max_seqlen_q=tokens_q, max_seqlen_k=tokens_k,
        causal=causal, window=window, scale=scale, softcap=softcap, sinks=sinks,
    )  # fmt: skip
    out = out.unflatten(0, q.shape[:2]) if layout_q is None else hetu_kernels.unpack(out, layout_q)
    return out.transpose(1, 2)


def why_no_kernel(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why the kernel cannot attend with these tensors; None where it can."""
    if not is_plain(query, key, value):
        return "distributed tensors"
    if max(key.shape[-1], value.shape[-1]) > MAX_HEAD_DIM:
        return f"head_dim={max(key.shape[-1], value.shape[-1])}, above {MAX_HEAD_DIM}"
    if key.shape != value.shape:
        return f"value shaped {list(value.shape)}, key {list(key.shape)}"
    if query.shape[0] != key.shape[0]:
        return f"query with batch {query.shape[0]}, key with {key.shape[0]}"
    return None


def has_gaps(padding: Tensor) -> bool:
    """Whether a row has padding between tokens, over which packing would shorten distances. Waits for the device.

    A compiled graph cannot depend on that: there the answer is that it may.
    """
    if torch.compiler.is_compiling():
        return True

    def look() -> bool:
        kept = padding != 0
        runs = kept[:, :1].sum(1) + (kept[:, 1:] & ~kept[:, :-1]).sum(1)
        return bool((runs > 1).any())

    return bool(once(padding, "gaps", look))


def dense_mask(query: Tensor, key: Tensor, *, causal: bool, padding: Tensor | None, window: Window) -> Tensor:
    """bool ``[batch or 1, 1, tokens_q, tokens_k]``, True where a query sees a key."""
    visible = TilingMask.of(causal=causal, window=window).dense(query.shape[2], key.shape[2], query.device)[None, None]
    return visible if padding is None else visible & (padding != 0)[:, None, None, :]


def _torch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    padding: Tensor | None,
    window: Window,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """torch's attention on a dense mask."""
    visible = dense_mask(query, key, causal=causal, padding=padding, window=window)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, dropout_p=dropout, scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


def _starts(x: Tensor) -> Tensor:
    """Where the sequences of ``[batch, tokens, ...]`` start once they lie one behind the other."""
    return torch.arange(x.shape[0] + 1, device=x.device, dtype=torch.int32) * x.shape[1]


def _layout(padding: Tensor, tokens: int) -> PaddingLayout:
    """The layout of the last ``tokens`` columns of a mask."""

    def work_out() -> PaddingLayout:
        return hetu_kernels.padding_layout(padding[:, padding.shape[1] - tokens :])

    layout: PaddingLayout = once(padding, tokens, work_out)
    return layout


_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def once(mask: Tensor, what: Hashable, work_out: Callable[[], Any]) -> Any:
    """What follows from a mask, worked out once: all layers of a model are given the same one."""
    # A tensor of inference mode does not count its changes: it may be another mask by now.
    if torch.compiler.is_compiling() or mask.is_inference():
        return work_out()
    found = _known.get(mask)
    if found is None or found[0] != mask._version:
        found = _known[mask] = (mask._version, {})
    if what not in found[1]:
        found[1][what] = work_out()
    return found[1][what]


_told: set[str] = set()


def tell_once(message: str) -> None:
    """Warn, but of one thing only once."""
    if message not in _told:
        _told.add(message)
        logger.warning(message)
