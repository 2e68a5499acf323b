"""What the LightningModules here have in common: AdamW, the learning rate of every step, and losses of text."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

LearningRateSchedule = Literal["cosine", "constant"]


class TrainedByAdamW(LightningModule):
    """A LightningModule that is trained by AdamW under a schedule, and knows how to log losses.

    Args:
        learning_rate: Highest learning rate of AdamW.
        betas: Decay rates of AdamW's two moments.
        weight_decay: Decoupled weight decay; matrices and tables only, not the norms' gains.
        lr_schedule: After the warmup, hold the learning rate or let it fall along half a cosine.
        warmup_steps: Optimizer steps over which the learning rate rises linearly from zero.
        total_steps: Optimizer steps at which the cosine ends. Default: as many as the Trainer will make; if it does not
            know (``max_epochs=-1`` without ``max_steps``), the learning rate is held.
        min_lr_ratio: Last learning rate of the cosine, as a fraction of ``learning_rate``.

    Raises:
        ValueError: If a rate or a number of steps is out of range.
    """

    def __init__(
        self,
        learning_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
        lr_schedule: LearningRateSchedule,
        warmup_steps: int,
        total_steps: int | None,
        min_lr_ratio: float,
    ) -> None:
        super().__init__()
        if learning_rate <= 0:
            raise ValueError(f"learning_rate={learning_rate}: expected a positive number.")
        if lr_schedule not in ("cosine", "constant"):
            raise ValueError(f"lr_schedule={lr_schedule!r}: expected 'cosine' or 'constant'.")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps={warmup_steps}: expected zero or more.")
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps={total_steps}: expected at least 1, or nothing to take the Trainer's.")
        self.learning_rate = learning_rate
        self.betas = betas
        self.weight_decay = weight_decay
        self.lr_schedule = lr_schedule
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.min_lr_ratio = min_lr_ratio

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, and a learning rate that is set anew at every optimizer step."""
        decayed = [parameter for parameter in self.parameters() if parameter.ndim >= 2]
        kept = [parameter for parameter in self.parameters() if parameter.ndim < 2]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": kept, "weight_decay": 0.0}]
        # A pipeline stage may hold no norm at all; its groups must still be those of the other stages.
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas)
        factor = partial(
            learning_rate_factor,
            warmup_steps=self.warmup_steps,
            total_steps=self._cosine_steps(),
            min_ratio=self.min_lr_ratio,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"},
        }

    def log_evaluation(self, stage: str, loss: Tensor, samples: int) -> None:
        """Log ``<stage>_loss`` and, where the datamodule knows its characters, the losses per character."""
        log = partial(self.log, on_epoch=True, sync_dist=True, batch_size=samples)
        log(f"{stage}_loss", loss, prog_bar=True)
        datamodule = getattr(self.trainer, "datamodule", None)
        characters_per_token = getattr(datamodule, "characters_per_token", None)
        if characters_per_token:
            log(f"{stage}_loss_per_character", loss / characters_per_token)
        bigram_loss = getattr(datamodule, "bigram_loss_per_character", None)
        if bigram_loss:
            log("bigram_loss_per_character", bigram_loss)

    def _cosine_steps(self) -> int | None:
        """Optimizer steps at which the cosine ends; ``None`` to hold the learning rate after the warmup."""
        if self.lr_schedule == "constant":
            return None
        if self.total_steps is not None:
            return self.total_steps
        if self._trainer is None:
            return None
        estimated = self.trainer.estimated_stepping_batches
        return int(estimated) if math.isfinite(estimated) else None


def learning_rate_factor(step: int, warmup_steps: int, total_steps: int | None, min_ratio: float) -> float:
    """What the highest learning rate is multiplied by: a linear rise, then half a cosine down to ``min_ratio``.

    Args:
        step: Optimizer steps made so far.
        warmup_steps: Steps of the rise; the first step already learns.
        total_steps: Step at which ``min_ratio`` is reached; ``None`` stays at 1 after the rise.
        min_ratio: Where the cosine ends.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if total_steps is None:
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
