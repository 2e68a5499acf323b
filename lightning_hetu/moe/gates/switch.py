"""The gate of Switch Transformer: one expert per token (arXiv 2101.03961, section 2.1)."""

from __future__ import annotations

from torch import Tensor

from lightning_hetu.moe.gates._gate import RouterGate
from lightning_hetu.moe.gates._output import GateOutput
from lightning_hetu.moe.gates._scores import weights_of


class SwitchGate(RouterGate):
    """Sends a token to its most probable expert; the weight is the probability.

    The weight is not divided by the sum over chosen experts: it would be 1, and the router learn nothing from it. The
    balance loss is E times the sum over experts of their fraction of tokens times their mean probability, which is 1
    where all is even.

    Args:
        dim: Width of a token.
        num_experts: Number of experts.
        **options: Options of :class:`RouterGate`.
    """

    def _route(self, logits: Tensor, valid: Tensor) -> GateOutput:
        return route_to_most_probable(self, logits, valid)


def route_to_most_probable(
    gate: RouterGate, logits: Tensor, valid: Tensor, metrics: dict[str, Tensor] | None = None
) -> GateOutput:
    """Switch routing by finite logits ``[T, E]``, for gates that end up there too."""
    scores = logits.softmax(dim=-1).masked_fill(~valid.unsqueeze(-1), 0.0)
    chosen = scores.detach().argmax(dim=-1, keepdim=True)  # the first of equal ones
    share = gate._share(chosen, valid, scores.dtype)
    expert_ids = gate._placed(chosen, valid)
    return gate._finish(
        expert_ids,
        weights_of(scores, expert_ids),
        scores=scores,
        slots=1,
        confidence=gate._confidence(scores),
        losses=gate._losses(logits, valid, scores, share, gate.num_experts),
        metrics=metrics,
    )
