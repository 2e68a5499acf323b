"""The hierarchical gate SAM, "Switch and Mixture", of HetuMoE (arXiv 2203.14685)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_hetu.moe.gates._checks import check_at_most, check_divides
from lightning_hetu.moe.gates._gate import RouterGate
from lightning_hetu.moe.gates._losses import alignment_loss
from lightning_hetu.moe.gates._output import GateOutput
from lightning_hetu.moe.gates._scores import best_experts, weights_of


class SAMGate(RouterGate):
    """Sends a token to the ``k`` best experts of one group, so that it visits one node only.

    Groups are E / ``num_groups`` consecutive experts. A token goes to the group with the largest sum of probabilities
    (a softmax over all experts), and there to the ``k`` most probable experts, with their probabilities as weights. The
    balance loss is the one of :class:`TopKGate`. The alignment loss is the mean over tokens of what experts of other
    groups exceed the k-th chosen one by; all probabilities in it get gradients, unlike in HetuMoE's own kernel.

    Args:
        dim: Width of a token.
        num_experts: Number of experts E.
        num_groups: Number of groups; divides E.
        k: Experts per token, at most as many as a group has.
        **options: Options of :class:`RouterGate`.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(self, dim: int, num_experts: int, *, num_groups: int = 2, k: int = 2, **options: Any) -> None:
        super().__init__(dim, num_experts, **options)
        check_divides("num_groups", num_groups, num_experts, "num_experts")
        check_at_most("k", k, num_experts // num_groups, "num_experts / num_groups")
        self.num_groups = num_groups
        self.k = k

    def _route(self, logits: Tensor, valid: Tensor) -> GateOutput:
        scores = logits.softmax(dim=-1).masked_fill(~valid.unsqueeze(-1), 0.0)
        size = self.num_experts // self.num_groups
        grouped = scores.detach().view(len(scores), self.num_groups, size)
        group = grouped.sum(dim=-1).argmax(dim=-1, keepdim=True)  # the first of equal ones
        inside = torch.arange(self.num_experts, device=group.device) // size == group
        chosen = best_experts(scores.detach().masked_fill(~inside, -1.0), self.k)
        share = self._share(chosen, valid, scores.dtype)
        losses = self._losses(logits, valid, scores, share, self.num_experts / self.k)
        losses["alignment"] = alignment_loss(scores, scores.gather(1, chosen[:, -1:]), inside, share)
        expert_ids = self._placed(chosen, valid)
        return self._finish(
            expert_ids,
            weights_of(scores, expert_ids),
            scores=scores,
            slots=self.k,
            confidence=self._confidence(scores),
            losses=losses,
        )
