"""What a cost model answers, and what follows from its answers for a whole plan.

A cost model prices one *row* of a plan (embedding, one block, or head) under one strategy: seconds per microbatch,
seconds of gradient synchronization, and bytes in each phase of a step. Everything here is the same for all cost
models; :mod:`~lightning_hetu.planning.hetu_cost` prices our own executor, and
:mod:`~lightning_hetu.planning.galvatron_cost` follows the released Galvatron 3.

Memory is the largest of the phases of a step, not a sum of their maxima (Galvatron-BMW, arXiv 2307.02031, section 3,
refined). Rows run forward first to last and backward last to first, so while row ``r`` runs, the rows in front of it
hold their activations and the rows behind it have already released theirs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lightning_hetu.planning.pipeline import PipelineForm, StageTimes
from lightning_hetu.planning.plan import HybridPlan, PlanPrediction, Schedule
from lightning_hetu.planning.schedules import most_in_flight

if TYPE_CHECKING:
    from lightning_hetu.planning.layer_strategy import LayerStrategy

CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "gathered", "transient")
"""Kinds of memory, in the order of a byte vector (``int64[6]``)."""

Bytes = NDArray[np.int64]
_ROUNDING = 1e-12


def byte_vector(**sizes: float) -> Bytes:
    """A byte vector from sizes by category, each rounded up to whole bytes."""
    return np.array([int(np.ceil(sizes.pop(name, 0.0))) for name in CATEGORIES], dtype=np.int64)


@dataclass(frozen=True)
class Setting:
    """The part of a plan that is the same for all its rows.

    Args:
        world_size: Devices in total.
        global_batch_size: Samples per step over all devices.
        num_microbatches: Microbatches per step.
        stages: Blocks of each stage.
        schedule: Pipeline schedule.
        virtual_stages: Stages per rank of the pipeline.
        held: Microbatches whose activations each stage holds, where these are not the most of a step.
    """

    world_size: int
    global_batch_size: int
    num_microbatches: int
    stages: tuple[int, ...]
    schedule: Schedule = "1f1b"
    virtual_stages: int = 1
    held: tuple[int, ...] = ()

    @classmethod
    def of(cls, plan: HybridPlan) -> Setting:
        """The setting of a plan."""
        return cls(
            plan.world_size,
            plan.global_batch_size,
            plan.num_microbatches,
            plan.stages,
            plan.schedule,
            plan.virtual_stages,
        )

    @property
    def num_stages(self) -> int:
        """Stages of all ranks."""
        return len(self.stages)

    @property
    def num_ranks(self) -> int:
        """Pipeline-parallel degree P: ranks of the pipeline, each of one or several stages."""
        return max(len(self.stages) // self.virtual_stages, 1)

    @property
    def devices_per_stage(self) -> int:
        """Devices of one stage."""
        return self.world_size // self.num_ranks

    @property
    def microbatch_size(self) -> int:
        """Samples of one microbatch over all devices of a stage."""
        return self.global_batch_size // self.num_microbatches

    def in_flight(self, stage: int) -> int:
        """Microbatches whose activations a stage holds at once.

        All under ``gpipe``, ``min(P - stage, m)`` under ``1f1b``, and the most in the stage's actions under the others;
        there the stages of a rank do not all hold the most at the same time.
        """
        if self.num_stages == 1:
            return 1
        if self.held:
            return self.held[stage]
        if self.schedule == "interleaved_1f1b" or self.schedule == "zero_bubble":
            return most_in_flight(self.schedule, self.num_ranks, self.num_microbatches, self.virtual_stages)[stage]
        if self.schedule == "gpipe":
            return self.num_microbatches
        return min(self.num_stages - stage, self.num_microbatches)

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        """Blocks up to the end of each stage."""
        return tuple(accumulate(self.stages))

    def rows(self, stage: int) -> range:
        """Rows of a stage. Row 0 is the embedding, row ``i + 1`` block ``i``, the last row the head."""
        ends = self._ends
        first = 0 if stage == 0 else ends[stage - 1] + 1
        return range(first, ends[stage] + (2 if stage == self.num_stages - 1 else 1))

    @property
    def num_rows(self) -> int:
        """Rows of the whole plan: embedding, blocks, head."""
        return sum(self.stages) + 2


@dataclass(frozen=True)
class RowMemory:
    """Bytes per device of one row, by category, at the moments of a step that matter.

    Args:
        held: After its forward, while other rows run: states, activations of all microbatches in flight, gathered
            parameters.
        released: After its backward of one microbatch.
        forward: While its forward runs.
        backward: While its backward runs.
        step: While the optimizer steps.
    """

    held: Bytes
    released: Bytes
    forward: Bytes
    backward: Bytes
    step: Bytes


@dataclass(frozen=True)
class RowCost:
    """Price of one row under one strategy.

    Args:
        seconds: Seconds per microbatch without gradient synchronization and without relayout of its input.
        sync: Additional seconds once per step.
        memory: Bytes per device.
        parts: Where the seconds go, by name; those of ``sync`` have names ending in ``_per_step``.
        forward: The part of ``seconds`` that is forward, where the cost model tells it apart.
        first_forward: The part of ``sync`` in the first forward of a step; what is in no other part is in the last
            backward.
        optimizer: The part of ``sync`` after the last backward.
    """

    seconds: float
    sync: float
    memory: RowMemory
    parts: Mapping[str, float] = field(default_factory=dict)
    forward: float = 0.0
    first_forward: float = 0.0
    optimizer: float = 0.0

    @property
    def times(self) -> StageTimes:
        """The same seconds as those of a stage of this row alone."""
        last_backward = self.sync - self.first_forward - self.optimizer
        if abs(last_backward) < _ROUNDING * abs(self.sync):
            last_backward = 0.0
        return StageTimes(self.forward, self.seconds - self.forward, self.first_forward, last_backward, self.optimizer)


@dataclass(frozen=True)
class Restriction:
    """A part of the search space: which strategies it has, and the bytes per stage it costs."""

    allows: Callable[[LayerStrategy], bool]
    base: Bytes


class CostModel(ABC):
    """Prices the rows of a plan; see the module."""

    name: str
    num_layers: int
    num_devices: int
    pipeline: bool = True
    """Whether the model can be cut into stages."""
    microbatches: bool = True
    """Whether a batch can be cut into microbatches."""
    split_vocab: bool = True
    """Whether embedding and head may have strategies of their own."""
    additive_sync: bool = True
    """Whether a step of a single stage takes ``m * time per microbatch + synchronization``."""
    uneven_stages: bool = True
    """Whether the search may cut the model into stages of different numbers of blocks; needs ``exact_pipeline``."""
    exact_pipeline: bool = True
    """Whether the step time is that of :meth:`pipeline_form`: the search then trades time per microbatch against
    synchronization across stages exactly. Otherwise the step time is :meth:`iteration_time`, and the search minimizes
    ``m * time + synchronization`` of every stage, as the paper does."""

    @abstractmethod
    def strategies(self, row: int, setting: Setting) -> list[LayerStrategy]:
        """Strategies the search looks at for a row, in order of preference among equals."""

    @abstractmethod
    def row_kind(self, row: int) -> Hashable:
        """Equal for rows whose prices are equal, up to stage borders and microbatches in flight."""

    @abstractmethod
    def row_cost(self, row: int, stage: int, strategy: LayerStrategy, setting: Setting) -> RowCost:
        """Price of one row. Stage borders (send, receive) count to the stage's first and last row."""

    @abstractmethod
    def relayout_seconds(self, row: int, before: LayerStrategy, after: LayerStrategy, setting: Setting) -> float:
        """Seconds per microbatch to bring the output of row ``row - 1`` into the layout of ``row``, both directions."""

    def relayout_times(
        self, row: int, before: LayerStrategy, after: LayerStrategy, setting: Setting
    ) -> tuple[float, float]:
        """The seconds of :meth:`relayout_seconds` in forward and in backward, where the cost model tells them apart."""
        return 0.0, self.relayout_seconds(row, before, after, setting)

    def step_time(self, stages: Sequence[StageTimes], setting: Setting) -> float:
        """Seconds of one step from what every stage takes."""
        if self.exact_pipeline:
            return self.pipeline_form(setting).step_time(stages)
        return self.iteration_time([stage.seconds for stage in stages], [stage.sync for stage in stages], setting)

    def pipeline_form(self, setting: Setting) -> PipelineForm:
        """The closed form of the step time, where ``exact_pipeline``."""
        return PipelineForm(setting.num_microbatches, setting.schedule)

    def iteration_time(self, seconds: Sequence[float], sync: Sequence[float], setting: Setting) -> float:
        """Seconds of one step from the seconds per microbatch and the synchronization of every stage.

        Only for models without ``exact_pipeline``. This is the textbook's ``(m - 1) max c + sum c``.
        """
        return (setting.num_microbatches - 1) * max(seconds) + sum(seconds) + sum(sync)

    def time_bound(self, seconds: Sequence[float], sync: Sequence[float], setting: Setting) -> float:
        """No step is faster whose stages take at least these times; only for models without ``exact_pipeline``."""
        return self.iteration_time(seconds, sync, setting)

    @abstractmethod
    def stage_base(self, stage: int, setting: Setting, strategies: Sequence[LayerStrategy] | None = None) -> Bytes:
        """Bytes per device of a stage that belong to none of its rows.

        Args:
            stage: The stage.
            setting: The setting.
            strategies: All rows of a plan; without them, what every plan needs.
        """

    def restrictions(self, setting: Setting) -> list[Restriction]:
        """Parts of the search space that need different memory outside of the rows; together they are all of it."""
        return [Restriction(lambda strategy: True, byte_vector())]

    def reserve(self, memory_budget: int) -> int:
        """Bytes of a budget that are kept aside and not planned with."""
        return 0

    def budget_for(self, peak: int) -> int:
        """Smallest budget whose planned part holds ``peak`` bytes."""
        return peak

    @abstractmethod
    def row_name(self, row: int) -> str:
        """Layer type of a row, for tables."""


@dataclass(frozen=True)
class StageReport:
    """What a cost model says of one stage of a plan.

    Args:
        rows: Rows of the stage.
        costs: Price of each.
        relayouts: Seconds per microbatch to relayout the input of each.
        times: Seconds of all of them.
        peak: Bytes per device by category in the fullest phase, of all stages of a device that has several.
        phase: Name of that phase.
    """

    rows: range
    costs: tuple[RowCost, ...]
    relayouts: tuple[float, ...]
    times: StageTimes
    peak: Bytes
    phase: str

    @property
    def seconds(self) -> float:
        """Seconds of one microbatch."""
        return self.times.seconds

    @property
    def sync(self) -> float:
        """Seconds once per step."""
        return self.times.sync


def optimizer_phase(costs: Sequence[RowCost]) -> Bytes:
    """Bytes while the optimizer steps."""
    total: Bytes = np.sum([cost.memory.step for cost in costs], axis=0, dtype=np.int64)
    return total


def peak_of_phases(costs: Sequence[RowCost]) -> tuple[Bytes, str]:
    """Bytes and name of the fullest phase of a stage in forward and backward; the first one in case of a tie.

    While a row runs, rows in front of it hold, and rows behind it count as after a backward. That is what they are in
    every microbatch but the first, and in the first they are smaller.
    """
    held, released, forward, backward = (
        np.array([getattr(cost.memory, name) for cost in costs], dtype=np.int64)
        for name in ("held", "released", "forward", "backward")
    )
    others = held.cumsum(axis=0) - held + released.sum(axis=0) - released.cumsum(axis=0)
    phases: Bytes = np.concatenate([others + forward, (others + backward)[::-1]])
    index, count = int(phases.sum(axis=1).argmax()), len(costs)
    name = f"forward of row {index}" if index < count else f"backward of row {2 * count - 1 - index}"
    return phases[index], name


def peak_phase(costs: Sequence[RowCost]) -> tuple[Bytes, str]:
    """Bytes and name of the fullest phase of a stage; the first one in case of a tie."""
    phases = [peak_of_phases(costs), (optimizer_phase(costs), "optimizer step")]
    return max(phases, key=lambda item: int(item[0].sum()))


def stage_report(model: CostModel, plan: HybridPlan, stage: int) -> StageReport:
    """Prices one stage of a plan.

    Raises:
        ValueError: If there is no such stage, or the plan is not of the model and cluster that were profiled.
    """
    _check_fits(model, plan)
    if not 0 <= stage < len(plan.stages):
        raise ValueError(f"stage={stage}: expected 0 to {len(plan.stages) - 1}.")
    return next(_stage_reports(model, plan, (stage,)))


def _stage_reports(
    model: CostModel, plan: HybridPlan, stages: Iterable[int], *, memory: bool = True
) -> Iterator[StageReport]:
    # Imported here: the prices of these schedules are made from those of a cost model, so their module imports this.
    from lightning_hetu.planning import schedule_cost

    setting = Setting.of(plan)
    model = schedule_cost.for_schedule(model, setting.schedule)
    strategies = [strategy for _, strategy in plan.rows()]
    peaks: dict[int, tuple[Bytes, str]] = {}
    for stage in stages:
        rows = setting.rows(stage)
        costs = tuple(_row_costs(model, rows, stage, strategies, setting))
        relayouts = [(0.0, 0.0)]
        relayouts += [model.relayout_times(row, strategies[row - 1], strategies[row], setting) for row in rows[1:]]
        moves = [StageTimes(*pair) for pair in relayouts]
        if not memory:
            peak, phase = byte_vector(), ""
        elif isinstance(model, schedule_cost.ScheduleCostModel) and schedule_cost.is_simulated(setting.schedule):
            rank = stage % setting.num_ranks
            if rank not in peaks:
                peaks[rank] = schedule_cost.rank_peak(model, setting, strategies, rank)
            peak, phase = peaks[rank]
        else:
            peak, phase = peak_phase(costs)
            peak = peak + model.stage_base(stage, setting, strategies)
        yield StageReport(
            rows=rows,
            costs=costs,
            relayouts=tuple(map(sum, relayouts)),
            times=StageTimes(*np.sum([*(cost.times for cost in costs), *moves], axis=0).tolist()),
            peak=peak,
            phase=phase,
        )


def _row_costs(
    model: CostModel, rows: range, stage: int, strategies: Sequence[LayerStrategy], setting: Setting
) -> Iterator[RowCost]:
    """Prices of the rows of a stage; equal ones between its first and its last row are priced once."""
    known: dict[Hashable, RowCost] = {}
    for row in rows:
        key = None if row in (rows[0], rows[-1]) else (model.row_kind(row), strategies[row])
        cost = known.get(key) if key is not None else None
        if cost is None:
            cost = model.row_cost(row, stage, strategies[row], setting)
            if key is not None:
                known[key] = cost
        yield cost


def predict(model: CostModel, plan: HybridPlan, *, memory_budget: int | None = None) -> PlanPrediction:
    """What a cost model expects of a plan.

    Raises:
        ValueError: If the plan is not of the model and cluster that were profiled, or the cost model has no prices for
            its schedule.
    """
    _check_fits(model, plan)
    reports = list(_stage_reports(model, plan, range(len(plan.stages))))
    reserve = 0 if memory_budget is None else model.reserve(memory_budget)
    return PlanPrediction(
        iteration_time=_step_time(model, plan, reports),
        stage_times=tuple(report.seconds for report in reports),
        stage_memory=tuple(int(report.peak.sum()) + reserve for report in reports),
        memory_budget=memory_budget,
        layer_times=tuple(
            cost.seconds + relayout
            for report in reports
            for cost, relayout in zip(report.costs, report.relayouts, strict=True)
        ),
        layer_memory=tuple(int(cost.memory.held.sum()) for report in reports for cost in report.costs),
        cost_model=model.name,
    )


def step_seconds(model: CostModel, plan: HybridPlan) -> float:
    """The time of :func:`predict`, for plans of the model and cluster that were profiled."""
    return _step_time(model, plan, list(_stage_reports(model, plan, range(len(plan.stages)), memory=False)))


def _step_time(model: CostModel, plan: HybridPlan, reports: Sequence[StageReport]) -> float:
    """Seconds of one step: by the closed form, or played where there is none."""
    from lightning_hetu.planning import schedule_cost  # as above

    setting, times = Setting.of(plan), [report.times for report in reports]
    if not schedule_cost.is_simulated(setting.schedule):
        return model.step_time(times, setting)
    return schedule_cost.played_step_time(setting, times, schedule_cost.weight_seconds(model, plan, reports))


def _check_fits(model: CostModel, plan: HybridPlan) -> None:
    if plan.num_layers != model.num_layers:
        raise ValueError(f"plan has {plan.num_layers} blocks, but the profile has {model.num_layers}.")
    if plan.world_size != model.num_devices:
        raise ValueError(f"plan.world_size={plan.world_size}, but the cluster has {model.num_devices} devices.")
