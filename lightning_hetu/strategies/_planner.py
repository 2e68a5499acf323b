"""From a Trainer and a LightningModule to a plan: what to profile, with which data, under which budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_hetu.parallel.batch import batch_samples
from lightning_hetu.parallel.forward_trace import UncuttableModelError, trace_structure
from lightning_hetu.parallel.pipeline_mixin import PipelineMixin, runs_own_forward
from lightning_hetu.parallel.structure import ModelStructure, find_structure
from lightning_hetu.planning import ClusterSpec, HetuConstants, HybridPlan, LayerStrategy, ModelProfile, search
from lightning_hetu.planning.breakdown import breakdown
from lightning_hetu.planning.osdp import OSDPPlan
from lightning_hetu.planning.profile import Precision
from lightning_hetu.planning.search_space import Pins
from lightning_hetu.planning.units import parse_bytes
from lightning_hetu.profiling import (
    ProfileCache,
    ProgressBar,
    cluster_key,
    model_key,
    optimizer_state_bytes,
    profile_cluster,
    profile_model,
    profile_step,
)
from lightning_hetu.strategies import _lightning_compat as compat

if TYPE_CHECKING:
    from lightning_hetu.strategies.auto import AutoHybridParallelStrategy


_BATCH_SIZES = (1, 2, 4, 8, 16, 32)
"""Local batch sizes that are timed; larger ones are extrapolated."""


@dataclass(frozen=True)
class PlanRequest:
    """What the user asked for; see :class:`AutoHybridParallelStrategy`."""

    plan: HybridPlan | str | Path
    memory_budget: int | str | None
    blocks: str | None
    pins: dict[str, Any]
    profile_cache: bool | str | Path

    def __post_init__(self) -> None:
        if not isinstance(self.plan, HybridPlan | str | Path):
            raise ValueError(f"plan={self.plan!r}: expected 'auto', the path of a plan file, or a HybridPlan.")
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget, name="memory_budget")
        if not isinstance(self.pins, dict):
            raise ValueError(
                f"pins={self.pins!r}: expected a mapping of plan fields, for example {{'dp_type': 'zero3'}}."
            )
        # Those of blocks and stages need the number of blocks; the others are not to be found out after profiling.
        Pins.parse({name: pin for name, pin in self.pins.items() if name not in ("layers", "stages")}, 1)
        if self.blocks is not None and not isinstance(self.blocks, str):
            raise ValueError(f"blocks={self.blocks!r}: expected a dotted path such as 'model.layers'.")
        if not isinstance(self.profile_cache, bool | str | Path):
            raise ValueError(f"profile_cache={self.profile_cache!r}: expected a folder, true or false.")


def evaluation_plan(structure: ModelStructure, world_size: int) -> HybridPlan:
    """The plan of an evaluation without training: parameters sharded over all devices; nothing to search."""
    return HybridPlan.uniform(
        LayerStrategy(dp=world_size, dp_type="zero3"), num_layers=len(structure.blocks), global_batch_size=world_size
    )


class _Captured(Exception):
    """Ends a training step as soon as its pipeline step is reached."""


class _Capture:
    """Stands in for the executor and keeps what a step of the module gives to ``pipeline_step``."""

    inputs: Any
    target: Any

    def step(self, inputs: Any, target: Any, keep_outputs: bool = False) -> Tensor:
        self.inputs, self.target = inputs, target
        raise _Captured

    def forward(self, inputs: Any) -> Tensor:
        self.inputs, self.target = inputs, None
        raise _Captured

    def outputs(self) -> Tensor | None:
        return None


def example_batch(trainer: Trainer) -> Any:
    """The first batch of the training loader, a global batch, drawn without changing the random state.

    In evaluation and prediction it is that of the loader they use.

    Raises:
        ValueError: If there is none.
    """
    loader = compat.dataloader_of_run(trainer)
    if isinstance(loader, Mapping | list | tuple):
        loader = compat.combined(loader)
    source = loader.dataset if isinstance(loader, DataLoader) else loader
    if isinstance(source, Iterator):
        rank_zero_warn(
            f"the training data is a {type(source).__name__}, which can be gone through only once: planning takes its"
            " first batch. Give plan='<file>' to keep it, or data that can be iterated again."
        )
    with isolate_rng():
        if isinstance(loader, DataLoader) and loader.num_workers > 0 and loader.batch_sampler is not None:
            # one batch is not worth starting workers for
            rows = next(iter(loader.batch_sampler), None)
            return _some(None if rows is None else loader.collate_fn([loader.dataset[row] for row in rows]))
        return _some(next(iter(loader), None))


def _some(batch: Any) -> Any:
    if batch is None:
        raise ValueError("the training dataloader yields no batch: there is nothing to plan for and to train on.")
    return batch


def model_structure(module: LightningModule, blocks: str | None, trainer: Trainer) -> ModelStructure:
    """Where the layers of the module are; a model that runs its own forward is traced with a batch of its data.

    One that cannot be cut is run as a module without pipeline support.

    Raises:
        ValueError: If they cannot be found.
    """
    if not runs_own_forward(module):
        return find_structure(module, blocks)
    step = compat.step_of_run(trainer, module)
    inputs, _ = pipeline_example(module, example_batch(trainer), step)
    try:
        return trace_structure(module, inputs, blocks)
    except UncuttableModelError as error:
        rank_zero_warn(f"{error} It is planned as one stage without microbatches.")
        return find_structure(module, blocks)


def pipeline_example(
    module: LightningModule, batch: Any, step: Callable[[Any, int], Any] | None = None
) -> tuple[Any, Any]:
    """What ``training_step``, or another step of the module, gives to ``pipeline_step`` for ``batch``."""
    capture = _Capture()
    mixin = cast(PipelineMixin, module)
    mixin._pipeline_engine = capture
    try:
        with compat.silent_logging(module), isolate_rng():
            (step or module.training_step)(batch, 0)
    except _Captured:
        return capture.inputs, capture.target
    finally:
        mixin._pipeline_engine = None
    name = getattr(step, "__name__", "training_step")
    raise ValueError(f"{type(module).__name__}.{name} did not call self.pipeline_step(inputs, target).")


def make_profiles(
    request: PlanRequest,
    trainer: Trainer,
    module: LightningModule,
    structure: ModelStructure,
    strategy: AutoHybridParallelStrategy,
) -> tuple[ModelProfile, ClusterSpec, int]:
    """Profiles of model and devices, measured or from the cache, and the samples in a global batch."""
    device = strategy.root_device
    cache = ProfileCache.from_option(request.profile_cache)
    with ProgressBar("profiling devices") as bar:
        measure_cluster = partial(profile_cluster, device, progress=bar)
        cluster = cache.cluster(cluster_key(device), measure_cluster) if cache else measure_cluster()
    batch = strategy.batch_to_device(example_batch(trainer), device)
    samples = batch_samples(batch)
    precision = cast(Precision, strategy.precision_plugin.precision)
    sizes = [size for size in _BATCH_SIZES if size <= samples] or [samples]
    optimizers = strategy.configured_optimizers
    options: dict[str, Any] = {
        "precision": precision,
        "device": device,
        "max_tp": cluster.num_devices,
        "batch_sizes": sizes,
    }
    with ProgressBar("profiling model") as bar, compat.silent_logging(module):
        optimizer = optimizers[0] if optimizers else None
        measured = {**options, "slots": cluster.slots, "optimizer": optimizer, "progress": bar}
        if structure.pipeline:
            inputs, target = pipeline_example(module, batch)
            example: Any = (inputs, target)
            measure_model = partial(profile_model, module, structure, inputs, target, **measured)
        else:
            example = batch
            measure_model = partial(profile_step, module, structure, partial(loss_of_step, module), batch, **measured)
        if cache is None:
            return measure_model(), cluster, samples
        key = model_key(
            module,
            structure,
            example,
            slots=cluster.slots,
            optimizer_states=optimizer_state_bytes(optimizer),
            **options,
        )
        return cache.model(key, measure_model), cluster, samples


GivenPlan = TypeVar("GivenPlan", HybridPlan, OSDPPlan)


def given_plan(plan: GivenPlan | str | Path, kind: type[GivenPlan]) -> GivenPlan | None:
    """The plan that the user gave, itself or as a file; ``None`` for ``"auto"``.

    Raises:
        ValueError: If the file cannot be read or holds no such plan.
    """
    if isinstance(plan, kind):
        return plan
    if str(plan) == "auto":
        return None
    try:
        return kind.load(str(plan))
    except OSError as error:
        raise ValueError(f"plan={str(plan)!r} cannot be read: {error.strerror}.") from error


def make_plan(
    request: PlanRequest,
    trainer: Trainer,
    module: LightningModule,
    structure: ModelStructure,
    strategy: AutoHybridParallelStrategy,
) -> HybridPlan:
    """The plan that was given, or the best one found; the same object on every rank."""
    given = given_plan(request.plan, HybridPlan)
    if given is not None:
        return given
    if not strategy.cuts_batches:
        raise ValueError(
            "use_distributed_sampler=False with plan='auto': a loader then yields the rows of one rank, and they depend"
            " on the plan. Leave it True and let batch_size be the global batch, or give a plan."
        )
    profile, cluster, samples = make_profiles(request, trainer, module, structure, strategy)
    budget = request.memory_budget
    if budget is None:
        if cluster.device_memory is None:
            raise ValueError("memory_budget=None, and the device does not tell its memory: give memory_budget='20GiB'.")
        budget = int(cluster.device_memory * 0.9)
    outcome: Any = None
    constants = HetuConstants(accumulates=trainer.accumulate_grad_batches > 1)
    if strategy.global_rank == 0:
        try:
            with ProgressBar("searching a plan") as bar:
                outcome = search(
                    profile,
                    cluster,
                    memory_budget=budget,
                    global_batch_size=samples,
                    constants=constants,
                    progress=lambda done, total: bar(done, total, ""),
                    **request.pins,
                )
            strategy.cost_breakdown = partial(breakdown, outcome, profile, cluster, constants=constants)
        except TypeError as error:
            outcome = ValueError(f"pins={request.pins}: {error}.")
        except ValueError as error:  # every rank must end with the same message instead of waiting for rank 0
            outcome = error
    outcome = strategy.broadcast(outcome)
    if isinstance(outcome, ValueError):
        raise outcome
    return cast(HybridPlan, outcome)


def loss_of_step(module: LightningModule, batch: Any) -> Tensor:
    """The loss that ``training_step`` returns."""
    output = module.training_step(batch, 0)
    loss = output["loss"] if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise ValueError(f"{type(module).__name__}.training_step returned {type(loss).__name__}: expected a loss.")
    return loss
