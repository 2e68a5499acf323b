"""Padding removal: a padded batch of sequences as one packed tensor of their tokens, and back.

    packed[t] = x.flatten(0, 1)[gather_idx[t]]                           pack
    y.flatten(0, 1)[p] = packed[scatter_idx[p]]                          unpack

Everything between the two then works on the tokens there are (ByteTransformer, 2210.03052, section III.B). The indices
are inverse to each other and -1 where there is nothing: a row of ``pack`` behind the last token is zero, padding is
filled by ``unpack``. So the gradient of one is the other, and that of padding is zero.

The layout is computed on the device, once per batch. The number of tokens is not known on the host unless it is given:
packed tensors then have as many rows as the padded batch, and nothing waits for the device. Kernel:
``_pack_kernels.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hetu_kernels._common import checks
from hetu_kernels._common.device import use_triton
from hetu_kernels.norm_act import pack_ref


class PaddingLayout(NamedTuple):
    """Where the tokens of a padded batch are; made by :func:`padding_layout`.

    Indices of a layout made otherwise are checked on the CPU, and elsewhere with ``LIGHTNING_HETU_CHECK=1``, which
    waits for the device; unchecked ones that point outside read beside a tensor.

    It is a tuple of tensors and numbers, so ``torch.utils._pytree`` and ``torch.compile`` see through it. The column of
    each packed token in its sequence, for position embeddings, is ``gather_idx % max_length``.

    Args:
        cu_seqlens: Where each sequence starts in a packed tensor, and at last the number of tokens, int32
            ``[batch + 1]``.
        gather_idx: Row of each packed token in the flattened batch, int32 ``[rows]``; -1 behind the last.
        scatter_idx: Row of each token of the flattened batch in the packed tensor, int32 ``[batch * max_length]``; -1
            for padding.
        batch: Number of sequences.
        max_length: Length they are padded to.
    """

    cu_seqlens: Tensor
    gather_idx: Tensor
    scatter_idx: Tensor
    batch: int
    max_length: int


@torch.library.custom_op("lightning_hetu::pack_fwd", mutates_args=())
def pack_fwd(x: Tensor, gather_idx: Tensor, scatter_idx: Tensor) -> Tensor:
    """Returns the packed rows; the inverse index is for backward."""
    size = x.shape[0] * x.shape[1]
    checks.indices("pack", "layout.gather_idx", gather_idx, size, "the rows of the padded batch", lowest=None)
    if use_triton(x):
        from hetu_kernels.norm_act._pack_kernels import launch_pack

        return launch_pack(x, gather_idx)
    return pack_ref.pack_rows(x, gather_idx)


@torch.library.custom_op("lightning_hetu::unpack_fwd", mutates_args=())
def unpack_fwd(
    packed: Tensor, gather_idx: Tensor, scatter_idx: Tensor, batch: int, max_length: int, fill: float
) -> Tensor:
    """Returns the padded batch; the inverse index is for backward."""
    size = packed.shape[0]
    checks.indices("unpack", "layout.scatter_idx", scatter_idx, size, "the rows of the packed tensor", lowest=None)
    if use_triton(packed):
        from hetu_kernels.norm_act._pack_kernels import launch_unpack

        return launch_unpack(packed, scatter_idx, batch, max_length, fill)
    return pack_ref.unpack_rows(packed, scatter_idx, batch, max_length, fill)


@pack_fwd.register_fake
def _(x, gather_idx, scatter_idx):  # type: ignore[no-untyped-def]
    return x.new_empty((gather_idx.shape[0], *x.shape[2:]))


@unpack_fwd.register_fake
def _(packed, gather_idx, scatter_idx, batch, max_length, fill):  # type: ignore[no-untyped-def]
    return packed.new_empty((batch, max_length, *packed.shape[1:]))


def _setup_pack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gather_idx, scatter_idx = inputs
    ctx.batch, ctx.max_length = x.shape[:2]
    ctx.save_for_backward(gather_idx, scatter_idx)


def _pack_backward(ctx: Any, dpacked: Tensor) -> tuple[Tensor | None, ...]:
    return unpack_fwd(dpacked, *ctx.saved_tensors, ctx.batch, ctx.max_length, 0.0), None, None


def _setup_unpack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])


def _unpack_backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
    return pack_fwd(dx, *ctx.saved_tensors), None, None, None, None, None


pack_fwd.register_autograd(_pack_backward, setup_context=_setup_pack)
unpack_fwd.register_autograd(_unpack_backward, setup_context=_setup_unpack)


def padding_layout(
    mask: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    max_length: int | None = None,
    total_tokens: int | None = None,
) -> PaddingLayout:
    """Work out where the tokens of a padded batch go, on its device and without waiting for it.

    Args:
        mask: ``[batch, max_length]`` of any dtype, 0 for padding, which may be anywhere. This or ``lengths``.
        lengths: Tokens at the start of each sequence, int32 or int64 ``[batch]``; taken as between 0 and
            ``max_length``.
        max_length: Length of the padded sequences; needed with ``lengths``.
        total_tokens: Rows of packed tensors, where the host knows how many tokens there are. Tokens beyond it are
            dropped, rows behind the last token are zero. None for ``batch * max_length``.

    Returns:
        The layout, for :func:`pack` and :func:`unpack`. The number of tokens is ``cu_seqlens[-1]``.

    Raises:
        ValueError: If not exactly one of ``mask`` and ``lengths`` is given, or shapes and sizes do not fit.
        TypeError: If ``lengths``, or a size, are no integers.
    """
    op = "padding_layout"
    if (mask is None) == (lengths is None):
        given = "neither" if mask is None else "both"
        raise ValueError(f"{op}: {given} of mask and lengths given, expected one of them.")
    checks.same_device(op, mask=mask, lengths=lengths)
    if max_length is not None:
        max_length = checks.whole(op, "max_length", max_length, at_least=0)
    if total_tokens is not None:
        total_tokens = checks.whole(op, "total_tokens", total_tokens, at_least=0)
    if mask is not None:
        if mask.dim() != 2:
            raise ValueError(f"{op}: mask has shape {list(mask.shape)}, expected [batch, max_length].")
        if max_length is not None and max_length != mask.shape[1]:
            raise ValueError(f"{op}: max_length={max_length}, expected {mask.shape[1]}, the number of mask's columns.")
        keep = mask != 0
    else:
        assert lengths is not None
        checks.integer(op, lengths=lengths)
        checks.shape(op, "lengths", lengths, (None,), "one per sequence")
        if max_length is None:
            raise ValueError(f"{op}: max_length=None, expected the length of the padded sequences beside lengths.")
        keep = torch.arange(max_length, device=lengths.device) < lengths[:, None]
    batch, padded_length = keep.shape
    rows = batch * padded_length if total_tokens is None else total_tokens
    count = keep.flatten().cumsum(0, dtype=torch.int32)  # of tokens so far, the one here included
    scatter_idx = torch.where(keep.flatten() & (count <= rows), count - 1, -1)
    # Packed token t is where the count reaches t + 1; behind the last, searchsorted gives the end.
    slots = torch.arange(1, rows + 1, device=keep.device, dtype=torch.int32)
    gather_idx = torch.searchsorted(count, slots, out_int32=True)
    gather_idx = torch.where(gather_idx < batch * padded_length, gather_idx, -1)
    ends = keep.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32).clamp(max=rows)
    return PaddingLayout(torch.nn.functional.pad(ends, (1, 0)), gather_idx, scatter_idx, batch, padded_length)


def pack(x: Tensor, layout: PaddingLayout) -> Tensor:
    """Remove padding: copy the tokens of a padded batch next to each other.

    Args:
        x: ``[batch, max_length, ...]``, of real numbers or integers; any strides. What is in the padding is ignored.
        layout: From :func:`padding_layout`.

    Returns:
        ``[rows, ...]`` in the dtype of ``x``, contiguous; rows behind the last token are zero. The gradient of ``x`` is
        zero in the padding.

    Raises:
        ValueError: If ``x`` is not padded like the layout, or on another device.
        TypeError: If ``x`` is no tensor, or a complex one, or ``layout`` is none.
    """
    _check_layout("pack", layout)
    _check("pack", "x", x, layout, (layout.batch, layout.max_length), "[batch, max_length, ...]")
    return pack_fwd(x, layout.gather_idx, layout.scatter_idx)


def unpack(packed: Tensor, layout: PaddingLayout, *, fill: float = 0.0) -> Tensor:
    """Restore padding: copy packed tokens to where they were.

    Args:
        packed: ``[rows, ...]``, of real numbers or integers; any strides.
        layout: The one it was packed with.
        fill: What the padding is filled with: any number that the dtype of ``packed`` has.

    Returns:
        ``[batch, max_length, ...]`` in the dtype of ``packed``, contiguous. The gradient of rows behind the last token
        is zero.

    Raises:
        ValueError: If ``packed`` has not as many rows as the layout, is on another device, or ``fill`` is not a number
            of its dtype.
        TypeError: If ``packed`` is no tensor, or a complex one, ``layout`` is none, or ``fill`` is no number.
    """
    _check_layout("unpack", layout)
    _check("unpack", "packed", packed, layout, layout.gather_idx.shape, "[rows, ...]")
    fill = _checked_fill(fill, packed.dtype)
    return unpack_fwd(packed, layout.gather_idx, layout.scatter_idx, layout.batch, layout.max_length, fill)


def _checked_fill(fill: float, dtype: torch.dtype) -> float:
    """A number that a dtype has; a bool takes any integer, as everywhere in torch."""
    if not isinstance(fill, bool | int | float):
        fill = checks.number("unpack", "fill", fill, infinite=True)
    if dtype.is_floating_point:
        largest = torch.finfo(dtype).max
        if fill - fill == 0 and not -largest <= fill <= largest:  # infinities and NaN are numbers of every such dtype
            raise ValueError(f"unpack: fill={fill}, expected {-largest} to {largest} for {dtype}, infinite or NaN.")
        return fill
    if not float(fill).is_integer():
        raise ValueError(f"unpack: fill={fill}, expected an integer for {dtype}.")
    if dtype != torch.bool and not torch.iinfo(dtype).min <= fill <= torch.iinfo(dtype).max:
        raise ValueError(
            f"unpack: fill={fill}, expected {torch.iinfo(dtype).min} to {torch.iinfo(dtype).max} for {dtype}."
        )
    return fill


def _check_layout(op: str, layout: PaddingLayout) -> None:
    """A layout whose parts fit together; what is in its tensors is looked at by the operators."""
    if not isinstance(layout, PaddingLayout):
        raise TypeError(f"{op}: layout is a {type(layout).__name__}, expected a PaddingLayout: see padding_layout().")
    gather_idx, scatter_idx = layout.gather_idx, layout.scatter_idx
    checks.tensors(op, **{"layout.gather_idx": gather_idx, "layout.scatter_idx": scatter_idx})
    checks.integer(op, **{"layout.gather_idx": gather_idx, "layout.scatter_idx": scatter_idx})
    checks.shape(op, "layout.gather_idx", gather_idx, (None,), "one per packed row")
    slots = layout.batch * layout.max_length
    checks.shape(op, "layout.scatter_idx", scatter_idx, (slots,), "batch * max_length")


def _check(op: str, name: str, tensor: Tensor, layout: PaddingLayout, sizes: tuple[int, ...], meaning: str) -> None:
    checks.tensors(op, **{name: tensor})
    tensors = {name: tensor, "layout.gather_idx": layout.gather_idx, "layout.scatter_idx": layout.scatter_idx}
    checks.same_device(op, **tensors)
    checks.not_distributed(op, **tensors)
    if tensor.dtype.is_complex:
        raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected real numbers or integers.")
    if tensor.dim() < len(sizes) or tensor.shape[: len(sizes)] != sizes:
        want = ", ".join(map(str, sizes))
        raise ValueError(
            f"{op}: {name} has shape {list(tensor.shape)}, expected [{want}, ...] as in layout: {meaning}."
        )
