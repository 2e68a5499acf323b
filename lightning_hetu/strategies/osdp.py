"""``Trainer(strategy="hetu_osdp")``: decides per operator how to shard it, and trains under that plan on FSDP2.

OSDP (arXiv 2209.13258 and 2305.09940): sharding everything needs the least memory and the most communication, so only
what has to be sharded is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from typing_extensions import override

from lightning_hetu.parallel.materialize import check_can_be_materialized
from lightning_hetu.parallel.mesh import PlanMesh
from lightning_hetu.parallel.osdp.apply import apply_osdp, check_parameters, reshard, set_last_micro_step
from lightning_hetu.parallel.osdp.discover import Unit
from lightning_hetu.parallel.osdp.engine import DataParallelEngine, reduce_plain_gradients
from lightning_hetu.parallel.pipeline_mixin import PipelineMixin, uses_pipeline
from lightning_hetu.planning import HybridPlan, LayerStrategy
from lightning_hetu.planning.osdp import OSDPPlan
from lightning_hetu.strategies import _lightning_compat as compat
from lightning_hetu.strategies._osdp_planner import (
    OSDPRequest,
    changes,
    evaluation_plan,
    looks_at_whole_tensors,
    make_plan,
    model_units,
)
from lightning_hetu.strategies._planned import PlannedStrategy
from lightning_hetu.strategies._planner import example_batch


class OSDPStrategy(PlannedStrategy):
    """Shards only the operators worth sharding, so that a step is as fast as the memory allows.

    Every operator is replicated (``dp``), gathered once per step (``z2``, as ZeRO-2), gathered around every use
    (``zdp``, as ZeRO-3 and FSDP), or offloaded (``off``); large ones are cut into slices that are gathered one by one.

    Batches: a dataloader is written as for one device. Its ``batch_size`` is the global batch, and every rank loads
    only its rows of it. With ``Trainer(use_distributed_sampler=False)`` loaders are left alone and must yield the
    rank's own rows.

    Args:
        memory_limit: Memory per device that a step may use: bytes, text such as ``"70GiB"``, or a fraction of the
            device's memory up to 1.0. By default 90 % of what a device has.
        modes: Modes to choose from: ``dp``, ``z2``, ``zdp``, ``zdp-k`` with a divisor k of the ranks, ``off``.
        max_slices: Largest number of slices of an operator; 1 cuts none.
        whole: Names of classes whose modules are decided on as a whole, for example ``["GPTBlock"]``.
        accumulation: When gradients are reduced under ``Trainer(accumulate_grad_batches=...)``: in the ``last``
            micro-step, in ``every`` one, or in the last one with ``z2`` gathered only once (``hold``); ``auto`` is the
            fastest that fits.
        plan: ``"auto"``, or a path of a plan file, or an :class:`OSDPPlan`.
        profile_cache: Folder where profiles of devices are kept; ``True`` for the default folder, ``False`` for none.
        process_group_backend: ``"nccl"``, ``"gloo"``; by default the one for the device.
        timeout: How long a collective may take.

    Raises:
        ValueError: For a plan or an option that cannot be.
        OSDPInfeasibleError: If nothing fits ``memory_limit``; it says how much would, and what would help.
    """

    def __init__(
        self,
        memory_limit: int | float | str | None = None,
        modes: Sequence[str] = ("dp", "z2", "zdp"),
        max_slices: int = 8,
        whole: Sequence[str] = (),
        accumulation: Literal["auto", "last", "every", "hold"] = "auto",
        plan: OSDPPlan | str | Path = "auto",
        profile_cache: bool | str | Path = True,
        process_group_backend: Literal["nccl", "gloo"] | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        for name, value in (("modes", modes), ("whole", whole)):
            if isinstance(value, str):
                raise ValueError(f"{name}={value!r}: expected a list, [{value!r}].")
        super().__init__(process_group_backend, timeout)
        self._request = OSDPRequest(
            plan, memory_limit, tuple(modes), max_slices, tuple(whole), accumulation, profile_cache
        )
        self.plan: OSDPPlan | None = None
        self._units: tuple[Unit, ...] = ()
        self._accumulating = False

    @property
    def request(self) -> OSDPRequest:
        """What the user asked for."""
        return self._request

    # ------------------------------------------------------------------ the plan

    @override
    def _check_model(self, trainer: Trainer, module: LightningModule) -> None:
        self.plan, self._rows_plan = None, None
        check_parameters(module)
        batch = example_batch(trainer)
        outcome: Any = None
        if self.global_rank == 0:
            try:
                outcome = model_units(self._request, trainer, module, self.root_device, batch)
            except Exception as error:  # every rank must end with it instead of waiting for rank 0
                outcome = error
        outcome = self.broadcast(outcome)
        if isinstance(outcome, Exception):
            raise outcome
        self._units = outcome

    @override
    def _check_meta(self, module: LightningModule) -> None:
        check_can_be_materialized(module)

    @override
    def _make_plan(self, trainer: Trainer, module: LightningModule) -> OSDPPlan:
        if compat.is_fitting(trainer) or self._request.plan != "auto":
            return make_plan(self._request, trainer, module, self._units, self)
        self._evaluation_only = module
        rank_zero_info(f"evaluation without a plan: parameters are sharded over all {self.world_size} devices")
        return evaluation_plan(self._units, self.world_size)

    @override
    def _accept(self, plan: OSDPPlan, trainer: Trainer, module: LightningModule) -> None:
        if plan.world_size != self.world_size:
            raise ValueError(
                f"plan.world_size={plan.world_size}, but {self.world_size} devices were started. Give"
                f" devices={plan.world_size}, or plan again for {self.world_size}."
            )
        problem = compat.averages_whole_parameters(trainer)
        if problem is None:
            problem = compat.compares_parameters(trainer, {mode for op in plan.operators for mode, _ in op.parts})
        if problem is not None and compat.is_fitting(trainer):
            raise ValueError(problem)
        sliced = next((operator for operator in plan.operators if operator.slices > 1), None)
        whole = looks_at_whole_tensors(self.configured_optimizers)
        if sliced is not None and whole is not None:
            raise ValueError(
                f"plan.operators: {sliced.slices} slices of {sliced.name!r}, but {whole} may look at whole parameters:"
                " plan again with max_slices=1, or use an optimizer that works element by element."
            )
        self.plan = plan
        rows = LayerStrategy(dp=self.world_size, dp_type="zero3")
        samples = plan.batch_size * self.world_size
        self._rows_plan = HybridPlan.uniform(rows, num_layers=1, global_batch_size=samples)
        self._plan_mesh = PlanMesh(self._rows_plan, self.root_device.type)

    @override
    def _cut(self, module: LightningModule) -> torch.nn.Module:
        assert self.plan is not None and self._plan_mesh is not None
        root = apply_osdp(module, self._units, self.plan, self._plan_mesh.root)
        if uses_pipeline(module):
            pipelined = cast(PipelineMixin, module)
            pipelined._pipeline_engine = DataParallelEngine(pipelined, self._plan_mesh.root.get_group())
        else:
            compat.synchronize_epoch_metrics(module)
        return root

    @override
    def _what_changed(self, plan_file: Path) -> str:
        assert self.plan is not None
        return changes(OSDPPlan.load(plan_file), self.plan)

    # ------------------------------------------------------------------ steps

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._resharded(super().validation_step(*args, **kwargs))

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._resharded(super().test_step(*args, **kwargs))

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._resharded(super().predict_step(*args, **kwargs))

    def _resharded(self, output: Any) -> Any:
        # Without a backward nothing else would, and whatever looks at parameters next would see gathered copies.
        if self._root is not None:
            reshard(self._root)
        return output

    @property
    @override
    def _gradient_ranks(self) -> int:
        return 1 if self.plan is None else self.plan.world_size

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().backward(closure_loss, optimizer, *args, **kwargs)
        if not self._accumulating and self._plan_mesh is not None and self.model is not None:
            reduce_plain_gradients(self.model, self._plan_mesh.root.get_group())
        return loss

    @contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        if self.plan is None or not isinstance(self.model, FSDPModule):
            yield
            return
        self._accumulating = True
        set_last_micro_step(self.model, self.plan, last=False)
        try:
            yield
        finally:
            self._accumulating = False
            set_last_micro_step(self.model, self.plan, last=True)
