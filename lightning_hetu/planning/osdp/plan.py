"""An OSDP plan: which mode every operator has, what it costs, and the same as JSON and as a text table."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from lightning_hetu.planning.osdp.costs import Accumulation, CollectiveCount, Part
from lightning_hetu.planning.osdp.solver import Proof
from lightning_hetu.planning.osdp.timeline import CATEGORIES, Point, points_from_json, points_to_json
from lightning_hetu.planning.tables import text_table
from lightning_hetu.planning.units import format_bytes, format_seconds

FORMAT_VERSION = 1
MEMORY_CATEGORIES = CATEGORIES
_NAME_WIDTH = 26


@dataclass(frozen=True)
class OperatorPlan:
    """What is decided for one operator, and what that costs per optimizer step and rank.

    Args:
        name: Name of the operator.
        parts: Modes and the number of slices that have each; the first slices have the first mode. One slice is the
            whole operator.
        cut: How it is cut, ``output`` or ``input``; empty if it is whole.
        kind: The operator's kind.
        tied: The group of operators that are one unit with this one. What they cost is noted at the first of them.
        bucket: Name of the first of the replicated operators whose gradients are reduced together with those of this
            one; their collectives are noted there. Empty if they are reduced alone.
        count: Number of parameters.
        seconds: Seconds of communication, and what slices add to computation.
        parameters: Bytes of parameters.
        gradients: Bytes of gradients.
        optimizer: Bytes of optimizer states.
        gathered: Bytes kept gathered beyond the gradients that take their place.
        transient: Bytes of its buffers while it runs.
        host: Bytes on the host.
        collectives: The collectives that a runtime issues for it.

    Raises:
        ValueError: If a part has no slices.
    """

    name: str
    parts: tuple[Part, ...]
    cut: str = ""
    kind: str = ""
    tied: str = ""
    bucket: str = ""
    count: int = 0
    seconds: float = 0.0
    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    gathered: int = 0
    transient: int = 0
    host: int = 0
    collectives: tuple[CollectiveCount, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple((str(mode), count) for mode, count in self.parts))
        object.__setattr__(self, "collectives", tuple(CollectiveCount(*item) for item in self.collectives))
        if not self.parts or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for _, n in self.parts):
            raise ValueError(
                f"operator {self.name!r}: parts={self.parts}: expected modes with at least one slice each."
            )
        if self.bucket and self.parts != (("dp", 1),):
            raise ValueError(
                f"operator {self.name!r}: bucket={self.bucket!r}: only whole operators in mode dp have one."
            )

    @property
    def slices(self) -> int:
        """Number of slices; 1 if the operator is whole."""
        return sum(count for _, count in self.parts)

    @property
    def mode(self) -> str:
        """Its mode in words: ``zdp``, or ``3 zdp + 1 z2`` for slices of two modes."""
        if len(self.parts) == 1:
            return self.parts[0][0]
        return " + ".join(f"{count} {mode}" for mode, count in self.parts)

    @property
    def memory(self) -> int:
        """Bytes on the device for all of the step."""
        return self.parameters + self.gradients + self.optimizer + self.gathered


@dataclass(frozen=True)
class OSDPPlan:
    """Modes of all operators, with the prediction of one optimizer step on one rank.

    Args:
        world_size: Data-parallel ranks.
        operators: Decisions in the order of the model.
        micro_steps: Forward and backward passes per optimizer step.
        accumulation: When gradients are reduced.
        batch_size: Samples per rank and micro-step.
        memory_limit: Bytes per rank; ``None`` is without limit.
        activations: Bytes of activations.
        base: Bytes of all that the plan does not decide on.
        compute_seconds: Seconds of forward and backward of all micro-steps.
        overlapped_seconds: Seconds of the step if communication runs beside computation.
        gap: How much less communication time any other plan can have at most, relative to this one's; 0 is proven best.
        proof: How the search ended; see ``solver.Solution``.
        shadow_price: Seconds saved per byte of a higher limit: the slope, at the limit, of the relaxed problem in which
            operators may be split at will between their options, for the largest transient of this plan. Of a played
            plan, on the way to the faster plan that is best worth the memory it needs. 0 where the fastest options fit.
        points: Memory over one optimizer step, if it was played; then the peak is that of these points, and the
            figures of the operators are what the search went by.

    Raises:
        ValueError: If a number is out of range, or operators share a name.
    """

    world_size: int
    operators: tuple[OperatorPlan, ...]
    micro_steps: int = 1
    accumulation: Accumulation = "last"
    batch_size: int = 1
    memory_limit: int | None = None
    activations: int = 0
    base: int = 0
    compute_seconds: float = 0.0
    overlapped_seconds: float = 0.0
    gap: float = 0.0
    proof: Proof = "complete"
    shadow_price: float = 0.0
    points: tuple[Point, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "operators", tuple(self.operators))
        object.__setattr__(self, "points", points_from_json(self.points))
        for name in ("world_size", "micro_steps", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"plan.{name}={value!r}: expected an integer of at least 1.")
        for name, allowed in (("accumulation", get_args(Accumulation)), ("proof", get_args(Proof))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"plan.{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}.")
        names = [operator.name for operator in self.operators]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"plan.operators: {twice!r} occurs {names.count(twice)} times, expected once.")

    @property
    def communication_seconds(self) -> float:
        """Seconds of communication, and of what slices add to computation."""
        return math.fsum(operator.seconds for operator in self.operators)

    @property
    def seconds(self) -> float:
        """Seconds of one optimizer step with communication and computation one after another."""
        return self.communication_seconds + self.compute_seconds

    @property
    def samples_per_second(self) -> float:
        """Samples of all ranks per second of :attr:`seconds`; infinite if the step costs nothing."""
        samples = self.batch_size * self.micro_steps * self.world_size
        return samples / self.seconds if self.seconds else math.inf

    @property
    def memory(self) -> dict[str, int]:
        """Peak bytes per rank by category (:data:`MEMORY_CATEGORIES`); with points those at the highest one."""
        if peak := self.peak_point:
            return {name: size for name, size in zip(MEMORY_CATEGORIES, peak.memory, strict=True)}
        out: dict[str, int] = {name: sum(getattr(op, name) for op in self.operators) for name in MEMORY_CATEGORIES[:4]}
        out["transient"] = max((operator.transient for operator in self.operators), default=0)
        return {**out, "activations": self.activations, "base": self.base}

    @property
    def peak_memory(self) -> int:
        """Peak bytes per rank."""
        return sum(self.memory.values())

    @property
    def peak_point(self) -> Point | None:
        """The highest point; ``None`` without points."""
        return max(self.points, key=lambda point: point.total, default=None)

    @property
    def collectives(self) -> tuple[CollectiveCount, ...]:
        """All collectives of one optimizer step, those of one kind and number of ranks together."""
        totals: dict[tuple[str, int], tuple[int, int]] = {}
        for item in (item for operator in self.operators for item in operator.collectives):
            calls, size = totals.get((item.op, item.ranks), (0, 0))
            totals[item.op, item.ranks] = calls + item.calls, size + item.bytes
        return tuple(CollectiveCount(*key, *value) for key, value in sorted(totals.items()))

    @property
    def in_short(self) -> str:
        """How many operators have each mode."""
        counts = Counter(operator.mode for operator in self.operators)
        return ", ".join(f"{count} x {mode}" for mode, count in sorted(counts.items()))

    def __getitem__(self, name: str) -> OperatorPlan:
        """The decision for the operator of that name.

        Raises:
            KeyError: If there is none.
        """
        for operator in self.operators:
            if operator.name == name:
                return operator
        raise KeyError(name)

    @property
    def fingerprint(self) -> str:
        """Hash of all that is decided, for comparing plans of different processes. Predictions do not count."""
        decided = [[op.name, op.parts, op.cut, op.tied, *([op.bucket] if op.bucket else ())] for op in self.operators]
        text = json.dumps([FORMAT_VERSION, self.world_size, self.micro_steps, self.accumulation, decided])
        return hashlib.sha256(text.encode()).hexdigest()

    def explain(self, *, each: bool = False) -> str:
        """The plan as a text table: what equal operators do, what it costs, and what more memory would bring.

        Args:
            each: Whether every operator has a line of its own.
        """
        return explain(self, each=each)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-compatible values."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        data["operators"] = [_short(operator) for operator in self.operators]
        data["points"] = points_to_json(self.points)
        return {"version": FORMAT_VERSION, **data}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OSDPPlan:
        """Reads what :meth:`to_dict` wrote.

        Raises:
            ValueError: If a field is missing, unknown or malformed.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"an OSDP plan is a mapping of its fields, got {type(data).__name__}.")
        data = dict(data)
        version = data.pop("version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise ValueError(f"plan.version={version!r}: this release reads version {FORMAT_VERSION}.")
        if "layers" in data and "operators" not in data:
            raise ValueError("it is a hybrid-parallel plan, of hetu_auto: expected a plan of operators, of hetu_osdp.")
        try:
            operators = tuple(OperatorPlan(**item) for item in data.pop("operators"))
            return cls(operators=operators, **data)
        except (TypeError, KeyError) as error:
            raise ValueError(f"the OSDP plan is malformed: {error}.") from error

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> OSDPPlan:
        """Reads what :meth:`to_json` wrote.

        Raises:
            ValueError: If the text is not a plan.
        """
        return cls.from_dict(json.loads(text))

    def save(self, path: str | Path) -> Path:
        """Writes the plan as JSON and returns the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> OSDPPlan:
        """Reads a plan file.

        Raises:
            ValueError: If the file does not hold a plan; the message names it.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"OSDP plan file {str(path)!r}: {error}") from error


def _short(operator: OperatorPlan) -> dict[str, Any]:
    """The fields of an operator that are not empty."""
    data = {**vars(operator), "parts": [list(part) for part in operator.parts]}
    data["collectives"] = [list(item) for item in operator.collectives]
    return {name: value for name, value in data.items() if value or name == "name"}


def explain(plan: OSDPPlan, *, each: bool = False) -> str:
    """The plan as a text table of at most 110 columns; operators of one kind with the same costs share a line.

    Args:
        plan: The plan.
        each: Whether every operator has a line of its own.
    """
    ranks, steps = plan.world_size, plan.micro_steps
    lines = [
        f"OSDP plan for {ranks} rank{'s' * (ranks > 1)}: {_operators(len(plan.operators))}, batch of"
        f" {plan.batch_size} per rank, {steps} micro-step{'s' * (steps > 1)}",
        f"predicted step {format_seconds(plan.seconds)}: communication {format_seconds(plan.communication_seconds)},"
        f" computation {format_seconds(plan.compute_seconds)}; {format_seconds(plan.overlapped_seconds)} overlapped",
        _limit_line(plan),
        _proof_line(plan),
        "",
        text_table(
            [("operators", "count", "mode", "slices", "memory per rank", "buffers", "time"), *_rows(plan, each)]
        ),
        "",
        text_table(
            [("memory", "per rank"), *((name, format_bytes(size)) for name, size in plan.memory.items() if size)]
        ),
    ]
    if plan.collectives:
        calls = [(c.op, str(c.ranks), str(c.calls), format_bytes(c.bytes)) for c in plan.collectives]
        lines += ["", text_table([("collectives per step", "ranks", "calls", "bytes"), *calls])]
    return "\n".join(lines)


def _operators(count: int) -> str:
    return f"{count} operator{'s' * (count != 1)}"


def _limit_line(plan: OSDPPlan) -> str:
    peak = f"peak memory {format_bytes(plan.peak_memory)} per rank"
    if point := plan.peak_point:
        peak += f" ({point.label})"
    if plan.memory_limit is None:
        return f"{peak}, no limit"
    line = f"{peak}, {plan.peak_memory / plan.memory_limit:.1%} of the limit of {format_bytes(plan.memory_limit)}"
    if plan.shadow_price > 0:
        return f"{line}; 1 MiB more saves about {format_seconds(plan.shadow_price * 2**20)}"
    return f"{line}; more memory saves nothing"


def _proof_line(plan: OSDPPlan) -> str:
    if plan.proof == "complete":
        return "proven best: no other plan communicates for less time"
    why = ": the time limit was hit" if plan.proof == "time limit" else ""
    return f"no other plan saves more than {plan.gap * 100:.2g}% of the communication time{why}"


def _rows(plan: OSDPPlan, each: bool) -> list[tuple[str, ...]]:
    """A line for the operators of each kind with equal costs, or for each one, in the order of their first ones."""
    runs: dict[tuple[Any, ...], list[OperatorPlan]] = {}
    for op in plan.operators:
        # Without a kind, equal costs tell that operators are alike.
        alike = op.kind, op.count, op.parts, op.seconds, op.memory, op.transient, bool(op.tied)
        runs.setdefault((op.name,) if each else alike, []).append(op)
    out: list[tuple[str, ...]] = []
    for run in runs.values():
        op, count = run[0], len(run)
        name = op.kind if op.kind and count > 1 else op.name
        out.append(
            (
                name if len(name) <= _NAME_WIDTH else "..." + name[3 - _NAME_WIDTH :],
                str(count),
                op.mode,
                f"{op.slices} {op.cut}" if op.slices > 1 else "-",
                format_bytes(count * op.memory),
                format_bytes(op.transient),
                format_seconds(count * op.seconds),
            )
        )
    return out
