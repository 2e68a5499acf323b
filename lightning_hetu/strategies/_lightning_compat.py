"""Every use of Lightning's private parts, in one place. Checked against lightning 2.6."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, NoReturn

import torch
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import _TunerExitException
from lightning.pytorch.utilities.seed import isolate_rng
from torchmetrics import Metric

from lightning_hetu.parallel.clip import clip_gradients_by_norm


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


def end_after_sigterm(trainer: Trainer) -> None:
    """Makes SIGTERM end the run instead of blocking it in mid-step.

    Lightning's handler communicates, in the middle of whatever the process was doing; with other collectives under way
    the processes then wait for each other forever. Here rank 0 only notes the signal.

    Not yet a clean end: Lightning's check behind a batch raises on rank 0 alone, before the loop has told the others,
    so they end on a closed connection; what rank 0 does collectively on the exception (``save_on_exception``) hangs.
    """
    connector = trainer._signal_connector

    def note(self: Any, signum: Any, frame: Any) -> None:
        launcher = self.trainer.strategy.launcher
        if self.trainer.is_global_zero and not self.received_sigterm:
            self.received_sigterm = True
            if launcher is not None:
                launcher.kill(signum)

    connector._sigterm_notifier_fn = MethodType(note, connector)  # type: ignore[method-assign]


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


def train_dataloader(trainer: Trainer) -> Any:
    """The training loader as the user wrote it, built without disturbing the random state."""
    with isolate_rng():
        return trainer.fit_loop._data_source.dataloader()


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
    """``self.log`` does nothing inside: there is no loop yet that could collect values."""

    def ignore(*args: Any, **kwargs: Any) -> None:
        return None

    before = {name: module.__dict__.get(name) for name in ("log", "log_dict")}
    for name in before:
        module.__dict__[name] = ignore
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = value
