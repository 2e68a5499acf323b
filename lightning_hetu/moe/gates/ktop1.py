"""k top-1 routing: one expert of each of k prototypes (M6-T, arXiv 2105.15082)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_hetu.moe.gates._checks import check_count, check_divides
from lightning_hetu.moe.gates._gate import RouterGate
from lightning_hetu.moe.gates._output import GateOutput
from lightning_hetu.moe.gates._scores import weights_of


class KTop1Gate(RouterGate):
    """Splits experts into ``k`` prototypes and sends a token to the most probable expert of each.

    A prototype is E / k consecutive experts with a softmax of its own. The weight is that softmax's probability, and
    the weights of a token are not divided by their sum. The balance loss is the sum over prototypes of what
    :class:`SwitchGate` has for one, which is k where all is even; the z loss is the mean over prototypes. A row without
    a softmax in one prototype gets no expert in any.

    Args:
        dim: Width of a token.
        num_experts: Number of experts E.
        k: Number of prototypes; divides E.
        **options: Options of :class:`RouterGate`.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(self, dim: int, num_experts: int, *, k: int = 2, **options: Any) -> None:
        super().__init__(dim, num_experts, **options)
        check_count("k", k)
        check_divides("k", k, num_experts, "num_experts")
        self.k = k

    def _route(self, logits: Tensor, valid: Tensor) -> GateOutput:
        size = self.num_experts // self.k
        parts = logits.view(len(logits), self.k, size)
        valid = valid & parts.detach().amax(dim=-1).isfinite().all(dim=-1)
        parts = parts.masked_fill(~valid.view(-1, 1, 1), 0.0)
        scores = parts.softmax(dim=-1).flatten(1).masked_fill(~valid.unsqueeze(-1), 0.0)
        best = scores.detach().view_as(parts).argmax(dim=-1)  # the first of equal ones
        chosen = best + size * best.new_tensor(range(self.k))
        share = self._share(chosen, valid, scores.dtype)
        expert_ids = self._placed(chosen, valid)
        return self._finish(
            expert_ids,
            weights_of(scores, expert_ids),
            scores=scores,
            slots=self.k,
            confidence=self._confidence(scores),
            losses=self._losses(parts, valid, scores, share, size),
        )
