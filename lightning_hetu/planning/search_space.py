"""What a search may choose from: batch, microbatches, stages, schedule, and the pins that narrow it.

Any field of a plan can be pinned. A pin that no plan can satisfy is an error, not an empty result.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from lightning_hetu.planning.cost_model import CostModel, Setting
from lightning_hetu.planning.enumeration import powers_of_two, with_sharded_operators, without_needless_cuts
from lightning_hetu.planning.hetu_cost import HetuCostModel
from lightning_hetu.planning.layer_strategy import DataParallelType, LayerStrategy
from lightning_hetu.planning.plan import PricedSchedule, Schedule, even_stages

DataParallelMode = Literal["layer", "osdp"]


@dataclass(frozen=True)
class Pins:
    """Fields of a plan that are given and not searched; ``None`` leaves a field free.

    Args:
        pipeline_parallel_size: Number of stages.
        stages: Number of stages, or blocks per stage.
        num_microbatches: Microbatches per step.
        schedule: Pipeline schedule, or ``any`` for the one found to be the fastest; ``None`` is ``1f1b``, for which the
            best plan is found, and no larger budget ever gives a slower one. With ``interleaved_1f1b``, ``stages`` can
            only be a number, that of ranks.
        layers: One strategy for all blocks, or one entry per block, ``None`` for free ones.
        embedding: Strategy of the embedding.
        head: Strategy of the head.
        dp: Data-parallel degree of the blocks, or the allowed ones.
        tp: Tensor-parallel degree of the blocks, or the allowed ones.
        dp_type: Type of data parallelism of all rows, or the allowed ones; rows without data parallelism are free.
        sp: Ulysses degree of the blocks, or the allowed ones.
        cp: Context-parallel degree of the blocks, or the allowed ones.
        sequence_parallel: Whether the blocks use Megatron sequence parallelism, which takes ``tp`` above 1.
        recompute: Whether the blocks are recomputed.
        max_tp: Largest tensor-parallel degree of any row.
        dp_mode: ``layer`` decides on one type of data parallelism per layer. With ``osdp`` a block may also have some
            operators in ``zero3`` while the rest is ``ddp`` or ``zero2``, where its profile knows its operators.
    """

    pipeline_parallel_size: int | None = None
    stages: tuple[int, ...] | None = None
    num_microbatches: int | None = None
    schedule: Schedule | Literal["any"] | None = None
    layers: tuple[LayerStrategy | None, ...] | None = None
    embedding: LayerStrategy | None = None
    head: LayerStrategy | None = None
    dp: tuple[int, ...] | None = None
    tp: tuple[int, ...] | None = None
    sp: tuple[int, ...] | None = None
    cp: tuple[int, ...] | None = None
    sequence_parallel: bool | None = None
    dp_type: tuple[DataParallelType, ...] | None = None
    recompute: bool | None = None
    max_tp: int | None = None
    dp_mode: DataParallelMode | None = None

    @classmethod
    def parse(cls, pins: Mapping[str, Any], num_layers: int) -> Pins:
        """Reads the keyword arguments of a search; text and single values are accepted where the fields are tuples.

        Raises:
            ValueError: If a pin is unknown or malformed.
        """
        allowed = [field.name for field in fields(cls)]
        unknown = [name for name in pins if name not in allowed]
        if unknown:
            raise ValueError(f"pin {', '.join(map(repr, unknown))} is unknown: expected one of {', '.join(allowed)}.")
        values: dict[str, Any] = {name: value for name, value in pins.items() if value is not None}
        for name in ("pipeline_parallel_size", "num_microbatches", "max_tp"):
            if name in values:
                _check_positive(name, values[name])
        for name in ("dp", "tp", "sp", "cp"):
            if name in values:
                values[name] = _as_tuple(values[name])
                for degree in values[name]:
                    _check_positive(name, degree)
        if "stages" in values:
            given = values["stages"]
            stages = _parse_stages(given, num_layers)
            count = values.setdefault("pipeline_parallel_size", len(stages))
            if count != len(stages):
                raise ValueError(f"pipeline_parallel_size={count} contradicts stages={given!r}: give one of them.")
            # A number of stages leaves open where the model is cut.
            values["stages"] = None if isinstance(given, int) else stages
        if "schedule" in values and values["schedule"] not in (*get_args(Schedule), "any"):
            raise ValueError(f"schedule={values['schedule']!r}: expected one of {', '.join(get_args(Schedule))}, any.")
        if values.get("schedule") == "interleaved_1f1b" and values.get("stages") is not None:
            raise ValueError(
                f"stages={list(values['stages'])}: expected a number, that of ranks of the pipeline, with"
                " schedule='interleaved_1f1b'."
            )
        if "dp_type" in values:
            values["dp_type"] = _as_tuple(values["dp_type"])
            for kind in values["dp_type"]:
                if kind not in get_args(DataParallelType):
                    raise ValueError(f"dp_type={kind!r}: expected one of {', '.join(get_args(DataParallelType))}.")
        if "dp_mode" in values and values["dp_mode"] not in get_args(DataParallelMode):
            raise ValueError(f"dp_mode={values['dp_mode']!r}: expected one of {', '.join(get_args(DataParallelMode))}.")
        for name in ("sequence_parallel", "recompute"):
            if name in values and not isinstance(values[name], bool):
                raise ValueError(f"{name}={values[name]!r}: expected true or false.")
        for name in ("embedding", "head"):
            if name in values:
                values[name] = LayerStrategy.parse(values[name])
        if "layers" in values:
            values["layers"] = _parse_layers(values["layers"], num_layers)
        return cls(**values)

    def options(self, model: CostModel, row: int, setting: Setting) -> list[LayerStrategy]:
        """Strategies of a row that the pins and the microbatch size allow."""
        given = self.given(model, row)
        found = [given] if given is not None else self._free(model, row, setting)
        found = [
            strategy
            for strategy in found
            if strategy.num_devices == setting.devices_per_stage and setting.microbatch_size % strategy.dp == 0
        ]
        # What the released Galvatron searches stays whole.
        return without_needless_cuts(found) if isinstance(model, HetuCostModel) else found

    def given(self, model: CostModel, row: int) -> LayerStrategy | None:
        """The strategy that a row is pinned to, if it is."""
        if row == 0:
            return self.embedding
        if row > model.num_layers:
            return self.head
        return None if self.layers is None else self.layers[row - 1]

    def _free(self, model: CostModel, row: int, setting: Setting) -> list[LayerStrategy]:
        block = 0 < row <= model.num_layers
        by_operator = block and self.dp_mode == "osdp"
        if by_operator and not isinstance(model, HetuCostModel):
            raise ValueError(f"dp_mode='osdp': cost model {model.name!r} has no prices of operators, expected 'hetu'.")
        allowed = [
            s
            for s in model.strategies(row, setting)
            if (not block or self._allows_block(s))
            and (self.dp_type is None or s.shard_degree == 1 or s.dp_type in self.dp_type)
            and (self.max_tp is None or s.tp <= self.max_tp)
        ]
        if not by_operator or not isinstance(model, HetuCostModel):
            return allowed
        layer, layers = model.layer(row), model.num_layers // setting.num_stages
        return with_sharded_operators(allowed, layer.operators, layer.parameter_bytes, layers)

    def _allows_block(self, strategy: LayerStrategy) -> bool:
        degrees = all(
            allowed is None or getattr(strategy, name) in allowed
            for name, allowed in (("dp", self.dp), ("tp", self.tp), ("sp", self.sp), ("cp", self.cp))
        )
        flags = (("sequence_parallel", self.sequence_parallel), ("recompute", self.recompute))
        return degrees and all(wanted is None or getattr(strategy, name) == wanted for name, wanted in flags)

    def settings(self, model: CostModel, global_batch_size: int) -> Iterator[Setting]:
        """Every combination of stages, microbatches and schedule for one batch size, fewest of each first.

        Stages are of even size where the cut is not pinned; :attr:`free_cut` says whether others may be tried.
        Their schedule is ``1f1b`` unless ``gpipe`` is pinned, which takes at least the same memory, and the same time
        but for what happens once per step. Plans of the other schedules are made from those of ``1f1b``.
        """
        schedule: PricedSchedule = "gpipe" if self.schedule == "gpipe" else "1f1b"
        for count in self._stage_counts(model):
            stages = self.stages or even_stages(model.num_layers, count)
            for microbatches in self._microbatch_counts(model, global_batch_size):
                if schedule == "1f1b" and count > 1 and microbatches < count:
                    continue
                if self.simulated and (count == 1 or microbatches % count):
                    continue
                yield Setting(model.num_devices, global_batch_size, microbatches, stages, schedule)

    @property
    def simulated(self) -> bool:
        """Whether the pinned schedule has no closed form: it needs several ranks and whole groups of microbatches."""
        return self.schedule not in (None, "any", *get_args(PricedSchedule))

    @property
    def free_cut(self) -> bool:
        """Whether the search may choose how many blocks each stage has."""
        return self.stages is None

    def pinned_strategies(self) -> dict[str, LayerStrategy]:
        """The rows that are pinned, by the name of the field, blocks with an index; equal blocks once."""
        found: dict[str, LayerStrategy] = {}
        for index, strategy in enumerate(self.layers or ()):
            if strategy is not None and strategy not in found.values():
                found[f"layers[{index}]"] = strategy
        for name in ("embedding", "head"):
            if getattr(self, name) is not None:
                found[name] = getattr(self, name)
        return found

    def __str__(self) -> str:
        shown = {**vars(self), "layers": None, "embedding": None, "head": None}
        parts = [f"{name}={value}" for name, value in shown.items() if value is not None]
        return (
            ", ".join([*parts, *(f"{name}={value}" for name, value in self.pinned_strategies().items())]) or "no pins"
        )

    def _stage_counts(self, model: CostModel) -> list[int]:
        if self.pipeline_parallel_size is not None:
            count = self.pipeline_parallel_size
            if model.num_devices % count or count > model.num_layers:
                raise ValueError(
                    f"pipeline_parallel_size={count}: expected a divisor of {model.num_devices} devices, and at most"
                    f" {model.num_layers} blocks."
                )
            if count > 1 and not model.pipeline:
                raise ValueError(
                    f"pipeline_parallel_size={count}: the model has no pipeline support (PipelineMixin), expected 1."
                )
            return [count]
        return [
            count
            for count in powers_of_two(model.num_devices)
            if count == 1 or (model.pipeline and count <= model.num_layers)
        ]

    def _microbatch_counts(self, model: CostModel, global_batch_size: int) -> list[int]:
        if self.num_microbatches is not None:
            if self.num_microbatches > 1 and not model.microbatches:
                raise ValueError(
                    f"num_microbatches={self.num_microbatches}: the model cannot cut a batch into microbatches,"
                    " expected 1."
                )
            return [self.num_microbatches] if global_batch_size % self.num_microbatches == 0 else []
        if not model.microbatches:
            return [1]
        return [count for count in range(1, global_batch_size + 1) if global_batch_size % count == 0]


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: expected an integer of at least 1.")


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Collection) and not isinstance(value, str) else (value,)


def _parse_stages(value: Any, num_layers: int) -> tuple[int, ...]:
    if isinstance(value, int) and not isinstance(value, bool):
        return even_stages(num_layers, value)
    stages = _as_tuple(value)
    for count in stages:
        _check_positive("stages", count)
    if sum(stages) != num_layers:
        raise ValueError(f"stages={list(stages)} holds {sum(stages)} blocks, but the model has {num_layers}.")
    return stages


def _parse_layers(value: Any, num_layers: int) -> tuple[LayerStrategy | None, ...]:
    if isinstance(value, (str, Mapping, LayerStrategy)):
        return (LayerStrategy.parse(value),) * num_layers
    if not isinstance(value, Sequence) or len(value) != num_layers:
        size = len(value) if isinstance(value, Sequence) else value
        raise ValueError(f"layers: expected one strategy, or one entry per block ({num_layers}), got {size!r}.")
    return tuple(None if item is None else LayerStrategy.parse(item) for item in value)
