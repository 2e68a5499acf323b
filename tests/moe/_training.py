"""Small trainings of models with experts, for several ranks and for one; imported by the processes themselves."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hetu.moe.gates import DTSGate
from lightning_hetu.moe.layer import MoELayer
from lightning_hetu.moe.mixin import MoEModuleMixin

DIM, EXPERTS, SAMPLES = 6, 4, 64


class Small(MoEModuleMixin, LightningModule):
    """Two layers of experts between two linear ones, and a regression."""

    def __init__(self, expert_parallel: int | None = None, **options: Any) -> None:
        super().__init__()
        self.expert_parallel = expert_parallel
        self.into, self.out = nn.Linear(DIM, DIM), nn.Linear(DIM, 1)
        self.layers = nn.ModuleList(MoELayer(DIM, 8, EXPERTS, activation="relu", **options) for _ in range(2))
        self.moe_coefficients = {"balance": 0.3, "z": 0.1}

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.into(x))
        for layer in self.layers:
            x = x + layer(x)
        return self.out(x).squeeze(-1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return (self(x) - y).square().mean() + self.moe_loss()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", (self(batch[0]) - batch[1]).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Watch(Callback):
    """Losses of all batches, means over ranks, and gates at each batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gates: list[tuple[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")
        self.losses.append(float(loss))
        for gate in pl_module.modules():
            if isinstance(gate, DTSGate):
                self.gates.append((gate.phase, float(gate.tau)))
                break


def data(rank: int, ranks: int, dtype: torch.dtype = torch.float32) -> DataLoader[Any]:
    """This rank's rows of batches of 16."""
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(SAMPLES, DIM, generator=draw)[rank::ranks].to(dtype)
    return DataLoader(TensorDataset(x, x.square().sum(dim=1)), batch_size=16 // ranks)


def fit(
    rank: int,
    folder: str,
    *,
    ranks: int = 1,
    module: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    callbacks: tuple[Callback, ...] = (),
    checkpoint: str | None = None,
    save: str | None = None,
    dtype: torch.dtype = torch.float32,
    kind: type[Small] = Small,
    validate: str | None = None,
) -> dict[str, Any]:
    """Trains on batches of 16 samples over all ranks; gives losses, weights of the whole model, and what was logged."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    model = kind(**(module or {})).to(dtype)
    watch = Watch()
    options: dict[str, Any] = {"max_epochs": 1, "log_every_n_steps": 1, "use_distributed_sampler": False}
    options |= trainer or {}
    rows, ours = (rank, ranks), "strategy" in options
    if ours:  # it cuts global batches
        rows = (0, 1)
        options |= {"devices": ranks, "use_distributed_sampler": True}
    elif ranks > 1:
        options |= {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": ranks}
    else:
        options |= {"devices": 1}
    runner = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[watch, *callbacks], **options,
    )  # fmt: skip
    runner.fit(model, data(*rows, dtype), ckpt_path=checkpoint, weights_only=False)
    if save is not None:
        runner.save_checkpoint(Path(folder) / save)
    if validate is not None:
        runner.validate(model, data(*rows, dtype), ckpt_path=validate, verbose=False, weights_only=False)
    logged = {name: float(value) for name, value in runner.callback_metrics.items()}
    if ours:
        share = model.layers[0].experts.num_slots
        return {"losses": watch.losses, "logged": logged, "step": runner.global_step, "share": share}
    values = runner._checkpoint_connector.dump_checkpoint(weights_only=False)
    return {
        "losses": watch.losses, "gates": watch.gates, "logged": logged, "weights": values["state_dict"],
        "optimizer": values["optimizer_states"], "step": runner.global_step,
    }  # fmt: skip
