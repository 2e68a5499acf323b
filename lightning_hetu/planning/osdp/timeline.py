"""Memory over one optimizer step of an OSDP plan on FSDP2.

OSDP (arXiv 2209.13258) adds model states, activations and the largest gathered copy up. These do not peak together:
when most activations are alive, no gradient is there yet. A profile of the model says in which order its units run
forward and backward, when the gradients of parameters appear, and how many bytes of activations are alive meanwhile;
``fsdp2`` says what the runtime allocates and frees at each of these moments. Played one after another they give the
memory by category over the whole step, and its peak.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from lightning_hetu.planning.osdp.costs import Accumulation, Part, mode_ranks
from lightning_hetu.planning.osdp.fsdp2 import GLOO, Category, Group, Memory, Runtime, Shared, Tensor, finish_backward
from lightning_hetu.planning.osdp.operator import Operator

ROOT = "."
"""Name of the unit of the whole model."""
CATEGORIES: tuple[Category, ...] = get_args(Category)
MomentKind = Literal["enter", "leave", "output_gradient", "gradient", "accumulated", "input_gradient", "end"]
# Points that a timeline keeps for pictures.
_POINTS = 240


class Bytes(NamedTuple):
    """Bytes that grow with the number of samples."""

    fixed: float
    per_sample: float

    def of(self, samples: int) -> float:
        """Bytes for so many samples."""
        return max(self.fixed + self.per_sample * samples, 0.0)


class Moment(NamedTuple):
    """A moment of forward and backward at which FSDP2 acts, or at which a gradient of a parameter appears.

    ``enter`` and ``leave`` are a unit's forward, ``output_gradient`` the first gradient of an output and
    ``input_gradient`` the last gradient of an input of it; ``gradient`` is the birth of a parameter's gradient and
    ``accumulated`` when the parameter has it; ``end`` is the end of backward.

    Args:
        kind: What happens.
        unit: Name of the unit; :data:`ROOT` for the whole model.
        parameter: Position of the parameter in the unit's shapes, or -1.
        alive: Bytes of activations alive at the moment: all but parameters, their gradients, and buffers.
        most: Most of them since the moment before.
    """

    kind: MomentKind
    unit: str
    parameter: int
    alive: Bytes
    most: Bytes


@dataclass(frozen=True)
class StepProfile:
    """What is known about one forward and backward of a model.

    Args:
        operators: Its units, in the order in which they are first called.
        moments: What happens, in order. The root enters first, and when it leaves, forward is over.
        tree: Names of the units in the order of the module tree.
        base: Bytes of what is there all the time besides parameters of units: buffers, and parameters that cannot be
            sharded.
        batch: Bytes of a batch.
        samples: Samples that were profiled.
        dtypes: For units that are not gathered and reduced as stored, bytes per gathered and per reduced element.
        boundaries: For units that are called, bytes of inputs and of outputs that have a gradient.
    """

    operators: tuple[Operator, ...]
    moments: tuple[Moment, ...]
    tree: tuple[str, ...]
    base: int = 0
    batch: Bytes = Bytes(0.0, 0.0)
    samples: int = 1
    dtypes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    boundaries: Mapping[str, tuple[Bytes, Bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = {operator.name for operator in self.operators}
        if missing := sorted(names - set(self.tree)):
            raise ValueError(f"profile.tree: {missing[0]!r} is not in it, but is an operator.")
        if not self.moments or self.moments[-1].kind != "end":
            raise ValueError("profile.moments: expected 'end' as the last one.")

    def activation_peak(self, samples: int) -> float:
        """Most bytes of activations that are ever alive."""
        return max(moment.most.of(samples) for moment in self.moments)

    def activations_kept(self, samples: int) -> float:
        """Bytes of activations alive when forward ends."""
        return next(m.alive.of(samples) for m in reversed(self.moments) if m.kind == "leave" and m.unit == ROOT)


class Point(NamedTuple):
    """The most bytes alive around one moment, by category in the order of :data:`CATEGORIES`.

    The label is the phase (``forward``, ``backward`` or ``optimizer``) and, behind a colon, what happens.
    """

    label: str
    memory: tuple[int, ...]

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.memory)


@dataclass(frozen=True)
class Timeline:
    """Memory over one optimizer step.

    Args:
        points: What was alive, in order.
    """

    points: tuple[Point, ...]

    @property
    def peak_point(self) -> Point:
        """Where most is alive; the first such point."""
        return max(self.points, key=lambda point: point.total)

    @property
    def peak(self) -> int:
        """Most bytes alive."""
        return self.peak_point.total

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by category at the peak."""
        return dict(zip(CATEGORIES, self.peak_point.memory, strict=True))

    def compact(self, points: int = _POINTS) -> tuple[Point, ...]:
        """At most so many points: of equal stretches the highest one each, so that the peak is among them."""
        if len(self.points) <= points:
            return self.points
        edges = [len(self.points) * i // points for i in range(points + 1)]
        pieces = (self.points[a:b] for a, b in zip(edges, edges[1:], strict=False))
        return tuple(max(piece, key=lambda point: point.total) for piece in pieces)


@dataclass(frozen=True)
class StepSettings:
    """How a step is run.

    Args:
        world_size: Data-parallel ranks.
        micro_steps: Forward and backward passes per optimizer step.
        accumulation: When gradients are reduced.
        gather_bytes: Bytes per gathered element; ``None`` is as stored.
        reduce_bytes: Bytes per reduced element; ``None`` is ``gather_bytes``.
        optimizer_values: Values the optimizer keeps per trained parameter.
        batch_size: Samples per rank and micro-step.
        base: Bytes of what the profile does not know.
        runtime: What devices and process groups do.
    """

    world_size: int
    micro_steps: int = 1
    accumulation: Accumulation = "last"
    gather_bytes: int | None = None
    reduce_bytes: int | None = None
    optimizer_values: float = 2.0
    batch_size: int = 1
    base: int = 0
    runtime: Runtime = GLOO


def play_step(
    profile: StepProfile,
    parts: Mapping[str, Sequence[Part]],
    settings: StepSettings,
    buckets: Mapping[str, str] | None = None,
) -> Timeline:
    """Plays one optimizer step, not the first one, on the rank that has most.

    Args:
        profile: The model.
        parts: For each operator its modes and the number of slices in each; see :class:`OperatorPlan`.
        settings: How the step is run.
        buckets: For operators whose gradients are reduced together, the name of the first of them.

    Raises:
        ValueError: If operators of plan and profile differ.
    """
    names = {operator.name for operator in profile.operators}
    if names != set(parts):
        raise ValueError(f"parts: operator {min(names ^ set(parts))!r} is in the plan or in the profile only.")
    return _Player(profile, parts, settings, buckets or {}).play()


def play_owners(
    profile: StepProfile, parts: Mapping[str, Sequence[Part]], settings: StepSettings
) -> list[tuple[int, ...]]:
    """What the operators hold at every point of the step, in the order of the profile, and last what none of them does.

    Args:
        profile: See :func:`play_step`.
        parts: See :func:`play_step`.
        settings: See :func:`play_step`.
    """
    player = _Player(profile, parts, settings, {}, owners=True)
    player.play()
    return player.owned


class _Player:
    """One step, being played."""

    def __init__(
        self,
        profile: StepProfile,
        parts: Mapping[str, Sequence[Part]],
        settings: StepSettings,
        buckets: Mapping[str, str],
        *,
        owners: bool = False,
    ) -> None:
        self.profile = profile
        self.settings = settings
        self.memory = Memory(CATEGORIES, len(profile.operators) if owners else 0)
        self.numbers = {op.name: number if owners else -1 for number, op in enumerate(profile.operators)}
        self.shared = Shared(self.memory, settings.runtime, settings.world_size)
        with_gradient = {(m.unit, m.parameter) for m in profile.moments if m.kind == "gradient"}
        self.groups = {
            op.name: self._groups_of(op, parts[op.name], with_gradient) for op in profile.operators if op.parameters
        }
        self._join(buckets)
        found = [group for name in profile.tree for group in self.groups.get(name, ())]
        self.all_groups = list({id(group): group for group in found}.values())
        self.sliced = {name for name, groups in self.groups.items() if len(groups) > 1}
        self.with_input = {m.unit for m in profile.moments if m.kind == "input_gradient"}
        self.inside = self._most_inside()
        self.points: list[Point] = []
        self.owned: list[tuple[int, ...]] = []
        self.activations = 0

    def _groups_of(self, operator: Operator, parts: Sequence[Part], with_gradient: set[tuple[str, int]]) -> list[Group]:
        ranks = self.settings.world_size
        gathered = self.settings.gather_bytes or operator.dtype_bytes
        gathered, reduced = self.profile.dtypes.get(operator.name, (gathered, self.settings.reduce_bytes or gathered))
        modes = [mode for mode, count in parts for _ in range(count)]
        found = []
        for number, (mode, shapes) in enumerate(zip(modes, operator.slice_shapes(len(modes)), strict=True)):
            indices = list(range(len(operator.shapes)) or (0,))
            if number and operator.cuts and operator.cuts[0] == "input":
                indices = [index for index in indices if len(operator.shapes[index]) > 1]
            tensors = []
            for index, shape in zip(indices, shapes, strict=True):
                first, rest = shape[0], math.prod(shape[1:])
                each = -(-first // ranks)
                trained = (operator.name, index) in with_gradient
                key = operator.name, index
                tensors.append(Tensor(key, first * rest, each * ranks * rest, min(each, first) * rest, trained))
            kept, owner = mode_ranks(mode, ranks), self.numbers[operator.name]
            dtypes = operator.dtype_bytes, gathered, reduced
            found.append(Group(self.shared, mode, kept, tensors, *dtypes, owner, (operator.name,)))
        return found

    def _join(self, buckets: Mapping[str, str]) -> None:
        """Puts replicated operators into one group."""
        members: dict[str, list[str]] = {}
        for operator in self.profile.operators:
            if operator.name in buckets:
                members.setdefault(buckets[operator.name], []).append(operator.name)
        for names in members.values():
            one = self.groups[names[0]][0]
            tensors = [tensor for name in names for tensor in self.groups[name][0].tensors]
            dtypes = one.stored, one.gathered, one.reduced
            self.groups |= dict.fromkeys(names, [Group(self.shared, "dp", 1, tensors, *dtypes, one.owner, names)])

    def _most_inside(self) -> dict[str, tuple[float, float]]:
        """For units that are cut, the most activations in forward and in backward of the unit."""
        samples = self.settings.batch_size
        most = {name: [0.0, 0.0] for name in self.sliced}
        running: tuple[str, int] | None = None
        for moment in self.profile.moments:
            if running is not None:
                name, way = running
                most[name][way] = max(most[name][way], moment.most.of(samples))
            if moment.kind in ("enter", "output_gradient"):
                running = (moment.unit, int(moment.kind != "enter")) if moment.unit in self.sliced else None
            elif moment.kind in ("leave", "input_gradient"):
                running = None
        found = {}
        for name, (forward, backward) in most.items():
            # Slices give parts that are put together or added up: one more output, or gradient of the input.
            into, out = self.profile.boundaries.get(name, (Bytes(0, 0), Bytes(0, 0)))
            found[name] = (forward + out.of(samples), backward + into.of(samples))
        return found

    def play(self) -> Timeline:
        settings, runtime = self.settings, self.settings.runtime
        self.memory.add("base", settings.base + self.profile.base + self.profile.batch.of(settings.batch_size))
        for group in self.all_groups:
            if not group.host:
                held = [group.elements(tensor) // group.ranks for tensor in group.tensors]
                group.add("parameters", group.stored * sum(held))
                states = sum(group.local(tensor) for tensor in group.tensors if tensor.trained)
                group.add("optimizer", group.stored * states * settings.optimizer_values)
            if runtime.stale_gradients and not group.host:
                self._stale(group)
        self._note("forward: begin")
        # Of many micro-steps all but the first and the last are alike.
        count = min(settings.micro_steps, 3)
        for step in range(count):
            self._micro_step(step == 0, step == count - 1)
        self._optimizer()
        return Timeline(tuple(self.points))

    def _stale(self, group: Group) -> None:
        trained = sum(group.elements(tensor) for tensor in group.tensors if tensor.trained)
        group.sharded_gradients = trained // group.ranks * group.stored
        group.has_gradients = trained > 0
        group.add("gradients", group.sharded_gradients)

    def _micro_step(self, first: bool, last: bool) -> None:
        settings = self.settings
        for group in self.all_groups:
            group.reduces = last or settings.accumulation == "every"
            group.reshards = last or not (settings.accumulation == "hold" and group.mode == "z2")
        backward = False
        for moment in self.profile.moments:
            self._activations(moment.most.of(settings.batch_size))
            self._activations(moment.alive.of(settings.batch_size))
            for group in self._ordered(moment):
                self._act(group, moment, backward)
            ends_forward = moment.kind == "leave" and moment.unit == ROOT and not backward
            if ends_forward:
                self.shared.free_flat()
            elif moment.kind == "end":
                finish_backward(self.shared, self.all_groups)
            if moment.kind not in ("gradient", "accumulated"):
                unit = "the model" if moment.unit == ROOT else moment.unit
                self._note(f"{'backward' if backward else 'forward'}: {moment.kind.replace('_', ' ')} {unit}")
            if ends_forward:
                backward = True
                if first:
                    for group in self.all_groups:
                        group.free_gradients()
                    self.memory.look()  # what was there before them is noted

    def _ordered(self, moment: Moment) -> list[Group]:
        groups = self.groups.get(moment.unit, [])
        return groups[::-1] if moment.kind == "output_gradient" else groups

    def _act(self, group: Group, moment: Moment, backward: bool) -> None:
        if moment.unit in self.sliced:
            self._act_slice(group, moment, backward)
        elif moment.kind == "enter":
            group.enter(backward, moment.unit)
        elif moment.kind == "leave":
            group.leave(backward, moment.unit)
        elif moment.kind == "output_gradient":
            group.before_backward(moment.unit)
        elif moment.kind == "gradient":
            group.gradient((moment.unit, moment.parameter))
        elif moment.kind == "accumulated":
            group.accumulate((moment.unit, moment.parameter))
        elif moment.kind == "input_gradient":
            group.after_inputs(moment.unit)

    def _act_slice(self, group: Group, moment: Moment, backward: bool) -> None:
        """All of a slice's forward when the unit enters, and all of its backward when its output has a gradient."""
        alive = moment.alive.of(self.settings.batch_size)
        if moment.kind == "enter":
            group.enter(backward, moment.unit)
            self._activations(max(self.inside[moment.unit][0], alive))
            self._activations(alive)
            group.leave(backward, moment.unit)
        elif moment.kind == "output_gradient":
            group.before_backward(moment.unit)
            self._activations(max(self.inside[moment.unit][1], alive))
            for tensor in group.tensors:
                if tensor.trained:
                    group.gradient(tensor.key)
                    group.accumulate(tensor.key)
            self._activations(alive)
            if moment.unit in self.with_input:
                group.after_inputs(moment.unit)

    def _activations(self, size: float) -> None:
        self.memory.add("activations", math.ceil(size) - self.activations)
        self.activations = math.ceil(size)

    def _optimizer(self) -> None:
        runtime = self.settings.runtime
        sizes = [
            group.stored * group.local(tensor)
            for group in self.all_groups
            if not group.host
            for tensor in group.tensors
            if tensor.trained
        ]
        pairs = zip(sizes, [0, *sizes], strict=False)
        each = max((runtime.optimizer_each * now + runtime.optimizer_before * past for now, past in pairs), default=0)
        extra = each + runtime.optimizer_all * sum(sizes)
        self.memory.add("transient", extra)
        self.memory.add("transient", -math.ceil(extra))
        self._note("optimizer: step")

    def _note(self, label: str) -> None:
        at_most, owned = self.memory.look()
        self.owned.append(tuple(owned))
        self.points.append(Point(label, tuple(at_most[name] for name in CATEGORIES)))


def points_to_json(points: Iterable[Point]) -> list[list[Any]]:
    """The points as JSON-compatible values: a label and the bytes of each category."""
    return [[point.label, *point.memory] for point in points]


def points_from_json(rows: Iterable[Any]) -> tuple[Point, ...]:
    """Reads what :func:`points_to_json` wrote; points are left as they are.

    Raises:
        ValueError: If a row is not a label and a number for each category.
    """
    found = []
    for row in rows:
        if not isinstance(row, Point):
            if len(row) != len(CATEGORIES) + 1:
                raise ValueError(f"plan.points: {row!r}: expected a label and {len(CATEGORIES)} numbers.")
            row = Point(str(row[0]), tuple(int(value) for value in row[1:]))
        found.append(row)
    return tuple(found)
