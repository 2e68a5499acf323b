"""The gate of GShard: two experts per token, the second one perhaps by chance (arXiv 2006.16668, algorithm 1)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_hetu.moe.gates._checks import check_at_most, check_choice
from lightning_hetu.moe.gates._gate import RouterGate
from lightning_hetu.moe.gates._output import GateOutput
from lightning_hetu.moe.gates._scores import best_experts, gumbel_like, normalized, weights_of

SecondPolicy = Literal["top", "sampling", "random"]
PairNormalize = Literal["before_drop", "after_drop"]


class GShardGate(RouterGate):
    """Sends a token to its most probable expert and to a second one.

    The balance loss is the one of :class:`SwitchGate`, of first choices only.

    Args:
        dim: Width of a token.
        num_experts: Number of experts, at least 2.
        second_policy: The second expert in training, which in evaluation is the second most probable one. ``top``:
            that one. ``sampling``: one of the others by chance, by their probabilities. ``random``: the second most
            probable with probability min(1, 2 g2), else none, where g2 is its weight before any is dropped.
        normalize: When weights are divided by their sum. ``before_drop``: before the second one is left out by
            ``random`` or either is dropped for lack of room. ``after_drop``: of what is kept, so that a single expert
            has the weight 1; g2 is then the probability.
        **options: Options of :class:`RouterGate`.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        second_policy: SecondPolicy = "top",
        normalize: PairNormalize = "before_drop",
        **options: Any,
    ) -> None:
        super().__init__(dim, num_experts, **options)
        check_at_most("choices", 2, num_experts, "num_experts")
        check_choice("second_policy", second_policy, SecondPolicy)
        check_choice("normalize", normalize, PairNormalize)
        self.second_policy: SecondPolicy = second_policy
        self.normalize: PairNormalize = normalize

    def _route(self, logits: Tensor, valid: Tensor) -> GateOutput:
        scores = logits.softmax(dim=-1).masked_fill(~valid.unsqueeze(-1), 0.0)
        chosen = best_experts(scores, 2)
        if self.training and self.second_policy == "sampling":
            chosen = torch.cat([chosen[:, :1], _sampled(logits.detach(), chosen[:, :1])], dim=1)
        share = self._share(chosen[:, :1], valid, scores.dtype)
        expert_ids = self._placed(chosen, valid)
        weights = weights_of(scores, expert_ids)
        if self.normalize == "before_drop":
            weights = normalized(weights)
        if self.training and self.second_policy == "random" and not self.force_balanced:
            second = weights.detach()[:, 1]
            left_out = torch.zeros_like(expert_ids, dtype=torch.bool)
            left_out[:, 1] = torch.rand_like(second) >= 2 * second
            expert_ids = expert_ids.masked_fill(left_out, -1)
            weights = weights.masked_fill(left_out, 0.0)
        return self._finish(
            expert_ids,
            weights,
            scores=scores,
            slots=2,
            confidence=self._confidence(scores),
            renormalize=self.normalize == "after_drop",
            losses=self._losses(logits, valid, scores, share, self.num_experts),
        )


def _sampled(logits: Tensor, first: Tensor) -> Tensor:
    """An expert other than ``first`` ``[T, 1]`` with probabilities in proportion to the softmax of ``logits``."""
    # Experts that are ruled out stay above the first choice, which must not come twice.
    noisy = (logits + gumbel_like(logits)).clamp(min=torch.finfo(logits.dtype).min)
    return noisy.scatter(1, first, -torch.inf).argmax(dim=-1, keepdim=True)
