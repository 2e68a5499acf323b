"""What a stage of a plan does in each direction, laid out from the prices of the cost model.

Only the order is decided here; every duration is a price, and together they are what the cost model charges.

* A forward receives its input (the input's share of ``stage_border``, gathering on arrival included). Then, row by row:
  relayout towards fewer batch shards, the gather of ``zero3`` beside the forward, the tensor-parallel reductions and
  the exchanges of a cut sequence of forward, half of ``runtime``.
* A backward receives its gradients (the output's share of ``stage_border``). Then, rows last to first: the gather of
  ``zero3``, recomputation, backward and gradient reduction, side by side as far as the cost model overlaps them; the
  other tensor-parallel reductions and exchanges, the other half of ``runtime``, relayout towards more batch shards.
* What is paid once per step: gathers of ``zero2`` in the first forward; reductions in the last backward, whose result
  is sent when they are done, since FSDP2 waits for them at the end of a backward; the optimizer at the end of a stage.

A reduction is drawn at the end of the backward of its own row. At run time it runs beside the backward of the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from lightning_hetu.planning.cost_model import CATEGORIES, Setting, StageReport, stage_report
from lightning_hetu.planning.hetu_cost import HetuCostModel
from lightning_hetu.planning.layer_strategy import LayerStrategy
from lightning_hetu.planning.plan import HybridPlan
from lightning_hetu.planning.timeline import Body, Piece, Stream

_ACTIVATIONS = CATEGORIES.index("activations")
_PLACED_PARTS = frozenset(
    {
        "forward",
        "backward",
        "tensor_parallel",
        "sequence_parallel",
        "parameter_gather",
        "stage_border",
        "runtime",
        "gradient_reduce",
        "gradient_reduce_per_step",
        "parameter_gather_per_step",
    }
)
"""Parts of a row's price that have a place of their own in the step; see the module."""


class _RowTimes(NamedTuple):
    """Seconds of one row; communication that may overlap comes as (alone, added to the computation beside it)."""

    forward: float
    recompute: float
    backward: float
    tensor: tuple[float, float]  # forward, backward
    sequence: tuple[float, float]  # forward, backward
    relayout: tuple[float, float]
    runtime: float  # per direction
    other: float  # per direction
    gather_forward: tuple[float, float]
    gather_backward: tuple[float, float]
    gather_once: tuple[float, float]
    reduce: tuple[float, float]
    reduce_once: tuple[float, float]
    step: tuple[tuple[str, float], ...]
    kept: float  # bytes


class _Builder:
    """Lays out pieces one after another."""

    def __init__(self, slowdown: float | None, *, overlap_gathers: bool) -> None:
        self.slowdown = slowdown
        self.overlap_gathers = overlap_gathers and slowdown is not None
        self.clock = 0.0
        self.pieces: list[Piece] = []
        self.memory: list[tuple[float, float]] = []

    def add(self, stream: Stream, name: str, row: int | None, seconds: float) -> None:
        """Something nothing else runs beside."""
        if seconds > 0:
            self.pieces.append(Piece(stream, name, row, self.clock, self.clock + seconds))
            self.clock += seconds

    def beside(
        self,
        row: int,
        compute: Sequence[tuple[str, float]],
        gather: tuple[str, tuple[float, float]],
        reduce: tuple[str, tuple[float, float]],
    ) -> None:
        """Computation with a gather at its beginning and a reduction at its end."""
        (gather_name, (gather_alone, gather_added)) = gather
        (reduce_name, (reduce_alone, reduce_added)) = reduce
        stop = self.clock + sum(seconds for _, seconds in compute) + gather_added + reduce_added
        if not self.overlap_gathers:
            self.add("data_parallel", gather_name, row, gather_added)
            gather_alone = 0.0
        serial_reduce = reduce_added if self.slowdown is None else 0.0
        if self.slowdown is None:
            reduce_alone = 0.0
        span = stop - serial_reduce - self.clock
        # Both sides slow down while both run, so the shorter one is slow from its beginning to its end.
        computing = sum(seconds for _, seconds in compute)
        communicating = gather_alone + reduce_alone
        slow = self.slowdown or 1.0
        stretch = min(slow, span / computing) if communicating and computing else 1.0
        begin = self.clock
        for name, seconds in compute:
            self.add("compute", name, row, seconds * stretch)
        if communicating:
            stretch = min(slow, span / communicating) if computing else 1.0
            if gather_alone:
                self.pieces.append(Piece("data_parallel", gather_name, row, begin, begin + gather_alone * stretch))
            if reduce_alone:
                end = begin + span
                self.pieces.append(Piece("data_parallel", reduce_name, row, end - reduce_alone * stretch, end))
        self.clock = stop - serial_reduce
        self.add("data_parallel", reduce_name, row, serial_reduce)
        self.clock = stop

    def remember(self, size: float) -> None:
        """A change of activation bytes now."""
        if size:
            self.memory.append((self.clock, size))

    def body(self) -> Body:
        """What was laid out."""
        return Body(self.clock, tuple(self.pieces), tuple(self.memory))


class StageTiming:
    """One stage of a plan, its prices split by direction.

    Args:
        model: The cost model.
        plan: The plan.
        stage: Which stage.

    Attributes:
        border: Seconds to receive the input in forward, and the gradients of the output in backward.

    Raises:
        ValueError: If the plan is not of the model and cluster that were profiled.
    """

    def __init__(self, model: HetuCostModel, plan: HybridPlan, stage: int) -> None:
        self.model = model
        self.stage = stage
        self.setting = Setting.of(plan)
        self.strategies = [strategy for _, strategy in plan.rows()]
        report = stage_report(model, plan, stage)
        self.rows = report.rows
        # The same prices without overlap say how long overlapped communication takes alone.
        cluster = replace(model.cluster, overlap_slowdown=None)
        serial = stage_report(HetuCostModel(model.profile, cluster, model.constants), plan, stage)
        self.times = [self._row_times(report, serial, index) for index in range(len(self.rows))]
        self.border = self._border(report)
        base = model.stage_base(stage, self.setting, self.strategies)[_ACTIVATIONS]
        self.border_bytes = int(base) / self.setting.in_flight(stage)

    # ---- splitting prices -------------------------------------------------------------------------------------------

    def _border(self, report: StageReport) -> tuple[float, float]:
        """Seconds to receive the input in forward, and the gradients of the output in backward."""
        first, last = (cost.parts["stage_border"] for cost in (report.costs[0], report.costs[-1]))
        if len(self.rows) > 1:
            return first, last
        # The only row of its stage pays for both borders. Were there one more block, it would pay for its input only.
        stages = tuple(count + (index == self.stage) for index, count in enumerate(self.setting.stages))
        row, longer = self.rows[0], replace(self.setting, stages=stages)
        received = self.model.row_cost(row, self.stage, self.strategies[row], longer).parts["stage_border"]
        return received, first - received

    def _row_times(self, report: StageReport, serial: StageReport, index: int) -> _RowTimes:
        row = self.rows[index]
        strategy, cost, alone = self.strategies[row], report.costs[index], serial.costs[index].parts

        def both(name: str) -> tuple[float, float]:
            return alone.get(name, 0.0), cost.parts.get(name, 0.0)

        gather_forward = gather_backward = (0.0, 0.0)
        if strategy.dp_type == "zero3" or strategy.sharded:
            seconds, added = both("parameter_gather")
            gather_forward = seconds / 2, self.model.gather_in_forward(row, strategy, self.setting)
            gather_backward = seconds / 2, added - gather_forward[1]
        relayout = report.relayouts[index]
        # An all-gather on the way to fewer batch shards, in forward or in backward; back is a slice.
        to_fewer = row > self.rows[0] and self.strategies[row - 1].dp > strategy.dp
        forward = cost.parts["forward"]
        recompute = forward if strategy.recompute else 0.0
        known = {name: seconds for name, seconds in cost.parts.items() if name not in _PLACED_PARTS}
        other = sum(seconds for name, seconds in known.items() if not name.endswith("_per_step"))
        return _RowTimes(
            forward=forward,
            recompute=recompute,
            backward=cost.parts["backward"] - recompute,
            tensor=self.model.tensor_times(row, strategy, self.setting),
            sequence=self.model.sequence_times(row, strategy, self.setting),
            relayout=(relayout, 0.0) if to_fewer else (0.0, relayout),
            runtime=cost.parts["runtime"] / 2,
            other=other / 2,
            gather_forward=gather_forward,
            gather_backward=gather_backward,
            gather_once=both("parameter_gather_per_step"),
            reduce=both("gradient_reduce"),
            reduce_once=both("gradient_reduce_per_step"),
            step=tuple((name, seconds) for name, seconds in known.items() if name.endswith("_per_step")),
            kept=self._kept_bytes(row, strategy),
        )

    def _kept_bytes(self, row: int, strategy: LayerStrategy) -> float:
        """Activations that a row keeps of one microbatch: what it holds in a pipeline of one stage."""
        setting = self.setting
        alone = replace(setting, world_size=setting.devices_per_stage, stages=(sum(setting.stages),))
        return float(self.model.row_cost(row, 0, strategy, alone).memory.held[_ACTIVATIONS])

    # ---- laying them out --------------------------------------------------------------------------------------------

    def _builder(self) -> _Builder:
        overlap_gathers = self.model.constants.overlap_gathers
        return _Builder(self.model.cluster.overlap_slowdown, overlap_gathers=overlap_gathers)

    def _name(self, row: int) -> str:
        if row == 0:
            return "embedding"
        return "head" if row > self.model.num_layers else f"block {row - 1}"

    def forward(self, *, first: bool) -> Body:
        """The forward of one microbatch, without receiving its input."""
        out = self._builder()
        out.remember(self.border_bytes)
        for row, times in zip(self.rows, self.times, strict=True):
            name = self._name(row)
            out.add("tensor_parallel", f"{name} relayout", row, times.relayout[0])
            gather = times.gather_forward
            if first:
                gather = gather[0] + times.gather_once[0], gather[1] + times.gather_once[1]
            compute = [(f"{name} forward", times.forward)]
            out.beside(row, compute, (f"{name} gather", gather), ("", (0.0, 0.0)))
            out.add("tensor_parallel", f"{name} all-reduce", row, times.tensor[0])
            out.add("tensor_parallel", f"{name} sequence", row, times.sequence[0])
            out.add("compute", f"{name} runtime", row, times.runtime)
            out.add("compute", f"{name} other", row, times.other)
            out.remember(times.kept)
        return out.body()

    def backward(self, *, last: bool) -> Body:
        """The backward of one microbatch, without receiving its gradients."""
        out = self._builder()
        for row, times in zip(reversed(self.rows), reversed(self.times), strict=True):
            name = self._name(row)
            reduce = times.reduce
            if last:
                reduce = reduce[0] + times.reduce_once[0], reduce[1] + times.reduce_once[1]
            compute = [(f"{name} recompute", times.recompute), (f"{name} backward", times.backward)]
            out.beside(row, compute, (f"{name} gather", times.gather_backward), (f"{name} reduce", reduce))
            out.add("tensor_parallel", f"{name} all-reduce", row, times.tensor[1])
            out.add("tensor_parallel", f"{name} sequence", row, times.sequence[1])
            out.add("compute", f"{name} runtime", row, times.runtime)
            out.add("compute", f"{name} other", row, times.other)
            out.add("tensor_parallel", f"{name} relayout", row, times.relayout[1])
            out.remember(-times.kept)
        out.remember(-self.border_bytes)
        return out.body()

    def final(self) -> Body:
        """What the stage does at the end of the step."""
        out = self._builder()
        for row, times in zip(self.rows, self.times, strict=True):
            for name, seconds in times.step:
                out.add("compute", f"{self._name(row)} {name.removesuffix('_per_step')}", row, seconds)
        return out.body()
