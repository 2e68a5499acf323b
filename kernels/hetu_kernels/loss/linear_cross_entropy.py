"""Linear layer and cross entropy in one, without the logits of all rows ever being in memory.

    z = softcap * tanh((x W^T + b) / softcap)                      softcap and b where given
    lse = log(sum_c exp(z_c))
    loss = (1 - s) w_t (lse - z_t) + s / C sum_c w_c (lse - z_c) + z_loss lse^2        t: label, s: label smoothing

Rows are taken in chunks. The logits of a chunk are a matrix product; a row kernel computes their loss and overwrites
them with its gradient; two more matrix products turn that into gradients of ``x`` and ``W``, the latter summed over the
chunks in float32. A training step thus needs the logits only once, and 6 T H C operations: the upstream gradient of a
mean or a sum is one number, by which the finished gradients are multiplied in backward. Where there is one number per
row (``reduction="none"``), or the vocabulary is split over ranks, backward computes the logits again (8 T H C) and
multiplies each row before the products. The z-loss is PaLM's (2204.02311, section 5), the softcap Gemma 2's
(2408.00118, section 2). Kernels: ``_linear_cross_entropy_kernels.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hetu_kernels._common import alloc, checks
from hetu_kernels._common.device import autocast_dtype, use_triton
from hetu_kernels.loss import linear_cross_entropy_ref as ref

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CHUNK_BYTES = 256 * 2**20
_REDUCTIONS = ("mean", "sum", "none")


class _Chunks:
    """The logits of a few rows at a time, in one buffer that their gradients reuse.

    Args:
        x: ``[T, H]``.
        weight: ``[C, H]``.
        compute: Dtype of the matrix products.
        chunk_bytes: Bound of ``rows * C * 4``; one row is always taken.
    """

    def __init__(self, x: Tensor, weight: Tensor, compute: torch.dtype, chunk_bytes: int) -> None:
        self.x = checks.last_dim_contiguous(x.to(compute))
        self.weight = checks.last_dim_contiguous(weight.to(compute))
        self.size = weight.shape[0]
        self.kernel = use_triton(x) and self.size > 0
        self.width = max(1, -(-self.size // 16)) * 16  # rows start where vectors of any dtype may
        most = max(1, chunk_bytes // (4 * self.width))
        self.rows = min(most - most % 128 if most > 128 else most, x.shape[0])
        dtype = compute if products_of(x.device) == "narrow" else torch.promote_types(compute, torch.float32)
        self.logits = alloc.empty((self.rows, self.width), dtype=dtype, device=x.device)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Gives the rows, their logits, and the same memory as the place of their gradients."""
        for start in range(0, self.x.shape[0], max(1, self.rows)):
            rows = slice(start, min(start + self.rows, self.x.shape[0]))
            buffer = self.logits[: rows.stop - rows.start]
            logits = buffer[:, : self.size]
            _product(self.x[rows], self.weight.T, logits)
            yield rows, logits, buffer.view(self.x.dtype)[:, : self.size]


class _Gradients:
    """Sums up what the chunks contribute: ``dx`` in the dtype of the products, ``dweight`` and ``dbias`` wider."""

    def __init__(self, chunks: _Chunks, want_x: bool, want_weight: bool, want_bias: bool) -> None:
        x, self.chunks = chunks.x, chunks
        hidden = x.shape[1]
        self.wide = torch.promote_types(x.dtype, torch.float32)
        self.dx = alloc.empty((x.shape[0] if want_x else 0, hidden), dtype=x.dtype, device=x.device)
        # Without rows nothing else is written.
        make = alloc.empty if x.shape[0] else torch.zeros
        self.dweight = make((chunks.size if want_weight else 0, hidden), dtype=self.wide, device=x.device)
        self.dbias = torch.zeros((chunks.size if want_bias else 0,), dtype=self.wide, device=x.device)

    def add(self, rows: slice, grad: Tensor) -> None:
        """``grad`` is the gradient of the logits of these rows."""
        if self.dx.shape[0]:
            _product(grad, self.chunks.weight, self.dx[rows])
        if self.dweight.shape[0]:
            _product(grad.T, self.chunks.x[rows], self.dweight, accumulate=rows.start > 0)
        if self.dbias.shape[0]:
            self.dbias += grad.sum(0, dtype=self.wide)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.dx, self.dweight, self.dbias


def products_of(device: torch.device) -> str:
    """How a device multiplies narrow matrices into a float32 one.

    Returns:
        ``"mixed"`` where its library can (cuBLAS), ``"widened"`` where both are converted before (CPU), ``"narrow"``
        where the product is rounded to their dtype, and logits are.
    """
    if device.type != "cuda":
        return "widened"
    return "mixed" if torch.version.hip is None else "narrow"


def _product(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """``out = a @ b`` or ``out += a @ b``, summed up in float32 whatever the dtypes."""
    products = products_of(a.device)
    if products == "widened" and a.dtype not in (torch.float32, torch.float64):
        product = a.to(torch.float32) @ b.to(torch.float32)
        if accumulate:
            out += product
        else:
            out.copy_(product)
    elif a.dtype == out.dtype:
        if accumulate:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif products == "mixed":
        if accumulate:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        step = max(1, 2**24 // max(1, out.shape[1]))  # the narrow product of a few rows at a time
        for start in range(0, out.shape[0], step):
            part = slice(start, start + step)
            product = a[part] @ b
            if accumulate:
                out[part] += product
            else:
                out[part] = product


def forward_chunks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    compute: torch.dtype,
    chunk_bytes: int,
    want_x: bool,
    want_weight: bool,
    want_bias: bool,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses and log-sum-exps ``[T]``, the place of this slice of the vocabulary (see :func:`ref.vocabulary_of`), and
    the gradients of the sum of all losses that are wanted, others empty.
    """
    chunks = _Chunks(x, weight, compute, chunk_bytes)
    gradients = _Gradients(chunks, want_x, want_weight, want_bias)
    labels, bias, class_weight = checks.contiguous(labels, bias, class_weight)
    with_grad = want_x or want_weight or want_bias
    vocabulary = ref.vocabulary_of(weight, group)
    wide = gradients.wide
    shape = (x.shape[0],) if group is None else (4, x.shape[0])
    loss = alloc.empty(shape, dtype=wide, device=x.device)
    lse = alloc.empty((x.shape[0],), dtype=wide, device=x.device)
    smoothing = ref.smoothing(label_smoothing, class_weight, vocabulary, wide) if label_smoothing else None
    losses = (labels, class_weight, vocabulary, ignore_index, label_smoothing, z_loss)
    for rows, logits, grad in chunks:
        if chunks.kernel:
            from hetu_kernels.loss._linear_cross_entropy_kernels import launch_rows_forward

            launch_rows_forward(
                logits, bias, labels, class_weight, None if group is None else vocabulary, smoothing,
                loss, lse, grad if with_grad else None, row_start=rows.start, ignore_index=ignore_index,
                label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
            )  # fmt: skip
        else:
            here = (labels[rows], *losses[1:])
            found = ref.rows_forward(logits, bias, labels[rows], class_weight, vocabulary, ignore_index, softcap)
            if group is not None:
                loss[:, rows] = torch.stack(found)
                continue
            lse[rows], chosen, weighted = ref.reduce_statistics(*found, None)
            loss[rows] = ref.row_loss(lse[rows], chosen, weighted, *here)
            if with_grad:
                grad.copy_(
                    ref.rows_backward(
                        logits, bias, labels[rows], class_weight, vocabulary, ignore_index,
                        label_smoothing, z_loss, softcap, lse[rows], None,
                    )
                )  # fmt: skip
        if with_grad:
            gradients.add(rows, grad)
    if group is not None:
        maximum, total, chosen, weighted = loss.unbind(0)
        lse, chosen, weighted = ref.reduce_statistics(maximum, total, chosen, weighted, group)
        loss = ref.row_loss(lse, chosen, weighted, *losses)
        lse = torch.where((labels < 0) | (labels >= vocabulary[1]), torch.nan, lse)
    return loss, lse, vocabulary, *gradients.result()


def backward_chunks(
    dloss: Tensor,
    lse: Tensor,
    vocabulary: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    compute: torch.dtype,
    chunk_bytes: int,
    want_x: bool,
    want_weight: bool,
    want_bias: bool,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients that are wanted, others empty, from those of the losses ``[T]``; the logits are computed again."""
    chunks = _Chunks(x, weight, compute, chunk_bytes)
    gradients = _Gradients(chunks, want_x, want_weight, want_bias)
    labels, bias, class_weight = checks.contiguous(labels, bias, class_weight)
    smoothing = ref.smoothing(label_smoothing, class_weight, vocabulary, gradients.wide) if label_smoothing else None
    dloss = dloss.to(gradients.wide).contiguous()
    for rows, logits, grad in chunks:
        if chunks.kernel:
            from hetu_kernels.loss._linear_cross_entropy_kernels import launch_rows_backward

            launch_rows_backward(
                logits, bias, labels, class_weight, None if group is None else vocabulary, smoothing, dloss, lse, grad,
                row_start=rows.start, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
                softcap=softcap,
            )  # fmt: skip
        else:
            grad.copy_(
                ref.rows_backward(
                    logits, bias, labels[rows], class_weight, vocabulary, ignore_index,
                    label_smoothing, z_loss, softcap, lse[rows], dloss[rows],
                )
            )  # fmt: skip
        gradients.add(rows, grad)
    dx, dweight, dbias = gradients.result()
    if group is not None and want_x:
        from torch import distributed as dist

        dist.all_reduce(dx, group=group)
    return dx, dweight, dbias


@torch.library.custom_op("lightning_hetu::linear_cross_entropy_fwd", mutates_args=())
def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    compute: torch.dtype,
    chunk_bytes: int,
    reduce: bool,
    want_x: bool,
    want_weight: bool,
    want_bias: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`forward_chunks`, with the sum of the losses instead if they are to be ``reduce``-d."""
    with torch.autocast(x.device.type, enabled=False):
        loss, *others = forward_chunks(
            x, weight, bias, labels, class_weight, ignore_index, label_smoothing, z_loss, softcap, compute,
            chunk_bytes, want_x, want_weight, want_bias, _group_of(group),
        )  # fmt: skip
    return (loss.sum() if reduce else loss, *others)  # type: ignore[return-value]


@linear_cross_entropy_fwd.register_fake
def _(
    x, weight, bias, labels, class_weight, ignore_index, label_smoothing, z_loss, softcap, compute,
    chunk_bytes, reduce, want_x, want_weight, want_bias, group,
):  # type: ignore[no-untyped-def]  # fmt: skip
    wide = torch.promote_types(compute, torch.float32)
    rows, hidden = x.shape
    lse = x.new_empty((rows,), dtype=wide)
    return (
        x.new_empty((), dtype=wide) if reduce else torch.empty_like(lse),
        lse,
        labels.new_empty((2,), dtype=torch.int64),
        x.new_empty((rows if want_x else 0, hidden), dtype=compute),
        x.new_empty((weight.shape[0] if want_weight else 0, hidden), dtype=wide),
        x.new_empty((weight.shape[0] if want_bias else 0,), dtype=wide),
    )


@torch.library.custom_op("lightning_hetu::linear_cross_entropy_bwd", mutates_args=())
def linear_cross_entropy_bwd(
    dloss: Tensor,
    lse: Tensor,
    vocabulary: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    compute: torch.dtype,
    chunk_bytes: int,
    want_x: bool,
    want_weight: bool,
    want_bias: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`backward_chunks`, with ``dx`` and ``dweight`` in the dtypes of ``x`` and ``weight``."""
    with torch.autocast(x.device.type, enabled=False):
        dx, dweight, dbias = backward_chunks(
            dloss, lse, vocabulary, x, weight, bias, labels, class_weight, ignore_index, label_smoothing, z_loss,
            softcap, compute, chunk_bytes, want_x, want_weight, want_bias, _group_of(group),
        )  # fmt: skip
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias


@linear_cross_entropy_bwd.register_fake
def _(
    dloss, lse, vocabulary, x, weight, bias, labels, class_weight, ignore_index, label_smoothing, z_loss,
    softcap, compute, chunk_bytes, want_x, want_weight, want_bias, group,
):  # type: ignore[no-untyped-def]  # fmt: skip
    rows, hidden = x.shape
    return (
        x.new_empty((rows if want_x else 0, hidden)),
        weight.new_empty((weight.shape[0] if want_weight else 0, hidden)),
        lse.new_empty((weight.shape[0] if want_bias else 0,)),
    )


def _group_of(name: str) -> ProcessGroup | None:
    """The process group of that name; operators take strings, not groups."""
    if not name:
        return None
    from torch.distributed import distributed_c10d

    return distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]  # a NewType of str


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, labels, class_weight, *ctx.options = inputs
    _, lse, vocabulary, *gradients = output
    _, _, _, _, _, _, ctx.reduce, *wanted, _ = ctx.options
    ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
    ctx.finished = any(wanted)
    if ctx.finished:
        ctx.save_for_backward(*gradients)
    else:
        ctx.save_for_backward(lse, vocabulary, x, weight, bias, labels, class_weight)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dloss: Tensor | None, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * len(ctx.options)
    if dloss is None:
        return None, None, None, None, None, *nothing
    want = ctx.needs_input_grad[:3]
    if ctx.finished:
        found = [
            _scaled(gradient, dloss, dtype) if wanted else None
            for gradient, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, want, strict=True)
        ]
        return *found, None, None, *nothing
    lse, vocabulary, x, weight, bias, labels, class_weight = ctx.saved_tensors
    ignore_index, label_smoothing, z_loss, softcap, compute, chunk_bytes, reduce, *_, group = ctx.options
    dx, dweight, dbias = linear_cross_entropy_bwd(
        dloss.expand(lse.shape) if reduce else dloss, lse, vocabulary, x, weight, bias, labels, class_weight,
        ignore_index, label_smoothing, z_loss, softcap, compute, chunk_bytes, *want, group,
    )  # fmt: skip
    return (
        dx if want[0] else None,
        dweight if want[1] else None,
        dbias.to(bias.dtype) if want[2] else None,
        None,
        None,
        *nothing,
    )


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient * factor``, multiplied in float32 and rounded once, without a float32 copy on the GPU."""
    factor = factor.reshape((1,) * gradient.dim())  # of no dimension, it would be rounded to the gradient's dtype first
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


linear_cross_entropy_fwd.register_autograd(_backward, setup_context=_setup)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Cross entropy of ``x @ weight.T + bias`` against labels, without holding all logits.

    Equal to ``F.cross_entropy(F.linear(x, weight, bias), target)`` but for three things: the loss is float32 for narrow
    dtypes too, the mean over no label at all is 0 with zero gradients (torch: NaN), and a label out of range makes its
    row's loss, and the gradients it reaches, NaN (torch: an assertion on the device).

    With gradients enabled, ``mean`` and ``sum`` compute them during forward and hold them until backward: that of ``x``
    in its dtype, that of ``weight`` in float32. Under :class:`torch.autocast`, ``x`` and ``weight`` are multiplied in
    its dtype. Gradients of gradients do not exist.

    Args:
        x: Rows ``[..., H]``, float32, float16 or bfloat16; any strides.
        weight: ``[C, H]`` in the dtype of ``x``. With a ``group``, this rank's slice of the rows.
        target: Labels, shaped like ``x`` without its last dimension, int32 or int64.
        bias: ``[C]``, any floating dtype; with a ``group``, this rank's slice.
        ignore_index: Rows with this label have no loss and no gradient and do not count in the mean.
        label_smoothing: Part of the target that is spread evenly over all classes, 0 to 1.
        z_loss: Adds ``z_loss * lse^2`` to the loss of each row, whatever its class weight; 0 or more.
        softcap: Logits become ``softcap * tanh(logits / softcap)``, finite; None for no bound.
        class_weight: Weight of each class in the loss, one for each row of ``weight``; with a ``group``, of all slices,
            on every rank. The mean then divides by the weights of the labels. It gets no gradient.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for a loss shaped like ``target``.
        group: Ranks over which the vocabulary is split, in their order; slices may differ in size. All of them call
            with the same rows and labels and get the same loss; the gradient of ``x`` is complete on each of them,
            those of ``weight`` and ``bias`` are of its slice.
        chunk_bytes: Bound of the buffer of logits: rows are taken so many at a time that ``rows * C * 4`` stays within
            it, at least one. A larger one makes for fewer passes over the gradient of ``weight``.

    Returns:
        The loss: a scalar, or one value per row. Float32 for narrow dtypes.

    Raises:
        ValueError: If shapes, devices or options do not fit together.
        TypeError: If a dtype does not fit, a tensor is distributed, or an argument is of the wrong type.
    """
    op = "linear_cross_entropy"
    checks.tensors(op, x=x, weight=weight, target=target)
    checks.not_distributed(op, x=x, weight=weight, bias=bias, target=target)
    checks.same_device(op, x=x, weight=weight, target=target, bias=bias, class_weight=class_weight)
    checks.floating(op, x=x, weight=weight, bias=bias, class_weight=class_weight)
    checks.integer(op, target=target)
    checks.one_of(op, "reduction", reduction, _REDUCTIONS)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, expected rows of at least one element.")
    checks.shape(op, "weight", weight, (None, x.shape[-1]), "classes, columns of x")
    if group is None and weight.shape[0] == 0:
        raise ValueError(f"{op}: weight has shape {list(weight.shape)}, expected at least one class.")
    checks.shape(op, "target", target, tuple(x.shape[:-1]), "one label per row of x")
    checks.shape(op, "bias", bias, (weight.shape[0],), "one per row of weight")
    checks.shape(op, "class_weight", class_weight, (weight.shape[0] if group is None else None,), "one per class")
    label_smoothing = checks.number(op, "label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing={label_smoothing}, expected 0 to 1.")
    z_loss = checks.number(op, "z_loss", z_loss, sign="0 or more")
    if softcap is not None:
        softcap = checks.number(op, "softcap", softcap, sign="positive", meaning=", or None for no cap")
    ignore_index = checks.whole(op, "ignore_index", ignore_index)
    chunk_bytes = checks.whole(op, "chunk_bytes", chunk_bytes, at_least=1)
    if group is not None and not hasattr(group, "group_name"):
        raise TypeError(f"{op}: group={group!r}, expected a torch.distributed.ProcessGroup or None.")
    compute = _compute_dtype(x, weight)
    if class_weight is not None:
        class_weight = class_weight.detach()
    labels = target.reshape(-1)
    in_forward = reduction != "none" and group is None and torch.is_grad_enabled()
    loss = linear_cross_entropy_fwd(
        x.reshape(-1, x.shape[-1]), weight, bias, labels, class_weight, ignore_index, label_smoothing, z_loss, softcap,
        compute, chunk_bytes, reduction != "none", in_forward and x.requires_grad,
        in_forward and weight.requires_grad, in_forward and bias is not None and bias.requires_grad,
        "" if group is None else group.group_name,
    )[0]  # fmt: skip
    if reduction == "none":
        return loss.reshape(target.shape)
    if reduction == "sum":
        return loss
    return loss / ref.denominator(labels, class_weight, ignore_index, loss.dtype)


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """What :func:`torch.nn.functional.linear` would multiply in."""
    autocast = autocast_dtype(x.device)
    if autocast is not None and torch.float64 not in (x.dtype, weight.dtype):  # which it leaves as it is
        return autocast
    checks.same_dtype("linear_cross_entropy", x=x, weight=weight)
    return x.dtype
