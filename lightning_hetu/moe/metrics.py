"""Figures on where tokens go: torchmetrics that add counts over batches and ranks before they divide."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_hetu.moe.gates import GateOutput


class ExpertLoad(Metric):
    """How evenly tokens are spread over experts.

    :meth:`compute` gives scalars by name: ``cv``, the standard deviation of the experts' loads over their mean;
    ``max_over_mean``; ``entropy``, that of the loads over the one of even loads, so 1 is even; ``dead``, the share of
    experts without a token. Assignments count before any is dropped for lack of capacity.

    Args:
        num_experts: Number of experts.

    Raises:
        ValueError: If it is not at least 1.
    """

    full_state_update = False
    loads: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        if isinstance(num_experts, bool) or not isinstance(num_experts, int) or num_experts < 1:
            raise ValueError(f"num_experts={num_experts!r}: expected an integer of at least 1.")
        self.add_state("loads", default=torch.zeros(num_experts, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, decided: GateOutput) -> None:
        """Adds what a gate has decided for a batch."""
        self.loads += decided.tokens_per_expert.to(self.loads)

    def compute(self) -> dict[str, Tensor]:
        """The scalars; of no token at all, loads count as even."""
        total = self.loads.sum()
        share = torch.where(total > 0, self.loads / total.clamp(min=1), 1 / len(self.loads))
        entropy = torch.special.entr(share).sum()
        even = torch.tensor(float(len(share)), dtype=torch.float64).log()
        return {
            "cv": share.std(correction=0) * len(share),
            "max_over_mean": share.max() * len(share),
            "entropy": entropy / even.to(entropy) if len(share) > 1 else torch.ones_like(entropy),
            "dead": (share == 0).double().mean(),
        }


class MeanActiveExperts(Metric):
    """Experts that a token is sent to, on average; tokens without one count too."""

    full_state_update = False
    chosen: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("chosen", "tokens"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, decided: GateOutput) -> None:
        """Adds what a gate has decided for a batch."""
        self.chosen += (decided.expert_ids >= 0).sum()
        self.tokens += len(decided.expert_ids)

    def compute(self) -> Tensor:
        """The mean; 0 without tokens."""
        return self.chosen / self.tokens.clamp(min=1)


class DropRate(Metric):
    """Share of assignments that found no room in their expert."""

    full_state_update = False
    dropped: Tensor
    chosen: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("dropped", "chosen"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, decided: GateOutput) -> None:
        """Adds what a gate has decided for a batch."""
        chosen = decided.expert_ids >= 0
        self.dropped += (decided.dropped & chosen).sum()
        self.chosen += chosen.sum()

    def compute(self) -> Tensor:
        """The share; 0 without assignments."""
        return self.dropped / self.chosen.clamp(min=1)


class BalanceRatio(Metric):
    """Load of the busiest rank over the mean load of ranks; 1 is the best there is.

    Args:
        owners: For each expert the number of the rank that has it.

    Raises:
        ValueError: If there is no expert, or a number is negative.
    """

    full_state_update = False
    loads: Tensor

    def __init__(self, owners: Sequence[int]) -> None:
        super().__init__()
        if not owners or min(owners) < 0:
            raise ValueError(f"owners={list(owners)}: expected the number of a rank for each expert.")
        self.owners = torch.tensor(owners)
        self.add_state("loads", default=torch.zeros(max(owners) + 1, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, decided: GateOutput | Sequence[int]) -> None:
        """Adds a batch.

        Args:
            decided: What a gate has decided; or the rows that each rank worked on, where experts do not stay with their
                owners. All ranks know those, and add them: that changes no ratio.
        """
        if isinstance(decided, GateOutput):
            self.loads.index_add_(0, self.owners.to(self.loads.device), decided.kept_per_expert.to(self.loads))
        else:
            self.loads += torch.tensor(decided).to(self.loads)

    def compute(self) -> Tensor:
        """The ratio; 1 without tokens."""
        mean = self.loads.mean()
        return torch.where(mean > 0, self.loads.max() / mean.clamp(min=1e-30), torch.ones_like(mean))
