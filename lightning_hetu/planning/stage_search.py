"""The best strategies of all rows for one setting: one batch size, stage cut and microbatch count.

Inside a stage the dynamic program is exact. Across stages, the step time depends on the slowest stages, so the least
sum of times is not always best: a stage that is not the slowest may trade its own time for a shorter synchronization.
Nor is one second like another: forward, backward, and what is done once in the first forward or the last backward fall
to different places of the step. The stages are therefore solved for all of them, and their best choices combined.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_hetu.planning.cost_model import CostModel, Setting
from lightning_hetu.planning.dynamic_programming import ReducedStage, fastest_choice, least_peak
from lightning_hetu.planning.label_bounds import TimeBounds
from lightning_hetu.planning.layer_strategy import LayerStrategy
from lightning_hetu.planning.pipeline import EVERY_MICROBATCH, ONCE_PER_STEP, StageTimes, Weights, stage_supports
from lightning_hetu.planning.plan import HybridPlan
from lightning_hetu.planning.search_space import Pins
from lightning_hetu.planning.stage_tables import Floats, RowTable, StageChoice, Support

_PIPELINE_LABEL_LIMIT = 96
_PIPELINE_LABEL_LIMITS = (12, _PIPELINE_LABEL_LIMIT)
_TIE = 1e-9
_BOUNDED: tuple[Weights, ...] = (
    EVERY_MICROBATCH,
    ONCE_PER_STEP,
    (1.0, 0.0, 0.0, 0.0, 0.0),
    (0.0, 1.0, 0.0, 0.0, 0.0),
)


@dataclass(frozen=True)
class StageTables:
    """The options of one stage, ready for the dynamic program.

    Args:
        options: Strategies of each row.
        rows: Their prices; criteria are those of :class:`~lightning_hetu.planning.pipeline.StageTimes`.
        relayouts: The same between the options of neighboring rows.
        base: Bytes that belong to no row.
        key: Equal for stages of the same prices.
    """

    options: tuple[tuple[LayerStrategy, ...], ...]
    rows: tuple[RowTable, ...]
    relayouts: tuple[Floats, ...]
    base: int
    key: int


@dataclass(frozen=True)
class Found:
    """A plan: its setting, its time, its fullest stage, and the strategies of all rows."""

    setting: Setting
    time: float
    peak: int
    strategies: tuple[LayerStrategy, ...]

    def key(self) -> tuple[float, int]:
        """Orders plans of one setting: fastest first, then least memory."""
        return self.time, self.peak

    def plan(self) -> HybridPlan:
        """The plan without its prediction."""
        return HybridPlan(
            world_size=self.setting.world_size,
            global_batch_size=self.setting.global_batch_size,
            num_microbatches=self.setting.num_microbatches,
            stages=self.setting.stages,
            layers=self.strategies[1:-1],
            embedding=self.strategies[0],
            head=self.strategies[-1],
            schedule=self.setting.schedule,
        )


class Prices:
    """Options of all rows and their prices, shared by settings that differ in nothing but the cut into stages."""

    def __init__(self, model: CostModel, setting: Setting, pins: Pins) -> None:
        self.model = model
        everything: dict[tuple[LayerStrategy, ...], tuple[LayerStrategy, ...]] = {}
        rows = _options(model, setting, pins)
        self.variants: list[tuple[list[tuple[LayerStrategy, ...]], int]] = []
        for restriction in model.restrictions(setting):
            allowed = [tuple(s for s in row if restriction.allows(s)) for row in rows]
            choices = [allowed]
            if not model.split_vocab:
                shared = [strategy for strategy in allowed[0] if strategy in allowed[-1]]
                choices = [[(strategy,), *allowed[1:-1], (strategy,)] for strategy in shared]
            for choice in choices:
                if all(choice):
                    # Equal options are one object, so that prices can be looked up by identity.
                    same = [everything.setdefault(options, options) for options in choice]
                    self.variants.append((same, int(restriction.base.sum())))
        self._tables: dict[Hashable, RowTable] = {}
        self._relayouts: dict[Hashable, Floats] = {}
        self._choices: dict[Hashable, tuple[StageChoice | None, bool]] = {}
        self._reduced: dict[Hashable, ReducedStage] = {}
        self._peaks: dict[Hashable, float] = {}
        self._held: dict[Hashable, float] = {}
        self._bounds: dict[Hashable, float] = {}
        self._stage_bounds: dict[Hashable, tuple[float, ...]] = {}
        self._time_bounds: dict[Hashable, TimeBounds] = {}
        self._trade_offs: dict[Hashable, Any] = {}
        self._stages: dict[Hashable, StageTables] = {}
        self._keys: dict[tuple[int, ...], int] = {}

    def stage(self, stage: int, variant: int, setting: Setting) -> StageTables:
        """All prices of a stage, which are the same in all cuts that give it the same rows."""
        rows = setting.rows(stage)
        if (stage, rows, variant) not in self._stages:
            options, extra = self.variants[variant]
            tables = tuple(self.table(row, stage, options[row], setting) for row in rows)
            relayouts = tuple(self.relayout(row, options[row - 1], options[row], setting) for row in rows[1:])
            self._stages[stage, rows, variant] = StageTables(
                options=tuple(options[row] for row in rows),
                rows=tables,
                relayouts=relayouts,
                base=int(self.model.stage_base(stage, setting).sum()) + extra,
                # Equal prices are the same objects.
                key=self._keys.setdefault(tuple(map(id, (*tables, *relayouts))), len(self._keys)),
            )
        return self._stages[stage, rows, variant]

    def table(self, row: int, stage: int, options: tuple[LayerStrategy, ...], setting: Setting) -> RowTable:
        """Prices of the options of a row in a stage."""
        rows, kind = setting.rows(stage), self.model.row_kind
        border = (
            kind(row + 1) if row == rows[-1] and stage + 1 < setting.num_stages else None,
            row == rows[0] and stage > 0,
        )
        key = (kind(row), border, setting.in_flight(stage), stage if border[0] or border[1] else None, id(options))
        if key not in self._tables:
            costs = [self.model.row_cost(row, stage, strategy, setting) for strategy in options]
            memory = [cost.memory for cost in costs]
            self._tables[key] = RowTable(
                held=np.array([float(m.held.sum()) for m in memory]),
                released=np.array([float(m.released.sum()) for m in memory]),
                working=np.array([float(max(m.forward.sum(), m.backward.sum())) for m in memory]),
                step=np.array([float(m.step.sum()) for m in memory]),
                cost=np.array([cost.times for cost in costs]),
            )
        return self._tables[key]

    def least_held(self, row: int, stage: int, options: tuple[LayerStrategy, ...], setting: Setting) -> float:
        """Fewest bytes that a row holds after its forward in a stage, whether or not the cut has it there."""
        key = (self.model.row_kind(row), setting.in_flight(stage), id(options))
        if key not in self._held:
            costs = [self.model.row_cost(row, stage, strategy, setting) for strategy in options]
            self._held[key] = min(float(cost.memory.held.sum()) for cost in costs)
        return self._held[key]

    def relayout(
        self, row: int, before: tuple[LayerStrategy, ...], after: tuple[LayerStrategy, ...], setting: Setting
    ) -> Floats:
        """Seconds, ``[S, S, 5]``, from each option of the row in front of ``row`` to each of its own."""
        key = (self.model.row_kind(row), self.model.row_kind(row - 1), id(before), id(after))
        if key not in self._relayouts:
            found = np.zeros((len(before), len(after), len(StageTimes._fields)))
            found[:, :, :2] = [[self.model.relayout_times(row, a, b, setting) for b in after] for a in before]
            self._relayouts[key] = found
        return self._relayouts[key]

    def bound(self, stage: StageTables, capacity: int, weights: Weights) -> float:
        """No choice of a stage that fits has a smaller weighted sum, remembered; infinite if plainly none fits."""
        key = (stage.key, capacity - stage.base, weights)
        found = self._bounds.get(key)
        if found is None:
            found = self._bounds[key] = self.time_bound(stage.rows, capacity - stage.base, weights, stage.key)
        return found

    def bounds(self, stage: StageTables, capacity: int) -> tuple[float, ...]:
        """Bounds on the time of a microbatch, on what is done once per step, on a forward and on a backward."""
        key = (stage.key, capacity - stage.base)
        found = self._stage_bounds.get(key)
        if found is None:
            found = tuple(self.bound(stage, capacity, weights) for weights in _BOUNDED)
            self._stage_bounds[key] = found
        return found

    def time_bound(
        self, rows: Sequence[RowTable], budget: float, weights: Weights, key: Hashable | None = None
    ) -> float:
        """The same for any rows whose prices are from here."""
        bounds = self._time_bounds.get(key)
        if bounds is None:
            bounds = TimeBounds(rows, self._trade_offs)
            if key is not None:
                self._time_bounds[key] = bounds
        return bounds.least(budget, weights)

    def least_sum(self, stage: StageTables, capacity: int, weights: Weights) -> StageChoice | None:
        """The choice of least weighted sum of the times of one stage, remembered."""
        return self._least_sum(stage, capacity, weights)[0]

    def _least_sum(self, stage: StageTables, capacity: int, weights: Weights) -> tuple[StageChoice | None, bool]:
        key = (stage.key, capacity - stage.base, weights)
        if key not in self._choices:
            self._choices[key] = least_sum(stage, capacity, weights, np.inf)
        return self._choices[key]

    def proven(self, stage: StageTables, capacity: int, weights: Weights) -> float:
        """The same as :meth:`bound`, or the least weighted sum itself where that is known already."""
        choice, exact = self._choices.get((stage.key, capacity - stage.base, weights), (None, False))
        if choice is None or not exact:
            return self.bound(stage, capacity, weights)
        return float(np.dot(weights, choice.cost))

    def reduced(self, stage: StageTables, comparison: Floats) -> ReducedStage:
        """A stage without needless options, remembered."""
        key = (stage.key, comparison.tobytes())
        if key not in self._reduced:
            self._reduced[key] = ReducedStage.of(stage.rows, stage.relayouts, comparison)
        return self._reduced[key]

    def least_peak(self, stage: StageTables) -> float:
        """Fewest bytes of the rows of one stage, remembered."""
        if stage.key not in self._peaks:
            self._peaks[stage.key] = least_peak(stage.rows, stage.relayouts)
        return self._peaks[stage.key]


class SettingSearch:
    """The plans of one setting.

    Where embedding and head are one unit, ``variants`` has one entry per strategy they may share.
    """

    def __init__(self, model: CostModel, setting: Setting, pins: Pins, prices: Prices | None = None) -> None:
        self.model = model
        self.setting = setting
        self.prices = prices or Prices(model, setting, pins)
        self.variants = [
            [self.prices.stage(stage, index, setting) for stage in range(setting.num_stages)]
            for index in range(len(self.prices.variants))
        ]

    # ---- search -----------------------------------------------------------------------------------------------------

    def lower_bound(self, capacity: int) -> float:
        """No plan of this setting in ``capacity`` bytes is faster; infinite where none fits."""
        return min((self.variant_bound(stages, capacity) for stages in self.variants), default=np.inf)

    def variant_bound(self, stages: Sequence[StageTables], capacity: int) -> float:
        """No plan of a variant in ``capacity`` bytes is faster; infinite if plainly none fits."""
        if len(stages) == 1 and self.model.additive_sync:
            return self.prices.bound(stages[0], capacity, self._in_turn)
        seconds, once, forward, backward = self._bounds(stages, capacity)
        if not np.all(np.isfinite([*seconds, *once])):
            return np.inf
        if len(stages) == 1 or not self.model.exact_pipeline:
            return self.model.time_bound(seconds, once, self.setting)
        form = self.model.pipeline_form(self.setting)
        bound = form.time_bound(seconds, forward, backward)
        # Time and synchronization are bounded together: the option that is best in one is seldom best in the other.
        even = zip(stages, form.even_weights(len(stages)), strict=True)
        return max(bound, sum(self.prices.bound(stage, capacity, weights) for stage, weights in even))

    def _bounds(self, stages: Sequence[StageTables], capacity: int) -> list[tuple[float, ...]]:
        """Least time of a microbatch, once per step, of a forward and of a backward of each stage of a variant."""
        return list(zip(*(self.prices.bounds(stage, capacity) for stage in stages), strict=True))

    def least_times(self, stages: Sequence[StageTables], capacity: int) -> list[StageTimes]:
        """Times of one microbatch of each stage of a variant that add up to the least ones; infinite if none fits."""
        seconds, _, forward, _ = self._bounds(stages, capacity)
        pairs = zip(seconds, forward, strict=True)
        return [StageTimes(part, whole - part if np.isfinite(part) else np.inf) for whole, part in pairs]

    @property
    def _in_turn(self) -> Weights:
        """Weights that give the step time of a single stage."""
        rounds = float(self.setting.num_microbatches)
        return rounds, rounds, 1.0, 1.0, 1.0

    def least_peak(self) -> int:
        """Fewest bytes with which this setting has a plan.

        Raises:
            ValueError: If it has none at any size.
        """
        return min(max(self.stage_peaks(stages)) for stages in self.variants)

    def stage_peaks(self, stages: Sequence[StageTables]) -> list[int]:
        """Fewest bytes of each stage of a variant."""
        return [stage.base + int(self.prices.least_peak(stage)) for stage in stages]

    def best(self, capacity: int, incumbent: float = np.inf) -> Found | None:
        """The fastest plan in ``capacity`` bytes, or ``None`` if none fits or none is as fast as ``incumbent``."""
        found: list[Found] = []
        bounds = [self.variant_bound(stages, capacity) for stages in self.variants]
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
            setting=self.setting,
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
        in_turn = self._in_turn
        free_sync = (*in_turn[:2], 0.0, 0.0, 0.0)
        if len(stages) == 1 and self.model.additive_sync:
            choice, _ = least_sum(stages[0], capacity, in_turn, known)
            return None if choice is None else [choice]
        # Every stage for itself gives a good plan to prune with.
        best: list[StageChoice] | None = None
        alone: list[list[StageChoice]] = []
        for weights in (in_turn, (1.0, 1.0, 1.0, 1.0, 1.0) if len(stages) > 1 else free_sync):
            choices = self._each_alone(stages, capacity, weights)
            if choices is None:
                return None
            alone.append(choices)
            if best is None or self._time(choices) < self._time(best):
                best = choices
            # A single stage takes at least ``m * time`` and at least ``m * time + synchronization``.
            least = sum(weight * cost for weight, cost in zip(weights, choices[0].cost, strict=True))
            if len(stages) == 1 and self._time(choices) <= least * (1 + _TIE):
                return choices
        assert best is not None  # One of the two weightings has set it.
        if len(stages) > 1 and not self.model.exact_pipeline:
            return best
        known = min(known, self._time(best))

        def at_least(stage: int, weights: Weights) -> float:
            return self.prices.proven(stages[stage], capacity, weights)

        form = self.model.pipeline_form(self.setting)
        asked = form.demands(at_least, len(stages))
        if max(demand.bound for demand in asked) > known * (1 + _TIE):
            return None
        supports = [stage_supports(asked, at_least, index) for index in range(len(stages))]
        fronts: list[list[StageChoice]] | None
        if len(stages) == 1:  # its synchronization may be hidden, but not be less than free
            supports[0].append(Support(free_sync))
            fronts, _ = self._fronts(stages, capacity, supports, known, _PIPELINE_LABEL_LIMIT)
            if fronts is None:
                return None
            return [min(fronts[0], key=lambda choice: (self._time([choice]), choice.peak, choice.options))]
        # A mixture of the two, and what few labels find, are better plans to prune with.
        for limit in (0, *_PIPELINE_LABEL_LIMITS):
            if limit:
                fronts, exact = self._fronts(stages, capacity, supports, known, limit)
            else:
                fronts, exact = [list(both) for both in zip(*alone, strict=True)], False
            combined = None if fronts is None else form.combine(fronts, known)
            # Every stage for itself was at least as good as what was left out.
            if combined is not None and combined[0] <= self._time(best):
                best = combined[1]
                known = min(known, combined[0])
            if exact:
                break
        # Where labels were left out, a stage may seem to have no choice that is as good as the known ones.
        return best if fronts is not None or self._time(best) <= known * (1 + _TIE) else None

    def _fronts(
        self,
        stages: Sequence[StageTables],
        capacity: int,
        supports: Sequence[Sequence[Support]],
        known: float,
        limit: int,
    ) -> tuple[list[list[StageChoice]] | None, bool]:
        """Choices of each stage that may beat a known plan, ``None`` where one has none, and whether these are all."""
        form, fronts, exact = self.model.pipeline_form(self.setting), [], True
        for index, (stage, own) in enumerate(zip(stages, supports, strict=True)):
            reduced = self.prices.reduced(stage, form.comparison(index, len(stages)))
            front, whole = reduced.solve(capacity - stage.base, own, known, limit)
            exact = exact and whole
            if not front:
                return None, whole
            fronts.append(front)
        return fronts, exact

    def _each_alone(self, stages: Sequence[StageTables], capacity: int, weights: Weights) -> list[StageChoice] | None:
        """The least weighted sum of the times of each stage; ``None`` if one does not fit."""
        choices = [self.prices.least_sum(stage, capacity, weights) for stage in stages]
        found = [choice for choice in choices if choice is not None]
        return found if len(found) == len(stages) else None

    def _time(self, choices: Sequence[StageChoice]) -> float:
        return self.model.step_time([StageTimes(*choice.cost) for choice in choices], self.setting)


def _options(model: CostModel, setting: Setting, pins: Pins) -> list[tuple[LayerStrategy, ...]]:
    """Strategies of every row; rows of one kind and pin have the same."""
    found: dict[Hashable, tuple[LayerStrategy, ...]] = {}
    options = []
    for row in range(setting.num_rows):
        block = 0 < row <= model.num_layers
        key = (model.row_kind(row), pins.layers[row - 1] if block and pins.layers is not None else None)
        if key not in found:
            found[key] = tuple(pins.options(model, row, setting))
        options.append(found[key])
    return options


def least_sum(stage: StageTables, capacity: int, weights: Weights, incumbent: float) -> tuple[StageChoice | None, bool]:
    """The choice of least weighted sum of one stage, with all criteria, and whether it is proven to be that."""
    # Layers of one type stay one object: the dynamic program works once for all of them.
    factors = np.array(weights)
    summed = {id(r): RowTable(r.held, r.released, r.working, r.step, (r.cost @ factors)[:, None]) for r in stage.rows}
    scaled = {id(matrix): matrix @ factors for matrix in stage.relayouts}
    rows, relayouts = [summed[id(r)] for r in stage.rows], [scaled[id(matrix)] for matrix in stage.relayouts]
    choice, exact = fastest_choice(rows, relayouts, capacity - stage.base, incumbent=incumbent)
    if choice is None:
        return None, exact
    cost = sum(row.cost[option] for row, option in zip(stage.rows, choice.options, strict=True))
    pairs = zip(stage.relayouts, choice.options[:-1], choice.options[1:], strict=True)
    cost = sum((matrix[a, b] for matrix, a, b in pairs), start=cost)
    return StageChoice(tuple(cost.tolist()), choice.peak, choice.options), exact
