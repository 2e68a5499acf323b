"""Every use of Lightning's private parts, in one place. Checked against lightning 2.6."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, NoReturn

import torch
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import SIGTERMException, _TunerExitException
from lightning.pytorch.utilities.seed import isolate_rng
from torchmetrics import Metric

from lightning_hetu.parallel.alone import running_alone
from lightning_hetu.parallel.clip import clip_gradients_by_norm
from lightning_hetu.planning.plan import HybridPlan


def setup_processes(strategy: ModelParallelStrategy) -> None:
    """What ``ModelParallelStrategy.setup_environment`` does, without its two-dimensional mesh."""
    ParallelStrategy.setup_environment(strategy)
    # Lightning's launcher limits the threads of the first process only; the others would all use every core.
    _set_num_threads_if_needed(num_processes=strategy.num_processes)
    state = torch.get_rng_state()  # Lightning seeds anew here; a run on one device would not
    strategy._setup_distributed()
    torch.set_rng_state(state)


def set_device_mesh(module: LightningModule, mesh: Any) -> None:
    """What users read as ``self.device_mesh``."""
    module._device_mesh = mesh


def keep_user_samplers(trainer: Trainer) -> bool:
    """Stops Lightning from replacing samplers: it would shuffle every training loader. Returns the user's setting."""
    connector = trainer._accelerator_connector
    before = bool(connector.use_distributed_sampler)
    connector.use_distributed_sampler = False
    return before


class SigtermWatch:
    """Ends a run in good order on SIGTERM: on all ranks together, between two batches.

    Lightning's handler communicates, in the middle of whatever the process was doing; with other collectives under way
    the processes then wait for each other forever. Here a rank only notes the signal, and the ranks agree on it before
    the next batch. A signal behind the last batch is delivered again once the Trainer is done.

    Args:
        trainer: The Trainer whose signals to watch.
        device: Where collectives run.
    """

    def __init__(self, trainer: Trainer, device: torch.device) -> None:
        self.device = device
        self.connector = trainer._signal_connector
        self.noted = False
        self.connector._sigterm_notifier_fn = self._note  # type: ignore[assignment,method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = self.agree  # type: ignore[method-assign]
        restore_handlers = _SignalConnector.teardown

        def teardown() -> None:
            restore_handlers(self.connector)
            if self.noted and not self.connector.received_sigterm:
                os.kill(os.getpid(), signal.SIGTERM)

        self.connector.teardown = teardown  # type: ignore[method-assign]

    def agree(self) -> None:
        """Raises on every rank if any has received SIGTERM; every rank must call it.

        Raises:
            SIGTERMException: With the exit status of a process that SIGTERM has ended.
        """
        noted = torch.tensor(int(self.noted), device=self.device)
        torch.distributed.all_reduce(noted, op=torch.distributed.ReduceOp.MAX)
        if noted.item():
            self.connector.received_sigterm = True
            raise SIGTERMException(128 + signal.SIGTERM)

    def _note(self, signum: int, _: Any) -> None:
        launcher = self.connector.trainer.strategy.launcher
        if not self.noted and launcher is not None:
            launcher.kill(signum)
        self.noted = True


def configure_optimizers(module: LightningModule) -> tuple[list[torch.optim.Optimizer], list[Any]]:
    """Optimizers and scheduler configurations of the module, checked by Lightning."""
    return _init_optimizers_and_lr_schedulers(module)


def configure_optimizers_early(
    trainer: Trainer, module: LightningModule
) -> tuple[list[torch.optim.Optimizer], list[Any]]:
    """The same before there is a plan.

    If that sets loaders up (``estimated_stepping_batches`` does), they will be set up once more under the plan: what
    they have drawn is put back.
    """
    states, before = _collect_rng_states(), trainer.fit_loop._combined_loader
    configured = configure_optimizers(module)
    if trainer.fit_loop._combined_loader is not before:
        _set_rng_states(states)
    return configured


def unsupported_callback(trainer: Trainer, plan: HybridPlan) -> str | None:
    """Why a callback of this Trainer cannot run on parameters that are distributed tensors."""
    meshes = {(row.shard_degree, row.tp, row.dp_type == "ddp", row.sharded) for _, row in plan.rows()}
    alike = (
        len(meshes) == 1
        and not (plan.layers[0].dp_type == "ddp" and plan.layers[0].sharded)
        and plan.pipeline_parallel_size == 1
        and plan.embedding.tp == 1
    )
    problem = averages_whole_parameters(trainer)
    if problem is not None:
        return problem
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BaseFinetuning) and not alike:
            return (
                f"{type(callback).__name__} compares parameters one by one, which only works where all are sharded"
                " alike: pin pipeline_parallel_size=1, max_tp=1 and dp_type='zero3'."
            )
    return None


def averages_whole_parameters(trainer: Trainer) -> str | None:
    """Why a callback of this Trainer cannot run on parameters that are sharded in any way."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
            return f"{type(callback).__name__} averages whole parameters, which no process has here: remove it."
    return None


def compares_parameters(trainer: Trainer, modes: set[str]) -> str | None:
    """Why a callback of this Trainer cannot run on parameters that are held in several ways."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BaseFinetuning) and len(modes) > 1:
            return (
                f"{type(callback).__name__} compares parameters one by one, which only works where all are sharded"
                " alike: give modes=['zdp'] and max_slices=1."
            )
    return None


def forget_dataloaders(trainer: Trainer) -> None:
    """Makes loops set their loaders up anew: some may have been built before there was a plan to cut them by."""
    for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
        loop._combined_loader = None
    trainer.predict_loop._combined_loader = None


def synchronize_epoch_metrics(module: LightningModule) -> None:
    """Averages logged values of an epoch over ranks unless the user says otherwise.

    Every rank has seen other rows. Schedulers, checkpoints and early stopping that decide by a rank's own value would
    decide differently on every rank.
    """
    log, log_dict = module.log, module.log_dict

    def of_epoch(options: dict[str, Any]) -> bool:
        trainer = module.trainer
        return bool(options.get("on_epoch", trainer.evaluating or trainer.sanity_checking))

    def synchronized_log(name: str, value: Any, *args: Any, **options: Any) -> None:
        if not args and not isinstance(value, Metric) and of_epoch(options):
            options.setdefault("sync_dist", True)
        log(name, value, *args, **options)

    def synchronized_log_dict(dictionary: Any, *args: Any, **options: Any) -> None:
        if not args and not any(isinstance(value, Metric) for value in dict(dictionary).values()) and of_epoch(options):
            options.setdefault("sync_dist", True)
        log_dict(dictionary, *args, **options)

    module.__dict__["log"], module.__dict__["log_dict"] = synchronized_log, synchronized_log_dict


def dataloader_of_run(trainer: Trainer) -> Any:
    """The loader of the running call as the user wrote it, built without disturbing the random state.

    That of training for ``trainer.fit``; the first one where evaluation has several.
    """
    loops = {
        TrainerFn.VALIDATING: trainer.validate_loop,
        TrainerFn.TESTING: trainer.test_loop,
        TrainerFn.PREDICTING: trainer.predict_loop,
    }
    loop: Any = loops.get(trainer.state.fn, trainer.fit_loop)  # type: ignore[arg-type]
    with isolate_rng():
        loader = loop._data_source.dataloader()
    return loader[0] if loop is not trainer.fit_loop and isinstance(loader, list | tuple) else loader


def step_of_run(trainer: Trainer, module: LightningModule) -> Any:
    """The method of the module that the running call gives batches to."""
    steps = {
        TrainerFn.VALIDATING: module.validation_step,
        TrainerFn.TESTING: module.test_step,
        TrainerFn.PREDICTING: module.predict_step,
    }
    return steps.get(trainer.state.fn, module.training_step)  # type: ignore[arg-type]


def combined(loaders: Any) -> Iterator[Any]:
    """Batches of several loaders side by side, as a training step is given them."""
    pairs: Iterator[Any] = iter(CombinedLoader(loaders, "max_size_cycle"))
    return (batch for batch, _, _ in pairs)


def steps_to_come(trainer: Trainer) -> int | None:
    """Training batches that ``max_steps`` allows; ``None`` if it does not limit them."""
    return None if trainer.max_steps < 0 else trainer.max_steps * trainer.accumulate_grad_batches


def is_fitting(trainer: Trainer) -> bool:
    """Whether the running call is ``trainer.fit``."""
    return trainer.state.fn == TrainerFn.FITTING


def end_run() -> NoReturn:
    """Ends the running call of the Trainer in good order, before its loop starts."""
    raise _TunerExitException


def is_training_stage(trainer: Trainer) -> bool:
    """Whether the loader being prepared is the one to train on."""
    stage = trainer.state.stage
    return stage is not None and stage.value == "train"


def clip_across_meshes(plugin: Precision, get_pipeline_group: Any) -> Precision:
    """Makes ``gradient_clip_val`` count every stage and every mesh."""

    def clip_grad_by_norm(self: Precision, optimizer: torch.optim.Optimizer, clip_val: int | float) -> None:
        clip_gradients_by_norm(self.main_params(optimizer), float(clip_val), get_pipeline_group())

    plugin.clip_grad_by_norm = MethodType(clip_grad_by_norm, plugin)  # type: ignore[method-assign]
    return plugin


@contextmanager
def no_inference_tensors() -> Iterator[None]:
    """Evaluation without gradients but not in inference mode, whose tensors FSDP cannot gather parameters into."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def silent_logging(module: LightningModule) -> Iterator[None]:
    """For running a step to look at it: ``self.log`` does nothing, and no layer waits for other ranks."""

    def ignore(*args: Any, **kwargs: Any) -> None:
        return None

    before = {name: module.__dict__.get(name) for name in ("log", "log_dict")}
    for name in before:
        module.__dict__[name] = ignore
    try:
        with running_alone():
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = value
