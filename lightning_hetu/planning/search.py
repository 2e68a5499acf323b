"""The search for the best plan.

Outer loop of Galvatron (arXiv 2211.13878, section 3.4): batch sizes, pipeline degrees and microbatch counts; inside,
the strategies of all rows by dynamic programming. A setting whose lower bound is worse than the best known plan is
skipped. That is for 1F1B; other schedules are tried on what was found, see
:mod:`~lightning_hetu.planning.schedule_search`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from lightning_hetu.planning.alternatives import rejected_alternatives
from lightning_hetu.planning.cluster import ClusterSpec
from lightning_hetu.planning.cost_model import CATEGORIES, CostModel, Setting, predict, stage_report
from lightning_hetu.planning.enumeration import powers_of_two
from lightning_hetu.planning.errors import NoFeasiblePlanError
from lightning_hetu.planning.galvatron_cost import GalvatronCostModel
from lightning_hetu.planning.galvatron_files import GalvatronProfile
from lightning_hetu.planning.hetu_cost import HetuConstants, HetuCostModel
from lightning_hetu.planning.layer_strategy import LayerStrategy
from lightning_hetu.planning.partition_search import PartitionSearch
from lightning_hetu.planning.plan import HybridPlan, PlanPrediction
from lightning_hetu.planning.profile import ModelProfile
from lightning_hetu.planning.schedule_cost import offered_schedules
from lightning_hetu.planning.schedule_search import (
    WORTHWHILE_GAIN,
    PricedPlan,
    ScheduleSearch,
    simulated_schedules,
    try_schedules,
)
from lightning_hetu.planning.search_space import Pins
from lightning_hetu.planning.stage_search import Found, SettingSearch
from lightning_hetu.planning.units import parse_bytes

CostModelName = Literal["hetu", "galvatron3"]
Progress = Callable[[int, int], None]
Candidates = SettingSearch | PartitionSearch

_log = logging.getLogger(__name__)
_TIE = 1e-9
_ROUNDING = 1e-12
"""Sums of the same times in another order may differ by this share."""
_LARGEST_BATCH = 1 << 16
_WORTHWHILE_BATCH_GAIN = 1.01
_PATIENCE = 2


def build_cost_model(
    profile: ModelProfile | GalvatronProfile,
    cluster: ClusterSpec | None,
    cost_model: CostModelName | CostModel = "hetu",
    *,
    constants: HetuConstants | None = None,
) -> CostModel:
    """The cost model of a name; an instance is passed through.

    Raises:
        ValueError: If the name is unknown or does not go with the kind of profile.
    """
    if isinstance(cost_model, CostModel):
        return cost_model
    if cost_model not in get_args(CostModelName):
        raise ValueError(f"cost_model={cost_model!r}: expected one of {', '.join(get_args(CostModelName))}.")
    if cost_model == "galvatron3":
        if not isinstance(profile, GalvatronProfile):
            raise ValueError("cost_model='galvatron3' needs the profile that load_galvatron_profiles returns.")
        return GalvatronCostModel(profile)
    if not isinstance(profile, ModelProfile) or not isinstance(cluster, ClusterSpec):
        raise ValueError("cost_model='hetu' needs a ModelProfile and a ClusterSpec.")
    return HetuCostModel(profile, cluster, constants)


def evaluate(
    plan: HybridPlan,
    profile: ModelProfile | GalvatronProfile,
    cluster: ClusterSpec | None = None,
    cost_model: CostModelName | CostModel = "hetu",
    *,
    memory_budget: int | str | None = None,
    constants: HetuConstants | None = None,
) -> PlanPrediction:
    """What a cost model expects of a plan, found by a search or written by hand.

    Args:
        plan: The plan.
        profile: The model.
        cluster: The devices; not used by ``galvatron3``, whose profile has them.
        cost_model: ``"hetu"`` for our executor, ``"galvatron3"`` for the released Galvatron.
        memory_budget: Recorded in the prediction. A cost model that reserves a part of it adds that part to the memory.
        constants: Properties of the executor, for ``"hetu"``.

    Raises:
        ValueError: If plan, profile and cluster do not belong together.
    """
    model = build_cost_model(profile, cluster, cost_model, constants=constants)
    return predict(model, plan, memory_budget=None if memory_budget is None else parse_bytes(memory_budget))


def memory_breakdown(
    plan: HybridPlan,
    profile: ModelProfile | GalvatronProfile,
    cluster: ClusterSpec | None = None,
    stage: int = 0,
    cost_model: CostModelName | CostModel = "hetu",
    *,
    constants: HetuConstants | None = None,
) -> dict[str, int]:
    """Peak bytes per device of one stage by category; they add up to the stage's predicted memory.

    The categories are ``parameters``, ``gradients``, ``optimizer``, ``activations``, ``gathered`` (full copies of
    parameters) and ``transient``, all at the moment of the peak.

    Raises:
        ValueError: If there is no such stage, or plan, profile and cluster do not belong together.
    """
    model = build_cost_model(profile, cluster, cost_model, constants=constants)
    peak = stage_report(model, plan, stage).peak
    return {name: int(size) for name, size in zip(CATEGORIES, peak, strict=True)}


def time_breakdown(
    plan: HybridPlan,
    profile: ModelProfile | GalvatronProfile,
    cluster: ClusterSpec | None = None,
    stage: int = 0,
    cost_model: CostModelName | CostModel = "hetu",
    *,
    constants: HetuConstants | None = None,
) -> dict[str, float]:
    """Seconds of one stage by what takes them.

    Names that end in ``_per_step`` are paid once per step, all others per microbatch; the latter add up to the stage's
    predicted time.

    Raises:
        ValueError: If there is no such stage, or plan, profile and cluster do not belong together.
    """
    model = build_cost_model(profile, cluster, cost_model, constants=constants)
    report = stage_report(model, plan, stage)
    total: dict[str, float] = {}
    for cost in report.costs:
        for name, seconds in cost.parts.items():
            total[name] = total.get(name, 0.0) + seconds
    total["relayout"] = sum(report.relayouts)
    return total


def search(
    profile: ModelProfile | GalvatronProfile,
    cluster: ClusterSpec | None,
    *,
    memory_budget: int | str,
    global_batch_size: int | None = None,
    cost_model: CostModelName | CostModel = "hetu",
    constants: HetuConstants | None = None,
    alternatives: bool = True,
    progress: Progress | None = None,
    **pins: Any,
) -> HybridPlan:
    """Finds the plan of highest predicted throughput whose fullest device stays within the memory budget.

    The result is deterministic: of equal throughput, fewer microbatches win, then fewer stages, then less memory.

    Args:
        profile: The model.
        cluster: The devices; ``None`` for ``galvatron3``, whose profile has them.
        memory_budget: Bytes per device, or text such as ``"20GiB"``.
        global_batch_size: Samples per step over all devices. ``None`` tries growing sizes for the best throughput.
        cost_model: ``"hetu"`` for our executor, ``"galvatron3"`` for the released Galvatron, or an instance.
        constants: Properties of the executor, for ``"hetu"``.
        alternatives: Whether to record the best plans of restricted spaces in ``plan.rejected``.
        progress: Called with the number of finished and of all settings.
        pins: Fields of the plan that are given, see :class:`~lightning_hetu.planning.search_space.Pins`.

    Raises:
        NoFeasiblePlanError: If no plan fits; it names the smallest budget with which one does.
        ValueError: If an argument is malformed, or no plan exists at any budget.
    """
    model = build_cost_model(profile, cluster, cost_model, constants=constants)
    budget = parse_bytes(memory_budget)
    fixed = Pins.parse(pins, model.num_layers)
    if fixed.schedule not in (None, "any", *offered_schedules(model)):
        known = ", ".join(offered_schedules(model))
        raise ValueError(
            f"schedule={fixed.schedule!r}: the model or the cost model does not have it, expected {known}."
        )
    if global_batch_size is None:
        batch = _search_batch_sizes(model, budget, fixed, progress)
    else:
        if isinstance(global_batch_size, bool) or not isinstance(global_batch_size, int) or global_batch_size < 1:
            raise ValueError(f"global_batch_size={global_batch_size!r}: expected an integer of at least 1.")
        batch = _Batch.of(model, global_batch_size, budget, fixed, progress)
        if not batch.possible:
            raise ValueError(_impossible(model, global_batch_size, fixed))
        if not batch.feasible:
            raise NoFeasiblePlanError(budget, batch.smallest_budget())
    plan, others = _chosen(model, batch, budget, fixed, alternatives=alternatives)
    if alternatives:
        plan = replace(plan, rejected=rejected_alternatives(model, plan, budget, fixed, others))
    return plan


@dataclass
class _Batch:
    """What was found for one batch size.

    Args:
        settings: All settings in which every row has an option.
        bounds: Least step time of each.
        found: Plans by the index of their setting.
        best: The best of them.
        played: Plans of a pinned schedule without a closed form, which take the place of ``best``.
    """

    settings: list[Candidates]
    bounds: list[float] = field(default_factory=list)
    found: dict[int, Found] = field(default_factory=dict)
    best: Found | None = None
    played: ScheduleSearch | None = None

    @classmethod
    def of(
        cls,
        model: CostModel,
        size: int,
        budget: int,
        pins: Pins,
        progress: Progress | None,
        slowest: float = float("inf"),
    ) -> _Batch:
        """Looks for the best plan of a batch size, most promising settings first; slower ones than ``slowest`` not."""
        batch = cls(_prepare(model, size, pins))
        capacity = budget - model.reserve(budget)
        batch.bounds = [setting.lower_bound(capacity) for setting in batch.settings]
        if pins.simulated:
            assert isinstance(model, HetuCostModel)  # No other one offers such a schedule.
            batch.played = try_schedules(model, batch.settings, batch.bounds, {}, budget, pins)
            if progress is not None and batch.settings:
                progress(len(batch.settings), len(batch.settings))
        else:
            batch.search(capacity, progress, slowest)
        return batch

    def search(self, capacity: int, progress: Progress | None, slowest: float) -> None:
        """Solves the settings that may hold the best plan."""
        order = sorted((bound, index) for index, bound in enumerate(self.bounds))
        for done, (bound, index) in enumerate(order, start=1):
            incumbent = slowest if self.best is None else self.best.time
            hopeless = bound == float("inf") or bound > slowest * (1 + _TIE)
            if not hopeless and _may_beat(self.settings[index].setting, bound, self.best):
                found = self.settings[index].best(capacity, incumbent)
                if found is not None:
                    self.found[index] = found
                    if self.best is None or _beats(found, self.best):
                        self.best = found
            if progress is not None:
                progress(done, len(self.settings))

    @property
    def time(self) -> float:
        """Seconds per step of the best plan; infinite without one."""
        if self.played is not None:
            fastest = self.played.fastest
            return float("inf") if fastest is None else fastest.time
        return float("inf") if self.best is None else self.best.time

    @property
    def possible(self) -> bool:
        """Whether there is a plan at any budget."""
        return bool(self.settings) and (self.played is None or bool(self.played.frugal))

    @property
    def feasible(self) -> bool:
        """Whether a plan fits."""
        return self.best is not None or (self.played is not None and self.played.fastest is not None)

    def smallest_budget(self) -> int:
        """Fewest bytes with which this batch size has a plan."""
        if self.played is not None:
            return min(item.peak for item in self.played.frugal.values())
        return min(setting.model.budget_for(setting.least_peak()) for setting in self.settings)


def _chosen(
    model: CostModel, batch: _Batch, budget: int, pins: Pins, *, alternatives: bool
) -> tuple[HybridPlan, list[PricedPlan]]:
    """The plan of a batch size with its prediction, and the best plans of the other schedules that were tried."""
    if batch.played is not None:
        fastest = batch.played.fastest
        assert fastest is not None  # The caller has looked.
        return replace(fastest.plan, prediction=fastest.prediction), []
    assert batch.best is not None
    plan = batch.best.plan()
    if pins.layers is None:
        plan = _in_few_runs(model, plan, budget)
    chosen = PricedPlan(plan, predict(model, plan, memory_budget=budget))
    others: list[PricedPlan] = []
    wanted = alternatives or pins.schedule == "any"
    if wanted and isinstance(model, HetuCostModel) and simulated_schedules(model, pins):
        tried = try_schedules(model, batch.settings, batch.bounds, batch.found, budget, pins, chosen.time)
        others = [tried.best.get(name) or tried.frugal[name] for name in tried.frugal]
        fastest = tried.fastest
        if pins.schedule == "any" and fastest is not None and fastest.time < chosen.time * (1 - WORTHWHILE_GAIN):
            others = [chosen, *(item for item in others if item is not fastest)]
            chosen = fastest
    return replace(chosen.plan, prediction=chosen.prediction), others


def _prepare(model: CostModel, batch: int, pins: Pins) -> list[Candidates]:
    """All settings of one batch size in which every row has an option."""
    settings = [_candidates(model, setting, pins) for setting in pins.settings(model, batch)]
    return [setting for setting in settings if setting.variants]


def _candidates(model: CostModel, setting: Setting, pins: Pins) -> Candidates:
    """The plans of a setting: of its cut into stages, or of all cuts where that is free."""
    cuts = model.uneven_stages and pins.free_cut and 1 < setting.num_stages < model.num_layers
    return PartitionSearch(model, setting, pins) if cuts else SettingSearch(model, setting, pins)


def _rank(found: Found) -> tuple[int, int, int]:
    """Orders plans of equal throughput."""
    return found.setting.num_microbatches, found.setting.num_stages, found.peak


def _may_beat(setting: Setting, bound: float, best: Found | None) -> bool:
    """Whether a setting whose plans take at least ``bound`` may hold one that beats the best known plan."""
    if best is None or bound < best.time * (1 - _TIE):
        return True
    behind = (setting.num_microbatches, setting.num_stages) > _rank(best)[:2]
    return bound <= best.time * (1 + _TIE) and not behind


def _beats(found: Found, other: Found) -> bool:
    """Whether a plan is faster than another one of the same batch size, or equally fast and ranks before it."""
    if abs(found.time - other.time) > _TIE * other.time:
        return found.time < other.time
    return _rank(found) < _rank(other)


def _search_batch_sizes(model: CostModel, budget: int, pins: Pins, progress: Progress | None) -> _Batch:
    """The best throughput over batch sizes that double until none fits or it no longer pays.

    A larger batch can always be cut into more microbatches, so throughput levels off rather than ending: the search
    stops after two doublings that gain less than one percent.
    """
    best: tuple[float, _Batch] | None = None
    tried: list[_Batch] = []
    size, idle = pins.num_microbatches or 1, 0
    while size <= _LARGEST_BATCH and idle < _PATIENCE:
        slowest = float("inf") if best is None or best[0] == float("inf") else size / best[0]
        batch = _Batch.of(model, size, budget, pins, progress, slowest)
        if batch.possible and best is None:
            tried.append(batch)
        if batch.feasible:
            throughput = size / batch.time if batch.time > 0 else float("inf")
            idle = 0 if best is None or throughput > best[0] * _WORTHWHILE_BATCH_GAIN else idle + 1
            if best is None or throughput > best[0] * (1 + _TIE):
                best = throughput, batch
        elif batch.possible:
            idle += 1
        _log.debug("batch %d: %.6g s", size, batch.time)
        size *= 2
    if best is not None:
        return best[1]
    if not tried:
        raise ValueError(_impossible(model, None, pins))
    raise NoFeasiblePlanError(budget, min(batch.smallest_budget() for batch in tried))


def _in_few_runs(model: CostModel, plan: HybridPlan, budget: int) -> HybridPlan:
    """Puts blocks of one strategy next to each other where that costs no time and still fits.

    The order of equal blocks often does not matter; a plan of few runs is easier to read.
    """
    prediction = predict(model, plan, memory_budget=budget)
    for first, last in plan.stage_bounds:
        for start, stop in _runs_of_one_type(model, first, last):
            order = list(dict.fromkeys(plan.layers[start:stop]))
            layouts = list(dict.fromkeys(map(_layout, order)))
            for early in (True, False):
                ranks = {s: (layouts.index(_layout(s)), s.recompute != early, i) for i, s in enumerate(order)}
                block = sorted(plan.layers[start:stop], key=ranks.__getitem__)
                candidate = replace(plan, layers=(*plan.layers[:start], *block, *plan.layers[stop:]))
                new = predict(model, candidate, memory_budget=budget)
                slower = new.iteration_time > prediction.iteration_time * (1 + _ROUNDING)
                if not slower and max(new.stage_memory) <= budget:
                    plan = candidate
                    break
    return plan


def _layout(strategy: LayerStrategy) -> tuple[int, int, int, int, bool]:
    return strategy.dp, strategy.tp, strategy.sp, strategy.cp, strategy.sequence_parallel


def _impossible_degree(model: CostModel, batch: int | None, pins: Pins) -> str | None:
    """One line on a pinned degree or schedule that the model does not have, if there is one."""
    if pins.simulated and not model.pipeline:
        return f"schedule={pins.schedule!r}: the model has no pipeline support (PipelineMixin), so it has one stage."
    pinned = {name: degrees for name in ("tp", "sp", "cp") if (degrees := getattr(pins, name)) is not None}
    shown = {name: f"{name}={', '.join(map(str, degrees))}" for name, degrees in pinned.items()}
    above = [name for name, degrees in pinned.items() if min(degrees) > 1]
    if "tp" in above and len(above) > 1:
        return f"{shown['tp']} with {shown[above[1]]}: no block has both, set one of them to 1."
    if above == ["sp", "cp"]:
        return f"{shown['sp']} with {shown['cp']}: pin layers to have both, for example layers: sp2-cp2-zero2."
    # Whatever divides the batch: as many samples as devices, and one microbatch.
    whole = replace(
        pins, layers=None, embedding=None, head=None, dp=None, tp=None, sp=None, cp=None, num_microbatches=1
    )
    samples = max(batch or 1, model.num_devices)
    for name in above:
        offered = {
            getattr(strategy, name)
            for setting in whole.settings(model, samples)
            for strategy in model.strategies(1, setting)
        }
        if not offered.intersection(pinned[name]):
            remedy = {
                "tp": "a tensor_parallel_plan gives it more",
                "sp": "more needs attention by scaled_dot_product_attention, and nothing else that mixes tokens",
                "cp": "more needs attention by scaled_dot_product_attention without a mask",
            }[name]
            degrees = ", ".join(map(str, sorted(offered)))
            return f"{shown[name]}: blocks can have {degrees}; {remedy}."
    return None


def _runs_of_one_type(model: CostModel, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Ranges of neighboring blocks of one layer type."""
    start = first
    for block in range(first + 1, last + 1):
        if block == last or model.row_kind(block + 1) != model.row_kind(start + 1):
            yield start, block
            start = block


def _impossible(model: CostModel, batch: int | None, pins: Pins) -> str:
    """One line on why there is no setting at all."""
    counts = [pins.pipeline_parallel_size] if pins.pipeline_parallel_size else powers_of_two(model.num_devices)
    sizes = [model.num_devices // count for count in counts]
    for name, strategy in pins.pinned_strategies().items():
        if strategy.num_devices not in sizes:
            return (
                f"{name}={strategy} takes {strategy.num_devices} devices of a stage, but a stage of"
                f" {model.num_devices} devices has {' or '.join(map(str, sizes))}."
            )
    problem = _impossible_degree(model, batch, pins)
    if problem is not None:
        return problem
    return (
        f"global_batch_size={batch}: no plan divides it over {model.num_devices} devices with {pins}; it must be"
        " divisible by num_microbatches times the data-parallel degree of every layer, and embedding and head cannot"
        " have degrees of tensor parallelism that were not profiled."
    )
