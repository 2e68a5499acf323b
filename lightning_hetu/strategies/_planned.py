"""What strategies that plan have in common: processes, optimizers, batches, steps and checkpoints.

A strategy of ours finds a plan in ``setup``, when the whole module and its optimizers are there, cuts the module, and
gives the optimizers what this rank has. Automatic optimization stays Lightning's own.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import LBFGS, Adafactor, Optimizer
from typing_extensions import override

from lightning_hetu.parallel import checkpoint as ckpt
from lightning_hetu.parallel import checkpoint_files as ckpt_files
from lightning_hetu.parallel.build import synchronize_initial_state
from lightning_hetu.parallel.data import RowSelector, check_training_batches, shard_dataloader
from lightning_hetu.parallel.materialize import on_meta
from lightning_hetu.parallel.mesh import PlanMesh
from lightning_hetu.parallel.optimizers import GroupNames, can_rebind, parameter_groups, parameter_names, rebind
from lightning_hetu.parallel.osdp.split import slice_parts
from lightning_hetu.planning.plan import HybridPlan
from lightning_hetu.strategies import _lightning_compat as compat

Configured = tuple[list[Optimizer], list[Any]]
"""Optimizers, and Lightning's configurations of schedulers."""


class PlannedStrategy(ModelParallelStrategy):
    """Base of the strategies that plan and then train under the plan.

    Args:
        process_group_backend: ``"nccl"``, ``"gloo"``; by default the one for the device.
        timeout: How long a collective may take.
    """

    shares_experts = False
    """Asked by models with experts: whether a plan shares them out; otherwise they are parameters like any other."""

    def __init__(
        self,
        process_group_backend: Literal["nccl", "gloo"] | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            data_parallel_size=1,
            tensor_parallel_size=1,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.plan: Any = None
        self._rows_plan: HybridPlan | None = None
        """Tells which rows of a batch a rank works on."""
        self._plan_mesh: PlanMesh | None = None
        self._parallelized: LightningModule | None = None
        self._root: torch.nn.Module | None = None
        self._parameter_names: list[str] = []
        self._optimizer_names: list[GroupNames] | None = None
        self._configured: Configured | None = None
        self._shard_loaders: bool | None = None
        self._evaluation_only: LightningModule | None = None
        self._optimizers_of: LightningModule | None = None
        self._sigterm: compat.SigtermWatch | None = None
        self.weights_only: bool | None = None
        self._stop_after: Literal["plan", "profile"] | None = None
        self._stop_file: str | None = None

    # ------------------------------------------------------------------ what a strategy decides

    def _check_model(self, trainer: Trainer, module: LightningModule) -> None:
        """Looks at the whole module before anything is done.

        Raises:
            ValueError: If it cannot be run.
        """

    def _check_meta(self, module: LightningModule) -> None:
        """Whether a module on the meta device can be run; it then gets memory when it is cut.

        Raises:
            ValueError: If it cannot.
        """
        raise ValueError(
            f"{type(module).__name__} is on the meta device: {type(self).__name__} measures and cuts a model with its"
            " weights, so build it on a real device. (hetu_osdp takes models on the meta device.)"
        )

    @abstractmethod
    def _make_plan(self, trainer: Trainer, module: LightningModule) -> Any:
        """Finds the plan for the whole module, which is on its device."""

    @abstractmethod
    def _accept(self, plan: Any, trainer: Trainer, module: LightningModule) -> None:
        """Sets ``plan``, ``_rows_plan`` and ``_plan_mesh``.

        Raises:
            ValueError: If the plan cannot be run.
        """

    @abstractmethod
    def _cut(self, module: LightningModule) -> torch.nn.Module:
        """Puts the plan into effect; returns the module whose forward is to be called."""

    @abstractmethod
    def _what_changed(self, plan_file: Path) -> str:
        """How the plan differs from the one of a checkpoint.

        Raises:
            ValueError: If the file holds no such plan.
        """

    @property
    def _gradient_ranks(self) -> int:
        """Over how many ranks gradients are summed that belong to the mean of their losses."""
        return 1

    def _pipeline_group(self) -> Any:
        """Ranks that have the other stages of the model; ``None`` if there are none."""
        return None

    def _whole_model(self) -> AbstractContextManager[None]:
        """In this context the module has all its parameters, in their order."""
        return nullcontext()

    # ------------------------------------------------------------------ processes and plan

    @property
    def cuts_batches(self) -> bool:
        """Whether loaders yield global batches that are cut here; the opposite of ``use_distributed_sampler=False``."""
        return bool(self._shard_loaders)

    @property
    def configured_optimizers(self) -> list[Optimizer]:
        """What the module's ``configure_optimizers`` gave, while the plan is being made; empty in evaluation."""
        return self._configured[0] if self._configured is not None else []

    def stop_after_plan(self, plan_file: str | None = None) -> None:
        """Makes the next ``fit`` end once the plan is shown; it is also written to ``plan_file``."""
        self._stop_after, self._stop_file = "plan", plan_file

    @override
    def setup_environment(self) -> None:
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        if self._process_group_backend == "nccl" and self.root_device.type != "cuda":
            raise ValueError(
                f"process_group_backend='nccl' is for GPUs, but this run is on {self.root_device.type}: use 'gloo', or"
                " None."
            )
        compat.setup_processes(self)

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        # Loaders are cut by `process_dataloader`; Lightning itself must not.
        return {"num_replicas": 1, "rank": 0}

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None and self.lightning_module is not None
        self.accelerator.setup(trainer)
        self._sigterm = compat.SigtermWatch(trainer, self.root_device)
        module = self.lightning_module
        if not module.automatic_optimization:
            raise ValueError(
                f"{type(module).__name__}.automatic_optimization=False: {type(self).__name__} needs automatic"
                " optimization; set it to True."
            )
        if self._parallelized is not module:
            if self._shard_loaders is None:
                self._shard_loaders = compat.keep_user_samplers(trainer)
            self._prepare(trainer, module)
        elif compat.is_fitting(trainer) and self._evaluation_only is module:
            raise ValueError(
                f"{type(module).__name__} was set up for evaluation before a plan was searched: fit first, or use a new"
                " Trainer and module to fit."
            )
        self.model = self._root  # a second call of the Trainer has connected the bare module again
        self.barrier()
        if compat.is_fitting(trainer):
            self.setup_optimizers(trainer)
            self._check_optimizers()
        elif self._optimizers_of is not module:
            self.optimizers = []  # of another module, fitted before
        self._optimizers_of = module
        self.setup_precision_plugin()

    def _prepare(self, trainer: Trainer, module: LightningModule) -> None:
        """Everything between a whole module and a cut one, with its optimizers."""
        if any(isinstance(child, FSDPModule) for child in module.modules()):
            raise ValueError(
                f"{type(module).__name__} is already parallelized: build a new one for another Trainer, and load its"
                " checkpoint."
            )
        self._check_model(trainer, module)
        if on_meta(module):
            self._check_meta(module)
        else:
            module.to(self.root_device)
            synchronize_initial_state(module)
        self._configured = compat.configure_optimizers_early(trainer, module) if compat.is_fitting(trainer) else None
        # One random state for all ranks: tensor-parallel ranks must draw the same dropout masks. Profiling draws too.
        random_state = self.broadcast(torch.get_rng_state())
        if any(isinstance(child, torch.nn.modules.batchnorm._BatchNorm) for child in module.modules()):
            rank_zero_warn(
                f"{type(module).__name__} has batch normalization: its statistics are those of a rank's own rows, so"
                " results depend on the plan."
            )
        plan = self._make_plan(trainer, module)
        torch.set_rng_state(random_state)
        self._accept(plan, trainer, module)
        if self._evaluation_only is not module:
            rank_zero_info(plan.explain())
        self._save_plan(trainer)
        if self._stop_after == "plan":
            self.barrier()
            compat.end_run()
        assert self._plan_mesh is not None
        compat.set_device_mesh(module, self._plan_mesh.root)
        self._device_mesh = self._plan_mesh.root
        self._parameter_names = [name for name, _ in module.named_parameters()]
        names = parameter_names(self.configured_optimizers, module)
        self.precision_plugin.convert_module(module)
        self._root = self._cut(module)
        if self._configured is not None:
            self._configured = self._rebound(self._configured, names)
        compat.forget_dataloaders(trainer)
        self._parallelized = self.lightning_module

    def _save_plan(self, trainer: Trainer) -> None:
        """Writes the plan to the log folder, and to where the user wants it."""
        folder = trainer.log_dir  # all ranks together: it communicates
        if self.global_rank != 0 or not compat.is_fitting(trainer):
            return
        # Not to the working directory, where it might be a file of the user's.
        if trainer.loggers and folder is not None:
            self.plan.save(Path(folder) / ckpt_files.PLAN_FILE)
        if self._stop_file is not None:
            try:
                self.plan.save(self._stop_file)
            except OSError as error:
                raise ValueError(f"out={self._stop_file!r} cannot be written: {error.strerror}.") from error

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        module, configured = self.lightning_module, self._configured
        assert module is not None
        if configured is None and self._optimizers_of is module:  # another fit of the same module
            with self._whole_model():
                configured = compat.configure_optimizers(module)
                names = parameter_names(configured[0], module)
            configured = self._rebound(configured, names)
        self._configured = None
        if configured is None:  # with what this rank has
            super().setup_optimizers(trainer)
        else:
            self.optimizers, self.lr_scheduler_configs = configured

    def _rebound(self, configured: Configured, names: list[GroupNames] | None) -> Configured | None:
        """Optimizers of the whole model, given what this rank has of it; ``None`` if they must be configured again."""
        assert self.lightning_module is not None
        optimizers, _ = configured
        self._optimizer_names = names if all(map(can_rebind, optimizers)) else None
        if self._optimizer_names is None:
            return None
        parameters = dict(self.lightning_module.named_parameters())
        for optimizer, groups in zip(optimizers, self._optimizer_names, strict=True):
            rebind(optimizer, groups, parameters, slice_parts(self.lightning_module))
        return configured

    def _check_optimizers(self) -> None:
        for optimizer in self.optimizers:
            if isinstance(optimizer, LBFGS):
                raise ValueError(
                    "LBFGS evaluates the loss several times per step, which a plan cannot: use another optimizer."
                )
            if isinstance(optimizer, Adafactor):
                raise ValueError("Adafactor does not run on distributed tensors: use another optimizer, AdamW say.")

    @property
    @override
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        ModelParallelStrategy.precision_plugin.fset(self, plugin)  # type: ignore[attr-defined]
        if plugin is not None:
            compat.clip_across_meshes(plugin, self._pipeline_group)

    # ------------------------------------------------------------------ data

    @override
    def process_dataloader(self, dataloader: object) -> object:
        if not self._shard_loaders or self._rows_plan is None or self._plan_mesh is None:
            return dataloader
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        training = compat.is_training_stage(trainer)
        if training and trainer.limit_train_batches == 1.0:
            samples = check_training_batches(dataloader, self._rows_plan, compat.steps_to_come(trainer))
            if samples not in (None, self._rows_plan.global_batch_size):
                rank_zero_warn(
                    f"the dataloader's batch_size is {samples}, but the plan is for a global batch of"
                    f" {self._rows_plan.global_batch_size}: what it predicts does not hold."
                )
        selector = RowSelector(self._rows_plan, self._plan_mesh, training=training)
        return shard_dataloader(dataloader, selector, self.broadcast)

    # ------------------------------------------------------------------ steps

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        if self._gradient_ranks > 1:
            # Gradients are summed over ranks, so the mean over data-parallel ranks is taken in the loss.
            closure_loss = closure_loss / self._gradient_ranks
        return super().backward(closure_loss, optimizer, *args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        self._agree_to_go_on()
        with compat.no_inference_tensors():
            return super().validation_step(*args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        self._agree_to_go_on()
        with compat.no_inference_tensors():
            return super().test_step(*args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        self._agree_to_go_on()
        with compat.no_inference_tensors():
            return super().predict_step(*args, **kwargs)

    def _agree_to_go_on(self) -> None:
        # Before batches of training Lightning's loop asks. Loaders of the user's own may differ in length.
        if self._sigterm is not None and self.cuts_batches:
            self._sigterm.agree()

    @contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        """Gradients are reduced once per accumulation window."""
        if not isinstance(self.model, FSDPModule):
            yield
            return
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)

    # ------------------------------------------------------------------ checkpoints

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return ckpt.model_state(self.lightning_module)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        assert self.lightning_module is not None
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        return ckpt.optimizer_state(self.lightning_module, optimizer)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__}.save_checkpoint(storage_options=...): only None is supported.")
        assert self.plan is not None and self.lightning_module is not None
        path = Path(self.broadcast(str(filepath)))
        metadata = dict(checkpoint)
        state = {"state_dict": metadata.pop("state_dict")}
        optimizer_states = metadata.pop("optimizer_states", [])
        state.update({f"optimizer_{index}": value for index, value in enumerate(optimizer_states)})
        if optimizer_states:
            metadata[ckpt_files.PARAMETER_GROUPS_KEY] = self._parameter_groups()
        ckpt.save_folder(state, metadata, self.plan.to_json(), path)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.lightning_module is not None
        path = Path(self.broadcast(str(checkpoint_path)))
        weights_only = self.weights_only if weights_only is None else weights_only
        strict = self.lightning_module.strict_loading
        if path.is_file():
            return self._load_file(path, weights_only, strict)
        names = self._parameter_groups() if self.optimizers else None
        ckpt.load_folder(self.lightning_module, self.optimizers, path, names, strict=strict)
        metadata = ckpt_files.load_metadata(path, weights_only)
        ckpt.check_parameter_groups(metadata.get(ckpt_files.PARAMETER_GROUPS_KEY), names)
        self._tell_what_changed(path / ckpt_files.PLAN_FILE)
        return metadata

    def _tell_what_changed(self, plan_file: Path) -> None:
        if not plan_file.is_file() or self.plan is None:
            return
        try:
            changed = self._what_changed(plan_file)
        except ValueError as error:  # it is there to be read; loading does not depend on it
            rank_zero_warn(f"the checkpoint does not tell under which plan it was written: {error}")
        else:
            rank_zero_info(f"since the checkpoint was written: {changed}")

    def _load_file(self, path: Path, weights_only: bool | None, strict: bool) -> dict[str, Any]:
        checkpoint: dict[str, Any] = ckpt_files.load_file(path, weights_only)
        ckpt_files.check_content(checkpoint, path)
        assert self.lightning_module is not None
        optimizers = self.optimizers if checkpoint.get("optimizer_states") else []
        names = self._parameter_groups() if optimizers else []
        ckpt.load_full(self.lightning_module, optimizers, checkpoint, names, strict=strict)
        return checkpoint

    def _parameter_groups(self) -> list[GroupNames] | None:
        assert self.lightning_module is not None
        module, known = self.lightning_module, self._optimizer_names
        return parameter_groups(module, self.optimizers, self._parameter_names, known)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing: :meth:`load_checkpoint` has filled the model."""
