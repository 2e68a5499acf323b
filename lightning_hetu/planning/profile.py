"""What the planner knows of a model: what one layer of each type costs in time and memory.

The profilers of :mod:`lightning_hetu.profiling` write these; the numbers may as well be typed in by hand.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import gcd
from pathlib import Path
from typing import Any, Literal, get_args

FORMAT_VERSION = 1
Precision = Literal["32-true", "bf16-mixed", "bf16-true", "16-true"]


@dataclass(frozen=True)
class ExpertProfile:
    """Experts of a layer that are shared out over the ranks with the same dense weights.

    Args:
        parameter_bytes: Parameters of all experts, in the training dtype.
        number: Into how many equal parts they can be divided at most.
        routed_bytes: Bytes per sample of the rows that go to experts, in one direction.
        trainable_fraction: Share of ``parameter_bytes`` that is trained.
    """

    parameter_bytes: int
    number: int
    routed_bytes: float = 0.0
    trainable_fraction: float = 1.0

    def __post_init__(self) -> None:
        if self.parameter_bytes < 0 or self.number < 1 or self.routed_bytes < 0:
            raise ValueError(
                f"experts: parameter_bytes={self.parameter_bytes}, number={self.number},"
                f" routed_bytes={self.routed_bytes}: expected at least 0, 1 and 0."
            )

    def ranks(self, copies: int) -> int:
        """How many of ``copies`` ranks with the same dense weights share them out."""
        return gcd(self.number, copies)


@dataclass(frozen=True)
class LayerProfile:
    """Costs of one layer of one type, for one microbatch on one device. All sizes in bytes, all times in seconds.

    Args:
        name: Name of the layer type, for tables.
        parameter_bytes: Parameters in the training dtype, not sharded.
        tp_parameter_bytes: The part of them that tensor parallelism splits; the rest is copied.
        forward_time: ``(samples, seconds)`` of forward without any parallelism, ascending in samples.
        backward_ratio: Backward time over forward time.
        activation_bytes: ``{tp: bytes per sample}`` that forward keeps for backward.
        boundary_bytes: Bytes per sample of the layer's input: what a recomputed layer keeps, what is sent between
            layers of different layout and between stages.
        forward_transient: ``{tp: bytes per sample}`` alive during forward on top of what it keeps.
        backward_transient: ``{tp: bytes per sample}`` alive during backward on top of what forward kept.
        backward_gradients: ``{tp: bytes}`` of the layer's own gradients that are there when the most is alive in
            backward, whatever the number of samples.
        tp_degrees: Tensor-parallel degrees the layer can run with (its plan is known and divides).
        tp_forward_time: ``{tp: points}`` like ``forward_time``, of what one of ``tp`` ranks computes; where a degree is
            missing, a ``tp``-th of the whole layer.
        sequence_degrees: Those of ``tp_degrees`` with which the layer can run with Megatron sequence parallelism, too.
        sequence_activation_bytes: ``activation_bytes`` under sequence parallelism; see :meth:`activations`.
        ulysses_degrees: Ulysses degrees above 1 the layer can run with (they divide its heads and its sequence).
        context_degrees: Context-parallel degrees above 1 the layer can run with (its attention can go round a ring).
        trainable_fraction: Share of ``parameter_bytes`` that is trained (has gradients and optimizer states).
        operators: ``{name: parameter bytes}`` of the modules inside of the layer whose parameters can be gathered on
            their own, in the order they are called; see ``LayerStrategy.sharded``. Empty where that is not known.
        experts: Experts that are shared out; no other size speaks of their parameters. ``None`` where there are none.
    """

    name: str
    parameter_bytes: int
    tp_parameter_bytes: int = 0
    forward_time: tuple[tuple[float, float], ...] = ((1, 0.0),)
    backward_ratio: float = 2.0
    activation_bytes: Mapping[int, float] = field(default_factory=lambda: {1: 0.0})
    boundary_bytes: float = 0.0
    forward_transient: Mapping[int, float] = field(default_factory=lambda: {1: 0.0})
    backward_transient: Mapping[int, float] = field(default_factory=lambda: {1: 0.0})
    backward_gradients: Mapping[int, float] = field(default_factory=lambda: {1: 0.0})
    tp_degrees: tuple[int, ...] = (1,)
    trainable_fraction: float = 1.0
    tp_forward_time: Mapping[int, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    sequence_degrees: tuple[int, ...] = ()
    sequence_activation_bytes: Mapping[int, float] = field(default_factory=dict)
    ulysses_degrees: tuple[int, ...] = ()
    context_degrees: tuple[int, ...] = ()
    operators: Mapping[str, int] = field(default_factory=dict)
    experts: ExpertProfile | None = None

    def __post_init__(self) -> None:
        points = tuple(sorted((float(n), float(t)) for n, t in self.forward_time))
        object.__setattr__(self, "forward_time", points)
        for name in (
            "activation_bytes",
            "forward_transient",
            "backward_transient",
            "backward_gradients",
            "sequence_activation_bytes",
        ):
            object.__setattr__(self, name, {int(k): float(v) for k, v in getattr(self, name).items()})
        times = {int(k): tuple(sorted((float(n), float(t)) for n, t in v)) for k, v in self.tp_forward_time.items()}
        object.__setattr__(self, "tp_forward_time", times)
        object.__setattr__(self, "tp_degrees", tuple(sorted({1, *map(int, self.tp_degrees)})))
        object.__setattr__(self, "sequence_degrees", tuple(sorted({*map(int, self.sequence_degrees)})))
        unknown = [degree for degree in self.sequence_degrees if degree == 1 or degree not in self.tp_degrees]
        if unknown:
            raise ValueError(
                f"layer {self.name!r}: sequence_degrees={list(self.sequence_degrees)} must be among its tensor-parallel"
                f" degrees {list(self.tp_degrees[1:])}."
            )
        for name in ("ulysses_degrees", "context_degrees"):
            given = tuple(getattr(self, name))
            if any(isinstance(degree, bool) or not isinstance(degree, int) or degree < 2 for degree in given):
                raise ValueError(f"layer {self.name!r}: {name}={list(given)}: expected integers of at least 2.")
            object.__setattr__(self, name, tuple(sorted(set(given))))
        if not points or points[0][0] <= 0 or any(t < 0 for _, t in points):
            raise ValueError(f"layer {self.name!r}: forward_time needs (samples > 0, seconds >= 0) points.")
        if not 0 <= self.tp_parameter_bytes <= self.parameter_bytes:
            raise ValueError(
                f"layer {self.name!r}: tp_parameter_bytes={self.tp_parameter_bytes} must lie between 0 and"
                f" parameter_bytes={self.parameter_bytes}."
            )

        if isinstance(self.experts, Mapping):  # from a file
            object.__setattr__(self, "experts", ExpertProfile(**self.experts))
        operators = {str(name): int(size) for name, size in self.operators.items()}
        object.__setattr__(self, "operators", operators)
        if any(size < 1 for size in operators.values()) or sum(operators.values()) > self.parameter_bytes:
            raise ValueError(
                f"layer {self.name!r}: operators={operators} must be positive and add up to no more than"
                f" parameter_bytes={self.parameter_bytes}."
            )

    def forward_seconds(self, samples: float, tp: int = 1) -> float:
        """Forward seconds of one of ``tp`` ranks for ``samples``.

        Interpolated; proportional below the first measured point, sloped beyond the last.
        """
        points = self.tp_forward_time.get(tp)
        if points is None:
            points, samples = self.forward_time, samples / tp
        if len(points) == 1 or samples <= points[0][0]:
            return points[0][1] * samples / points[0][0]
        index = min(bisect_left([n for n, _ in points], samples), len(points) - 1)
        (x0, y0), (x1, y1) = points[index - 1], points[index]
        return max(y0 + (y1 - y0) * (samples - x0) / (x1 - x0), 0.0)

    def activations(self, tp: int, *, sequence_parallel: bool = False) -> float:
        """Bytes per sample that one of ``tp`` ranks keeps from forward to backward.

        Under sequence parallelism every activation between the split products is cut along the sequence and every one
        inside of them along heads or columns; what is gathered for a product is not kept (arXiv 2205.05198, section
        4.2.2 and table 2). Where ``sequence_activation_bytes`` has no entry that makes ``activation_bytes[1] / tp``.
        """
        if not sequence_parallel:
            return self.at_degree(self.activation_bytes, tp)
        if tp in self.sequence_activation_bytes:
            return self.sequence_activation_bytes[tp]
        return self.at_degree(self.activation_bytes, 1) / tp

    def parameters(self, tp: int) -> float:
        """Parameter bytes on one of ``tp`` tensor-parallel ranks."""
        return self.parameter_bytes - self.tp_parameter_bytes * (1 - 1 / tp)

    @staticmethod
    def at_degree(table: Mapping[int, float], tp: int) -> float:
        """Value of a ``{tp: bytes}`` table; a missing degree halves the next smaller known one."""
        if tp in table:
            return table[tp]
        smaller = [known for known in table if known < tp]
        if not smaller:
            return table[min(table)]
        return table[max(smaller)] * max(smaller) / tp


@dataclass(frozen=True)
class ModelProfile:
    """A model as the planner sees it: embedding, a sequence of blocks, head.

    Args:
        layer_types: One profile per distinct kind of block.
        layers: Index into ``layer_types`` for every block, in model order.
        embedding: Everything before the first block.
        head: Everything behind the last block, the loss included.
        precision: Lightning's precision name the model was profiled in.
        pipeline: Whether the model can be cut into stages (it has pipeline support).
        microbatches: Whether a batch can be cut into microbatches (it has pipeline support).
        split_vocab: Whether embedding and head may have layouts of their own; otherwise both are one unit.
        optimizer_state_bytes: Optimizer state bytes per parameter byte (Adam in fp32: 2).
        tied_bytes: Parameters that are counted in the embedding and in the head because they serve both. In different
            stages each has a copy, and they add up their gradients; in one stage there is only one.
        name: Human-readable model name.
        schedules: Pipeline schedules that the model can run.
    """

    layer_types: tuple[LayerProfile, ...]
    layers: tuple[int, ...]
    embedding: LayerProfile
    head: LayerProfile
    precision: Precision = "32-true"
    pipeline: bool = True
    microbatches: bool = True
    split_vocab: bool = True
    optimizer_state_bytes: float = 2.0
    tied_bytes: int = 0
    name: str = "model"
    schedules: tuple[str, ...] = ("1f1b", "gpipe", "interleaved_1f1b", "zero_bubble")

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedules", tuple(self.schedules))
        object.__setattr__(self, "layer_types", tuple(self.layer_types))
        object.__setattr__(self, "layers", tuple(int(i) for i in self.layers))
        if not self.layers or any(not 0 <= i < len(self.layer_types) for i in self.layers):
            raise ValueError(
                f"profile.layers={list(self.layers)}: expected at least one index below {len(self.layer_types)}."
            )
        if not 0 <= self.tied_bytes <= min(self.embedding.parameter_bytes, self.head.parameter_bytes):
            raise ValueError(
                f"profile.tied_bytes={self.tied_bytes}: expected no more than embedding and head have,"
                f" {self.embedding.parameter_bytes} and {self.head.parameter_bytes}."
            )
        if self.precision not in get_args(Precision):
            raise ValueError(f"profile.precision={self.precision!r}: expected one of {', '.join(get_args(Precision))}.")

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.layers)

    def block(self, index: int) -> LayerProfile:
        """Profile of block ``index``."""
        return self.layer_types[self.layers[index]]

    def to_dict(self) -> dict[str, Any]:
        """The profile as JSON-compatible values."""
        return {"version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelProfile:
        """Reads what :meth:`to_dict` wrote.

        Raises:
            ValueError: If a field is missing, unknown or malformed.
        """
        data = dict(data)
        version = data.pop("version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise ValueError(f"profile.version={version!r}: this release reads version {FORMAT_VERSION}.")
        try:
            return cls(
                layer_types=tuple(LayerProfile(**item) for item in data.pop("layer_types")),
                embedding=LayerProfile(**data.pop("embedding")),
                head=LayerProfile(**data.pop("head")),
                **data,
            )
        except (TypeError, KeyError) as error:
            raise ValueError(f"the model profile is malformed: {error}.") from error

    def save(self, path: str | Path) -> Path:
        """Writes the profile as JSON and returns the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> ModelProfile:
        """Reads a profile file.

        Raises:
            ValueError: If the file does not hold a profile; the message names it.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, AttributeError) as error:
            raise ValueError(f"profile file {str(path)!r}: {error}") from error
