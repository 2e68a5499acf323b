"""A hybrid-parallel plan: how a model is cut into stages and how every layer in them is parallelized."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_hetu.planning.layer_strategy import LayerStrategy

PricedSchedule = Literal["1f1b", "gpipe"]
"""The schedules of one stage per rank and whole backwards, whose step time has a closed form."""
Schedule = Literal["1f1b", "gpipe", "interleaved_1f1b", "zero_bubble"]
FORMAT_VERSION = 1


def _check_numbers(name: str, values: Any) -> None:
    if not isinstance(values, tuple) or any(isinstance(v, bool) or not isinstance(v, Real) for v in values):
        raise ValueError(f"{name}={values!r}: expected {'numbers' if isinstance(values, tuple) else 'a list'}")


@dataclass(frozen=True)
class PlanPrediction:
    """What the cost model expects of a plan.

    Args:
        iteration_time: Seconds per optimizer step without accumulation.
        stage_times: Seconds of one microbatch in each stage, without gradient synchronization.
        stage_memory: Peak bytes per device of each stage. A device with several stages (``plan.virtual_stages``) has
            one peak for all of them together, which stands at each, so the largest entry is that of the fullest device.
        memory_budget: Bytes per device the plan was searched under.
        layer_times: Seconds of one microbatch per row of the plan: embedding, blocks, head.
        layer_memory: Bytes per device per row of the plan: embedding, blocks, head.
        cost_model: Name of the cost model.
    """

    iteration_time: float
    stage_times: tuple[float, ...]
    stage_memory: tuple[int, ...]
    memory_budget: int | None = None
    layer_times: tuple[float, ...] = ()
    layer_memory: tuple[int, ...] = ()
    cost_model: str = "hetu"

    def __post_init__(self) -> None:
        _check_numbers("prediction.iteration_time", (self.iteration_time,))
        _check_numbers("prediction.memory_budget", () if self.memory_budget is None else (self.memory_budget,))
        for name in ("stage_times", "stage_memory", "layer_times", "layer_memory"):
            _check_numbers(f"prediction.{name}", getattr(self, name))


@dataclass(frozen=True)
class RejectedPlan:
    """An alternative the search looked at and did not choose.

    Args:
        description: What it is, in the words of the plan table.
        reason: Why it lost.
        iteration_time: Predicted seconds per step, if it is feasible.
        memory: Predicted peak bytes per device of its fullest stage.
    """

    description: str
    reason: str
    iteration_time: float | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        for name in ("iteration_time", "memory"):
            value = getattr(self, name)
            _check_numbers(f"rejected.{name}", () if value is None else (value,))


@dataclass(frozen=True)
class HybridPlan:
    """A complete hybrid-parallel plan.

    Args:
        world_size: Number of devices.
        global_batch_size: Samples per step over all devices.
        num_microbatches: Pieces the global batch is cut into, one after another.
        stages: Number of blocks in each pipeline stage, in model order. With ``virtual_stages`` they go round the ranks
            of the pipeline: of ``P`` ranks, rank ``r`` has the stages ``r``, ``r + P``, and so on.
        layers: One strategy per block, in model order.
        embedding: Strategy of everything before the first block (first stage).
        head: Strategy of everything behind the last block, loss included (last stage).
        schedule: Order of microbatches in the pipeline. ``interleaved_1f1b`` is 1F1B over several stages per rank;
            ``zero_bubble`` splits the backward, and computes gradients of weights where a rank would wait.
        virtual_stages: Stages per rank of the pipeline.
        prediction: What the cost model expects; ``None`` for a plan written by hand.
        rejected: Alternatives, best first.

    Raises:
        ValueError: If the numbers contradict each other; the message names the field.
    """

    world_size: int
    global_batch_size: int
    num_microbatches: int
    stages: tuple[int, ...]
    layers: tuple[LayerStrategy, ...]
    embedding: LayerStrategy
    head: LayerStrategy
    schedule: Schedule = "1f1b"
    virtual_stages: int = 1
    prediction: PlanPrediction | None = None
    rejected: tuple[RejectedPlan, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "rejected", tuple(self.rejected))
        for name in ("world_size", "global_batch_size", "num_microbatches", "virtual_stages"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"plan.{name}={value!r}: expected an integer of at least 1.")
        if self.prediction is not None:
            for name, count in (("stage", len(self.stages)), ("layer", len(self.layers) + 2)):
                for quantity in ("times", "memory"):
                    found = len(getattr(self.prediction, f"{name}_{quantity}"))
                    if found != count and (found or name == "stage"):
                        raise ValueError(f"plan.prediction.{name}_{quantity} has {found} entries: expected {count}.")
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"plan.schedule={self.schedule!r}: expected one of {', '.join(get_args(Schedule))}.")
        if not self.stages or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in self.stages):
            raise ValueError(f"plan.stages={list(self.stages)}: expected at least one block in every stage.")
        if sum(self.stages) != len(self.layers):
            raise ValueError(
                f"plan.stages={list(self.stages)} holds {sum(self.stages)} blocks, but plan.layers has"
                f" {len(self.layers)}."
            )
        if len(self.stages) % self.virtual_stages:
            raise ValueError(
                f"plan.stages has {len(self.stages)} entries: expected a multiple of"
                f" plan.virtual_stages={self.virtual_stages}."
            )
        if self.world_size % self.pipeline_parallel_size:
            of = "stages" if self.virtual_stages == 1 else "ranks"
            raise ValueError(
                f"plan.world_size={self.world_size} is not divisible by {self.pipeline_parallel_size} pipeline {of}."
            )
        if self.global_batch_size % self.num_microbatches:
            raise ValueError(
                f"plan.global_batch_size={self.global_batch_size} is not divisible by"
                f" plan.num_microbatches={self.num_microbatches}."
            )
        if self.schedule == "1f1b" and self.num_microbatches < len(self.stages) and len(self.stages) > 1:
            raise ValueError(
                f"plan.num_microbatches={self.num_microbatches} is fewer than {len(self.stages)} stages: the 1f1b"
                " schedule needs at least as many. Raise it, or use schedule='gpipe'."
            )
        self._check_schedule()
        for name, strategy in self.rows():
            if strategy.num_devices != self.devices_per_stage:
                raise ValueError(
                    f"plan.{name}={strategy} uses {strategy.num_devices} devices, but a stage has"
                    f" {self.devices_per_stage} (world_size={self.world_size}, {len(self.stages)} stages"
                    + (f", {self.virtual_stages} per rank)." if self.virtual_stages > 1 else ").")
                )
            if self.microbatch_size % strategy.dp:
                raise ValueError(
                    f"plan.{name}={strategy}: a microbatch of {self.microbatch_size} samples"
                    f" (global_batch_size={self.global_batch_size} / num_microbatches={self.num_microbatches})"
                    f" cannot be split over dp={strategy.dp}."
                )

    def _check_schedule(self) -> None:
        """Refuses combinations that the schedule does not have, or that it would compute wrongly."""
        if self.schedule in get_args(PricedSchedule):
            if self.virtual_stages > 1:
                raise ValueError(
                    f"plan.virtual_stages={self.virtual_stages}: schedule={self.schedule!r} has one stage per rank. Use"
                    " schedule='interleaved_1f1b', or virtual_stages=1."
                )
            return
        ranks = self.pipeline_parallel_size
        if ranks == 1:
            raise ValueError(
                f"plan.schedule={self.schedule!r}: {len(self.stages)} stages with virtual_stages={self.virtual_stages}"
                " are on one rank of the pipeline, expected at least 2 ranks. Use schedule='1f1b' with one stage."
            )
        if self.schedule == "interleaved_1f1b" and self.virtual_stages == 1:
            raise ValueError(
                "plan.virtual_stages=1: schedule='interleaved_1f1b' needs at least 2. Raise it, or use schedule='1f1b'."
            )
        if self.num_microbatches % ranks:
            raise ValueError(
                f"plan.num_microbatches={self.num_microbatches}: expected a multiple of {ranks} pipeline ranks with"
                f" schedule={self.schedule!r}."
            )
        sharded = [name for name, row in self.rows() if row.dp_type == "zero3" or row.sharded]
        if self.schedule == "zero_bubble" and sharded:
            raise ValueError(
                f"plan.{sharded[0]}={dict(self.rows())[sharded[0]]}: schedule='zero_bubble' splits the backward, which"
                " gives wrong gradients where parameters are freed between its parts. Use zero2 or ddp, or"
                " schedule='1f1b'."
            )

    @property
    def pipeline_parallel_size(self) -> int:
        """Ranks of the pipeline: the number of stages, where each rank has one."""
        return len(self.stages) // self.virtual_stages

    @property
    def devices_per_stage(self) -> int:
        """Devices that work on one stage together."""
        return self.world_size // self.pipeline_parallel_size

    def stages_of_rank(self, rank: int) -> range:
        """The stages that a rank of the pipeline works on, in model order."""
        return range(rank, len(self.stages), self.pipeline_parallel_size)

    @property
    def microbatch_size(self) -> int:
        """Samples in one microbatch over all devices of a stage."""
        return self.global_batch_size // self.num_microbatches

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.layers)

    @property
    def stage_bounds(self) -> tuple[tuple[int, int], ...]:
        """First block and one past the last block of each stage."""
        ends = tuple(accumulate(self.stages))
        return tuple(zip((0, *ends[:-1]), ends, strict=True))

    def stage_of(self, layer: int) -> int:
        """Index of the stage that holds block ``layer``."""
        return next(stage for stage, (_, end) in enumerate(self.stage_bounds) if layer < end)

    def rows(self) -> list[tuple[str, LayerStrategy]]:
        """Name and strategy of the embedding, every block, and the head, in model order."""
        blocks = [(f"layers[{index}]", layer) for index, layer in enumerate(self.layers)]
        return [("embedding", self.embedding), *blocks, ("head", self.head)]

    @classmethod
    def uniform(
        cls,
        strategy: LayerStrategy | str,
        *,
        num_layers: int,
        global_batch_size: int,
        num_microbatches: int = 1,
        stages: Sequence[int] | int = 1,
        embedding: LayerStrategy | str | None = None,
        head: LayerStrategy | str | None = None,
        schedule: Schedule = "1f1b",
        virtual_stages: int = 1,
    ) -> HybridPlan:
        """A plan with the same strategy in every block; ``stages`` may be a count, blocks are then spread evenly.

        Embedding and head follow the blocks unless given, but without recomputation and operators sharded further.
        """
        strategy = LayerStrategy.parse(strategy)
        if isinstance(stages, int):
            stages = even_stages(num_layers, stages)
        plain = replace(strategy, recompute=False, sharded=())
        return cls(
            world_size=strategy.num_devices * len(stages) // max(virtual_stages, 1),
            global_batch_size=global_batch_size,
            num_microbatches=num_microbatches,
            stages=tuple(stages),
            layers=(strategy,) * num_layers,
            embedding=plain if embedding is None else LayerStrategy.parse(embedding),
            head=plain if head is None else LayerStrategy.parse(head),
            schedule=schedule,
            virtual_stages=virtual_stages,
        )

    def explain(self) -> str:
        """The plan as a text table: what every run of equal rows does, what it costs, and why others lost."""
        # Imported here: the table is built from plans, so its module imports this one.
        from lightning_hetu.planning.explain import explain

        return explain(self)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-compatible values."""
        out: dict[str, Any] = {
            "version": FORMAT_VERSION,
            "world_size": self.world_size,
            "global_batch_size": self.global_batch_size,
            "num_microbatches": self.num_microbatches,
            "schedule": self.schedule,
            "stages": list(self.stages),
            "embedding": str(self.embedding),
            "layers": [str(layer) for layer in self.layers],
            "head": str(self.head),
        }
        if self.virtual_stages > 1:
            out["virtual_stages"] = self.virtual_stages
        if self.prediction is not None:
            out["prediction"] = {
                key: list(value) if isinstance(value, tuple) else value for key, value in vars(self.prediction).items()
            }
        if self.rejected:
            out["rejected"] = [vars(item) for item in self.rejected]
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HybridPlan:
        """Reads what :meth:`to_dict` wrote; a strategy may be text or a mapping of its fields.

        Raises:
            ValueError: If a field is missing, unknown or contradicts another.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"a plan is a mapping of its fields, got {type(data).__name__}.")
        data = dict(data)
        version = data.pop("version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise ValueError(f"plan.version={version!r}: this release reads version {FORMAT_VERSION}.")
        if "operators" in data and "layers" not in data:
            raise ValueError("it is a plan of operators, of hetu_osdp: expected a hybrid-parallel plan, of hetu_auto.")
        required = ("world_size", "global_batch_size", "num_microbatches", "stages", "layers", "embedding", "head")
        missing = [key for key in required if key not in data]
        optional = ("schedule", "virtual_stages", "prediction", "rejected")
        unknown = [key for key in data if key not in (*required, *optional)]
        if missing or unknown:
            problem = f"lacks {', '.join(missing)}" if missing else f"has unknown {', '.join(unknown)}"
            raise ValueError(
                f"the plan {problem}: expected {', '.join(required)} and optionally schedule, virtual_stages."
            )
        try:
            prediction = data.get("prediction")
            if prediction is not None:
                values: dict[str, Any] = {
                    k: tuple(v) if isinstance(v, list) else v for k, v in dict(prediction).items()
                }
                prediction = PlanPrediction(**values)
            rejected = tuple(RejectedPlan(**item) for item in data.get("rejected", ()))
            stages, layers = tuple(data["stages"]), tuple(data["layers"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"the plan is malformed: {error}.") from error
        return cls(
            world_size=data["world_size"],
            global_batch_size=data["global_batch_size"],
            num_microbatches=data["num_microbatches"],
            stages=stages,
            layers=tuple(LayerStrategy.parse(layer) for layer in layers),
            embedding=LayerStrategy.parse(data["embedding"]),
            head=LayerStrategy.parse(data["head"]),
            schedule=data.get("schedule", "1f1b"),
            virtual_stages=data.get("virtual_stages", 1),
            prediction=prediction,
            rejected=rejected,
        )

    def to_json(self) -> str:
        """The plan as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> HybridPlan:
        """Reads :meth:`to_json` text.

        Raises:
            ValueError: If the text is not JSON or not a plan.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the plan is not JSON: {error}.") from error
        return cls.from_dict(data)

    def save(self, path: str | Path) -> Path:
        """Writes the plan as JSON and returns the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json() + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> HybridPlan:
        """Reads a plan file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it does not hold a plan; the message names the file.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"plan file {str(path)!r}: {error}") from error


def even_stages(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Blocks per stage when spread evenly; the remainder goes to the last stages, one block each.

    Raises:
        ValueError: If there are fewer blocks than stages.
    """
    if num_stages < 1 or num_layers < num_stages:
        raise ValueError(f"stages={num_stages}: expected between 1 and the number of blocks, {num_layers}.")
    base, extra = divmod(num_layers, num_stages)
    return tuple(base + (stage >= num_stages - extra) for stage in range(num_stages))
