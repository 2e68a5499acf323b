"""Whether another pipeline schedule makes a plan faster.

The search itself prices 1F1B, whose step time has a closed form. Interleaved 1F1B (arXiv 2104.04473, section 2.2) and
zero bubble (arXiv 2401.10241, section 2) are tried on what it found: the best plans of the most promising settings keep
the strategy of every row, are cut again into as many stages as the schedule has, and are priced by playing the step.
Rows under ``zero3`` become ``zero2`` where a schedule needs that. These schedules hold more microbatches: ranks that
no longer fit are sharded further or recomputed, and where that does not help the plan is solved for less memory.

This is a heuristic. What it finds is priced in full, so it is never slower than the 1F1B plan that it replaces, and
never takes more than the budget; but there may be better plans of these schedules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from lightning_hetu.planning.cost_model import CostModel, Setting, predict, step_seconds
from lightning_hetu.planning.hetu_cost import HetuCostModel
from lightning_hetu.planning.layer_strategy import LayerStrategy
from lightning_hetu.planning.partition import balanced_cut
from lightning_hetu.planning.partition_search import PartitionSearch
from lightning_hetu.planning.pipeline import Weights
from lightning_hetu.planning.plan import HybridPlan, PlanPrediction, Schedule, even_stages
from lightning_hetu.planning.schedule_cost import ScheduleCostModel, is_simulated, offered_schedules, rank_peak
from lightning_hetu.planning.search_space import Pins
from lightning_hetu.planning.stage_search import Found, SettingSearch, StageTables
from lightning_hetu.planning.stage_tables import StageChoice

WORTHWHILE_GAIN = 0.01
"""Least share of the step time that a plan must gain to leave 1F1B: more stages or split backwards are harder to
follow, and their prices are less certain."""
_VIRTUAL_STAGES = (1, 2, 4, 8)
_SETTINGS_PER_DEGREE = 2
_MOST_SETTINGS = 6
_MOST_PINNED_SETTINGS = 16
_STAGES_GAIN = 0.002
"""Twice as many stages per rank that gain less than this share are the last ones tried."""
_RETRIES = 1
_SAVINGS = (("zero2", 1.0), *(("recompute", share / 4) for share in range(1, 5)), ("zero3", 1.0))
"""What is changed, one after the other, on a rank that exceeds the budget, and for what share of its rows."""
_MOST_ACTIONS = 1 << 16
"""Longer steps are not played: microbatches times stages."""
_ZERO_BUBBLE_REST = 1 / 3
"""Share of the bubble that split backwards leave, where forward and both parts of backward are equal."""

Candidates = SettingSearch | PartitionSearch


@dataclass(frozen=True)
class PricedPlan:
    """A plan and what a cost model expects of it."""

    plan: HybridPlan
    prediction: PlanPrediction

    @property
    def time(self) -> float:
        """Seconds per step."""
        return self.prediction.iteration_time

    @property
    def peak(self) -> int:
        """Bytes per device of the fullest one."""
        return max(self.prediction.stage_memory)


class ScheduleSearch:
    """Plans of other schedules, made from plans of 1F1B.

    Args:
        model: Prices of the executor.
        budget: Bytes per device.
        pins: Fields that are given.

    Attributes:
        best: The fastest plan of each schedule that fits the budget.
        frugal: The plan of least memory of each schedule, whether or not it fits.
    """

    def __init__(self, model: HetuCostModel, budget: int, pins: Pins) -> None:
        self.model = ScheduleCostModel(model)
        self.budget = budget
        self.pins = pins
        self.schedules = simulated_schedules(model, pins)
        self.best: dict[Schedule, PricedPlan] = {}
        self.frugal: dict[Schedule, PricedPlan] = {}

    @property
    def fastest(self) -> PricedPlan | None:
        """The fastest of all plans that fit; of equal ones, that of the simpler schedule."""
        return min(self.best.values(), key=lambda item: item.time, default=None)

    def try_plan(self, plan: HybridPlan, limit: float = np.inf) -> float:
        """Prices the variants of a 1F1B plan that may take less than ``limit`` seconds, at least one per schedule.

        Returns:
            The least share of the budget that one takes which exceeds it and would be the fastest; 1 without such.
        """
        ranks = plan.pipeline_parallel_size
        if ranks < 2 or plan.num_microbatches % ranks:
            return 1.0
        base = predict(self.model, plan)
        missed: list[PricedPlan] = []
        for schedule in self.schedules:
            changed = self._without_zero3(plan) if schedule == "zero_bubble" else plan
            if changed is not None:
                missed += self._try_schedule(replace(changed, schedule="1f1b"), base, schedule, limit)
        fastest = min((item.time for item in self.best.values()), default=np.inf)
        return min((item.peak / self.budget for item in missed if item.time < fastest), default=1.0)

    def _try_schedule(
        self, plan: HybridPlan, base: PlanPrediction, schedule: Schedule, limit: float
    ) -> Iterator[PricedPlan]:
        """Prices plans of one schedule, fewest stages first, as long as more stages help; yields those that miss."""
        before = np.inf
        for virtual in _VIRTUAL_STAGES:
            stages = plan.pipeline_parallel_size * virtual
            if (virtual == 1 and schedule == "interleaved_1f1b") or (virtual > 1 and not self.pins.free_cut):
                continue
            if stages > plan.num_layers or stages * plan.num_microbatches > _MOST_ACTIONS:
                return
            cuts = dict.fromkeys(self._cuts(plan, base, stages))
            variants = [replace(plan, schedule=schedule, stages=cut, virtual_stages=virtual) for cut in cuts]
            if schedule in self.frugal and self._least_time(variants[0], base) >= limit:
                continue
            timed = sorted((step_seconds(self.model, item), index) for index, item in enumerate(variants))
            for seconds, index in timed:
                known = self.best[schedule].time if schedule in self.best else np.inf
                if seconds >= min(limit, known) and schedule in self.frugal:
                    break
                found = self._priced(variants[index])
                if schedule not in self.frugal or found.peak < self.frugal[schedule].peak:
                    self.frugal[schedule] = found
                if found.peak <= self.budget:
                    if found.time < known:
                        self.best[schedule] = found
                    break
                if found.time >= min(limit, known):
                    continue
                smaller = self._with_less_memory(found.plan)
                if smaller is None:
                    yield found
                elif step_seconds(self.model, smaller) < known:
                    self.best[schedule] = self._priced(smaller)
            if timed[0][0] >= before * (1 - _STAGES_GAIN):
                return
            before = timed[0][0]

    def _priced(self, plan: HybridPlan) -> PricedPlan:
        return PricedPlan(plan, predict(self.model, plan, memory_budget=self.budget))

    def _with_less_memory(self, plan: HybridPlan) -> HybridPlan | None:
        """The plan with other strategies on the ranks that exceed the budget, or ``None`` if that is not enough.

        On such a rank, copies of states are sharded first, then its blocks are recomputed, those of the stages that
        hold most microbatches first, and then parameters are sharded.
        """
        setting = Setting.of(plan)
        strategies = [row for _, row in plan.rows()]
        pinned = set(self.pins.pinned_strategies().values())
        ends = (0, setting.num_rows - 1)
        for rank in range(setting.num_ranks):
            rows = [row for stage in plan.stages_of_rank(rank) for row in setting.rows(stage)]
            rows = [row for row in rows if self.model.split_vocab or row not in ends]
            for change, share in _SAVINGS:
                if int(rank_peak(self.model, setting, strategies, rank)[0].sum()) <= self.budget:
                    break
                if change == "zero3" and plan.schedule == "zero_bubble":
                    continue
                changeable = [row for row in rows if change != "recompute" or row not in ends]
                for row in changeable[: ceil(share * len(changeable))]:
                    smaller = _saving(strategies[row], change)
                    if strategies[row] not in pinned and self._allows(smaller):
                        strategies[row] = smaller
            if int(rank_peak(self.model, setting, strategies, rank)[0].sum()) > self.budget:
                return None
        return replace(plan, embedding=strategies[0], layers=tuple(strategies[1:-1]), head=strategies[-1])

    def _allows(self, strategy: LayerStrategy) -> bool:
        """Whether the pins allow the sharding and the recomputation of a row."""
        pins = self.pins
        sharding = pins.dp_type is None or strategy.shard_degree == 1 or strategy.dp_type in pins.dp_type
        return sharding and (pins.recompute is None or not strategy.recompute or pins.recompute)

    def _cuts(self, plan: HybridPlan, base: PlanPrediction, stages: int) -> Sequence[tuple[int, ...]]:
        """The cut of a plan where it has as many stages, the one of balanced time, and the even one."""
        cuts = [plan.stages] if len(plan.stages) == stages else []
        if self.pins.free_cut:
            extra = np.zeros(stages)
            extra[0], extra[-1] = base.layer_times[0], base.layer_times[-1]
            cuts.append(balanced_cut(np.tile(base.layer_times[1:-1], (stages, 1)), extra))
            cuts.append(even_stages(plan.num_layers, stages))
        return cuts

    def _without_zero3(self, plan: HybridPlan) -> HybridPlan | None:
        """The plan with ``zero2`` in place of ``zero3``; ``None`` where the pins do not have it."""
        pinned = self.pins.pinned_strategies().values()
        before = [row for _, row in plan.rows()]
        rows = [replace(row, dp_type="zero2") if row.dp_type == "zero3" else replace(row, sharded=()) for row in before]
        changed = [pair for pair in zip(before, rows, strict=True) if pair[0] != pair[1]]
        if any(row in pinned or not self._allows(new) for row, new in changed):
            return None
        return replace(plan, embedding=rows[0], layers=tuple(rows[1:-1]), head=rows[-1])

    @staticmethod
    def _least_time(plan: HybridPlan, base: PlanPrediction) -> float:
        """What a plan would take with stages of equal time and the least bubble of its schedule.

        Args:
            plan: A plan of another schedule.
            base: Prediction of the 1F1B plan that it was made from.
        """
        return sum(base.stage_times) / plan.pipeline_parallel_size * _rounds(plan)


def _saving(strategy: LayerStrategy, change: str) -> LayerStrategy:
    """A strategy that takes less memory in one respect, or the same one."""
    if change == "recompute":
        return replace(strategy, recompute=True)
    order = ("ddp", "zero2", "zero3")
    if strategy.shard_degree == 1 or order.index(strategy.dp_type) >= order.index(change):
        return strategy
    rest = () if change == "zero3" else strategy.sharded
    return replace(strategy, dp_type=change, sharded=rest)  # type: ignore[arg-type]


def _rounds(plan: HybridPlan) -> float:
    """Microbatches and, in units of one, the bubble of equal stages."""
    bubble = (plan.pipeline_parallel_size - 1) / plan.virtual_stages
    return plan.num_microbatches + bubble * (_ZERO_BUBBLE_REST if plan.schedule == "zero_bubble" else 1)


def simulated_schedules(model: CostModel, pins: Pins) -> tuple[Schedule, ...]:
    """Schedules besides 1F1B that a search tries."""
    offered = [name for name in offered_schedules(model) if is_simulated(name)]
    return tuple(name for name in offered if pins.schedule in (None, "any", name))


def try_schedules(
    model: HetuCostModel,
    settings: Sequence[Candidates],
    bounds: Sequence[float],
    known: Mapping[int, Found],
    budget: int,
    pins: Pins,
    time: float = np.inf,
) -> ScheduleSearch:
    """Tries other schedules on the best plans of the most promising settings.

    Args:
        model: Prices of the executor.
        settings: Settings of one batch size under 1F1B.
        bounds: Least step time of each.
        known: Plans that are already there, by the index of their setting.
        budget: Bytes per device.
        pins: Fields that are given.
        time: Seconds per step to beat.
    """
    search = ScheduleSearch(model, budget, pins)
    capacity = budget - model.reserve(budget)
    limit = time * (1 - WORTHWHILE_GAIN)
    for index in _promising(model, settings, bounds, known, limit, pins):
        found = known.get(index) or _solved(settings[index], capacity)
        room = capacity
        for attempt in range(_RETRIES + 1):
            over = 1.0 if found is None else search.try_plan(found.plan(), limit)
            if found is None or over <= 1 or attempt == _RETRIES:
                break
            # Less memory for 1F1B, by as much as its variant exceeds the budget.
            room = int(min(found.peak - 1, room / over))
            found = _solved(settings[index], room)
    if pins.simulated and not search.best:
        # Plans of least memory do not depend on the budget, so what they need is enough for another search.
        search.frugal = {}
        for setting in settings:
            found = _solved(setting, _even(setting).least_peak())
            if found is not None:
                search.try_plan(found.plan())
    return search


def _promising(
    model: HetuCostModel,
    settings: Sequence[Candidates],
    bounds: Sequence[float],
    known: Mapping[int, Found],
    limit: float,
    pins: Pins,
) -> list[int]:
    """Indices of the settings whose plans may beat ``limit`` with hardly a bubble, most promising first.

    The setting of the fastest known plan always is among them, so that its variants are known.
    """
    fastest = min(known, key=lambda index: known[index].key(), default=-1)
    ranked: list[tuple[bool, float, int]] = []
    for index, (candidates, bound) in enumerate(zip(settings, bounds, strict=True)):
        setting = candidates.setting
        ranks, count = setting.num_stages, setting.num_microbatches
        if ranks < 2 or count % ranks or not np.isfinite(bound):
            continue
        virtual = max(v for v in _VIRTUAL_STAGES if v * ranks <= model.num_layers)
        ideal = bound * (count + (ranks - 1) * _ZERO_BUBBLE_REST / virtual) / (count + ranks - 1)
        if ideal < limit or index == fastest:
            ranked.append((index != fastest, ideal, index))
    most, most_per_degree = _MOST_SETTINGS, _SETTINGS_PER_DEGREE
    if pins.simulated:
        most = most_per_degree = _MOST_PINNED_SETTINGS
    chosen: list[int] = []
    per_degree: Counter[int] = Counter()
    for _, _, index in sorted(ranked):
        degree = settings[index].setting.num_stages
        if len(chosen) < most and per_degree[degree] < most_per_degree:
            chosen.append(index)
            per_degree[degree] += 1
    return chosen


def _even(candidates: Candidates) -> SettingSearch:
    """The search of the even cut, or of the one that is given."""
    return candidates.cut(candidates.setting.stages) if isinstance(candidates, PartitionSearch) else candidates


def _solved(candidates: Candidates, capacity: int) -> Found | None:
    """The even cut with the least work in every stage by itself: it is cut again anyway."""
    search = _even(candidates)
    rounds = float(search.setting.num_microbatches)
    weights: Weights = (rounds, rounds, 1.0, 1.0, 1.0)
    solved: list[tuple[float, int, Sequence[StageTables], list[StageChoice]]] = []
    for stages in search.variants:
        choices = [search.prices.least_sum(stage, capacity, weights) for stage in stages]
        found = [choice for choice in choices if choice is not None]
        if len(found) == len(stages):
            seconds = sum(float(np.dot(weights, choice.cost)) for choice in found)
            solved.append((seconds, len(solved), stages, found))
    if not solved:
        return None
    _, _, tables, found = min(solved, key=lambda item: item[:2])
    return Found(
        setting=search.setting,
        time=np.nan,  # The price of 1F1B is of no interest here.
        peak=max(int(choice.peak) + stage.base for stage, choice in zip(tables, found, strict=True)),
        strategies=tuple(
            options[index]
            for stage, choice in zip(tables, found, strict=True)
            for options, index in zip(stage.options, choice.options, strict=True)
        ),
    )
