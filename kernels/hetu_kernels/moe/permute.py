"""Tokens to their experts and back: rows grouped by expert, and the weighted sum of what the experts made of them.

    rows[position_of[t, j]] = x[t]                                   permute
    y[t] = sum_j weights[t, j] rows[position_of[t, j]]               unpermute

The layout transform of HetuMoE (2203.14685), without slots for tokens that do not come: rows are in the
order of their experts, those of one expert in the order of ``(t, j)``, and ``offsets`` say where each expert's begin.
Assignments without an expert, and those beyond an expert's capacity, have position -1. Backward is

    dx[t] = sum_j drows[position_of[t, j]]
    drows[position_of[t, j]] = weights[t, j] dy[t],    dweights[t, j] = <dy[t], rows[position_of[t, j]]>

All sums are in float32 over ascending j: no atomics, the same bits every time. Kernels: ``_permute_kernels.py`` for the
rows, ``_permute_route_kernels.py`` for their order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hetu_kernels._common import checks
from hetu_kernels._common.device import may_read, use_triton
from hetu_kernels.moe import permute_ref

_INT32_MAX = 2**31 - 1


class Permuted(NamedTuple):
    """Tokens grouped by expert; made by :func:`permute`.

    Args:
        rows: The tokens ``[num_rows, dim]``; zeros behind the last.
        token_of: Token in each row, int32 ``[num_rows]``; -1 behind the last.
        position_of: Row of each assignment, int32 ``[tokens, choices]``; -1 where it has none.
        offsets: First row of each expert, and at last the number of rows that are taken, int32 ``[num_experts + 1]``.
    """

    rows: Tensor
    token_of: Tensor
    position_of: Tensor
    offsets: Tensor


@torch.library.custom_op("lightning_hetu::permute_fwd", mutates_args=())
def permute_fwd(
    x: Tensor, expert_ids: Tensor, num_experts: int, capacity: int | None, num_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns rows, tokens of rows, positions of assignments and offsets of experts."""
    checks.indices("permute", "expert_ids", expert_ids, num_experts, "the experts", lowest=None)
    if use_triton(x):
        from hetu_kernels.moe._permute_kernels import launch_permute_rows
        from hetu_kernels.moe._permute_route_kernels import launch_route

        token_of, position_of, offsets = launch_route(expert_ids, num_experts, capacity, num_rows)
        return launch_permute_rows(x, position_of, offsets, num_rows), token_of, position_of, offsets
    token_of, position_of, offsets = permute_ref.route(expert_ids, num_experts, capacity, num_rows)
    return permute_ref.take(x, token_of), token_of, position_of, offsets


@permute_fwd.register_fake
def _(x, expert_ids, num_experts, capacity, num_rows):  # type: ignore[no-untyped-def]
    def integers(*shape):  # type: ignore[no-untyped-def]
        return x.new_empty(shape, dtype=torch.int32)

    rows = x.new_empty((num_rows, x.shape[1]))
    return rows, integers(num_rows), integers(*expert_ids.shape), integers(num_experts + 1)


@torch.library.custom_op("lightning_hetu::permute_bwd", mutates_args=())
def permute_bwd(drows: Tensor, position_of: Tensor) -> Tensor:
    """Returns the gradient of the tokens."""
    if use_triton(drows):
        from hetu_kernels.moe._permute_kernels import launch_gather_sum

        return launch_gather_sum(drows, position_of, None)
    return permute_ref.permute_backward(drows, position_of)


@permute_bwd.register_fake
def _(drows, position_of):  # type: ignore[no-untyped-def]
    return drows.new_empty((position_of.shape[0], drows.shape[1]))


def _setup_permute(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2])


def _permute_backward(ctx: Any, drows: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return permute_bwd(drows, *ctx.saved_tensors), None, None, None, None


permute_fwd.register_autograd(_permute_backward, setup_context=_setup_permute)


@torch.library.custom_op("lightning_hetu::unpermute_fwd", mutates_args=())
def unpermute_fwd(rows: Tensor, position_of: Tensor, weights: Tensor) -> Tensor:
    """Returns the weighted sums."""
    _check_positions(position_of, rows.shape[0])
    if use_triton(rows):
        from hetu_kernels.moe._permute_kernels import launch_gather_sum

        return launch_gather_sum(rows, position_of, weights)
    return permute_ref.unpermute_reference(rows, position_of, weights)


@unpermute_fwd.register_fake
def _(rows, position_of, weights):  # type: ignore[no-untyped-def]
    return rows.new_empty((position_of.shape[0], rows.shape[1]))


@torch.library.custom_op("lightning_hetu::unpermute_bwd", mutates_args=())
def unpermute_bwd(dy: Tensor, rows: Tensor, position_of: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of rows and weights."""
    if use_triton(rows):
        from hetu_kernels.moe._permute_kernels import launch_unpermute_backward

        return launch_unpermute_backward(dy, rows, position_of, weights)
    return permute_ref.unpermute_backward(dy, rows, position_of, weights)


@unpermute_bwd.register_fake
def _(dy, rows, position_of, weights):  # type: ignore[no-untyped-def]
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


def _setup_unpermute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _unpermute_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    drows, dweights = unpermute_bwd(dy, *ctx.saved_tensors)
    return drows, None, dweights


unpermute_fwd.register_autograd(_unpermute_backward, setup_context=_setup_unpermute)


def permute(
    x: Tensor, expert_ids: Tensor, num_experts: int, *, capacity: int | None = None, num_rows: int | None = None
) -> Permuted:
    """Group tokens by expert: one row for each assignment that is kept.

    Args:
        x: Tokens ``[tokens, dim]``, float32, float16 or bfloat16; any strides.
        expert_ids: Experts of each token, int32 or int64 ``[tokens, choices]``; negative for none. Ids of
            ``num_experts`` and more are refused where they are looked at, and skipped elsewhere.
        num_experts: Number of experts.
        capacity: Assignments that one expert takes, the first in the order of ``(token, choice)``; None for all.
        num_rows: Rows of the result, where the host knows how many it needs. Rows behind the last assignment are zero,
            assignments that find no row are dropped: ``tokens * choices`` is always enough. None for just enough, which
            waits for the device to count them.

    Returns:
        The rows, in the dtype of ``x`` and contiguous, and where they come from. Their gradient goes to ``x``, summed
        in float32 over the copies of a token.

    Raises:
        ValueError: If shapes, devices or numbers do not fit, or an expert does not exist.
        TypeError: If an argument has the wrong dtype or type.
    """
    op = "permute"
    checks.tensors(op, x=x, expert_ids=expert_ids)
    checks.same_device(op, x=x, expert_ids=expert_ids)
    checks.not_distributed(op, x=x, expert_ids=expert_ids)
    checks.floating(op, x=x)
    checks.integer(op, expert_ids=expert_ids)
    checks.shape(op, "x", x, (None, None), "tokens, dim")
    checks.shape(op, "expert_ids", expert_ids, (x.shape[0], None), "tokens of x, choices")
    num_experts = checks.whole(op, "num_experts", num_experts, at_least=1)
    if capacity is not None:
        capacity = checks.whole(op, "capacity", capacity, at_least=0, meaning=", or None for any number")
    if num_rows is None:
        if expert_ids.device.type == "meta":
            raise ValueError(f"{op}: num_rows=None, expected a number: assignments on meta cannot be counted.")
        num_rows = permute_ref.count_rows(expert_ids, num_experts, capacity)
    num_rows = checks.whole(op, "num_rows", num_rows, at_least=0, meaning=", or None to count them")
    for name, size in (("expert_ids", expert_ids.numel()), ("num_rows", num_rows)):
        if size > _INT32_MAX:
            raise ValueError(f"{op}: {name} asks for {size} rows, expected at most {_INT32_MAX}: split the tokens.")
    return Permuted(*permute_fwd(x, expert_ids, num_experts, capacity, num_rows))


def unpermute(rows: Tensor, position_of: Tensor, weights: Tensor) -> Tensor:
    """Add up, for each token, what its experts made of it.

    Args:
        rows: Results of the experts ``[num_rows, dim]``, float32, float16 or bfloat16; any strides.
        position_of: From :func:`permute`, int32 or int64 ``[tokens, choices]``; negative for none. No row may occur
            twice, which is checked on the CPU, and elsewhere with ``LIGHTNING_HETU_CHECK=1``.
        weights: Float32 ``[tokens, choices]`` (float64 for float64 ``rows``); those without a row are ignored.

    Returns:
        ``[tokens, dim]`` in the dtype of ``rows``, contiguous, summed in float32 in the order of the choices. ``rows``
        and ``weights`` get gradients; that of rows which no position names is zero.

    Raises:
        ValueError: If shapes or devices do not fit, or positions are out of range or repeat.
        TypeError: If an argument has the wrong dtype or type.
    """
    op = "unpermute"
    checks.tensors(op, rows=rows, position_of=position_of, weights=weights)
    checks.same_device(op, rows=rows, position_of=position_of, weights=weights)
    checks.not_distributed(op, rows=rows, position_of=position_of, weights=weights)
    checks.floating(op, rows=rows)
    checks.integer(op, position_of=position_of)
    wide = torch.promote_types(rows.dtype, torch.float32)
    if weights.dtype != wide:
        raise TypeError(
            f"{op}: weights has dtype {weights.dtype}, expected {wide}, for {rows.dtype} rows: pass weights.to({wide})."
        )
    checks.shape(op, "rows", rows, (None, None), "num_rows, dim")
    checks.shape(op, "position_of", position_of, (None, None), "tokens, choices")
    checks.shape(op, "weights", weights, tuple(position_of.shape), "that of position_of")
    return unpermute_fwd(rows, position_of, weights)


def _check_positions(position_of: Tensor, num_rows: int) -> None:
    """Positions within the rows and each at most once: backward writes the gradient of a row once."""
    checks.indices("unpermute", "position_of", position_of, num_rows, "the rows", lowest=None)
    if not may_read(position_of):
        return
    named = torch.bincount(position_of[position_of >= 0], minlength=1)
    row = int(named.argmax())
    if named[row] > 1:
        raise ValueError(f"unpermute: position_of has row {row} {int(named[row])} times, expected each once at most.")
