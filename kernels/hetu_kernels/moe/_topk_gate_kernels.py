"""Kernels and launchers of :func:`topk_gate`: whole rows in registers, several short ones at a time.

All arithmetic is in float32. The best k are found by k rounds of maximum and lowest column. A program counts its tokens
by expert in registers and adds the counts to those of the others once, at the end: integer sums do not depend on the
order in which programs finish.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hetu_kernels._common import alloc
from hetu_kernels._common.checks import contiguous, last_dim_contiguous
from hetu_kernels._common.config import Config
from hetu_kernels._common.device import on_device, sm_count
from hetu_kernels._common.triton_utils import cdiv, next_power_of_2, sigmoid, tl, triton

_TILE = 1024  # logits a program holds; forward and backward keep four tiles of them in registers, 8 a thread each
_WARPS = 4
# Each of them adds its counts at the end: enough to fill a multiprocessor with warps, few enough to add up quickly.
_PROGRAMS_PER_MULTIPROCESSOR = 8


@triton.jit
def _load_rows(ptr, row, col, stride_row, num_tokens, E: tl.constexpr, OTHER: tl.constexpr):
    """A tile of rows in float32; ``OTHER`` outside of them."""
    mask = (row < num_tokens) & (col < E)
    return tl.load(ptr + row * stride_row + col, mask=mask, other=OTHER).to(tl.float32)


@triton.jit
def _score_rows(x, SIGMOID: tl.constexpr):
    """Scores of all experts, 0 for a logit of -inf, and which rows have any: ``[rows, 1]``."""
    wrong = x != x
    if SIGMOID:
        scores = sigmoid(x)
    else:
        wrong = wrong | (x == float("inf"))
        largest = tl.max(x, axis=1, keep_dims=True)
        power = tl.exp(x - tl.where(largest == float("-inf"), 0.0, largest))
        total = tl.sum(power, axis=1, keep_dims=True)
        scores = power / tl.where(total == 0.0, 1.0, total)
    defined = tl.max(wrong.to(tl.int32), axis=1, keep_dims=True) == 0
    return scores, defined


@triton.jit(do_not_specialize=["num_tokens"])
def _topk_gate_fwd_kernel(
    logits_ptr, weights_ptr, ids_ptr, counts_ptr, scores_ptr, stride_logits_row, num_tokens,
    E: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr, CHOICES: tl.constexpr,
    SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr, WITH_SCORES: tl.constexpr,
):  # fmt: skip
    """Grid (programs,): each takes every ``programs``-th tile of ``ROWS`` tokens. Results are contiguous."""
    col = tl.arange(0, EXPERTS)[None, :]
    choice = tl.arange(0, CHOICES)[None, :]
    taken = tl.zeros([ROWS, EXPERTS], dtype=tl.int32)
    for tile in range(tl.program_id(0), tl.cdiv(num_tokens, ROWS), tl.num_programs(0)):
        row = (tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        x = _load_rows(logits_ptr, row, col, stride_logits_row, num_tokens, E, float("-inf"))
        scores, defined = _score_rows(x, SIGMOID)
        left = tl.where(defined, x, float("-inf"))
        weights = tl.zeros([ROWS, CHOICES], dtype=tl.float32)
        ids = tl.full([ROWS, CHOICES], -1, dtype=tl.int32)
        for j in tl.static_range(K):
            best = tl.max(left, axis=1, keep_dims=True)
            lowest = tl.min(tl.where(left == best, col, EXPERTS), axis=1, keep_dims=True)
            lowest = tl.where(best > float("-inf"), lowest, -1)
            hit = col == lowest
            weight = tl.sum(tl.where(hit, scores, 0.0), axis=1, keep_dims=True)
            weights = tl.where(choice == j, weight, weights)
            ids = tl.where(choice == j, lowest, ids)
            left = tl.where(hit, float("-inf"), left)
        taken += (defined & (x > left)).to(tl.int32)
        if RENORMALIZE:
            total = tl.sum(weights, axis=1, keep_dims=True)
            weights = weights / tl.where(total > 0.0, total, 1.0)
        mask = (row < num_tokens) & (choice < K)
        tl.store(weights_ptr + row * K + choice, weights, mask=mask)
        tl.store(ids_ptr + row * K + choice, ids, mask=mask)
        if WITH_SCORES:
            scores = tl.where(defined, scores, float("nan"))
            tl.store(scores_ptr + row * E + col, scores, mask=(row < num_tokens) & (col < E))
    count = tl.sum(taken, axis=0)
    expert = tl.arange(0, EXPERTS)
    tl.atomic_add(counts_ptr + expert, count, mask=count > 0, sem="relaxed")


@triton.jit(do_not_specialize=["num_tokens"])
def _topk_gate_bwd_kernel(
    dweights_ptr, dscores_ptr, logits_ptr, ids_ptr, dlogits_ptr,
    stride_dscores_row, stride_logits_row, num_tokens,
    E: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
    SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr, HAS_DWEIGHTS: tl.constexpr, HAS_DSCORES: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of ``ROWS`` tokens,). ``dlogits``, ``dweights`` and ``ids`` are contiguous."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    col = tl.arange(0, EXPERTS)[None, :]
    x = _load_rows(logits_ptr, row, col, stride_logits_row, num_tokens, E, float("-inf"))
    scores, defined = _score_rows(x, SIGMOID)
    grad = tl.zeros([ROWS, EXPERTS], dtype=tl.float32)  # of the scores
    if HAS_DWEIGHTS:
        chosen = tl.zeros([ROWS, EXPERTS], dtype=tl.int1)
        for j in tl.static_range(K):
            expert = tl.load(ids_ptr + row * K + j, mask=row < num_tokens, other=-1)
            hit = col == expert
            dweight = tl.load(dweights_ptr + row * K + j, mask=row < num_tokens, other=0.0)
            grad = tl.where(hit, dweight, grad)
            chosen = chosen | hit
        if RENORMALIZE:
            total = tl.sum(tl.where(chosen, scores, 0.0), axis=1, keep_dims=True)
            total = tl.where(total > 0.0, total, 1.0)
            mean = tl.sum(tl.where(chosen, grad * scores, 0.0), axis=1, keep_dims=True) / total
            grad = tl.where(chosen, (grad - mean) / total, 0.0)
    if HAS_DSCORES:
        grad += _load_rows(dscores_ptr, row, col, stride_dscores_row, num_tokens, E, 0.0)
    if SIGMOID:
        dlogits = grad * scores * sigmoid(-x)
    else:
        dlogits = scores * (grad - tl.sum(scores * grad, axis=1, keep_dims=True))
    dlogits = tl.where(defined, dlogits, 0.0).to(dlogits_ptr.dtype.element_ty)
    tl.store(dlogits_ptr + row * E + col, dlogits, mask=(row < num_tokens) & (col < E))


def _config(experts: int, tile: int = _TILE) -> Config:
    block = next_power_of_2(experts)
    return Config({"ROWS": max(1, tile // block), "EXPERTS": block}, num_warps=_WARPS, num_stages=1)


def launch_topk_gate_forward(
    logits: Tensor, k: int, *, renormalize: bool, score: str, with_scores: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the forward kernel.

    Args:
        logits: ``[tokens, experts]``.
        k: Experts per token.
        renormalize: Divide weights by their sum.
        score: ``"softmax"`` or ``"sigmoid"``.
        with_scores: Store the scores of all experts.

    Returns:
        Weights float32 and expert ids int32, both ``[tokens, k]``; counts int32 ``[experts]``; scores float32
        ``[tokens, experts]``, or without rows.
    """
    tokens, experts = logits.shape
    weights = alloc.empty((tokens, k), dtype=torch.float32, device=logits.device)
    ids = alloc.empty((tokens, k), dtype=torch.int32, device=logits.device)
    counts = alloc.empty((experts,), dtype=torch.int32, device=logits.device).zero_()
    scores = alloc.empty((tokens if with_scores else 0, experts), dtype=torch.float32, device=logits.device)
    if tokens:
        # Many rounds, unrolled, keep more in registers: half the tile, or triton 3.6 spills for 128 experts and k = 8.
        config = _config(experts, _TILE if k <= 4 else _TILE // 2)
        tiles = cdiv(tokens, config.blocks["ROWS"])
        logits = last_dim_contiguous(logits)
        with on_device(logits):
            _topk_gate_fwd_kernel[(min(tiles, sm_count(logits.device) * _PROGRAMS_PER_MULTIPROCESSOR),)](
                logits, weights, ids, counts, scores, logits.stride(0), tokens,
                E=experts, K=k, CHOICES=next_power_of_2(k), SIGMOID=score == "sigmoid", RENORMALIZE=renormalize,
                WITH_SCORES=with_scores, **config.kwargs,
            )  # fmt: skip
    return weights, ids, counts, scores


def launch_topk_gate_backward(
    dweights: Tensor | None,
    dscores: Tensor | None,
    logits: Tensor,
    expert_ids: Tensor,
    *,
    renormalize: bool,
    score: str,
) -> Tensor:
    """Run the backward kernel.

    Args:
        dweights: Gradient of the weights, float32 ``[tokens, k]``; None without.
        dscores: Gradient of the scores, float32 ``[tokens, experts]``; None without.
        logits: As in forward.
        expert_ids: What forward returned.
        renormalize: As in forward.
        score: As in forward.

    Returns:
        The gradient of the logits, in their dtype.
    """
    tokens, experts = logits.shape
    dlogits = alloc.empty((tokens, experts), dtype=logits.dtype, device=logits.device)
    if tokens:
        config = _config(experts)
        dweights, expert_ids = contiguous(dweights, expert_ids)
        logits = last_dim_contiguous(logits)
        dscores = None if dscores is None else last_dim_contiguous(dscores)
        with on_device(logits):
            _topk_gate_bwd_kernel[(cdiv(tokens, config.blocks["ROWS"]),)](
                dweights, dscores, logits, expert_ids, dlogits,
                0 if dscores is None else dscores.stride(0), logits.stride(0), tokens,
                E=experts, K=expert_ids.shape[1], SIGMOID=score == "sigmoid", RENORMALIZE=renormalize,
                HAS_DWEIGHTS=dweights is not None, HAS_DSCORES=dscores is not None, **config.kwargs,
            )  # fmt: skip
    return dlogits
