"""Records where tokens go while a model trains, for replaying it later on other clusters and placements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_hetu.moe.gradients import moe_layers
from lightning_hetu.moe.placement import save_trace


class RoutingTrace(Callback):
    """Writes the tokens of every step, by the rank they came from and the expert they went to.

    One file ``layer<number>.npz`` for each mixture-of-experts layer, with ``counts`` int32 ``[steps, ranks, experts]``:
    those of optimizer steps, micro-batches added up. ``python -m lightning_hetu.moe.placement`` replays them.

    Args:
        folder: Where to write, at the end of training; relative to ``default_root_dir``.
        max_steps: Steps after which nothing more is recorded.

    Raises:
        ValueError: If ``max_steps`` is below 1.
    """

    def __init__(self, folder: str | Path = "routing", max_steps: int = 10_000) -> None:
        if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
            raise ValueError(f"max_steps={max_steps!r}: expected an integer of at least 1.")
        self.folder, self.max_steps = Path(folder), max_steps
        self._step = 0
        self._steps: list[Tensor] = []
        """Of each step int64 ``[layers, experts]``, this rank's own tokens."""
        self._current: Tensor | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins anew.

        Raises:
            ValueError: If the model has no layers, or they have different numbers of experts.
        """
        check_layers("RoutingTrace", pl_module)
        self._step, self._steps, self._current = trainer.global_step, [], None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds up the micro-batches of a step."""
        if len(self._steps) >= self.max_steps:
            return
        counts = step_counts(pl_module)
        self._current = counts if self._current is None else self._current + counts
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self._steps.append(self._current.cpu())
            self._current = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collects the counts of all ranks and writes them."""
        if not self._steps:
            return
        everyone = gathered(torch.stack(self._steps).to(trainer.strategy.root_device)).cpu().numpy()
        if trainer.global_rank != 0:
            return
        folder = Path(trainer.default_root_dir) / self.folder
        folder.mkdir(parents=True, exist_ok=True)
        for layer in range(everyone.shape[2]):
            save_trace(everyone[:, :, layer].swapaxes(0, 1), folder / f"layer{layer}.npz")
        rank_zero_info(f"wrote the routing of {len(self._steps)} steps to {folder}")


def check_layers(callback: str, module: LightningModule) -> None:
    """Refuses models whose layers cannot be looked at together.

    Raises:
        ValueError: If there are none, or they have different numbers of experts.
    """
    numbers = {layer.num_experts for layer in moe_layers(module)}
    if not numbers:
        raise ValueError(f"{callback}: {type(module).__name__} has no MoELayer.")
    if len(numbers) > 1:
        raise ValueError(f"{callback}: layers have {sorted(numbers)} experts, expected the same number in all.")


def step_counts(module: LightningModule) -> Tensor:
    """Tokens that experts of each layer got from this rank in the last forward pass, int64 ``[layers, experts]``."""
    return torch.stack(
        [
            layer.last.kept_per_expert
            if layer.last is not None
            else torch.zeros(layer.num_experts, dtype=torch.int64, device=module.device)
            for layer in moe_layers(module)
        ]
    )


def gathered(counts: Tensor) -> Tensor:
    """The counts of all ranks, ``[ranks, ...]``."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return counts.unsqueeze(0)
    parts = [torch.empty_like(counts) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, counts.contiguous())
    return torch.stack(parts)
