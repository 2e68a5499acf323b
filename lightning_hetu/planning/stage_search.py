"""The best strategies of all rows for one setting: one batch size, stage cut and microbatch count.

Inside a stage the dynamic program is exact. Across stages, the step time depends on the slowest stage and on the
largest synchronization, so the least sum of times is not always best: a stage that is not the slowest may trade its own
time for memory or for a shorter synchronization. The stages are therefore solved for both, time per microbatch and
synchronization, and combined over all thresholds of the latter, which is exact again.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_hetu.planning.cost_model import CostModel, Setting
from lightning_hetu.planning.dynamic_programming import (
    Floats,
    RowTable,
    StageChoice,
    Support,
    fastest_choice,
    least_peak,
    solve_stage,
    time_bound,
)
from lightning_hetu.planning.layer_strategy import LayerStrategy
from lightning_hetu.planning.plan import HybridPlan
from lightning_hetu.planning.search_space import Pins

_PIPELINE_LABEL_LIMIT = 1024
_TIE = 1e-9


@dataclass(frozen=True)
class StageTables:
    """The options of one stage, ready for the dynamic program.

    Args:
        options: Strategies of each row.
        rows: Their prices; criteria are seconds per microbatch and synchronization.
        relayouts: Seconds per microbatch between the options of neighboring rows.
        base: Bytes that belong to no row.
    """

    options: tuple[tuple[LayerStrategy, ...], ...]
    rows: tuple[RowTable, ...]
    relayouts: tuple[Floats, ...]
    base: int


@dataclass(frozen=True)
class Found:
    """A plan of one setting: its time, its fullest stage, and the strategies of all rows."""

    time: float
    peak: int
    strategies: tuple[LayerStrategy, ...]

    def key(self) -> tuple[float, int]:
        """Orders plans of one setting: fastest first, then least memory."""
        return self.time, self.peak


class SettingSearch:
    """The plans of one setting.

    Where embedding and head are one unit, ``variants`` has one entry per strategy they may share.
    """

    def __init__(self, model: CostModel, setting: Setting, pins: Pins) -> None:
        self.model = model
        self.setting = setting
        self._tables: dict[Hashable, RowTable] = {}
        self._relayouts: dict[Hashable, Floats] = {}
        everything = [tuple(pins.options(model, row, setting)) for row in range(setting.num_rows)]
        self.variants: list[list[StageTables]] = []
        for restriction in model.restrictions(setting):
            options = [tuple(s for s in row if restriction.allows(s)) for row in everything]
            choices = [options]
            if not model.split_vocab:
                shared = [strategy for strategy in options[0] if strategy in options[-1]]
                choices = [[(strategy,), *options[1:-1], (strategy,)] for strategy in shared]
            extra = int(restriction.base.sum())
            self.variants += [
                [self._stage_tables(stage, choice, extra) for stage in range(setting.num_stages)]
                for choice in choices
                if all(choice)
            ]

    # ---- tables -----------------------------------------------------------------------------------------------------

    def _stage_tables(self, stage: int, options: Sequence[tuple[LayerStrategy, ...]], extra: int) -> StageTables:
        rows = self.setting.rows(stage)
        return StageTables(
            options=tuple(options[row] for row in rows),
            rows=tuple(self._row_table(row, stage, options[row]) for row in rows),
            relayouts=tuple(self._relayout(row, options[row - 1], options[row]) for row in rows[1:]),
            base=int(self.model.stage_base(stage, self.setting).sum()) + extra,
        )

    def _row_table(self, row: int, stage: int, options: tuple[LayerStrategy, ...]) -> RowTable:
        rows, kind = self.setting.rows(stage), self.model.row_kind
        border = (
            kind(row + 1) if row == rows[-1] and stage + 1 < self.setting.num_stages else None,
            row == rows[0] and stage > 0,
        )
        key = (kind(row), border, self.setting.in_flight(stage), stage if border[0] or border[1] else None, options)
        if key not in self._tables:
            costs = [self.model.row_cost(row, stage, strategy, self.setting) for strategy in options]
            memory = [cost.memory for cost in costs]
            self._tables[key] = RowTable(
                held=np.array([float(m.held.sum()) for m in memory]),
                released=np.array([float(m.released.sum()) for m in memory]),
                working=np.array([float(max(m.forward.sum(), m.backward.sum())) for m in memory]),
                step=np.array([float(m.step.sum()) for m in memory]),
                cost=np.array([[cost.seconds, cost.sync] for cost in costs]),
            )
        return self._tables[key]

    def _relayout(self, row: int, before: tuple[LayerStrategy, ...], after: tuple[LayerStrategy, ...]) -> Floats:
        key = (self.model.row_kind(row), self.model.row_kind(row - 1), before, after)
        if key not in self._relayouts:
            self._relayouts[key] = np.array(
                [[self.model.relayout_seconds(row, a, b, self.setting) for b in after] for a in before]
            )
        return self._relayouts[key]

    # ---- search -----------------------------------------------------------------------------------------------------

    def lower_bound(self, capacity: int) -> float:
        """No plan of this setting in ``capacity`` bytes is faster; infinite where none fits."""
        return min((self._variant_bound(stages, capacity) for stages in self.variants), default=np.inf)

    def _variant_bound(self, stages: Sequence[StageTables], capacity: int) -> float:
        additive = len(stages) == 1 and self.model.additive_sync
        weights = [(self.setting.num_microbatches, 1.0)] if additive else [(1.0, 0.0), (0.0, 1.0)]
        bounds = [[time_bound(s.rows, capacity - s.base, w) for w in weights] for s in stages]
        if not np.all(np.isfinite(bounds)):
            return np.inf
        if additive:
            return bounds[0][0]
        return self.model.time_bound([b[0] for b in bounds], [b[1] for b in bounds], self.setting)

    def least_peak(self) -> int:
        """Fewest bytes with which this setting has a plan.

        Raises:
            ValueError: If it has none at any size.
        """
        return min(max(s.base + int(least_peak(s.rows, s.relayouts)) for s in stages) for stages in self.variants)

    def best(self, capacity: int, incumbent: float = np.inf) -> Found | None:
        """The fastest plan in ``capacity`` bytes, or ``None`` if none fits or none is as fast as ``incumbent``."""
        found: list[Found] = []
        bounds = [self._variant_bound(stages, capacity) for stages in self.variants]
        for index in sorted(range(len(bounds)), key=lambda i: (bounds[i], i)):
            stages = self.variants[index]
            known = min([incumbent, *(plan.time for plan in found)])
            if not np.isfinite(bounds[index]) or bounds[index] > known * (1 + _TIE):
                continue
            choices = self._solve(stages, capacity, known)
            if choices is not None:
                found.append(self._found(stages, choices))
        return min(found, key=Found.key, default=None)

    def _found(self, stages: Sequence[StageTables], choices: Sequence[StageChoice]) -> Found:
        return Found(
            time=self._time(choices),
            peak=max(int(c.peak) + s.base for s, c in zip(stages, choices, strict=True)),
            strategies=tuple(
                options[index]
                for s, c in zip(stages, choices, strict=True)
                for options, index in zip(s.options, c.options, strict=True)
            ),
        )

    def _solve(self, stages: Sequence[StageTables], capacity: int, known: float) -> list[StageChoice] | None:
        """The best choice of every stage together, or ``None``."""
        microbatches = self.setting.num_microbatches
        if len(stages) == 1 and self.model.additive_sync:
            choice = self._least_sum(stages[0], capacity, (microbatches, 1.0), known)
            return None if choice is None else [choice]
        # Every stage for itself gives a good plan to prune with.
        best: list[StageChoice] | None = None
        for weights in ((microbatches, 1.0), (1.0, 1.0) if len(stages) > 1 else (microbatches, 0.0)):
            choices = self._each_alone(stages, capacity, weights)
            if choices is None:
                return None
            if best is None or self._time(choices) < self._time(best):
                best = choices
            # A single stage takes at least ``m * time`` and at least ``m * time + synchronization``.
            least = weights[0] * choices[0].cost[0] + weights[1] * choices[0].cost[1]
            if len(stages) == 1 and self._time(choices) <= least * (1 + _TIE):
                return choices
        assert best is not None  # One of the two weightings has set it.
        if len(stages) > 1 and not self.model.exact_pipeline:
            return best
        known = min(known, self._time(best))
        bounds = [[time_bound(s.rows, capacity - s.base, w) for w in ((1.0, 0.0), (0.0, 1.0))] for s in stages]
        fronts = []
        for index, stage in enumerate(stages):
            others = [bound for position, bound in enumerate(bounds) if position != index]
            supports = _pipeline_supports(others, microbatches)
            budget, limit = capacity - stage.base, _PIPELINE_LABEL_LIMIT
            front = solve_stage(stage.rows, stage.relayouts, budget, supports, incumbent=known, limit=limit)
            if not front:
                return None
            fronts.append(front)
        return self._combine(fronts)

    def _each_alone(
        self, stages: Sequence[StageTables], capacity: int, weights: tuple[float, float]
    ) -> list[StageChoice] | None:
        """The least weighted sum of time and synchronization of each stage; ``None`` if one does not fit."""
        choices = [self._least_sum(stage, capacity, weights, np.inf) for stage in stages]
        found = [choice for choice in choices if choice is not None]
        return found if len(found) == len(stages) else None

    def _time(self, choices: Sequence[StageChoice]) -> float:
        return self.model.iteration_time([c.cost[0] for c in choices], [c.cost[1] for c in choices], self.setting)

    def _least_sum(
        self, stage: StageTables, capacity: int, weights: tuple[float, float], incumbent: float
    ) -> StageChoice | None:
        """The choice of least weighted sum of one stage, with both criteria."""
        # Layers of one type stay one object: the dynamic program works once for all of them.
        summed = {
            id(r): RowTable(r.held, r.released, r.working, r.step, (r.cost @ np.array(weights))[:, None])
            for r in stage.rows
        }
        scaled = {id(matrix): weights[0] * matrix for matrix in stage.relayouts}
        rows, relayouts = [summed[id(r)] for r in stage.rows], [scaled[id(matrix)] for matrix in stage.relayouts]
        choice = fastest_choice(rows, relayouts, capacity - stage.base, incumbent=incumbent)
        if choice is None:
            return None
        cost = sum(row.cost[option] for row, option in zip(stage.rows, choice.options, strict=True))
        pairs = zip(stage.relayouts, choice.options[:-1], choice.options[1:], strict=True)
        seconds = float(cost[0]) + sum(float(matrix[a, b]) for matrix, a, b in pairs)
        return StageChoice((seconds, float(cost[1])), choice.peak, choice.options)

    def _combine(self, fronts: Sequence[Sequence[StageChoice]]) -> list[StageChoice]:
        """The best combination of one choice per stage.

        For every threshold of the synchronization, the fastest choice of each stage below it: the step time grows with
        each stage time, so nothing better is left out.
        """
        best: tuple[tuple[float, float], list[StageChoice]] | None = None
        for threshold in sorted({choice.cost[1] for front in fronts for choice in front}):
            allowed = [[choice for choice in front if choice.cost[1] <= threshold] for front in fronts]
            if not all(allowed):
                continue
            picked = [min(front, key=lambda choice: (choice.cost, choice.peak, choice.options)) for front in allowed]
            key = (self._time(picked), max(c.peak for c in picked))
            if best is None or key < best[0]:
                best = key, picked
        assert best is not None  # The largest threshold allows every choice.
        return best[1]

    def plan(self, found: Found) -> HybridPlan:
        """The plan of a result."""
        return HybridPlan(
            world_size=self.setting.world_size,
            global_batch_size=self.setting.global_batch_size,
            num_microbatches=self.setting.num_microbatches,
            stages=self.setting.stages,
            layers=found.strategies[1:-1],
            embedding=found.strategies[0],
            head=found.strategies[-1],
            schedule=self.setting.schedule,
        )


def _pipeline_supports(others: Sequence[Sequence[float]], num_microbatches: int) -> list[Support]:
    """Linear lower bounds on ``(m - 1) * max c + sum c + max s`` in the ``(c, s)`` of one stage.

    Args:
        others: Lower bounds on ``(c, s)`` of the other stages.
        num_microbatches: ``m``.
    """
    rest = sum(c for c, _ in others)
    slowest = max((c for c, _ in others), default=0.0)
    # With a single stage, synchronization may be hidden (negative) but not less than free.
    sync = max((s for _, s in others), default=0.0)
    rounds = num_microbatches - 1
    return [
        Support((1.0 + rounds, 1.0), rest),
        Support((1.0 + rounds, 0.0), rest + sync),
        Support((1.0, 1.0), rest + rounds * slowest),
        Support((1.0, 0.0), rest + rounds * slowest + sync),
    ]
