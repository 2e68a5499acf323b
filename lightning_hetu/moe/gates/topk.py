"""The k best experts per token, with the scores and corrections of DeepSeek-V3 as options.

Top-k is the gate of arXiv 1701.06538 without its noise. Sigmoid scores and groups of experts are those of DeepSeek-V3
(arXiv 2412.19437, section 2.1.2), balancing by biases is arXiv 2408.15664.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_hetu.moe.gates._checks import check_at_most, check_choice, check_count, check_divides, check_number
from lightning_hetu.moe.gates._gate import RouterGate
from lightning_hetu.moe.gates._output import GateOutput
from lightning_hetu.moe.gates._scores import best_experts, normalized, weights_of

Score = Literal["softmax", "sigmoid"]
Normalize = Literal["none", "before_drop", "after_drop"]
BalanceScale = Literal["mean", "sum"]


class TopKGate(RouterGate):
    """Sends a token to the ``k`` experts with the highest scores.

    The balance loss is E / k times the sum over experts of their assignments per token times their mean probability,
    which is 1 where all is even. Probabilities are the scores, for ``sigmoid`` over their sum.

    Args:
        dim: Width of a token.
        num_experts: Number of experts E.
        k: Experts per token.
        score: ``softmax`` over experts, or a ``sigmoid`` for each.
        normalize: Whether weights are divided by their sum: ``none``, ``before_drop``, or ``after_drop``, which is of
            what is kept. With one choice the router would learn nothing from a weight of 1.
        num_groups: Groups of consecutive experts.
        top_groups: Groups whose experts a token can get: those with the highest sum of their two best scores.
        bias_balancing: Step of the biases that balance loads instead of a loss: an expert is chosen by its score plus
            its bias, and weighted by its score. 0 for none. See :meth:`update_bias`.
        balance_scale: ``mean``, or ``sum`` over choices as in HetuMoE (arXiv 2203.14685), which is k times as much.
        **options: Options of :class:`RouterGate`.

    Raises:
        ValueError: If an option is out of range, or options exclude one another.
    """

    expert_bias: Tensor | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: int = 2,
        score: Score = "softmax",
        normalize: Normalize = "none",
        num_groups: int = 1,
        top_groups: int = 1,
        bias_balancing: float = 0.0,
        balance_scale: BalanceScale = "mean",
        **options: Any,
    ) -> None:
        check_count("num_experts", num_experts)
        check_at_most("k", k, num_experts, "num_experts")
        check_choice("score", score, Score)
        check_choice("normalize", normalize, Normalize)
        check_choice("balance_scale", balance_scale, BalanceScale)
        check_divides("num_groups", num_groups, num_experts, "num_experts")
        check_at_most("top_groups", top_groups, num_groups, "num_groups")
        check_number("bias_balancing", bias_balancing)
        if k == 1 and normalize != "none":
            raise ValueError(f"normalize={normalize!r} with k=1: every weight would be 1; take 'none' or a larger k.")
        if k > top_groups * (num_experts // num_groups):
            raise ValueError(
                f"k={k}: top_groups={top_groups} have {top_groups * (num_experts // num_groups)} experts; lower k or"
                " raise top_groups."
            )
        if score == "sigmoid" and options.get("z_loss"):
            raise ValueError("z_loss=True with score='sigmoid': there is no softmax to regularize; leave z_loss out.")
        super().__init__(dim, num_experts, **options)
        self.k = k
        self.score: Score = score
        self.normalize: Normalize = normalize
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.bias_balancing = bias_balancing
        self.balance_scale: BalanceScale = balance_scale
        self.register_buffer("expert_bias", torch.zeros(num_experts, dtype=torch.float32) if bias_balancing else None)

    def reset_parameters(self) -> None:
        """Draws the router's weights as ``nn.Linear`` does, and sets biases to zero."""
        super().reset_parameters()
        if self._buffers.get("expert_bias") is not None:
            torch.nn.init.zeros_(self._buffers["expert_bias"])  # type: ignore[arg-type]

    @torch.no_grad()
    def update_bias(self, load: Tensor) -> None:
        """Raises the biases of experts below the mean load by ``bias_balancing``, lowers those above it.

        To be called once per optimizer step, on every rank with the same ``load``. The mean of biases is then taken off
        all of them: it changes no choice, and would grow over the steps until the scores are lost in rounding.

        Args:
            load: ``[E]``: ``tokens_per_expert`` summed over the micro-batches and ranks of the step.

        Raises:
            ValueError: If the gate has no biases, or the shape is wrong.
        """
        if self.expert_bias is None:
            raise ValueError("bias_balancing=0.0: this gate has no biases; give the size of their steps, say 1e-3.")
        if load.shape != self.expert_bias.shape:
            raise ValueError(f"load has shape {list(load.shape)}: expected [{self.num_experts}].")
        load = load.to(self.expert_bias.device, torch.float64)  # exact for counts, so that equal loads have no sign
        self.expert_bias += self.bias_balancing * (load.mean() - load).sign().float()
        self.expert_bias -= self.expert_bias.mean()

    def _route(self, logits: Tensor, valid: Tensor) -> GateOutput:
        scores = logits.sigmoid() if self.score == "sigmoid" else logits.softmax(dim=-1)
        scores = scores.masked_fill(~valid.unsqueeze(-1), 0.0)
        rank_by = scores.detach()
        if self.expert_bias is not None:
            rank_by = rank_by + self.expert_bias
        chosen = best_experts(self._in_top_groups(rank_by), self.k)
        share = self._share(chosen, valid, scores.dtype)
        expert_ids = self._placed(chosen, valid)
        weights = weights_of(scores, expert_ids)
        if self.normalize == "before_drop":
            weights = normalized(weights)
        probabilities = normalized(scores) if self.score == "sigmoid" else scores
        scale = self.num_experts / (self.k if self.balance_scale == "mean" else 1)
        return self._finish(
            expert_ids,
            weights,
            scores=scores,
            slots=self.k,
            confidence=self._confidence(scores),
            renormalize=self.normalize == "after_drop",
            losses=self._losses(logits, valid, probabilities, share, scale),
        )

    def _in_top_groups(self, rank_by: Tensor) -> Tensor:
        """Negative infinity for experts outside of a token's best groups."""
        if self.top_groups == self.num_groups:
            return rank_by
        grouped = rank_by.view(len(rank_by), self.num_groups, self.num_experts // self.num_groups)
        of_groups = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
        outside = torch.ones_like(of_groups, dtype=torch.bool)
        outside.scatter_(1, best_experts(of_groups, self.top_groups), False)
        return grouped.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(1)
