"""From a Trainer and a LightningModule to an OSDP plan: which operators there are, what they cost, and what fits."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from lightning_hetu.parallel.batch import batch_samples
from lightning_hetu.parallel.forward_trace import fake_batch, fake_copy
from lightning_hetu.parallel.osdp.discover import Unit, find_units
from lightning_hetu.parallel.transformers_compat import forget_fake_tensors
from lightning_hetu.planning.osdp import OperatorPlan, OSDPPlan
from lightning_hetu.planning.osdp.costs import Accumulation, mode_ranks
from lightning_hetu.planning.units import parse_bytes
from lightning_hetu.strategies import _lightning_compat as compat

if TYPE_CHECKING:
    from lightning_hetu.strategies.osdp import OSDPStrategy

_USABLE_MEMORY = 0.9


@dataclass(frozen=True)
class OSDPRequest:
    """What the user asked for; see :class:`OSDPStrategy`."""

    plan: OSDPPlan | str | Path
    memory_limit: int | float | str | None
    modes: tuple[str, ...]
    max_slices: int
    whole: tuple[str, ...]
    accumulation: str
    profile_cache: bool | str | Path

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
        return parse_bytes(wanted, name="memory_limit")


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
        with compat.silent_logging(model), torch.no_grad(), trainer.strategy.precision_plugin.forward_context():
            getattr(model, step)(values, 0)

    with isolate_rng():
        try:
            with forget_fake_tensors(), FakeTensorMode(allow_non_fake_inputs=True):
                copied = fake_copy(module, device, shared=(trainer,))
                rows = fake_batch(batch, batch_samples(batch), device)
                return find_units(copied, partial(run, copied, rows), whole=request.whole)
        except (DataDependentOutputException, DynamicOutputShapeException):
            module.to(device)
            rows = module.trainer.strategy.batch_to_device(batch, device)
            return find_units(module, partial(run, module, rows), whole=request.whole)


def evaluation_plan(units: tuple[Unit, ...], world_size: int) -> OSDPPlan:
    """The plan of an evaluation without training: everything sharded."""
    operators = tuple(OperatorPlan(unit.name, (("zdp", 1),), kind=unit.kind) for unit in units)
    return OSDPPlan(world_size, operators)


def make_plan(
    request: OSDPRequest, trainer: Trainer, module: LightningModule, units: tuple[Unit, ...], strategy: OSDPStrategy
) -> OSDPPlan:
    """The plan that was given, or the best one found; the same on every rank."""
    if isinstance(request.plan, OSDPPlan):
        return request.plan
    if str(request.plan) != "auto":
        try:
            return OSDPPlan.load(request.plan)
        except OSError as error:
            raise ValueError(f"plan={str(request.plan)!r} cannot be read: {error.strerror}.") from error
    raise NotImplementedError


def changes(before: OSDPPlan, after: OSDPPlan) -> str:
    """One line on how two plans differ."""
    if before.world_size != after.world_size:
        return f"{before.world_size} ranks -> {after.world_size} ranks; {_in_short(after)}"
    if before.fingerprint == after.fingerprint:
        return "the plan is the same"
    return f"{_in_short(before)} -> {_in_short(after)}"


def _in_short(plan: OSDPPlan) -> str:
    counts = Counter(operator.mode for operator in plan.operators)
    return ", ".join(f"{count} x {mode}" for mode, count in sorted(counts.items()))
