"""What all gates share: room in experts, counts, and rows that must not spoil others.

A row that has no softmax (NaN or positive infinity among its logits, or nothing but negative infinity) gets no expert:
ids of -1 and weights of 0. It counts neither in losses nor in means, and gives no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lightning_hetu.moe.gates._capacity import CapacityRounding, arrival_positions, count_per_expert, expert_capacity
from lightning_hetu.moe.gates._checks import check_choice, check_count, check_number
from lightning_hetu.moe.gates._joint import joint_rows
from lightning_hetu.moe.gates._losses import BalanceScope, BatchShare, balance_loss, batch_share, z_loss
from lightning_hetu.moe.gates._output import GateOutput
from lightning_hetu.moe.gates._scores import finite_rows, normalized, router_logits


class Gate(nn.Module):
    """Decides which experts a token goes to.

    Args:
        num_experts: Number of experts E.
        capacity_factor: Room in every expert over what even loads take. ``None`` or infinity: as much as is asked for,
            nothing is dropped. 0: everything is.
        min_capacity: The least room, in assignments, where there is a limit.
        capacity_rounding: ``exact``: ceil(factor k T / E) assignments. ``hetu``: k ceil(factor T / E).
        eval_capacity_factor: The factor in evaluation. Default: ``capacity_factor``.
        capacity_scope: Tokens that share the room: ``micro`` for those of the call, so that a rank never sends an
            expert more than its own limit; ``global`` for those of all ranks of ``balance_group``, which drops what one
            process with all tokens drops. Ranks then tell each other their choices.
        balance_group: Ranks of what is ``global``. Default: all. Also an attribute, for groups that come later.
        force_balanced: Whether loads are made even, whatever the scores, to measure speed and memory: choice j of token
            t goes to expert (t k + j) modulo E, with the score the gate has for it as its weight. Losses are those of
            the gate's own choice. Gates with another number of experts for each token, or none for some, number
            assignments by token and choice and take that number modulo E.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        capacity_factor: float | None = None,
        min_capacity: int = 0,
        capacity_rounding: CapacityRounding = "exact",
        eval_capacity_factor: float | None = None,
        capacity_scope: BalanceScope = "micro",
        balance_group: ProcessGroup | None = None,
        force_balanced: bool = False,
    ) -> None:
        super().__init__()
        check_count("num_experts", num_experts)
        check_count("min_capacity", min_capacity, least=0)
        for name, factor in (("capacity_factor", capacity_factor), ("eval_capacity_factor", eval_capacity_factor)):
            if factor is not None:
                check_number(name, factor)
        check_choice("capacity_rounding", capacity_rounding, CapacityRounding)
        check_choice("capacity_scope", capacity_scope, BalanceScope)
        self.num_experts = num_experts
        self.capacity_factor = capacity_factor
        self.min_capacity = min_capacity
        self.capacity_rounding: CapacityRounding = capacity_rounding
        self.eval_capacity_factor = eval_capacity_factor
        self.capacity_scope: BalanceScope = capacity_scope
        self.balance_group = balance_group
        self.force_balanced = force_balanced

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> GateOutput:
        """Routes tokens ``x`` ``[..., D]`` with the numbers ``token_ids`` ``[...]``, which not every gate needs."""
        raise NotImplementedError(f"{type(self).__name__} defines how it routes in forward().")

    def route(self, given: Tensor, /) -> GateOutput:
        """Routes by what :meth:`forward` decides by: logits ``[T, E]``, or tokens' numbers."""
        raise NotImplementedError(f"{type(self).__name__} defines how it routes in route().")

    def _placed(self, expert_ids: Tensor, valid: Tensor) -> Tensor:
        """No expert for rows that do not count; even loads where they are forced."""
        expert_ids = expert_ids.masked_fill(~valid.unsqueeze(-1), -1)
        if not self.force_balanced:
            return expert_ids
        chosen = expert_ids >= 0
        running = chosen.flatten().cumsum(0).view_as(expert_ids) - 1
        return torch.where(chosen, running % self.num_experts, -1)

    def _capacity_factor(self) -> float | None:
        """The factor that holds now; ``None`` where there is no limit."""
        factor = self.capacity_factor
        if not self.training and self.eval_capacity_factor is not None:
            factor = self.eval_capacity_factor
        return None if factor is None or math.isinf(factor) else factor

    def _finish(
        self,
        expert_ids: Tensor,
        weights: Tensor,
        *,
        scores: Tensor | None = None,
        slots: float | Tensor | None = None,
        confidence: Tensor | None = None,
        renormalize: bool = False,
        losses: Mapping[str, Tensor] | None = None,
        metrics: Mapping[str, Tensor] | None = None,
        residual: Tensor | None = None,
    ) -> GateOutput:
        """Drops what has no room, and counts.

        Args:
            expert_ids: int64 ``[T, K]`` of :meth:`_placed`.
            weights: ``[T, K]``, 0 without an expert.
            scores: For the output.
            slots: Assignments per token, by which there is room; ``None`` for gates without a limit.
            confidence: ``[T]``: who comes first; default the earlier token.
            renormalize: Whether weights of what is kept are divided by their sum.
            losses: For the output.
            metrics: For the output, beside the loads'.
            residual: For the output.
        """
        counts = count_per_expert(expert_ids, self.num_experts)
        position = None
        dropped = torch.zeros_like(expert_ids, dtype=torch.bool)
        kept, capacity, factor = counts, None, self._capacity_factor()
        if factor is not None and slots is not None:
            together, own = expert_ids, slice(None)
            if self.capacity_scope == "global":
                together, own = joint_rows(expert_ids, self.balance_group)
                confidence = None if confidence is None else joint_rows(confidence, self.balance_group)[0]
            capacity = expert_capacity(
                len(together), self.num_experts, float(slots), factor, self.min_capacity, self.capacity_rounding
            )
            position = arrival_positions(together, self.num_experts, confidence)[own]
            dropped = position >= capacity
            kept = count_per_expert(expert_ids.masked_fill(dropped, -1), self.num_experts)
            weights = weights.masked_fill(dropped, 0.0)
        if renormalize:
            weights = normalized(weights)
        return GateOutput(
            expert_ids=expert_ids,
            weights=weights,
            scores=scores,
            position=position,
            dropped=dropped,
            tokens_per_expert=counts,
            kept_per_expert=kept,
            losses=dict(losses or {}),
            metrics={**_load_metrics(counts, kept), **(metrics or {})},
            residual=residual,
            capacity=capacity,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        """Keeps float32 buffers that: in bfloat16, small steps of a bias or an average would be lost."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and buffer.dtype == torch.float32 != after.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self

    def extra_repr(self) -> str:
        """Sizes, for printing the module."""
        return f"num_experts={self.num_experts}"


class RouterGate(Gate):
    """A gate that scores experts by a linear map of tokens, the router.

    Logits and everything after them are computed in at least float32, under autocast too.

    Args:
        dim: Width of a token D.
        num_experts: Number of experts E.
        batch_prioritized: Whether tokens with the highest scores get room first, instead of the earlier ones
            (arXiv 2106.05974). Only matters with a capacity.
        jitter: In training the router sees tokens times uniform noise between 1 - ``jitter`` and 1 + ``jitter``.
        z_loss: Whether ``losses`` has ``z``.
        balance_scope: Tokens that losses are about: ``micro`` for those of the call; ``global`` for those of all ranks
            of ``balance_group``, such that the mean over ranks of gradients is the gradient of one process with all
            tokens. A rank's share counts by its number of tokens, which may differ between ranks.
        **options: Options of :class:`Gate`.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        batch_prioritized: bool = False,
        jitter: float = 0.0,
        z_loss: bool = False,
        balance_scope: BalanceScope = "micro",
        **options: Any,
    ) -> None:
        super().__init__(num_experts, **options)
        check_count("dim", dim)
        check_number("jitter", jitter, most=1.0, below=True)
        check_choice("balance_scope", balance_scope, BalanceScope)
        self.dim = dim
        self.batch_prioritized = batch_prioritized
        self.jitter = jitter
        self.z_loss = z_loss
        self.balance_scope: BalanceScope = balance_scope
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the router's weights as ``nn.Linear`` does."""
        nn.init.uniform_(self.weight, -1 / math.sqrt(self.dim), 1 / math.sqrt(self.dim))

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> GateOutput:
        """Routes tokens.

        Args:
            x: Tokens, ``[..., D]``, any floating dtype; T is the product of the leading sizes.
            token_ids: Not used.

        Returns:
            Where they go. The router gets gradients through ``weights``, ``scores`` and ``losses``.

        Raises:
            ValueError: If the last size is not ``dim``.
        """
        if x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {list(x.shape)}: expected a last size of dim={self.dim}.")
        x = x.reshape(-1, self.dim)
        if self.training and self.jitter:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))  # in bfloat16 noise of 1e-2 would be coarse
            x = wide * torch.empty_like(wide).uniform_(1 - self.jitter, 1 + self.jitter)
        return self.route(router_logits(x, self.weight))

    def route(self, logits: Tensor) -> GateOutput:
        """Routes tokens by given logits.

        Args:
            logits: ``[T, E]``, any floating dtype; negative infinity rules an expert out where others are left.

        Returns:
            Where they go.

        Raises:
            ValueError: If the shape is not ``[T, E]``.
        """
        if logits.dim() != 2 or logits.shape[1] != self.num_experts:
            raise ValueError(f"logits have shape {list(logits.shape)}: expected [tokens, {self.num_experts}].")
        return self._route(*finite_rows(logits))

    def _route(self, logits: Tensor, valid: Tensor) -> GateOutput:
        raise NotImplementedError(f"{type(self).__name__} defines how it routes in _route().")

    def _confidence(self, scores: Tensor) -> Tensor | None:
        return scores.detach().amax(dim=-1) if self.batch_prioritized else None

    def _share(self, expert_ids: Tensor, valid: Tensor, dtype: torch.dtype) -> BatchShare:
        """Counts the gate's own choice ``[T, K]`` for the losses."""
        assigned = count_per_expert(expert_ids.masked_fill(~valid.unsqueeze(-1), -1), self.num_experts)
        return batch_share(assigned, valid, dtype, self.balance_scope, self.balance_group)

    def _losses(
        self, logits: Tensor, valid: Tensor, probabilities: Tensor, share: BatchShare, scale: float
    ) -> dict[str, Tensor]:
        losses = {"balance": balance_loss(probabilities, share, scale)}
        if self.z_loss:
            losses["z"] = z_loss(logits, valid, share)
        return losses

    def extra_repr(self) -> str:
        """Sizes, for printing the module."""
        return f"dim={self.dim}, num_experts={self.num_experts}"


def _load_metrics(counts: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """Share of assignments dropped, and how uneven loads are: 0, 0 and 1 where there are none."""
    load = counts.to(torch.float32)
    total = counts.sum().clamp(min=1)
    mean = load.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return {
        "drop_rate": (counts - kept).sum() / total,
        "load_cv": load.std(correction=0) / mean,
        "max_over_mean": torch.where(counts.sum() > 0, load.max() / mean, 1.0),
    }
