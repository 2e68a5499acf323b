"""A discrete-event simulation of one training step of a pipeline.

Every stage runs its actions (:mod:`~lightning_hetu.planning.schedules`) in order. An action starts when the stage is
free and what it needs has arrived: the activations of the stage before, the gradients of the stage behind. Nothing
else decides, so one pass over the actions in an order that respects both is enough.

For a plan, all durations are prices of the cost model, see :mod:`~lightning_hetu.planning.stage_timing`. A transfer
occupies the receiver but not the sender, as the cost model prices it: torch's schedules wait for what they receive.
Where a rank has several stages (``plan.virtual_stages``), what is said of a stage below is said of a rank.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from lightning_hetu.planning.cluster import ClusterSpec
from lightning_hetu.planning.cost_model import Setting, predict, stage_report
from lightning_hetu.planning.hetu_cost import HetuConstants, HetuCostModel
from lightning_hetu.planning.plan import HybridPlan
from lightning_hetu.planning.profile import ModelProfile
from lightning_hetu.planning.schedule_cost import for_schedule, runs_whole, weight_seconds
from lightning_hetu.planning.schedules import Action, PipelineSchedule, action_lists
from lightning_hetu.planning.stage_timing import StageTiming
from lightning_hetu.planning.timeline import Body, Piece, Simulation, TimedAction, Transfer

Detail = Literal["row", "stage"]


# ---- any pipeline ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """What a virtual stage does; the first forward and the last backward of a step may do more."""

    forward: Body
    first_forward: Body
    backward: Body
    last_backward: Body
    backward_input: Body = Body()
    backward_weight: Body = Body()
    last_weight: Body = Body()

    def body(self, action: Action, *, first: bool, last: bool) -> Body:
        """What is done in an action that is, or is not, the first or last of its kind."""
        if action.kind == "forward":
            return self.first_forward if first else self.forward
        if action.kind == "backward":
            return self.last_backward if last else self.backward
        if action.kind == "backward_input":
            return self.backward_input  # What is done once per step belongs to the other part.
        return self.last_weight if last else self.backward_weight


def _run(
    orders: Sequence[Sequence[Action]],
    work: Sequence[_Work],
    final: Sequence[Body],
    p2p: Sequence[tuple[float, float]],
    *,
    overlap_p2p: bool,
) -> tuple[tuple[tuple[TimedAction, ...], ...], tuple[Transfer, ...]]:
    """Runs the actions of all stages.

    Args:
        orders: Actions of each of P stages.
        work: What each of V virtual stages does, V a multiple of P.
        final: What each stage does at the end.
        p2p: Seconds to send (activations, gradients) over each of V - 1 borders.
        overlap_p2p: Whether a stage computes while it receives.
    """
    num_stages, num_virtual = len(orders), len(work)
    finished: dict[tuple[int, bool, int], float] = {}  # (virtual stage, forward?, microbatch) -> when
    link_free: dict[tuple[int, int], float] = {}
    free = [0.0] * num_stages
    position = [0] * num_stages
    done: list[list[TimedAction]] = [[] for _ in orders]
    transfers: list[Transfer] = []
    firsts = [{(a.kind, a.chunk): a for a in reversed(order)} for order in orders]
    lasts = [{(a.kind, a.chunk): a for a in order} for order in orders]

    ready = deque(range(num_stages))
    while ready:
        stage = ready.popleft()
        while position[stage] < len(orders[stage]):
            action = orders[stage][position[stage]]
            virtual = action.chunk * num_stages + stage
            forward = action.kind == "forward"
            source, target = (virtual - 1, virtual + 1) if forward else (virtual + 1, virtual - 1)
            start = body_start = free[stage]
            weight = action.kind == "backward_weight"  # It needs nothing from other stages, and nothing needs it.
            if not weight and 0 <= source < num_virtual:
                available = finished.get((source, forward, action.microbatch))
                if available is None:
                    break  # The stage that finishes it will wake this one.
                seconds = p2p[min(source, virtual)][0 if forward else 1]
                sender = source % num_stages
                if overlap_p2p:
                    sent = max(available, link_free.get((sender, stage), 0.0))
                    link_free[sender, stage] = sent + seconds
                    start = body_start = max(start, sent + seconds)
                else:
                    sent = start = max(start, available)
                    body_start = start + seconds
                transfers.append(Transfer(sender, stage, action, sent, sent + seconds))
            key = action.kind, action.chunk
            body = work[virtual].body(action, first=action == firsts[stage][key], last=action == lasts[stage][key])
            free[stage] = body_start + body.seconds
            done[stage].append(TimedAction(action, start, body_start, free[stage], body))
            position[stage] += 1
            if not weight:
                finished[virtual, forward, action.microbatch] = free[stage]
                if 0 <= target < num_virtual:
                    ready.append(target % num_stages)
    assert all(map(len, orders)) and position == [len(order) for order in orders]  # No schedule waits for itself.
    for stage, body in enumerate(final):
        done[stage].append(TimedAction(None, free[stage], free[stage], free[stage] + body.seconds, body))
    return tuple(map(tuple, done)), tuple(transfers)


def _one_piece(name: str, seconds: float, change: float = 0.0) -> Body:
    """A body of one event; activations come at the start of a forward and go at the end of a backward."""
    memory = ((0.0 if change > 0 else seconds, change),) if change else ()
    return Body(seconds, (Piece("compute", name, None, 0.0, seconds),), memory)


def _numbers(name: str, values: Sequence[float] | None, count: int) -> list[float]:
    """The values of an argument as floats, zeros where it is not given."""
    if values is None:
        return [0.0] * count
    numbers = [float(value) for value in values]
    if len(numbers) != count:
        raise ValueError(f"{name} has {len(numbers)} entries: expected {count}.")
    for index, number in enumerate(numbers):
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{name}[{index}]={number}: expected a number of at least 0.")
    return numbers


def simulate_pipeline(
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    *,
    num_microbatches: int,
    schedule: PipelineSchedule = "1f1b",
    p2p_seconds: Sequence[float] | None = None,
    gather_seconds: Sequence[float] | None = None,
    reduce_seconds: Sequence[float] | None = None,
    sync_seconds: Sequence[float] | None = None,
    weight_seconds: Sequence[float] | None = None,
    activation_bytes: Sequence[float] | None = None,
    num_chunks: int = 1,
    overlap_p2p: bool = False,
) -> Simulation:
    """Simulates one step of a pipeline of P stages from times alone.

    With ``num_chunks`` above 1 a stage has several chunks of layers, and everything but ``sync_seconds`` is given for
    each of V = P * ``num_chunks`` virtual stages in model order; otherwise V = P. All arguments but the first three may
    be left out, which means 0.

    Args:
        forward_seconds: Forward of one microbatch, V entries.
        backward_seconds: Backward of one microbatch, V entries, both parts where the schedule splits it.
        num_microbatches: Microbatches per step.
        schedule: Name of the schedule, see :mod:`~lightning_hetu.planning.schedules`.
        p2p_seconds: To send the activations or the gradients of one microbatch over a border, V - 1 entries.
        gather_seconds: Additional time of the first forward of a step, V entries.
        reduce_seconds: Additional time of the last backward of a step, V entries. What that backward sends waits for
            it, unless backward is split.
        sync_seconds: After the last action of a stage, P entries. Nothing waits for it.
        weight_seconds: The part of ``backward_seconds`` that computes gradients of weights, V entries; half of it
            unless given. Only ``zero_bubble`` splits.
        activation_bytes: Kept from forward to backward of one microbatch, V entries.
        num_chunks: Chunks of layers per stage, for ``interleaved_1f1b`` and ``zero_bubble``.
        overlap_p2p: Whether a stage computes while it receives. By default it waits.

    Raises:
        ValueError: If the numbers do not fit together.
    """
    virtual = len(forward_seconds)
    if isinstance(num_chunks, bool) or not isinstance(num_chunks, int) or num_chunks < 1 or virtual % num_chunks:
        raise ValueError(f"num_chunks={num_chunks!r}: expected a divisor of the {virtual} entries of forward_seconds.")
    if not virtual:
        raise ValueError("forward_seconds has 0 entries: expected one for each stage.")
    num_stages = virtual // num_chunks
    forward = _numbers("forward_seconds", forward_seconds, virtual)
    backward = _numbers("backward_seconds", backward_seconds, virtual)
    p2p = _numbers("p2p_seconds", p2p_seconds, virtual - 1)
    gather = _numbers("gather_seconds", gather_seconds, virtual)
    reduce = _numbers("reduce_seconds", reduce_seconds, virtual)
    sync = _numbers("sync_seconds", sync_seconds, num_stages)
    memory = _numbers("activation_bytes", activation_bytes, virtual)
    weight = (
        _numbers("weight_seconds", weight_seconds, virtual) if weight_seconds is not None else [b / 2 for b in backward]
    )
    for index, (part, whole) in enumerate(zip(weight, backward, strict=True)):
        if part > whole:
            raise ValueError(f"weight_seconds[{index}]={part}: expected at most backward_seconds[{index}]={whole}.")
    orders = action_lists(schedule, num_stages, num_microbatches, num_chunks)

    work = [
        _Work(
            forward=_one_piece("forward", forward[v], memory[v]),
            first_forward=_one_piece("forward", forward[v] + gather[v], memory[v]),
            backward=_one_piece("backward", backward[v], -memory[v]),
            last_backward=_one_piece("backward", backward[v] + reduce[v], -memory[v]),
            backward_input=_one_piece("backward of input", backward[v] - weight[v]),
            backward_weight=_one_piece("backward of weights", weight[v], -memory[v]),
            last_weight=_one_piece("backward of weights", weight[v] + reduce[v], -memory[v]),
        )
        for v in range(virtual)
    ]
    final = [_one_piece("synchronization", seconds) for seconds in sync]
    actions, transfers = _run(orders, work, final, [(time, time) for time in p2p], overlap_p2p=overlap_p2p)
    return Simulation(schedule, num_microbatches, actions, transfers)


# ---- plans ----------------------------------------------------------------------------------------------------------


def simulate(
    plan: HybridPlan,
    profile: ModelProfile,
    cluster: ClusterSpec,
    *,
    constants: HetuConstants | None = None,
    detail: Detail = "row",
) -> Simulation:
    """Simulates one training step of a plan.

    Args:
        plan: The plan.
        profile: The model.
        cluster: The devices.
        constants: Properties of the executor.
        detail: ``"row"`` for events of every row, ``"stage"`` for one event per stage, microbatch and direction. Times
            are the same.

    Raises:
        ValueError: If plan, profile and cluster do not belong together.
    """
    if detail not in get_args(Detail):
        raise ValueError(f"detail={detail!r}: expected one of {', '.join(get_args(Detail))}.")
    model = for_schedule(HetuCostModel(profile, cluster, constants), plan.schedule)
    assert isinstance(model, HetuCostModel)
    stages = [StageTiming(model, plan, stage) for stage in range(len(plan.stages))]
    work = [
        _Work(
            forward=stage.forward(first=False),
            first_forward=stage.forward(first=True),
            backward=stage.backward(last=False),
            last_backward=stage.backward(last=True),
        )
        for stage in stages
    ]
    if plan.schedule == "zero_bubble":
        work = _with_split_backward(work, model, plan)
    if detail == "stage":
        work = [_without_rows(item) for item in work]
    p2p = [(after.border[0], before.border[1]) for before, after in zip(stages[:-1], stages[1:], strict=True)]
    ranks = plan.pipeline_parallel_size
    orders = action_lists(plan.schedule, ranks, plan.num_microbatches, plan.virtual_stages)
    final = [_joined([stages[stage].final() for stage in plan.stages_of_rank(rank)]) for rank in range(ranks)]
    actions, transfers = _run(orders, work, final, p2p, overlap_p2p=False)
    predicted = predict(model, plan).iteration_time
    return Simulation(plan.schedule, plan.num_microbatches, actions, transfers, predicted)


def _joined(bodies: Sequence[Body]) -> Body:
    """Bodies one after another."""
    seconds, pieces = 0.0, []
    for body in bodies:
        pieces += [_later(piece, seconds) for piece in body.pieces]
        seconds += body.seconds
    return Body(seconds, tuple(pieces))


def _later(piece: Piece, seconds: float) -> Piece:
    """A piece of a body that begins later."""
    return piece._replace(start=piece.start + seconds, end=piece.end + seconds)


def _with_split_backward(work: Sequence[_Work], model: HetuCostModel, plan: HybridPlan) -> list[_Work]:
    """The work of all stages with the two parts of their backward, each as one event."""
    setting, strategies = Setting.of(plan), [strategy for _, strategy in plan.rows()]
    second = weight_seconds(model, plan, [stage_report(model, plan, stage) for stage in range(len(plan.stages))])
    assert second is not None
    found = []
    for stage, (item, weight) in enumerate(zip(work, second, strict=True)):
        once = item.last_backward.seconds - item.backward.seconds
        freed = sum(size for _, size in item.backward.memory)
        whole = runs_whole(model, setting, strategies, stage)
        first_part, second_part = (freed, 0.0) if whole else (0.0, freed)
        found.append(
            replace(
                item,
                backward_input=_one_piece("backward of input", item.backward.seconds - weight, first_part),
                backward_weight=_one_piece("backward of weights", weight, second_part),
                last_weight=_one_piece("backward of weights", weight + once, second_part),
            )
        )
    return found


def _without_rows(work: _Work) -> _Work:
    """The work of a stage with one event per body."""

    def one(name: str, body: Body) -> Body:
        return _one_piece(name, body.seconds, sum(size for _, size in body.memory))

    return replace(
        work,
        forward=one("forward", work.forward),
        first_forward=one("forward", work.first_forward),
        backward=one("backward", work.backward),
        last_backward=one("backward", work.last_backward),
    )
