"""Sorts tokens by expert and brings results back, the same on every run.

The order is the contract: rows of an expert come by token, then by choice. In a group of ranks those of the first rank
come first. Results are gathered and summed over choices in a fixed order, so nothing depends on the order in which
threads run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dispatch:
    """Where the rows of kept assignments go.

    Args:
        token_of: int64 ``[rows]``: the token of each row, rows sorted by expert.
        position_of: int64 ``[tokens, choices]``: the row of each assignment; -1 where there is none.
        counts: int64 ``[experts]``: rows of each expert.
    """

    token_of: Tensor
    position_of: Tensor
    counts: Tensor

    @classmethod
    def build(cls, expert_ids: Tensor, num_experts: int) -> Dispatch:
        """Sorts assignments by expert.

        Args:
            expert_ids: int64 ``[tokens, choices]``; -1 is no expert.
            num_experts: Number of experts.
        """
        tokens, choices = expert_ids.shape
        flat = expert_ids.flatten()
        order = torch.where(flat < 0, num_experts, flat).argsort(stable=True)
        counts = torch.bincount(flat.clamp(min=-1) + 1, minlength=num_experts + 1)[1:]
        rows = order[: int(counts.sum())]
        position_of = torch.full_like(flat, -1)
        position_of[rows] = torch.arange(len(rows), device=flat.device)
        return cls(rows // max(choices, 1), position_of.view(tokens, choices), counts)

    def rows(self, x: Tensor) -> Tensor:
        """The row of every kept assignment, ``[rows, dim]`` of tokens ``[tokens, dim]``; differentiable."""
        return _Spread.apply(x, self.token_of, self.position_of)  # type: ignore[no-any-return, no-untyped-call]

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Sum over choices of weight times row.

        Args:
            rows: ``[rows, dim]``, as :meth:`rows` has them.
            weights: ``[tokens, choices]``.

        Returns:
            ``[tokens, dim]`` in the dtype of the rows; zero for tokens without an expert. Differentiable.
        """
        return _Combine.apply(rows, weights, self.token_of, self.position_of)  # type: ignore[no-any-return, no-untyped-call]


def sort_by_kernels(
    x: Tensor, expert_ids: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """The same by the kernels of ``hetu_kernels``, in the same order.

    Args:
        x: ``[tokens, dim]``.
        expert_ids: int64 ``[tokens, choices]``; -1 is no expert.
        num_experts: Number of experts.

    Returns:
        What :meth:`Dispatch.rows` gives, ``Dispatch.counts``, and a function for :meth:`Dispatch.combine`.
    """
    from hetu_kernels import permute, unpermute

    sorted_ = permute(x, expert_ids.to(torch.int32), num_experts)

    def combine(rows: Tensor, weights: Tensor) -> Tensor:
        return unpermute(rows, sorted_.position_of, weights)

    return sorted_.rows, sorted_.offsets.diff().to(torch.int64), combine


def _gathered(rows: Tensor, position_of: Tensor, choice: int) -> Tensor:
    """The row of each token's choice, zeros where there is none."""
    position = position_of[:, choice]
    if not len(rows):
        return rows.new_zeros(len(position), *rows.shape[1:])
    return rows[position.clamp(min=0)].masked_fill((position < 0).unsqueeze(-1), 0.0)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token_of: Tensor, position_of: Tensor) -> Tensor:
        ctx.save_for_backward(position_of)
        return x[token_of]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (position_of,) = ctx.saved_tensors
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = gradient.new_zeros(len(position_of), gradient.shape[1], dtype=wide)
        for choice in range(position_of.shape[1]):
            total += _gathered(gradient, position_of, choice)
        return total.to(gradient.dtype), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, token_of: Tensor, position_of: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, token_of, position_of)
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = rows.new_zeros(len(position_of), rows.shape[1], dtype=wide)
        for choice in range(position_of.shape[1]):
            total += weights[:, choice : choice + 1].to(wide) * _gathered(rows, position_of, choice)
        return total.to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weights, token_of, position_of = ctx.saved_tensors
        wide = torch.promote_types(rows.dtype, torch.float32)
        gradient = gradient.to(wide)
        of_weights = [
            (gradient * _gathered(rows, position_of, choice)).sum(dim=1) for choice in range(position_of.shape[1])
        ]
        kept = position_of >= 0
        of_row = weights.new_zeros(len(rows), dtype=wide)
        of_row[position_of[kept]] = weights[kept].to(wide)
        of_rows = (of_row.unsqueeze(-1) * gradient[token_of]).to(rows.dtype)
        of_weight = torch.stack(of_weights, dim=1).to(weights.dtype) if of_weights else torch.zeros_like(weights)
        return of_rows, of_weight, None, None
