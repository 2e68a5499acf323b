"""What every gate says about a batch of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor


@dataclass(frozen=True, eq=False)
class GateOutput:
    """Where tokens go, and with which weights.

    T tokens, K slots per token, E experts. An assignment is a slot of a token that has an expert. It is dropped where
    its expert has no room: ``expert_ids`` still names the expert, ``dropped`` is true and its weight is zero.

    Attributes:
        expert_ids: int64 ``[T, K]``; -1 where the slot has no expert. A token's experts differ from one another.
        weights: float32 ``[T, K]`` (float64 for float64 logits), differentiable; 0 without an expert, or dropped.
        scores: What experts were chosen by, ``[T, E]``, differentiable; ``None`` for gates that do not score.
        position: int64 ``[T, K]``: how many assignments reach the expert before this one; -1 without an expert.
            ``None`` without a capacity.
        dropped: bool ``[T, K]``.
        tokens_per_expert: int64 ``[E]``: assignments before any is dropped.
        kept_per_expert: int64 ``[E]``: assignments that are not dropped.
        losses: Scalars with their graph, by name (``balance``, ``z``, ``alignment``), without coefficients.
        metrics: Scalars without a graph, by name.
        residual: ``[T]``, differentiable: the share of a token that is added to its result, for gates that interpolate
            between a token and what its expert says; else ``None``.
        capacity: Assignments that an expert has room for; ``None`` for any number.
    """

    expert_ids: Tensor
    weights: Tensor
    scores: Tensor | None
    position: Tensor | None
    dropped: Tensor
    tokens_per_expert: Tensor
    kept_per_expert: Tensor
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    residual: Tensor | None = None
    capacity: int | None = None

    def detach(self) -> GateOutput:
        """The same without graphs."""
        return replace(
            self,
            weights=self.weights.detach(),
            scores=None if self.scores is None else self.scores.detach(),
            losses={name: loss.detach() for name, loss in self.losses.items()},
            residual=None if self.residual is None else self.residual.detach(),
        )
