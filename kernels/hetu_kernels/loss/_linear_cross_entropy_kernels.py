"""Row kernels of :func:`linear_cross_entropy`: they take logits that a matrix product has just made.

With the logit ``z`` of a class, after bias and softcap, the label ``t`` and class weights ``w`` (1 without any):

    lse  = log(sum_c exp(z_c))
    loss = (1 - s) w_t (lse - z_t) + s / C sum_c w_c (lse - z_c) + z_loss lse^2
    dz_c = exp(z_c - lse) ((1 - s) w_t + s / C sum_c w_c + 2 z_loss lse) - (1 - s) w_t [c = t] - s / C w_c

Arithmetic is in float32. The gradient overwrites the logits it is computed from: with ``s`` and the label subtracted in
float32 it is rounded once, to the dtype of the matrix products that follow.
"""

from __future__ import annotations

from torch import Tensor

from hetu_kernels._common.device import on_device
from hetu_kernels._common.triton_utils import next_power_of_2, tanh, tl, triton

_BLOCK = 4096  # columns of a row in registers at once


@triton.jit
def _load_logits(row_ptr, bias_ptr, c, num_cols, width, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Logits of some columns. Rows are padded to ``width``, so that whole vectors are read; what lies there is junk."""
    z = tl.load(row_ptr + c, mask=c < width, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + c, mask=c < num_cols, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        z = softcap * tanh(z / softcap)
    return z


@triton.jit
def _store_gradient(
    row_ptr, grad_ptr, bias_ptr, class_weight_ptr, num_cols, width, num_weights, offset, local, softcap,
    lse, factor, hot, share, scale,
    BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CLASS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, BARRIER: tl.constexpr,
):  # fmt: skip
    """Overwrite a row of logits with its gradient.

    Where gradients are narrower, the first half of a block lands on logits of the same block that other threads have
    yet to read: ``BARRIER``. Later blocks land on logits that were read before.
    """
    for start in range(0, num_cols, BLOCK):
        c = start + tl.arange(0, BLOCK)
        z = _load_logits(row_ptr, bias_ptr, c, num_cols, width, softcap, HAS_BIAS, HAS_SOFTCAP)
        grad = tl.exp(z - lse) * factor
        if HAS_SMOOTHING:
            if HAS_CLASS_WEIGHT:
                at = offset + c
                mask = (c < num_cols) & (at < num_weights)
                grad -= share * tl.load(class_weight_ptr + at, mask=mask, other=float("nan")).to(tl.float32)
            else:
                grad -= share
        grad -= tl.where(c == local, hot, 0.0)
        if HAS_SOFTCAP:
            ratio = z / softcap
            grad *= 1.0 - ratio * ratio
        grad *= scale
        if BARRIER:
            tl.debug_barrier()
        tl.store(grad_ptr + c, grad.to(grad_ptr.dtype.element_ty), mask=c < width)


@triton.jit
def _store_zeros(grad_ptr, num_cols, width, BLOCK: tl.constexpr):
    """The gradient of a row that is ignored."""
    for start in range(0, num_cols, BLOCK):
        c = start + tl.arange(0, BLOCK)
        tl.store(grad_ptr + c, tl.zeros([BLOCK], dtype=grad_ptr.dtype.element_ty), mask=c < width)


@triton.jit
def _class_weight(class_weight_ptr, label, num_weights, HAS_CLASS_WEIGHT: tl.constexpr):
    """Weight of a label; NaN where there is none."""
    weight = 1.0
    if HAS_CLASS_WEIGHT:
        inside = (label >= 0) & (label < num_weights)
        weight = tl.load(class_weight_ptr + label, mask=inside, other=float("nan")).to(tl.float32)
    return weight


@triton.jit(do_not_specialize=["row_start", "num_rows", "ignore_index"])
def _linear_cross_entropy_fwd_kernel(
    logits_ptr, grad_ptr, bias_ptr, labels_ptr, class_weight_ptr, vocabulary_ptr, smoothing_ptr, loss_ptr, lse_ptr,
    stride_logits_row, stride_grad_row, row_start, num_rows, num_cols, width, num_weights, ignore_index,
    confidence, z_loss, softcap,
    BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CLASS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, SPLIT: tl.constexpr, WITH_GRAD: tl.constexpr, BARRIER: tl.constexpr,
):  # fmt: skip
    """Grid (rows of the chunk,). Loss and log-sum-exp of each row, then its gradient (``WITH_GRAD``).

    Where the vocabulary is ``SPLIT``, float32 ``loss[4, num_rows]`` gets the statistics of this slice instead: maximum,
    sum of exponentials, label's logit, weighted sum.
    """
    row = tl.program_id(0).to(tl.int64)
    at = row_start + row
    row_ptr = logits_ptr + row * stride_logits_row
    label = tl.load(labels_ptr + at).to(tl.int64)
    rows = tl.cast(num_rows, tl.int64)
    if label == ignore_index:
        if SPLIT:
            tl.store(loss_ptr + at, 0.0)
            tl.store(loss_ptr + rows + at, 1.0)
            tl.store(loss_ptr + 2 * rows + at, 0.0)
            tl.store(loss_ptr + 3 * rows + at, 0.0)
        else:
            tl.store(loss_ptr + at, 0.0)
            tl.store(lse_ptr + at, 0.0)
        if WITH_GRAD:
            _store_zeros(grad_ptr + row * stride_grad_row, num_cols, width, BLOCK)
    else:
        offset = tl.cast(0, tl.int64)
        if SPLIT:
            offset = tl.load(vocabulary_ptr)
        local = label - offset
        inside = (local >= 0) & (local < num_cols)
        chosen = _load_logits(row_ptr, bias_ptr, tl.where(inside, local, 0), num_cols, width, softcap,
                              HAS_BIAS, HAS_SOFTCAP)  # fmt: skip
        chosen = tl.where(inside, chosen, 0.0)
        largest = tl.full((), float("-inf"), tl.float32)
        shift = tl.full((), 0.0, tl.float32)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        weighted = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, num_cols, BLOCK):
            c = start + tl.arange(0, BLOCK)
            z = _load_logits(row_ptr, bias_ptr, c, num_cols, width, softcap, HAS_BIAS, HAS_SOFTCAP)
            z = tl.where(c < num_cols, z, float("-inf"))
            before = largest
            largest = tl.maximum(largest, tl.max(z, axis=0))
            shift = tl.where(largest == float("-inf"), 0.0, largest)  # of -inf, -inf cannot be subtracted
            total = total * tl.exp(before - shift) + tl.exp(z - shift)
            if HAS_SMOOTHING:
                z = tl.where(c < num_cols, z, 0.0)
                if HAS_CLASS_WEIGHT:
                    mask = (c < num_cols) & (offset + c < num_weights)
                    z *= tl.load(class_weight_ptr + offset + c, mask=mask, other=0.0).to(tl.float32)
                weighted += z
        sum_exp = tl.sum(total, axis=0)
        if SPLIT:
            tl.store(loss_ptr + at, largest)
            tl.store(loss_ptr + rows + at, sum_exp)
            tl.store(loss_ptr + 2 * rows + at, chosen)
            tl.store(loss_ptr + 3 * rows + at, tl.sum(weighted, axis=0))
        else:
            lse = tl.where(inside, shift + tl.log(sum_exp), float("nan"))
            hot = confidence * _class_weight(class_weight_ptr, label, num_weights, HAS_CLASS_WEIGHT)
            factor = hot + 2.0 * z_loss * lse
            share = 0.0
            loss = hot * (lse - chosen) + z_loss * lse * lse
            if HAS_SMOOTHING:
                share = tl.load(smoothing_ptr)
                all_shares = tl.load(smoothing_ptr + 1)
                factor += all_shares
                loss += all_shares * lse - share * tl.sum(weighted, axis=0)
            tl.store(loss_ptr + at, loss)
            tl.store(lse_ptr + at, lse)
            if WITH_GRAD:
                _store_gradient(
                    row_ptr, grad_ptr + row * stride_grad_row, bias_ptr, class_weight_ptr,
                    num_cols, width, num_weights, offset, local, softcap, lse, factor, hot, share, 1.0,
                    BLOCK, HAS_BIAS, HAS_CLASS_WEIGHT, HAS_SMOOTHING, HAS_SOFTCAP, BARRIER,
                )  # fmt: skip


@triton.jit(do_not_specialize=["row_start", "ignore_index"])
def _linear_cross_entropy_bwd_kernel(
    logits_ptr, grad_ptr, bias_ptr, labels_ptr, class_weight_ptr, vocabulary_ptr, smoothing_ptr, dloss_ptr, lse_ptr,
    stride_logits_row, stride_grad_row, row_start, num_cols, width, num_weights, ignore_index,
    confidence, z_loss, softcap,
    BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CLASS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, SPLIT: tl.constexpr, BARRIER: tl.constexpr,
):  # fmt: skip
    """Grid (rows of the chunk,). Gradient of each row from its log-sum-exp, times the gradient of its loss."""
    row = tl.program_id(0).to(tl.int64)
    at = row_start + row
    label = tl.load(labels_ptr + at).to(tl.int64)
    if label == ignore_index:
        _store_zeros(grad_ptr + row * stride_grad_row, num_cols, width, BLOCK)
    else:
        offset = tl.cast(0, tl.int64)
        if SPLIT:
            offset = tl.load(vocabulary_ptr)
        lse = tl.load(lse_ptr + at)
        hot = confidence * _class_weight(class_weight_ptr, label, num_weights, HAS_CLASS_WEIGHT)
        factor = hot + 2.0 * z_loss * lse
        share = 0.0
        if HAS_SMOOTHING:
            share = tl.load(smoothing_ptr)
            factor += tl.load(smoothing_ptr + 1)
        _store_gradient(
            logits_ptr + row * stride_logits_row, grad_ptr + row * stride_grad_row, bias_ptr, class_weight_ptr,
            num_cols, width, num_weights, offset, label - offset, softcap,
            lse, factor, hot, share, tl.load(dloss_ptr + at),
            BLOCK, HAS_BIAS, HAS_CLASS_WEIGHT, HAS_SMOOTHING, HAS_SOFTCAP, BARRIER,
        )  # fmt: skip


def launch_rows_forward(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    class_weight: Tensor | None,
    vocabulary: Tensor | None,
    smoothing: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad: Tensor | None,
    *,
    row_start: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> None:
    """Run the forward kernel on the logits of a chunk of rows.

    Args:
        logits: ``[rows, C]``, rows padded to a stride of :func:`padded`.
        bias: ``[C]``.
        labels: Of all rows, ``[T]``.
        class_weight: Of all classes.
        vocabulary: First class and number of classes, where this is a slice of them.
        smoothing: See :func:`hetu_kernels.loss.linear_cross_entropy_ref.smoothing`.
        out: Losses, float32 ``[T]``; or statistics ``[4, T]`` if there is a ``vocabulary``.
        lse: Log-sum-exp, float32 ``[T]``; not written if there is a ``vocabulary``.
        grad: Where to put the gradient: the memory of ``logits``. None for no gradient.
        row_start: Number of the first row.
        ignore_index: Label of rows that do not count.
        label_smoothing: Part of the target that all classes share.
        z_loss: Factor of the squared log-sum-exp.
        softcap: Bound of the logits.
    """
    rows, size = logits.shape
    width = logits.stride(0)
    config = _config(width)
    with on_device(logits):
        _linear_cross_entropy_fwd_kernel[(rows,)](
            logits, logits if grad is None else grad, bias, labels, class_weight, vocabulary, smoothing, out, lse,
            width, 0 if grad is None else grad.stride(0), row_start, labels.shape[0], size, width,
            0 if class_weight is None else class_weight.shape[0], ignore_index,
            1.0 - label_smoothing, z_loss, 1.0 if softcap is None else softcap,
            HAS_BIAS=bias is not None, HAS_CLASS_WEIGHT=class_weight is not None, HAS_SMOOTHING=smoothing is not None,
            HAS_SOFTCAP=softcap is not None, SPLIT=vocabulary is not None, WITH_GRAD=grad is not None,
            BARRIER=grad is not None and grad.dtype != logits.dtype, **config,
        )  # fmt: skip


def launch_rows_backward(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    class_weight: Tensor | None,
    vocabulary: Tensor | None,
    smoothing: Tensor | None,
    dloss: Tensor,
    lse: Tensor,
    grad: Tensor,
    *,
    row_start: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> None:
    """Run the backward kernel: see :func:`launch_rows_forward`; ``dloss`` and ``lse`` are float32 ``[T]``."""
    rows, size = logits.shape
    width = logits.stride(0)
    config = _config(width)
    with on_device(logits):
        _linear_cross_entropy_bwd_kernel[(rows,)](
            logits, grad, bias, labels, class_weight, vocabulary, smoothing, dloss, lse,
            width, grad.stride(0), row_start, size, width,
            0 if class_weight is None else class_weight.shape[0], ignore_index,
            1.0 - label_smoothing, z_loss, 1.0 if softcap is None else softcap,
            HAS_BIAS=bias is not None, HAS_CLASS_WEIGHT=class_weight is not None, HAS_SMOOTHING=smoothing is not None,
            HAS_SOFTCAP=softcap is not None, SPLIT=vocabulary is not None,
            BARRIER=grad.dtype != logits.dtype, **config,
        )  # fmt: skip


def _config(width: int) -> dict[str, int]:
    block = min(next_power_of_2(width), _BLOCK)
    return {"BLOCK": block, "num_warps": max(1, min(8, block // 512))}
