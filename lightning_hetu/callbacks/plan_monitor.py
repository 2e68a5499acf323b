"""Compares what a plan promised with what it does."""

from __future__ import annotations

import time
from statistics import median
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_hetu.planning import HybridPlan, format_bytes
from lightning_hetu.planning.osdp import OSDPPlan
from lightning_hetu.profiling import MemoryMeter

Plan = HybridPlan | OSDPPlan


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
        plan: Plan | None = getattr(trainer.strategy, "plan", None)
        peaks = [self._memory]
        if torch.distributed.is_initialized():
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, self._memory)
            peaks = gathered
        per_stage = plan.devices_per_stage if isinstance(plan, HybridPlan) else len(peaks)
        self.stage_memory = [max(peaks[start : start + per_stage]) for start in range(0, len(peaks), per_stage)]
        rank_zero_info(self.summary(plan))

    @property
    def step_time(self) -> float | None:
        """Median seconds of a batch."""
        return median(self.step_times) if self.step_times else None

    def summary(self, plan: Plan | None) -> str:
        """One line about time and one about memory."""
        expected = _expected(plan)
        lines = []
        if self.step_time is not None:
            line = f"step time: measured {self.step_time * 1e3:.1f} ms"
            if expected is not None and expected.seconds:
                line += f", predicted {expected.seconds * 1e3:.1f} ms"
            lines.append(line)
        if any(self.stage_memory):
            line = "peak memory per stage: measured " + ", ".join(format_bytes(peak) for peak in self.stage_memory)
            if expected is not None:
                line += "; predicted " + ", ".join(format_bytes(peak) for peak in expected.memory)
                if expected.limit is not None and max(self.stage_memory) > expected.limit:
                    line += f"; over the budget of {format_bytes(expected.limit)}"
            lines.append(line)
        return "\n".join(lines)


class _Expected(NamedTuple):
    """What a plan promises: seconds of a batch, bytes of every stage, and the bytes that were allowed."""

    seconds: float
    memory: tuple[int, ...]
    limit: int | None


def _expected(plan: Plan | None) -> _Expected | None:
    if isinstance(plan, OSDPPlan):
        seconds = plan.overlapped_seconds or plan.seconds
        return _Expected(seconds / plan.micro_steps, (plan.peak_memory,), plan.memory_limit)
    if plan is None or plan.prediction is None:
        return None
    predicted = plan.prediction
    return _Expected(predicted.iteration_time, tuple(predicted.stage_memory), predicted.memory_budget)


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
