"""The gate of BASE layers: in training every expert gets the same number of tokens (arXiv 2103.16716)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lightning_hetu.moe.gates._auction import balanced_assignment
from lightning_hetu.moe.gates._gate import RouterGate
from lightning_hetu.moe.gates._joint import joint_rows
from lightning_hetu.moe.gates._losses import BalanceScope
from lightning_hetu.moe.gates._output import GateOutput
from lightning_hetu.moe.gates._scores import weights_of


class BASEGate(RouterGate):
    """Sends a token to one expert: in training by a balanced assignment, in evaluation to its best one.

    Scores are products of tokens with the experts' centroids. With s the sigmoid of the score for the chosen expert,
    the layer's result for a token x is s expert(x) + (1 - s) x: ``weights`` has s, ``residual`` has 1 - s. There are no
    losses, and no limit to a load but that of the assignment: the numbers of tokens differ by at most one.

    Args:
        dim: Width of a token.
        num_experts: Number of experts.
        balance_scope: Tokens that are assigned together: ``global`` for those of all ranks of ``balance_group``, as one
            process with all of them does; ranks tell each other the scores, and each computes the assignment.
            ``micro`` for those of the call.
        balance_group: Ranks of ``global``. Default: all.
        force_balanced: As in :class:`Gate`.

    Attributes:
        weight: Centroids ``[num_experts, dim]``.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        balance_scope: BalanceScope = "global",
        balance_group: ProcessGroup | None = None,
        force_balanced: bool = False,
    ) -> None:
        super().__init__(
            dim, num_experts, balance_scope=balance_scope, balance_group=balance_group, force_balanced=force_balanced
        )

    def reset_parameters(self) -> None:
        """Draws orthogonal centroids of length 0.1."""
        nn.init.orthogonal_(self.weight, gain=0.1)

    def _route(self, logits: Tensor, valid: Tensor) -> GateOutput:
        chosen = logits.detach().argmax(dim=-1)  # the first of equal ones
        if self.training:
            rows = valid.nonzero().squeeze(-1)
            scores, own = logits.detach()[rows], slice(None)
            if self.balance_scope == "global":
                scores, own = joint_rows(scores, self.balance_group)
            chosen[rows] = balanced_assignment(scores)[own]
        expert_ids = self._placed(chosen.unsqueeze(-1), valid)
        strength = weights_of(logits.sigmoid(), expert_ids)
        residual = (1 - strength.squeeze(-1)).masked_fill(~valid, 0.0)
        return self._finish(expert_ids, strength, scores=logits, residual=residual)
