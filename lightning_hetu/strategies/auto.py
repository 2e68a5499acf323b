"""``Trainer(strategy="hetu_auto")``: plans hybrid parallelism for a LightningModule and trains under the plan.

The planner follows Galvatron (arXiv 2211.13878) and Galvatron-BMW (arXiv 2307.02031). Automatic optimization stays
Lightning's own: a pipelined step computes its gradients early and hands them over when Lightning calls backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_hetu.parallel.build import build_module, build_stage, check_parameters, check_plan_fits_model
from lightning_hetu.parallel.executor import PipelineExecutor
from lightning_hetu.parallel.experts import settle_experts
from lightning_hetu.parallel.forward_build import build_forward_stage
from lightning_hetu.parallel.forward_executor import ForwardExecutor
from lightning_hetu.parallel.mesh import PlanMesh
from lightning_hetu.parallel.pipeline_mixin import PipelineMixin
from lightning_hetu.parallel.structure import ModelStructure
from lightning_hetu.planning.explain import diff
from lightning_hetu.planning.plan import HybridPlan
from lightning_hetu.strategies import _lightning_compat as compat
from lightning_hetu.strategies._planned import PlannedStrategy
from lightning_hetu.strategies._planner import PlanRequest, evaluation_plan, make_plan, make_profiles, model_structure


class AutoHybridParallelStrategy(PlannedStrategy):
    """Searches the fastest hybrid-parallel plan that fits memory, and trains under it.

    Batches: a dataloader is written as for one device. Its ``batch_size`` is the global batch, and every rank loads
    only its rows of it; so one script trains the same model on any number of devices and under any plan. With
    ``Trainer(use_distributed_sampler=False)`` loaders are left alone and must yield the rank's own rows.

    Args:
        plan: ``"auto"`` profiles and searches; or a path of a plan file, or a :class:`HybridPlan`.
        memory_budget: Memory per device the plan may use, as bytes or text such as ``"20GiB"``. By default 90 % of
            what a device has.
        blocks: Dotted path of the container of the model's blocks, for example ``"model.layers"``. By default it is
            found.
        pins: Fields of the plan that the search must not change, for example ``{"num_microbatches": 4}``; see
            :func:`lightning_hetu.planning.search`.
        profile_cache: Folder where profiles are kept; ``True`` for the default folder, ``False`` to always profile.
        process_group_backend: ``"nccl"``, ``"gloo"``; by default the one for the device.
        timeout: How long a collective may take.

    Raises:
        ValueError: For a plan or an option that cannot be.
        NoFeasiblePlanError: If nothing fits ``memory_budget``; it names the smallest budget that would do.
    """

    shares_experts = True

    def __init__(
        self,
        plan: HybridPlan | str | Path = "auto",
        memory_budget: int | str | None = None,
        blocks: str | None = None,
        pins: dict[str, Any] | None = None,
        profile_cache: bool | str | Path = True,
        process_group_backend: Literal["nccl", "gloo"] | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(process_group_backend, timeout)
        self._request = PlanRequest(plan, memory_budget, blocks, pins or {}, profile_cache)
        self.plan: HybridPlan | None = None
        self._structure: ModelStructure | None = None
        self._executor: PipelineExecutor | None = None
        self.cost_breakdown: Callable[[], str] | None = None
        """Tables of where the time and the memory of a plan that was searched go; on the first rank only."""

    @property
    def request(self) -> PlanRequest:
        """What the user asked for."""
        return self._request

    def stop_after_profile(self, folder: str) -> None:
        """Makes the next ``fit`` end once model and devices are profiled; the profiles are written to ``folder``."""
        self._stop_after, self._stop_file = "profile", folder

    # ------------------------------------------------------------------ the plan

    @override
    def _check_model(self, trainer: Trainer, module: LightningModule) -> None:
        self._executor, self.plan, self._rows_plan = None, None, None
        self._structure = model_structure(module, self._request.blocks, trainer)
        check_parameters(self._structure, module)
        settle_experts(self._structure, module, self.world_size)

    @override
    def _make_plan(self, trainer: Trainer, module: LightningModule) -> HybridPlan:
        assert self._structure is not None
        if self._stop_after == "profile":
            assert self._stop_file is not None
            profile, cluster = make_profiles(self._request, trainer, module, self._structure, self)[:2]
            if self.global_rank == 0:
                files = (
                    profile.save(Path(self._stop_file) / "model.json"),
                    cluster.save(Path(self._stop_file) / "cluster.json"),
                )
                rank_zero_info(f"wrote {files[0]} and {files[1]}")
            self.barrier()
            compat.end_run()
        if compat.is_fitting(trainer) or self._request.plan != "auto":
            return make_plan(self._request, trainer, module, self._structure, self)
        self._evaluation_only = module
        rank_zero_info(f"evaluation without a plan: parameters are sharded over all {self.world_size} devices")
        return evaluation_plan(self._structure, self.world_size)

    @override
    def _accept(self, plan: HybridPlan, trainer: Trainer, module: LightningModule) -> None:
        assert self._structure is not None
        check_plan_fits_model(plan, self._structure, module)
        problem = compat.unsupported_callback(trainer, plan)
        if problem is not None and compat.is_fitting(trainer):
            raise ValueError(problem)
        self.plan = self._rows_plan = plan
        self._plan_mesh = PlanMesh(plan, self.root_device.type)

    @override
    def _cut(self, module: LightningModule) -> torch.nn.Module:
        assert self._structure is not None and self.plan is not None and self._plan_mesh is not None
        if self._structure.pipeline:
            pipelined = cast(PipelineMixin, module)
            self._executor = self._make_executor(pipelined, self.plan, self._plan_mesh)
            pipelined._pipeline_engine = self._executor
            return module
        root = build_module(module, self._structure, self.plan, self._plan_mesh)
        compat.synchronize_epoch_metrics(module)
        return root

    def _make_executor(self, module: PipelineMixin, plan: HybridPlan, mesh: PlanMesh) -> PipelineExecutor:
        assert self._structure is not None and isinstance(module, LightningModule)
        if self._structure.trace is None:
            stage = build_stage(module, self._structure, plan, mesh)
            return PipelineExecutor(module, stage, plan, mesh, self.root_device)
        forward = build_forward_stage(module, self._structure, plan, mesh)
        return ForwardExecutor(module, forward, plan, mesh, self.root_device)

    @override
    def _whole_model(self) -> AbstractContextManager[None]:
        return nullcontext() if self._executor is None else self._executor.stage.removed.put_back()

    @override
    def _pipeline_group(self) -> Any:
        if self.plan is None or self._plan_mesh is None or self.plan.pipeline_parallel_size == 1:
            return None
        return self._plan_mesh.pipeline.get_group()

    @override
    def _what_changed(self, plan_file: Path) -> str:
        assert self.plan is not None
        return diff(HybridPlan.load(plan_file), self.plan)

    # ------------------------------------------------------------------ steps

    @property
    @override
    def _gradient_ranks(self) -> int:
        return self.plan.head.dp if self.plan is not None and self._executor is None else 1

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        steps = self._executor.steps if self._executor is not None else 0
        output = super().training_step(*args, **kwargs)
        if self._executor is not None and self._executor.steps == steps:
            raise ValueError(
                f"{type(self.lightning_module).__name__}.training_step did not call self.pipeline_step(inputs, target):"
                " under a plan the loss must come from it."
            )
        return output

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().optimizer_step(*args, **kwargs)
        if self._executor is not None:
            self._executor.end_accumulation()
        return output

    @contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        if self._executor is not None:
            yield
            return
        with super().block_backward_sync():
            yield
