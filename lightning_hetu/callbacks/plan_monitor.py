"""Compares what a plan promised with what it does."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_hetu.planning import HybridPlan, format_bytes
from lightning_hetu.profiling import MemoryMeter


class PlanMonitor(Callback):
    """Measures step time and peak memory under a plan, and says at the end how they compare with the prediction.

    Memory is of tensors: on CUDA ``max_memory_allocated``, on CPU every allocation of torch in one step.

    Args:
        memory_step: Batch, counted from the start of training, whose peak memory is measured; its time does not count.
        warmup: Batches before that are not timed.
    """

    def __init__(self, memory_step: int = 2, warmup: int = 3) -> None:
        self.memory_step = memory_step
        self.warmup = warmup
        self.step_times: list[float] = []
        self.stage_memory: list[int] = []
        self._batch = 0
        self._started = 0.0
        self._meter: MemoryMeter | None = None
        self._memory = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts over."""
        self._batch, self.step_times, self.stage_memory = 0, [], []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts the clock, or the memory meter."""
        if self._batch == self.memory_step:
            self._meter = MemoryMeter(pl_module.device, tensors=alive_tensors(pl_module, trainer))
            self._meter.__enter__()
        _synchronize(pl_module.device)
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops the clock, or the memory meter."""
        _synchronize(pl_module.device)
        seconds = time.perf_counter() - self._started
        if self._meter is not None:
            self._meter.__exit__(None, None, None)
            self._memory = self._meter.total
            self._meter = None
        elif self._batch >= self.warmup:
            self.step_times.append(seconds)
        self._batch += 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gathers the fullest rank of every stage and says how it compares."""
        plan: HybridPlan | None = getattr(trainer.strategy, "plan", None)
        peaks = [self._memory]
        if torch.distributed.is_initialized():
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, self._memory)
            peaks = gathered
        per_stage = plan.devices_per_stage if plan is not None else len(peaks)
        self.stage_memory = [max(peaks[start : start + per_stage]) for start in range(0, len(peaks), per_stage)]
        rank_zero_info(self.summary(plan))

    @property
    def step_time(self) -> float | None:
        """Median seconds of a batch."""
        return median(self.step_times) if self.step_times else None

    def summary(self, plan: HybridPlan | None) -> str:
        """One line about time and one about memory."""
        expected = plan.prediction if plan is not None else None
        lines = []
        if self.step_time is not None:
            line = f"step time: measured {self.step_time * 1e3:.1f} ms"
            if expected is not None:
                line += f", predicted {expected.iteration_time * 1e3:.1f} ms"
            lines.append(line)
        if any(self.stage_memory):
            line = "peak memory per stage: measured " + ", ".join(format_bytes(peak) for peak in self.stage_memory)
            if expected is not None:
                line += "; predicted " + ", ".join(format_bytes(peak) for peak in expected.stage_memory)
                if expected.memory_budget is not None and max(self.stage_memory) > expected.memory_budget:
                    line += f"; over the budget of {format_bytes(expected.memory_budget)}"
            lines.append(line)
        return "\n".join(lines)


def alive_tensors(module: LightningModule, trainer: Trainer) -> list[Tensor]:
    """Tensors that live from step to step: parameters, gradients, buffers and optimizer states."""
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    tensors += [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    for optimizer in trainer.optimizers:
        for state in optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return tensors


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
