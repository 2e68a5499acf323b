"""From a Trainer and a LightningModule to an OSDP plan: which operators there are, what they cost, and what fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

from lightning_hetu.parallel.batch import batch_samples, first_rows
from lightning_hetu.parallel.forward_trace import fake_batch, fake_copy
from lightning_hetu.parallel.materialize import on_meta
from lightning_hetu.parallel.osdp.discover import Unit, find_units
from lightning_hetu.parallel.osdp.split import cuts_of
from lightning_hetu.parallel.transformers_compat import forget_fake_tensors
from lightning_hetu.planning.osdp import (
    CallOverhead,
    HostLink,
    OperatorPlan,
    OSDPInfeasibleError,
    OSDPPlan,
    solve,
    solve_batch,
)
from lightning_hetu.planning.osdp.costs import Accumulation, mode_ranks
from lightning_hetu.planning.osdp.fsdp2 import GLOO, NCCL, Runtime
from lightning_hetu.planning.osdp.links import CollectiveSeconds
from lightning_hetu.planning.osdp.timeline import StepProfile
from lightning_hetu.planning.presets import DevicePreset
from lightning_hetu.planning.units import parse_bytes
from lightning_hetu.profiling import ProfileCache, ProgressBar, cluster_key, optimizer_state_bytes, profile_cluster
from lightning_hetu.profiling._isolation import untouched
from lightning_hetu.profiling._measure import Stopwatch
from lightning_hetu.profiling.fsdp2_probe import call_overhead
from lightning_hetu.profiling.operators import profile_operators
from lightning_hetu.profiling.step_time import StepSeconds, time_step
from lightning_hetu.strategies import _lightning_compat as compat
from lightning_hetu.strategies._planner import example_batch, given_plan, loss_of_step

if TYPE_CHECKING:
    from lightning_hetu.strategies.osdp import OSDPStrategy

_USABLE_MEMORY = 0.9
_LEAST_LIMIT = 1024
"""Bytes; below it a fraction was meant."""
_DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)
_ELEMENTWISE = (
    torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad,
    torch.optim.Adadelta, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam, torch.optim.ASGD, torch.optim.Rprop,
)  # fmt: skip


@dataclass(frozen=True)
class OSDPRequest:
    """What the user asked for; see :class:`OSDPStrategy`."""

    plan: OSDPPlan | str | Path = "auto"
    memory_limit: int | float | str | None = None
    modes: tuple[str, ...] = ("dp", "z2", "zdp")
    max_slices: int = 8
    whole: tuple[str, ...] = ()
    accumulation: str = "auto"
    profile_cache: bool | str | Path = True

    def __post_init__(self) -> None:
        if not isinstance(self.plan, OSDPPlan | str | Path):
            raise ValueError(f"plan={self.plan!r}: expected 'auto', the path of a plan file, or an OSDPPlan.")
        self.limit(None)
        if not self.modes or any(not isinstance(mode, str) for mode in self.modes):
            raise ValueError(f"modes={list(self.modes)}: expected names of modes, for example ['dp', 'z2', 'zdp'].")
        for mode in self.modes:
            if not mode.startswith("zdp-"):  # how many ranks there are is not known yet
                mode_ranks(mode, 2)
        if isinstance(self.max_slices, bool) or not isinstance(self.max_slices, int) or self.max_slices < 1:
            raise ValueError(f"max_slices={self.max_slices!r}: expected an integer of at least 1.")
        allowed = ("auto", *get_args(Accumulation))
        if self.accumulation not in allowed:
            raise ValueError(f"accumulation={self.accumulation!r}: expected one of {', '.join(allowed)}.")
        if not isinstance(self.profile_cache, bool | str | Path):
            raise ValueError(f"profile_cache={self.profile_cache!r}: expected a folder, true or false.")

    def limit(self, device_memory: int | None) -> int | None:
        """Bytes per device that may be used; ``None`` if that takes the device's memory, which is not known.

        Raises:
            ValueError: If the limit is malformed.
        """
        wanted = self.memory_limit
        if wanted is None:
            wanted = _USABLE_MEMORY
        if isinstance(wanted, float) and 0 < wanted <= 1:
            return None if device_memory is None else int(device_memory * wanted)
        size = parse_bytes(wanted, name="memory_limit")
        if size < _LEAST_LIMIT:
            raise ValueError(
                f"memory_limit={wanted!r}: expected bytes per device, text such as '20GiB', or a fraction of the"
                " device's memory from above 0.0 to 1.0."
            )
        return size


def model_units(
    request: OSDPRequest, trainer: Trainer, module: LightningModule, device: torch.device, batch: Any
) -> tuple[Unit, ...]:
    """The units of the module, found by a step on fake tensors; with real ones where that cannot be.

    Args:
        request: What the user asked for.
        trainer: Tells which step is run.
        module: The module.
        device: Where it is going to be.
        batch: A batch for that step, anywhere.
    """
    step = compat.step_of_run(trainer, module).__name__

    def run(model: Any, values: Any) -> None:
        model.trainer = trainer  # a copy of a LightningModule has none
        with compat.silent_logging(model), torch.no_grad(), trainer.strategy.precision_plugin.forward_context():
            getattr(model, step)(values, 0)

    with isolate_rng():
        try:
            with forget_fake_tensors(), FakeTensorMode(allow_non_fake_inputs=True):
                copied = fake_copy(module, device, shared=(trainer,))
                rows = fake_batch(batch, batch_samples(batch), device)
                return find_units(copied, partial(run, copied, rows), whole=request.whole, small_join_root=False)
        except _DATA_DEPENDENT:
            module.to(device)
            rows = trainer.strategy.batch_to_device(first_rows(batch, batch_samples(batch), 1), device)
            with untouched(module, device):
                return find_units(module, partial(run, module, rows), whole=request.whole, small_join_root=False)


def looks_at_whole_tensors(optimizers: Sequence[Optimizer]) -> str | None:
    """Name of an optimizer that is not known to work element by element, and so may differ for slices."""
    return next((type(item).__name__ for item in optimizers if type(item) not in _ELEMENTWISE), None)


def evaluation_plan(units: tuple[Unit, ...], world_size: int) -> OSDPPlan:
    """The plan of an evaluation without training: everything sharded."""
    operators = tuple(OperatorPlan(unit.name, (("zdp", 1),), kind=unit.kind) for unit in units)
    return OSDPPlan(world_size, operators)


def make_plan(
    request: OSDPRequest, trainer: Trainer, module: LightningModule, units: tuple[Unit, ...], strategy: OSDPStrategy
) -> OSDPPlan:
    """The plan that was given, or the best one found; the same on every rank."""
    given = given_plan(request.plan, OSDPPlan)
    if given is not None:
        return given
    if not strategy.cuts_batches:
        raise ValueError(
            "use_distributed_sampler=False with plan='auto': how many samples a rank gets is then not known before"
            " training. Leave it True and let batch_size be the global batch, or give a plan."
        )
    device, ranks = strategy.root_device, strategy.world_size
    batch = example_batch(trainer)
    samples = batch_samples(batch)
    if samples % ranks:
        raise ValueError(
            f"a training batch of {samples} samples does not divide over {ranks} devices: give the dataloader a"
            f" batch_size that is a multiple of {ranks}."
        )
    rows = first_rows(batch, samples, samples // ranks)
    cache = ProfileCache.from_option(request.profile_cache)
    with ProgressBar("profiling devices") as bar:
        measure_cluster = partial(profile_cluster, device, progress=bar)
        cluster = cache.cluster(cluster_key(device), measure_cluster) if cache else measure_cluster()
    limit = request.limit(cluster.device_memory)
    if limit is None:
        raise ValueError("memory_limit=None, and the device does not tell its memory: give memory_limit='20GiB'.")
    run = partial(step_loss, trainer)
    whole = looks_at_whole_tensors(strategy.configured_optimizers)
    if whole is not None and request.max_slices > 1:
        rank_zero_info(f"{whole} may look at whole parameters, so no operator is cut into slices")
        request = replace(request, max_slices=1)
    overhead = 0.0
    if device.type == "cpu" and ranks > 1:  # elsewhere the host works ahead of the device
        overhead = call_overhead(init_device_mesh(device.type, (ranks,)), cluster)
    seconds = None
    if not on_meta(module):  # where there are no weights yet, seconds of computation stay unknown
        with compat.silent_logging(module):
            seconds = time_step(module, run, strategy.batch_to_device(rows, device), device)
    outcome: Any = None
    if strategy.global_rank == 0:
        comm: CollectiveSeconds = cluster
        if "off" in request.modes:
            comm = HostLink(cluster, _host_seconds_per_byte(device))
        comm = CallOverhead(comm, overhead)
        try:
            with compat.silent_logging(module), ProgressBar("searching a plan") as bar:
                bar(0, 2, "activations")
                profile = profile_units(request, module, units, run, rows, trainer)
                if seconds is not None:
                    profile = with_seconds(profile, seconds)
                bar(1, 2, "modes")
                outcome = search_plan(
                    request,
                    profile,
                    limit,
                    comm=comm,
                    ranks=ranks,
                    micro_steps=trainer.accumulate_grad_batches,
                    optimizer=strategy.configured_optimizers,
                    runtime=NCCL if device.type == "cuda" else GLOO,
                )
                bar(2, 2, "done")
        except Exception as error:  # every rank must end with the same message instead of waiting for rank 0
            outcome = error
    outcome = strategy.broadcast(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    return cast(OSDPPlan, outcome)


def step_loss(trainer: Trainer, module: Any, batch: Any) -> Tensor:
    """The loss of a training step, in the Trainer's precision."""
    module.trainer = trainer  # a copy of a LightningModule has none
    with trainer.strategy.precision_plugin.forward_context():
        return loss_of_step(module, batch)


def profile_units(
    request: OSDPRequest,
    module: LightningModule,
    units: tuple[Unit, ...],
    run: Callable[[nn.Module, Any], Tensor],
    rows: Any,
    trainer: Trainer,
    device: DevicePreset | None = None,
) -> StepProfile:
    """Operators, their sizes, and the activations over a step; for a described device with its seconds.

    A model that decides by values what to compute is run for real, where it has weights.
    """
    options: dict[str, Any] = {
        "device": device,
        "cuts": cuts_of if request.max_slices > 1 else None,
        "max_slices": request.max_slices,
        "shared": (trainer,),
    }
    samples = batch_samples(rows)
    try:
        return profile_operators(module, units, run, rows, samples, **options)
    except ValueError as error:
        if device is not None or on_meta(module) or not isinstance(error.__cause__, _DATA_DEPENDENT):
            raise
        rows = trainer.strategy.batch_to_device(rows, trainer.strategy.root_device)
        return profile_operators(module, units, run, rows, samples, fake=False, **options)


def with_seconds(profile: StepProfile, seconds: StepSeconds) -> StepProfile:
    """Spreads measured seconds over the operators by their parameters, to which most of their arithmetic is due."""
    total = sum(operator.parameters for operator in profile.operators) or 1
    share = [operator.parameters / total / profile.samples for operator in profile.operators]
    operators = tuple(
        replace(operator, forward_seconds=seconds.forward * part, backward_seconds=seconds.backward * part)
        for operator, part in zip(profile.operators, share, strict=True)
    )
    return replace(profile, operators=operators)


def search_plan(
    request: OSDPRequest,
    profile: StepProfile,
    limit: int | None,
    *,
    comm: CollectiveSeconds,
    ranks: int,
    micro_steps: int,
    optimizer: Sequence[Optimizer] = (),
    search_batch: bool = False,
    runtime: Runtime = GLOO,
) -> OSDPPlan:
    """The best plan over the ways to accumulate gradients that the user allows.

    Args:
        request: What the user asked for.
        profile: The model.
        limit: Bytes per rank.
        comm: What knows how long collectives take.
        ranks: Data-parallel ranks.
        micro_steps: Batches per optimizer step.
        optimizer: The optimizers, if there are any yet.
        search_batch: Whether the batch size per rank is the one with the most samples per second; otherwise it is that
            of the profile.
        runtime: Where devices and process groups differ in memory.

    Raises:
        OSDPInfeasibleError: If nothing fits.
    """
    policies: tuple[Any, ...] = (request.accumulation,)
    if request.accumulation == "auto":
        policies = get_args(Accumulation) if micro_steps > 1 else ("last",)
    values = optimizer_state_bytes(optimizer[0] if optimizer else None)
    found: list[OSDPPlan] = []
    problem: OSDPInfeasibleError | None = None
    for accumulation in policies:
        try:
            options: dict[str, Any] = {
                "modes": tuple(mode for mode in request.modes if mode != f"zdp-{ranks}"),
                "world_size": ranks,
                "comm": comm,
                "micro_steps": micro_steps,
                "accumulation": accumulation,
                "optimizer_values": values,
                "profile": profile,
                "runtime": runtime,
            }
            if search_batch:
                plan = solve_batch(profile.operators, limit, **options)
            else:
                plan = solve(profile.operators, limit, batch_size=profile.samples, **options)
        except OSDPInfeasibleError as error:
            if problem is None or error.smallest_feasible_limit < problem.smallest_feasible_limit:
                problem = error
        else:
            found.append(plan)
    if not found:
        assert problem is not None
        raise problem
    return min(found, key=lambda plan: plan.seconds / plan.batch_size)


def _host_seconds_per_byte(device: torch.device) -> float:
    """Measured between pinned host memory and the device; where the device is the host, by a copy inside of it."""
    size = 1 << 26
    there = torch.empty(size, dtype=torch.uint8, device=device)
    here = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    watch, found = Stopwatch(device), []
    for _ in range(3):
        watch.start()
        there.copy_(here, non_blocking=True)
        found.append(watch.stop())
    return min(found) / size


def changes(before: OSDPPlan, after: OSDPPlan) -> str:
    """One line on how two plans differ."""
    if before.world_size != after.world_size:
        return f"{before.world_size} ranks -> {after.world_size} ranks; {after.in_short}"
    if before.fingerprint == after.fingerprint:
        return "the plan is the same"
    return f"{before.in_short} -> {after.in_short}"
