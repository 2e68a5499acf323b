"""Replays a routing trace over a described cluster: balance, step times and moved bytes under a policy.

Every ``interval`` steps the policy sees the mean of the last ``window`` steps and may change the placement, which the
next step pays for; what ``eplb`` wants is done whether it pays or not. ``shadow`` decides at each step for that step,
as FasterMoE does, and pays each time. Steps are priced by their own tokens, with the placement of the moment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_hetu.moe.placement.cost import PlacementCostModel
from lightning_hetu.moe.placement.placement import Placement
from lightning_hetu.moe.placement.planner import Policy, plan
from lightning_hetu.moe.placement.split import SplitName, balance_ratio, split_tokens
from lightning_hetu.moe.placement.traces import check_trace
from lightning_hetu.planning.tables import text_table
from lightning_hetu.planning.units import format_bytes, format_seconds

Refresh = Literal["step", "check"]
"""When the optimal split is solved: for the tokens of each step, or at each check for the mean before it."""


@dataclass(frozen=True, eq=False)
class Replay:
    """What a policy did with a trace.

    Args:
        ratios: Balance ratio of each step, float64 ``[steps]``.
        rank_loads: Tokens that each rank computes in each step, float64 ``[steps, ranks]``.
        step_seconds: Of each step, without changes, float64 ``[steps]``.
        adjust_seconds: Of the changes before each step, float64 ``[steps]``.
        placements: The placement of each step.
        num_ops: Operations in all.
        bytes_moved: Bytes that were sent for them.
    """

    ratios: NDArray[np.float64]
    rank_loads: NDArray[np.float64]
    step_seconds: NDArray[np.float64]
    adjust_seconds: NDArray[np.float64]
    placements: tuple[Placement, ...]
    num_ops: int
    bytes_moved: float

    def mean_ratio(self, skip: int = 0) -> float:
        """Mean balance ratio of the steps after the first ``skip``."""
        return float(self.ratios[skip:].mean())

    def mean_seconds(self, skip: int = 0) -> float:
        """Mean seconds per step of the steps after the first ``skip``, changes included."""
        return float((self.step_seconds + self.adjust_seconds)[skip:].mean())


def replay(
    trace: ArrayLike,
    placement: Placement,
    cost_model: PlacementCostModel | None,
    *,
    policy: Policy = "flexmoe",
    split: SplitName = "flow",
    interval: int = 5,
    window: int = 10,
    threshold: float = 1.0,
    max_ops: int | None = None,
    refresh: Refresh = "step",
) -> Replay:
    """Replays a trace under one policy.

    Args:
        trace: Counts, whole numbers ``[steps, ranks, experts]``.
        placement: Where experts are at first.
        cost_model: What steps and changes take; without one, only balance counts, and all seconds are 0.
        policy: Who decides.
        split: How tokens of replicated experts are split.
        interval: Steps between two decisions.
        window: Steps whose mean a decision sees, as far as there were that many.
        threshold: Balance ratio of that mean above which the policy is asked.
        max_ops: Most operations of one decision.
        refresh: When the optimal split is solved.

    Raises:
        ValueError: If the trace does not fit the placement, or a number is out of range.
    """
    counts = check_trace(trace)
    for name, value in (("interval", interval), ("window", window)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1 step.")
    ratios, seconds, adjust = (np.zeros(len(counts)) for _ in range(3))
    rank_loads = np.zeros((len(counts), placement.num_ranks))
    placements: list[Placement] = []
    operations, moved = 0, 0.0
    now = placement
    fractions = split_tokens(counts[0] * 0, now, split).fractions
    for step, tokens in enumerate(counts):
        seen = counts[max(step - window, 0) : step].mean(axis=0) if step else tokens * 0.0
        check = step > 0 and step % interval == 0
        if policy == "shadow":
            decision = plan(tokens, placement, policy=policy, split=split, max_ops=max_ops, cost_model=cost_model)
        elif check and split_tokens(seen, now, split).ratio > threshold:
            decision = plan(seen, now, policy=policy, split=split, max_ops=max_ops, cost_model=cost_model)
        else:
            decision = None
        if decision is not None and decision.ops and (decision.pays or policy == "eplb"):
            now = decision.after
            operations += len(decision.ops)
            moved += decision.bytes_moved or 0.0
            adjust[step] = decision.adjust_seconds or 0.0
        elif policy == "shadow":
            now = placement
        if refresh == "step" or split == "even" or policy == "shadow":
            fractions = split_tokens(tokens, now, split).fractions
        elif check:
            fractions = split_tokens(seen, now, split).fractions
        rank_loads[step] = tokens.sum(axis=0) @ fractions
        ratios[step] = balance_ratio(rank_loads[step])
        if cost_model is not None:
            seconds[step] = cost_model.step_seconds(tokens.astype(np.float64), fractions, now).total
        placements.append(now)
    return Replay(ratios, rank_loads, seconds, adjust, tuple(placements), operations, moved)


def compare(
    trace: ArrayLike,
    placement: Placement,
    cost_model: PlacementCostModel | None,
    *,
    policies: Sequence[Policy] = ("none", "shadow", "eplb", "flexmoe"),
    splits: Sequence[SplitName] = ("even", "flow"),
    interval: int = 5,
    eplb_interval: int = 50,
    window: int = 10,
    threshold: float = 1.0,
    max_ops: int | None = None,
    refresh: Refresh = "step",
) -> dict[tuple[Policy, SplitName], Replay]:
    """Replays a trace under several policies; arguments as of :func:`replay`.

    Args:
        trace: As there.
        placement: As there.
        cost_model: As there.
        policies: Which ones. ``none`` and ``shadow`` have no use for a split, and are replayed with the first.
        splits: Which ones.
        interval: As there.
        eplb_interval: The same for ``eplb``, which moves most experts each time.
        window: As there.
        threshold: As there.
        max_ops: As there; ``eplb`` has no limit.
        refresh: As there.
    """
    return {
        (policy, split): replay(
            trace,
            placement,
            cost_model,
            policy=policy,
            split=split,
            interval=eplb_interval if policy == "eplb" else interval,
            window=window,
            threshold=threshold,
            max_ops=None if policy == "eplb" else max_ops,
            refresh=refresh,
        )
        for policy in policies
        for split in (splits[:1] if policy in ("none", "shadow") else splits)
    }


def comparison_table(replays: Mapping[tuple[Policy, SplitName], Replay], skip: int = 0) -> str:
    """A line per replay; the gain is relative to the first line.

    Args:
        replays: As of :func:`compare`.
        skip: Steps at the beginning that do not count for means.
    """
    lines = [["policy", "split", "balance ratio", "step", "of it changes", "gain", "operations", "moved"]]
    base = next(iter(replays.values())).mean_seconds(skip)
    for (policy, split), found in replays.items():
        seconds = found.mean_seconds(skip)
        lines.append(
            [
                policy,
                "-" if policy in ("none", "shadow") else split,
                f"{found.mean_ratio(skip):.3f}",
                format_seconds(seconds),
                format_seconds(float(found.adjust_seconds[skip:].mean())),
                f"{base / seconds:.2f}x",
                str(found.num_ops),
                format_bytes(found.bytes_moved),
            ]
        )
    return text_table(lines)
