"""Attention over packed sequences of different lengths: no padding is stored, moved or computed.

For row i and key j of one sequence, with the query head's group sharing one key head (GQA, 2305.13245):

    s_ij = softcap(scale * q_i . k_j) + bias_ij - slope * |i + len_k - len_q - j|
    out_i = sum_j exp(s_ij - lse_i) v_j        over the visible keys,    lse_i = log sum_j exp(s_ij)

Packing comes from ByteTransformer (2210.03052), the loop from FlashAttention-2 (2307.08691), tiling and mask from
FastAttention (2410.16663), ALiBi from 2108.12409. Keys and values are read in their own dtype; logits, softmax and sums
are float32. Kernels: ``_varlen_forward_kernels.py``, ``_varlen_backward_kernels.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hetu_kernels._common import checks
from hetu_kernels._common.device import autocast, dot_precision, use_triton
from hetu_kernels.attention import varlen_ref
from hetu_kernels.attention.tiling_mask import TilingMask

MAX_HEAD_DIM = 256


@torch.library.custom_op("lightning_hetu::varlen_attention_fwd", mutates_args=())
def varlen_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    left: int,
    right: int,
    scale: float,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    want_dbias: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor]:
    """Returns ``out`` like ``q``, contiguous, and ``lse`` ``[heads, tokens]``, at least float32."""
    # What is wrong here would leave results unwritten, or read beside a tensor. Backward is given the same.
    op = "varlen_attention"
    checks.offsets(op, "cu_seqlens_q", cu_seqlens_q, q.shape[0], "max_seqlen_q", max_seqlen_q, "q")
    checks.offsets(op, "cu_seqlens_k", cu_seqlens_k, k.shape[0], "max_seqlen_k", max_seqlen_k, "k")
    mask = TilingMask(left, right)
    if use_triton(q, needs_dot=True):
        from hetu_kernels.attention._varlen_forward_kernels import Options, launch_forward

        options = Options(scale, mask, softcap, dot_precision(q, allow_tf32=allow_tf32))
        q, k, v = (checks.last_dim_contiguous(t) for t in (q, k, v))
        return launch_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, options, alibi_slopes, bias, sinks)
    out, lse = varlen_ref.attend(q, k, v, cu_seqlens_q, cu_seqlens_k, mask, scale, softcap, alibi_slopes, bias, sinks)
    return out.contiguous(), lse.contiguous()


@varlen_attention_fwd.register_fake
def _(q, k, v, cu_seqlens_q, *_):  # type: ignore[no-untyped-def]
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse


@torch.library.custom_op("lightning_hetu::varlen_attention_bwd", mutates_args=())
def varlen_attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    left: int,
    right: int,
    scale: float,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    want_dbias: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns gradients of q, k, v, of the bias (float32, empty unless wanted), and of the sinks (empty without)."""
    mask = TilingMask(left, right)
    if use_triton(q, needs_dot=True):
        from hetu_kernels.attention._varlen_backward_kernels import Options, launch_backward

        options = Options(scale, mask, softcap, dot_precision(q, allow_tf32=allow_tf32))
        dout, q, k, v = (checks.last_dim_contiguous(t) for t in (dout, q, k, v))
        dlse = None if dlse is None else checks.last_dim_contiguous(dlse)
        dq, dk, dv, dbias, delta = launch_backward(
            dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options,
            alibi_slopes, bias, want_dbias=want_dbias,
        )  # fmt: skip
        if sinks is None:
            return dq, dk, dv, dbias, delta.new_empty(0)
        # A sink is one more key with weight exp(sink - lse) and no value: its dp is 0. Rows of no sequence have none.
        weights = torch.exp(sinks.to(lse.dtype)[:, None] - lse.masked_fill(lse == float("-inf"), float("inf")))
        return dq, dk, dv, dbias, -(weights * delta).sum(1)

    differentiable = [t for t in (q, k, v, bias if want_dbias else None, sinks) if t is not None]

    def forward(*given: Tensor) -> tuple[Tensor, Tensor]:
        rest = iter(given[3:])
        own_bias = next(rest) if want_dbias else bias
        own_sinks = None if sinks is None else next(rest)
        return varlen_ref.attend(
            given[0],
            given[1],
            given[2],
            cu_seqlens_q,
            cu_seqlens_k,
            mask,
            scale,
            softcap,
            alibi_slopes,
            own_bias,
            own_sinks,
        )

    pull = torch.func.vjp(forward, *differentiable)[1]
    grads = iter(pull((dout, torch.zeros_like(lse) if dlse is None else dlse.to(lse.dtype))))
    dq, dk, dv = (next(grads).contiguous() for _ in range(3))
    dbias = next(grads).to(lse.dtype).contiguous() if want_dbias else lse.new_empty(0)
    return dq, dk, dv, dbias, lse.new_empty(0) if sinks is None else next(grads).to(lse.dtype).clone()


@varlen_attention_bwd.register_fake
def _(  # type: ignore[no-untyped-def]
    dout, dlse, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, left, right, scale, softcap, slopes, bias, sinks,
    want_dbias, allow_tf32,
):  # fmt: skip
    dbias = lse.new_empty(bias.shape if want_dbias else (0,))
    dsinks = lse.new_empty(0 if sinks is None else sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias, dsinks


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *sizes, slopes, bias, sinks, ctx.want_dbias, ctx.allow_tf32 = inputs
    ctx.sizes = sizes
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k, slopes, bias, sinks)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, slopes, bias, sinks = ctx.saved_tensors
    dq, dk, dv, dbias, dsinks = varlen_attention_bwd(
        torch.zeros_like(out) if dout is None else dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k,
        *ctx.sizes, slopes, bias, sinks, ctx.want_dbias, ctx.allow_tf32,
    )  # fmt: skip
    grad_bias = dbias.to(bias.dtype) if ctx.want_dbias else None
    grad_sinks = None if sinks is None else dsinks.to(sinks.dtype)
    return dq, dk, dv, *(None,) * 8, None, grad_bias, grad_sinks, None, None


varlen_attention_fwd.register_autograd(_backward, setup_context=_setup)


def varlen_attention(
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
    """Attention within each of several sequences that lie one behind the other.

    A row that sees no key gets output 0 and log-sum-exp -inf, and so does a row behind the last sequence. NaN and
    infinities in ``v``, and in gradients, may spread over the sequence they occur in, past the mask.

    The values of ``cu_seqlens_q`` and ``cu_seqlens_k`` are checked on the CPU only: looking at them on a GPU would wait
    for it. There, rows of a sequence that is longer than ``max_seqlen_q`` (for gradients, keys of one that is longer
    than ``max_seqlen_k``) and rows before the first sequence get whatever was in memory, and offsets that decrease or
    point past the end read and write beside the tensors. ``LIGHTNING_HETU_CHECK=1`` checks there too.

    Under :class:`torch.autocast`, ``q``, ``k`` and ``v`` are converted to its dtype, but float64 is left as it is.

    Args:
        q: Queries ``[tokens_q, heads, head_dim]``, float32, float16 or bfloat16; any strides. ``head_dim`` at most 256.
        k: Keys ``[tokens_k, kv_heads, head_dim]``; ``kv_heads`` divides ``heads``.
        v: Values, shaped like ``k``.
        cu_seqlens_q: Where each sequence begins in ``q``, and where the last one ends: int32 or int64
            ``[sequences + 1]``. The first entry is 0, none is smaller than the one before it.
        cu_seqlens_k: The same for ``k``; as for ``q`` unless told. Rows are aligned so that a sequence's last row sees
            its last key.
        max_seqlen_q: Length of the longest sequence in ``q``, or more, never less. An integer of Python or numpy: a
            tensor would cost a synchronization here and a recompilation for every value.
        max_seqlen_k: The same for ``k``; needed beside ``cu_seqlens_k``.
        causal: A row sees no key behind its own position.
        window: An integer ``w``: of the keys up to its own position, a row sees the last ``w``. Keys behind its own
            are not touched by it: without ``causal`` a row sees all of them. A pair ``(left, right)``: so many keys
            before and behind its own; None for all. FlashAttention's ``(3, 0)`` is ``4`` with ``causal``, its
            symmetric ``(3, 3)`` is that pair.
        scale: Factor of the products; ``head_dim ** -0.5`` unless told.
        softcap: Bound of the logits, ``softcap * tanh(s / softcap)``; finite.
        alibi_slopes: Slope per head ``[heads]``, no gradient.
        bias: Added to the logits: ``[sequences or 1, heads or 1, max_seqlen_q or 1, max_seqlen_k or 1]``, indexed by
            positions within the sequence. Differentiable.
        sinks: One more logit per head ``[heads]`` that takes weight and gives no value. Differentiable.
        allow_tf32: Multiply float32 in TF32 on NVIDIA. Otherwise three TF32 products make up nearly float32.
        return_lse: Return the log-sum-exps too.

    Returns:
        Outputs shaped like ``q``, contiguous; with ``return_lse`` also log-sum-exps ``[heads, tokens_q]``, at least
        float32, natural logarithm, differentiable.

    Raises:
        ValueError: If shapes, devices, options or (on the CPU) offsets do not fit together.
        TypeError: If a dtype is not supported, or an argument is of the wrong type.
    """
    op = "varlen_attention"
    checks.tensors(op, q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q)
    q, k, v = autocast(q, k, v)
    max_seqlen_q, max_seqlen_k = _check(
        op, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, alibi_slopes, bias, sinks
    )
    checks.flags(op, causal=causal, allow_tf32=allow_tf32)
    if scale is not None:
        scale = checks.number(op, "scale", scale)
    if softcap is not None:
        softcap = checks.number(op, "softcap", softcap, sign="positive", meaning=", or None for no cap")
    mask = TilingMask.of(causal=causal, window=window, op=op)
    out, lse = varlen_attention_fwd(
        q, k, v, cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        mask.left, mask.right, q.shape[-1] ** -0.5 if scale is None else scale, softcap, alibi_slopes, bias, sinks,
        bias is not None and bias.requires_grad and torch.is_grad_enabled(), allow_tf32,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _check(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
) -> tuple[int, int]:
    """Checks of everything that is known without looking into a tensor; returns both lengths as integers of Python."""
    checks.same_device(
        op, q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, alibi_slopes=alibi_slopes, bias=bias,
        sinks=sinks,
    )  # fmt: skip
    checks.floating(op, q=q, alibi_slopes=alibi_slopes, bias=bias, sinks=sinks)
    checks.same_dtype(op, q=q, k=k, v=v)
    checks.integer(op, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    if q.dim() != 3 or not 1 <= q.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(
            f"{op}: q has shape {list(q.shape)}, expected [tokens, heads, head_dim] with head_dim up to {MAX_HEAD_DIM}."
        )
    heads, head_dim = q.shape[1:]
    checks.shape(op, "k", k, (None, None, head_dim), "[tokens, kv_heads, head_dim of q]")
    checks.shape(op, "v", v, tuple(k.shape), "that of k")
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"{op}: k has {k.shape[1]} heads, expected a divisor of the {heads} heads of q.")
    if cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape[0] < 1:
        raise ValueError(f"{op}: cu_seqlens_q has shape {list(cu_seqlens_q.shape)}, expected [sequences + 1].")
    checks.shape(op, "cu_seqlens_k", cu_seqlens_k, (cu_seqlens_q.shape[0],), "that of cu_seqlens_q")
    max_seqlen_q = checks.whole(op, "max_seqlen_q", max_seqlen_q, at_least=0)
    if max_seqlen_k is None:
        if cu_seqlens_k is not None:
            raise TypeError(
                f"{op}: max_seqlen_k=None, expected the length of the longest sequence beside cu_seqlens_k."
            )
        max_seqlen_k = max_seqlen_q
    max_seqlen_k = checks.whole(op, "max_seqlen_k", max_seqlen_k, at_least=0)
    checks.shape(op, "alibi_slopes", alibi_slopes, (heads,), "one per head")
    checks.shape(op, "sinks", sinks, (heads,), "one per head")
    if bias is not None:
        full = (cu_seqlens_q.shape[0] - 1, heads, max_seqlen_q, max_seqlen_k)
        if bias.dim() != 4 or any(size != 1 and size != all_ for size, all_ in zip(bias.shape, full, strict=True)):
            raise ValueError(f"{op}: bias has shape {list(bias.shape)}, expected {list(full)}, each of which may be 1.")
    return max_seqlen_q, max_seqlen_k
