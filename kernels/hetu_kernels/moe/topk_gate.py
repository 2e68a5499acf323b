"""The gate of a mixture of experts: scores of all experts, the best k of each token, and how many tokens each gets.

    P = softmax(logits)   or   sigmoid(logits)                       in float32
    ids[t] = the k largest logits[t], the lowest id first among equals
    w[t, j] = P[t, ids[t, j]],   divided by their sum over j if renormalized

(2101.03961, section 2.1; sigmoid scores as in 2412.19437, section 2.1.2). Experts are ranked by logits: scores grow
with them, and round to equal numbers where logits still differ. Backward recomputes P from the logits. With ds the
gradient of the chosen scores,

    ds_j = dw_j,   or   (dw_j - sum_i dw_i w_i) / sum_i P[ids_i]     renormalized
    dP_e = dscores_e + sum_j ds_j [ids_j = e]
    dlogits_e = P_e (dP_e - sum_c P_c dP_c),   or   P_e (1 - P_e) dP_e

Differences from torch: a logit of -inf rules its expert out, also where fewer than k are left, and rows without any
expert have scores of 0, not NaN. Kernels: ``_topk_gate_kernels.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hetu_kernels._common import checks
from hetu_kernels._common.device import use_triton
from hetu_kernels.moe import topk_gate_ref

MAX_CHOICES = 8
MAX_EXPERTS = 512
_SCORES = ("softmax", "sigmoid")


@torch.library.custom_op("lightning_hetu::topk_gate_fwd", mutates_args=())
def topk_gate_fwd(
    logits: Tensor, k: int, renormalize: bool, score: str, with_scores: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns weights, expert ids, counts and scores (empty unless asked for)."""
    if use_triton(logits):
        from hetu_kernels.moe._topk_gate_kernels import launch_topk_gate_forward

        return launch_topk_gate_forward(logits, k, renormalize=renormalize, score=score, with_scores=with_scores)
    expert_ids, counts = topk_gate_ref.choose(logits, k, score)
    weights, scores = topk_gate_ref.weigh(logits, expert_ids, renormalize, score)
    return weights, expert_ids.contiguous(), counts, scores if with_scores else scores.new_empty((0, scores.shape[1]))


@topk_gate_fwd.register_fake
def _(logits, k, renormalize, score, with_scores):  # type: ignore[no-untyped-def]
    tokens, experts = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    return (
        logits.new_empty((tokens, k), dtype=wide),
        logits.new_empty((tokens, k), dtype=torch.int32),
        logits.new_empty((experts,), dtype=torch.int32),
        logits.new_empty((tokens if with_scores else 0, experts), dtype=wide),
    )


@torch.library.custom_op("lightning_hetu::topk_gate_bwd", mutates_args=())
def topk_gate_bwd(
    dweights: Tensor | None,
    dscores: Tensor | None,
    logits: Tensor,
    expert_ids: Tensor,
    renormalize: bool,
    score: str,
) -> Tensor:
    """Returns the gradient of the logits, in their dtype."""
    if use_triton(logits):
        from hetu_kernels.moe._topk_gate_kernels import launch_topk_gate_backward

        return launch_topk_gate_backward(dweights, dscores, logits, expert_ids, renormalize=renormalize, score=score)
    return topk_gate_ref.backward(dweights, dscores, logits, expert_ids, renormalize, score).contiguous()


@topk_gate_bwd.register_fake
def _(dweights, dscores, logits, expert_ids, renormalize, score):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, ctx.renormalize, ctx.score, ctx.with_scores = inputs
    ctx.save_for_backward(logits, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dweights: Tensor | None, _ids: Any, _counts: Any, dscores: Tensor | None) -> tuple[Any, ...]:
    logits, expert_ids = ctx.saved_tensors
    dlogits = topk_gate_bwd(
        dweights, dscores if ctx.with_scores else None, logits, expert_ids, ctx.renormalize, ctx.score
    )
    return dlogits, None, None, None, None


topk_gate_fwd.register_autograd(_backward, setup_context=_setup)


def topk_gate(
    logits: Tensor,
    k: int,
    *,
    renormalize: bool = False,
    score: str = "softmax",
    return_scores: bool = False,
) -> tuple[Tensor, ...]:
    """Choose the best experts of each token.

    A row with a NaN, or with +inf under the softmax, has no experts: ids of -1, weights of 0, scores of NaN, and
    gradients of 0.

    Args:
        logits: ``[tokens, experts]``, float32, float16 or bfloat16, up to 512 experts; any strides. An expert whose
            logit is -inf is never chosen.
        k: Experts per token, at most 8 and at most all.
        renormalize: Divide the weights of a token by their sum; they stay 0 where all of its scores are.
        score: ``"softmax"`` over the experts, or ``"sigmoid"`` of each.
        return_scores: Return the scores of all experts as well, for a balance loss.

    Returns:
        The weights float32 ``[tokens, k]``, largest first; the experts' ids int32 ``[tokens, k]``, -1 with weight 0
        where there are fewer than k; how many tokens chose each expert, int32 ``[experts]``; and with
        ``return_scores`` the scores float32 ``[tokens, experts]``. Logits get gradients through weights and scores.

    Raises:
        ValueError: If ``logits`` is no matrix of 1 to 512 columns, ``k`` is out of range, or there is no such score.
        TypeError: If ``logits`` is no floating tensor, ``k`` no integer, or a flag is neither True nor False.
    """
    op = "topk_gate"
    checks.tensors(op, logits=logits)
    checks.not_distributed(op, logits=logits)
    checks.floating(op, logits=logits)
    checks.shape(op, "logits", logits, (None, None), "tokens, experts")
    experts = logits.shape[1]
    if not 1 <= experts <= MAX_EXPERTS:
        raise ValueError(f"{op}: logits has {experts} columns, expected 1 to {MAX_EXPERTS}, one per expert.")
    k = checks.whole(op, "k", k, at_least=1, at_most=min(MAX_CHOICES, experts), meaning=", experts per token")
    checks.one_of(op, "score", score, _SCORES)
    checks.flags(op, renormalize=renormalize, return_scores=return_scores)
    results = topk_gate_fwd(logits, k, renormalize, score, return_scores)
    return results if return_scores else results[:3]
