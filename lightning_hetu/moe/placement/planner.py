"""Decides where experts should be: the policies, and what they expect of their plans.

``flexmoe`` (arXiv 2304.03946) improves the placement step by step and also constructs one from nothing, and keeps what
costs less. ``eplb`` always constructs one. ``shadow`` puts the hot experts of a step on all ranks. ``none`` changes
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_hetu.moe.placement._checks import tokens_by_expert, tokens_by_source
from lightning_hetu.moe.placement.cost import PlacementCostModel, StepSeconds
from lightning_hetu.moe.placement.eplb import constructed
from lightning_hetu.moe.placement.flexmoe import Problem, ways
from lightning_hetu.moe.placement.greedy import Prices
from lightning_hetu.moe.placement.operations import Copy, Operation
from lightning_hetu.moe.placement.placement import Placement
from lightning_hetu.moe.placement.shadow import shadowed
from lightning_hetu.moe.placement.split import Split, SplitName, split_tokens
from lightning_hetu.moe.placement.transition import relabel, transition

Policy = Literal["flexmoe", "eplb", "shadow", "none"]

COPY_PRICE = 2e-3
"""Without a cost model: by how much sending one expert per rank, side by side, must lower the balance ratio."""

LEAST_SAVING = 5e-3
"""Share of a step, or of the balance ratio, that a plan of ``flexmoe`` saves: loads of steps differ by more."""


@dataclass(frozen=True, eq=False)
class PlacementPlan:
    """What to do, and what is expected of it.

    Args:
        policy: Who decided.
        ops: Changes in their order; each is possible when its turn comes.
        before: The placement they start from.
        after: The placement they lead to.
        fractions: Split of tokens for ``after``, float64 ``[experts, ranks]``.
        ratio_before: Balance ratio of ``before`` under the same kind of split.
        ratio_after: Balance ratio of ``after``.
        seconds_before: Of a step, before; ``None`` without a cost model.
        seconds_after: Of a step, after; ``None`` without a cost model.
        adjust_seconds: That the operations take; ``None`` without a cost model.
        bytes_moved: That the operations send; ``None`` without a cost model.
        pays: Whether what it saves is more than what it takes; without a cost model, whether the ratio is lower.
    """

    policy: Policy
    ops: tuple[Operation, ...]
    before: Placement
    after: Placement
    fractions: NDArray[np.float64]
    ratio_before: float
    ratio_after: float
    seconds_before: StepSeconds | None
    seconds_after: StepSeconds | None
    adjust_seconds: float | None
    bytes_moved: float | None
    pays: bool

    @property
    def copies(self) -> tuple[Copy, ...]:
        """Experts that are sent, in the order of operations."""
        return tuple(copy for operation in self.ops for copy in operation.copies)


def plan(
    loads: ArrayLike,
    placement: Placement,
    *,
    policy: Policy = "flexmoe",
    split: SplitName = "flow",
    max_ops: int | None = None,
    cost_model: PlacementCostModel | None = None,
) -> PlacementPlan:
    """Plans changes of a placement; the same arguments give the same plan.

    Args:
        loads: Tokens of each expert by the rank they come from, ``[ranks, experts]``, or only by expert, ``[experts]``:
            counts of a step or their mean over some.
        placement: Where experts are.
        policy: Who decides. ``shadow`` is meant for one step and prices weights only; plans of ``flexmoe`` are empty
            where nothing pays.
        split: How tokens of replicated experts are split.
        max_ops: Most operations; any number if not given. A policy that constructs a placement does nothing if that
            takes more.
        cost_model: What steps and changes take; without one, only balance counts.

    Raises:
        ValueError: If an argument is out of range or does not fit the placement.
    """
    for name, value, known in (("policy", policy, get_args(Policy)), ("split", split, get_args(SplitName))):
        if value not in known:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(known)}.")
    if max_ops is not None and (isinstance(max_ops, bool) or not isinstance(max_ops, int) or max_ops < 0):
        raise ValueError(f"max_ops={max_ops!r}: expected a number of operations of at least 0, or None.")
    return _Planner(loads, placement, policy, split, max_ops, cost_model).plan()


class _Planner:
    """One decision."""

    def __init__(
        self,
        loads: ArrayLike,
        placement: Placement,
        policy: Policy,
        split: SplitName,
        max_ops: int | None,
        cost_model: PlacementCostModel | None,
    ) -> None:
        self.tokens = tokens_by_expert(loads, placement)
        self.sources = tokens_by_source(loads, placement)
        self.placement, self.policy, self.split, self.model = placement, policy, split, cost_model
        self.ranks, self.slots = placement.num_ranks, placement.num_slots
        # Every slot could be freed, filled and exchanged: more operations than that are never needed.
        self.max_ops = 4 * self.ranks * self.slots if max_ops is None else max_ops
        self.mean = float(self.tokens.sum()) / self.ranks
        self.relative: list[float] = (self.tokens / self.mean if self.mean > 0 else self.tokens).tolist()
        self.ranks_per_node = cost_model.topology.devices_per_node if cost_model is not None else self.ranks
        self.first = split_tokens(self.tokens, placement, split)
        self.seconds = None if cost_model is None else self._seconds(self.first, placement)

    def plan(self) -> PlacementPlan:
        if self.policy == "none" or not self.max_ops or self.ranks == 1 or not self.mean > 0:
            return self._priced([])
        if self.policy == "shadow":
            return self._priced(self._shadow())
        if self.policy == "eplb":
            return self._priced(self._construct())
        return self._flexmoe(self._prices())

    def _flexmoe(self, prices: Prices) -> PlacementPlan:
        """The best of the ways that were found, or nothing."""
        problem = Problem(self.placement, self.relative, self.sources / self.mean, self.split, prices, self.max_ops)
        nothing = self._priced([])
        best = min(map(self._priced, ways(problem)), key=lambda plan: self._value(plan, prices), default=nothing)
        return best if self._value(best, prices) < self._value(nothing, prices) * (1 - LEAST_SAVING) else nothing

    def _construct(self) -> list[Operation]:
        """The way to a new placement, whose ranks are named as they fit."""
        target = relabel(self.placement, constructed(self.relative, self.ranks, self.slots))
        return self._within(transition(self.placement, target, self.ranks_per_node))

    def _within(self, operations: list[Operation]) -> list[Operation]:
        return operations if len(operations) <= self.max_ops else []

    def _shadow(self) -> list[Operation]:
        def price(expert: int) -> float:
            if self.model is None:
                return COPY_PRICE
            copies = [(expert, 0, rank) for rank in range(1, self.ranks)]
            seconds = self.model.copy_seconds(copies, weights_only=True) + self.model.all_reduce(range(self.ranks))
            return seconds / (self.mean * self.model.received_token_seconds)

        return self._within(transition(self.placement, shadowed(self.placement, self.relative, price)))

    def _prices(self) -> Prices:
        model, ranks = self.model, self.ranks
        if model is None:
            return Prices(COPY_PRICE / ranks, None, 0.0, ranks)
        unit = self.mean * model.received_token_seconds
        if not unit > 0:
            return Prices(1e9, None, 0.0, ranks)  # nothing costs time, so nothing can pay
        sync = [[model.all_reduce_of(count, spans) / unit for count in range(ranks + 1)] for spans in (False, True)]
        copy = model.copy_seconds([(0, 0, 1)]) / model.horizon / unit
        locality = 1 - model.token_seconds / model.received_token_seconds
        return Prices(copy, np.array(sync), locality, self.ranks_per_node)

    def _value(self, plan: PlacementPlan, prices: Prices) -> float:
        """What a plan costs per step, its operations included."""
        if plan.seconds_after is None or plan.adjust_seconds is None or self.model is None:
            return plan.ratio_after + prices.copy * len(plan.copies)
        return plan.seconds_after.total + plan.adjust_seconds / self.model.horizon

    def _seconds(self, split: Split, placement: Placement) -> StepSeconds:
        assert self.model is not None
        return self.model.step_seconds(self.sources, split.fractions, placement)

    def _priced(self, operations: list[Operation]) -> PlacementPlan:
        after, split, seconds = self.placement.apply(*operations), self.first, self.seconds
        if operations:
            split = split_tokens(self.tokens, after, self.split)
        adjust = size = None
        pays = split.ratio < self.first.ratio
        if self.model is not None and self.seconds is not None:
            seconds = self._seconds(split, after) if operations else self.seconds
            only = self.policy == "shadow"
            copies = [copy for operation in operations for copy in operation.copies]
            adjust = self.model.copy_seconds(copies, weights_only=only)
            size = len(copies) * (self.model.weight_bytes if only else self.model.state_bytes)
            pays = (self.seconds.total - seconds.total) * (1 if only else self.model.horizon) > adjust
        return PlacementPlan(
            policy=self.policy,
            ops=tuple(operations),
            before=self.placement,
            after=after,
            fractions=split.fractions,
            ratio_before=self.first.ratio,
            ratio_after=split.ratio,
            seconds_before=self.seconds,
            seconds_after=seconds,
            adjust_seconds=adjust,
            bytes_moved=size,
            pays=pays,
        )
