"""Prices of plans whose ranks have several stages, or whose backward is split in two.

``interleaved_1f1b`` (arXiv 2104.04473, section 2.2) and ``zero_bubble`` (arXiv 2401.10241, section 2) have no closed
form: their step is played action by action, in the order of :mod:`~lightning_hetu.planning.schedules`. A *rank* is a
place in the pipeline; it has one or several stages.

Time. Profiles know the whole backward only. The gradients of weights take ``WEIGHT_SHARE`` of what it computes: those
of a product are one product of the same size as those of its input. The papers' attention has no weights, so their
share is a little smaller. Recomputation, communication of activations and the runtime belong to the first part,
reductions of gradients to the second one, where nothing computes beside them. Some stages run all of their backward in
the first part, see :func:`runs_whole`.

Memory. How many microbatches of each of its stages a rank holds follows from the order of its actions. The peak of a
rank is the fullest moment: the stage that runs is in its fullest phase, and its other stages hold what they do then.
That is an upper bound, since a moment is taken to be in forward and in backward. Between the two parts of a backward,
a microbatch keeps all its activations and the gradients of all products' outputs (``WAITING_SHARE``), and full
gradients of a stage are reduced together, when its second part ends. What a rank has sent stays until the end of
the step, when torch's schedules of several stages wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import get_args

import numpy as np

from lightning_hetu.planning.cost_model import (
    CATEGORIES,
    Bytes,
    CostModel,
    RowCost,
    Setting,
    StageReport,
    byte_vector,
    optimizer_phase,
    peak_of_phases,
)
from lightning_hetu.planning.hetu_cost import HetuCostModel
from lightning_hetu.planning.layer_strategy import LayerStrategy
from lightning_hetu.planning.pipeline import StageTimes
from lightning_hetu.planning.plan import HybridPlan, PricedSchedule, Schedule
from lightning_hetu.planning.schedules import Holding, action_lists, holdings

WEIGHT_SHARE = 0.5
"""Part of a row's backward computation that is for gradients of weights."""
WAITING_SHARE = 0.7
"""Gradients that wait for the second part of backward, over the activations that a row keeps: 33 against 48 times the
layer's input, counted in transformer blocks (torch 2.13, fp32)."""
_GROUPS = 4
"""Groups of one microbatch per rank after which what ranks hold repeats itself."""
_ACTIVATIONS = CATEGORIES.index("activations")


def is_simulated(schedule: Schedule) -> bool:
    """Whether a step of a schedule is priced by playing it."""
    return schedule not in get_args(PricedSchedule)


def offered_schedules(model: CostModel) -> tuple[Schedule, ...]:
    """Schedules that a search may choose from: those that the model can run and the cost model can price."""
    if isinstance(model, HetuCostModel):
        return tuple(name for name in get_args(Schedule) if name in model.profile.schedules)
    return get_args(PricedSchedule)


class ScheduleCostModel(HetuCostModel):
    """The prices of another model for our executor, under schedules whose steps are played.

    Args:
        model: That model.
    """

    def __init__(self, model: HetuCostModel) -> None:
        cluster = model.cluster
        if cluster.topology is not None and cluster.num_devices <= cluster.devices_per_node:
            # From the last rank back to the first one is no way to another node where there is only one.
            inside = replace(cluster.topology, inter_node=cluster.topology.intra_node, nics_per_node=None)
            cluster = replace(cluster, topology=inside)
        super().__init__(model.profile, cluster, model.constants)
        self._stages: dict[Hashable, dict[int, _StageBytes]] = {}
        self._serial: HetuCostModel | None = None
        if cluster.overlap_slowdown is not None:
            self._serial = HetuCostModel(model.profile, replace(cluster, overlap_slowdown=None), model.constants)

    def contention(self, setting: Setting) -> float:
        """How much slower a device computes than alone; the bubble of equal stages is what the papers say."""
        bubble = (setting.num_ranks - 1) / setting.virtual_stages
        if setting.schedule == "zero_bubble":
            bubble /= 3  # F + B - W instead of F + B + W, which are taken to be equal
        busy = setting.num_microbatches / (setting.num_microbatches + bubble)
        return max(1.0, setting.world_size * busy / self.cluster.slots)

    def row_cost(self, row: int, stage: int, strategy: LayerStrategy, setting: Setting) -> RowCost:
        """Price of one row under one strategy; nothing runs beside the reductions of a split backward."""
        cost = super().row_cost(row, stage, strategy, setting)
        if setting.schedule != "zero_bubble" or self._serial is None or strategy.shard_degree == 1:
            return cost
        alone = self._serial.row_cost(row, stage, strategy, setting).parts
        names = ("gradient_reduce", "gradient_reduce_per_step")
        added = [alone.get(name, 0.0) - cost.parts.get(name, 0.0) for name in names]
        parts = {**cost.parts, **{name: alone[name] for name in names if name in alone}}
        return replace(cost, seconds=cost.seconds + added[0], sync=cost.sync + added[1], parts=parts)

    def stage_bytes(
        self, setting: Setting, strategies: Sequence[LayerStrategy], stage: int
    ) -> Callable[[int], _StageBytes]:
        """Bytes of a stage for each number of microbatches that it may hold; equal stages are priced once."""
        rows = setting.rows(stage)
        key = (
            tuple((self.row_kind(row), strategies[row]) for row in rows),
            (setting.microbatch_size, setting.num_microbatches, setting.devices_per_stage),
        )
        known = self._stages.setdefault(key, {})

        def of(held: int) -> _StageBytes:
            if held not in known:
                known[held] = self._stage_bytes(setting, strategies, stage, held)
            return known[held]

        return of

    def _stage_bytes(self, setting: Setting, strategies: Sequence[LayerStrategy], stage: int, held: int) -> _StageBytes:
        def costs(count: int) -> list[RowCost]:
            some = replace(setting, held=(count,) * setting.num_stages)
            memory = (self._memory(row, stage, strategies[row], some) for row in some.rows(stage))
            return [RowCost(0.0, 0.0, item) for item in memory]

        rows = costs(held)
        running, phase = peak_of_phases(rows)
        resting: Bytes = np.sum([cost.memory.held for cost in rows], axis=0, dtype=np.int64)
        return _StageBytes(
            resting=resting,
            running=running,
            phase=phase,
            step=optimizer_phase(rows),
            kept=float(sum(int(cost.memory.held[_ACTIVATIONS]) for cost in costs(1))),
        )

    def sent_bytes(self, setting: Setting, strategies: Sequence[LayerStrategy], stage: int) -> Bytes:
        """What a stage sends in a step: its output to the next stage, and gradients of its input to the one before."""
        step = replace(setting, held=(setting.num_microbatches,) * setting.num_stages)
        total = byte_vector()
        for border in (stage - 1, stage):
            if 0 <= border < setting.num_stages - 1:
                total += self.stage_base(border, step, strategies)
                total -= byte_vector(transient=self.constants.context_bytes)
        return total

    def weight_seconds(self, strategy: LayerStrategy, cost: RowCost, *, whole: bool) -> float:
        """Seconds per microbatch of a row in the second part of backward."""
        reduce = cost.parts.get("gradient_reduce", 0.0)
        return reduce + (0.0 if whole else WEIGHT_SHARE * cost.parts["backward"])

    def waiting_gradients(self, row: int, strategy: LayerStrategy, setting: Setting) -> float:
        """Bytes of a row's full gradients from its backward until they are reduced, where they are not kept anyway."""
        if strategy.shard_degree == 1 or not self._reduces_every_microbatch(strategy):
            return 0.0
        layer = self._layer_of_plan(row, setting)
        return layer.parameters(strategy.tp) * layer.trainable_fraction * self._reduced

    def _tied_seconds(self, row: int, strategy: LayerStrategy, setting: Setting) -> float:
        """The first and the last stage are on the first and the last rank."""
        ranks = replace(setting, stages=(1,) * setting.num_ranks, virtual_stages=1, schedule="1f1b")
        return super()._tied_seconds(row, strategy, ranks)


def for_schedule(model: CostModel, schedule: Schedule) -> CostModel:
    """The model that prices plans of a schedule.

    Raises:
        ValueError: If the cost model has no prices for it.
    """
    if not is_simulated(schedule) or isinstance(model, ScheduleCostModel):
        return model
    if not isinstance(model, HetuCostModel):
        raise ValueError(
            f"plan.schedule={schedule!r}: cost model {model.name!r} has no prices for it, expected one of"
            f" {', '.join(get_args(PricedSchedule))}."
        )
    return ScheduleCostModel(model)


def weight_seconds(model: CostModel, plan: HybridPlan, reports: Sequence[StageReport]) -> list[float] | None:
    """Seconds per microbatch that each stage takes for the second part of its backward; ``None`` where it is whole."""
    if plan.schedule != "zero_bubble":
        return None
    model = for_schedule(model, plan.schedule)
    assert isinstance(model, ScheduleCostModel)
    setting, strategies = Setting.of(plan), [strategy for _, strategy in plan.rows()]
    found = []
    for stage, report in enumerate(reports):
        whole = runs_whole(model, setting, strategies, stage)
        priced = zip(report.rows, report.costs, strict=True)
        found.append(sum(model.weight_seconds(strategies[row], cost, whole=whole) for row, cost in priced))
    return found


def runs_whole(model: HetuCostModel, setting: Setting, strategies: Sequence[LayerStrategy], stage: int) -> bool:
    """Whether a stage computes the gradients of its weights in the first part of a split backward.

    The executor does so in the first stage and in those behind frozen ones, whose input has no gradient, and in those
    with a recomputed row, which would be computed once more for each of its weights.
    """
    rows = setting.rows(stage)
    frozen = all(model.layer(row).trainable_fraction == 0 for row in range(rows[0]))
    return frozen or any(strategies[row].recompute for row in rows)


# ---- memory ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _StageBytes:
    """Bytes of one stage for a number of microbatches that it holds, without what the runtime takes for itself.

    Args:
        resting: While another stage of the rank runs.
        running: In its fullest phase, named ``phase``.
        step: While the optimizer steps.
        kept: Activations of one microbatch.
    """

    resting: Bytes
    running: Bytes
    phase: str
    step: Bytes
    kept: float

    @cached_property
    def resting_sum(self) -> int:
        """All of ``resting``."""
        return int(self.resting.sum())

    @cached_property
    def running_sum(self) -> int:
        """All of ``running``."""
        return int(self.running.sum())


def rank_peak(
    model: ScheduleCostModel, setting: Setting, strategies: Sequence[LayerStrategy], rank: int
) -> tuple[Bytes, str]:
    """Bytes by category and name of the fullest moment of a rank of the pipeline, an upper bound; see the module."""
    stages = range(rank, setting.num_stages, setting.num_ranks)
    microbatches = min(setting.num_microbatches, _GROUPS * setting.num_ranks)
    order = action_lists(setting.schedule, setting.num_ranks, microbatches, setting.virtual_stages)[rank]
    whole = tuple(runs_whole(model, setting, strategies, stage) for stage in stages)
    chunks = [model.stage_bytes(setting, strategies, stage) for stage in stages]
    unreduced = [0.0] * len(stages)
    if setting.schedule == "zero_bubble":
        unreduced = [
            sum(model.waiting_gradients(row, strategies[row], setting) for row in setting.rows(stage))
            for stage in stages
        ]

    def waiting(moment: Holding) -> float:
        counts = zip(chunks, moment.waiting, strict=True)
        return WAITING_SHARE * sum(count * chunk(1).kept for chunk, count in counts if count)

    def size(moment: Holding) -> float:
        parts = [chunk(held) for chunk, held in zip(chunks, moment.held, strict=True)]
        runs = parts[moment.chunk]
        others = sum(part.resting_sum for part in parts) - runs.resting_sum
        return runs.running_sum + others + unreduced[moment.chunk] + waiting(moment)

    fullest = max(holdings(order, whole), key=size)
    parts = [chunk(held) for chunk, held in zip(chunks, fullest.held, strict=True)]
    total = parts[fullest.chunk].running + byte_vector(transient=unreduced[fullest.chunk], activations=waiting(fullest))
    for stage in stages:
        total += model.sent_bytes(setting, strategies, stage)
    optimizer = byte_vector()
    for index, part in enumerate(parts):
        total += part.resting if index != fullest.chunk else 0
        optimizer += part.step
    moments = [(total, parts[fullest.chunk].phase), (optimizer, "optimizer step")]
    peak, phase = max(moments, key=lambda item: int(item[0].sum()))
    return peak + byte_vector(transient=model.constants.context_bytes), phase


# ---- time -----------------------------------------------------------------------------------------------------------

_FORWARD, _FIRST_FORWARD, _BACKWARD, _LAST_BACKWARD, _INPUT, _WEIGHT, _LAST_WEIGHT = range(7)


@lru_cache(maxsize=16)
def _played(
    schedule: Schedule, num_ranks: int, num_microbatches: int, virtual_stages: int
) -> tuple[tuple[int, int, int], ...]:
    """All actions of a step in an order in which each finds what it needs.

    Each is a rank, the index of the action whose result it waits for (-1 for none), and which of the durations of all
    stages it takes.
    """
    orders = action_lists(schedule, num_ranks, num_microbatches, virtual_stages)
    num_stages = num_ranks * virtual_stages
    last, group = num_microbatches - 1, _LAST_WEIGHT + 1
    done: dict[tuple[int, bool, int], int] = {}  # (stage, forward?, microbatch) -> index
    found: list[tuple[int, int, int]] = []
    position = [0] * num_ranks
    ready = list(range(num_ranks))
    while ready:
        rank = ready.pop()
        for kind, microbatch, chunk in orders[rank][position[rank] :]:
            stage, forward, waits = chunk * num_ranks + rank, kind == "forward", -1
            source, target = (stage - 1, stage + 1) if forward else (stage + 1, stage - 1)
            if kind == "backward_weight":
                which = _LAST_WEIGHT if microbatch == last else _WEIGHT
            else:
                if 0 <= source < num_stages:
                    needed = done.get((source, forward, microbatch))
                    if needed is None:
                        break
                    waits = needed
                done[stage, forward, microbatch] = len(found)
                if 0 <= target < num_stages and target % num_ranks != rank:
                    ready.append(target % num_ranks)
                if forward:
                    which = _FORWARD if microbatch else _FIRST_FORWARD
                elif kind == "backward":
                    which = _LAST_BACKWARD if microbatch == last else _BACKWARD
                else:
                    which = _INPUT
            found.append((rank, waits, stage * group + which))
            position[rank] += 1
    assert position == [len(order) for order in orders]  # No schedule waits for itself.
    return tuple(found)


def played_step_time(
    setting: Setting, stages: Sequence[StageTimes], weight_seconds: Sequence[float] | None = None
) -> float:
    """Seconds of one step, played action by action; the same as a simulation of these times.

    Args:
        setting: Stages, microbatches and schedule.
        stages: Times of every stage.
        weight_seconds: The part of the backward of each stage that is its second one, for ``zero_bubble``.
    """
    weight = weight_seconds or [0.0] * len(stages)
    durations: list[float] = []
    for times, second in zip(stages, weight, strict=True):
        durations += (
            times.forward,
            times.forward + times.first_forward,
            times.backward,
            times.backward + times.last_backward,
            times.backward - second,
            second,
            second + times.last_backward,
        )
    free = [0.0] * setting.num_ranks
    ends: list[float] = []
    actions = _played(setting.schedule, setting.num_ranks, setting.num_microbatches, setting.virtual_stages)
    for rank, waits, which in actions:
        time = free[rank]
        if waits >= 0 and ends[waits] > time:
            time = ends[waits]
        time += durations[which]
        free[rank] = time
        ends.append(time)
    for stage, times in enumerate(stages):
        free[stage % setting.num_ranks] += times.optimizer
    return max(free)
