"""Plans for clusters that nobody has: the model is not run, and the devices are known by name only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_hetu.parallel.batch import batch_samples, first_rows
from lightning_hetu.parallel.forward_trace import trace_structure
from lightning_hetu.parallel.pipeline_mixin import runs_own_forward, uses_pipeline
from lightning_hetu.parallel.structure import find_structure
from lightning_hetu.planning import (
    HetuConstants,
    HybridPlan,
    ModelProfile,
    NoFeasiblePlanError,
    cluster_preset,
    device_preset,
    format_bytes,
    search,
)
from lightning_hetu.planning.breakdown import breakdown
from lightning_hetu.planning.presets import Arithmetic
from lightning_hetu.planning.profile import Precision
from lightning_hetu.planning.tables import text_table
from lightning_hetu.planning.units import format_seconds, parse_bytes
from lightning_hetu.profiling import ProgressBar, estimate_model
from lightning_hetu.strategies import _lightning_compat as compat
from lightning_hetu.strategies._planner import PlanRequest, pipeline_example

_USABLE_MEMORY = 0.9
_ESTIMATED_SAMPLES = 4
"""Samples in the batch that is estimated: enough for the weights that autocast copies not to count for each of them."""


@dataclass(frozen=True)
class Target:
    """What to plan for: a cluster, and how much of each device's memory to use.

    Args:
        name: Name of the cluster, as :func:`~lightning_hetu.planning.cluster_preset` reads it.
        memory_budget: Bytes per device.
    """

    name: str
    memory_budget: int

    @classmethod
    def parse(cls, text: str, memory_budget: int | str | None = None) -> Target:
        """Reads ``"2x8xH100-80GB"`` or ``"2x8xH100-80GB@70GiB"``.

        Args:
            text: Name of a cluster, optionally ``@`` and the memory to use of each device.
            memory_budget: The memory where the text has none; 90 percent of what a device has where neither does.

        Raises:
            ValueError: If the cluster is unknown or the size malformed.
        """
        name, _, own = text.partition("@")
        cluster = cluster_preset(name.strip())
        budget = own.strip() or memory_budget
        if budget is None:
            assert cluster.device_memory is not None  # every preset has it
            return cls(name.strip(), int(cluster.device_memory * _USABLE_MEMORY))
        return cls(name.strip(), parse_bytes(budget))


@dataclass(frozen=True)
class OfflinePlan:
    """The best plan for a target, or why there is none.

    Args:
        target: What it is for.
        plan: The plan.
        error: Why there is none.
        tokens_per_sample: Tokens in a sample, where samples are sequences of tokens.
        model_flops: Floating-point operations of one sample, forward and backward: matrix products, and attention as
            its kernel computes it. Recomputation of layers is not counted.
        peak_flops: Operations per second of one device at most, for this precision.
        breakdown: Tables of where its time and memory go.
    """

    target: Target
    plan: HybridPlan | None
    error: str | None
    tokens_per_sample: int | None
    model_flops: float
    peak_flops: float
    breakdown: Callable[[], str] | None = None

    @property
    def seconds(self) -> float:
        """Predicted seconds of a step; infinite where there is no plan."""
        if self.plan is None or self.plan.prediction is None:
            return math.inf
        return self.plan.prediction.iteration_time

    @property
    def samples_per_second(self) -> float:
        """Predicted samples per second on all devices."""
        return 0.0 if self.plan is None else self.plan.global_batch_size / self.seconds

    @property
    def utilization(self) -> float:
        """Model FLOPs utilization: the model's operations per second over the peak of all devices (2204.02311, B)."""
        if self.plan is None:
            return 0.0
        return self.samples_per_second * self.model_flops / (self.plan.world_size * self.peak_flops)

    def speed(self) -> str:
        """One line on the predicted speed."""
        tokens = ""
        if self.tokens_per_sample is not None:
            tokens = f"{self.samples_per_second * self.tokens_per_sample:,.0f} tokens/s, "
        return (
            f"{self.target.name}: {self.samples_per_second:.4g} samples/s, {tokens}model FLOPs utilization"
            f" {self.utilization:.1%} of {self.peak_flops / 1e12:.4g} TFLOP/s per device"
        )


def plan_offline(
    trainer: Trainer,
    module: LightningModule,
    datamodule: LightningDataModule | None,
    request: PlanRequest,
    targets: Sequence[Target],
) -> list[OfflinePlan]:
    """The best plan for each target.

    Args:
        trainer: Tells precision and accumulation; nothing is run.
        module: The model, on any device, the meta device included. Its optimizer counts as Adam.
        datamodule: Its data; only the shape of the first training batch counts, which is the global batch.
        request: Blocks and pins.
        targets: What to plan for.

    Raises:
        ValueError: If the model has no pipeline support, or the data yields no batch.
    """
    if not uses_pipeline(module):
        raise ValueError(
            f"{type(module).__name__} has no pipeline support: only a PipelineMixin can be planned without running it."
        )
    batch = first_batch(module, datamodule)
    samples = batch_samples(batch)
    with compat.silent_logging(module):
        inputs, target = pipeline_example(module, batch)
    if runs_own_forward(module):
        structure = trace_structure(module, inputs, request.blocks)
    else:
        structure = find_structure(module, request.blocks)
    inputs, target = (first_rows(value, samples, min(samples, _ESTIMATED_SAMPLES)) for value in (inputs, target))
    tokens = _tokens(inputs)
    plugin = trainer.strategy.precision_plugin
    precision = cast(Precision, plugin.precision)
    module = cast(LightningModule, plugin.convert_module(module))  # to half precision, where all of it is
    counted = estimate_model(module, structure, inputs, target, flops_per_second=1.0, precision=precision)
    profiles: dict[tuple[str, int], ModelProfile] = {}
    found = []
    for item in targets:
        cluster = cluster_preset(item.name)
        device = device_preset(cluster.device)
        key = cluster.device, min(cluster.devices_per_node, cluster.num_devices)
        if key not in profiles:
            profiles[key] = estimate_model(
                module, structure, inputs, target, device=device, precision=precision, max_tp=key[1]
            )
        plan, error, tables = None, None, None
        constants = HetuConstants(accumulates=trainer.accumulate_grad_batches > 1)
        try:
            with ProgressBar(f"searching a plan for {item.name}") as bar:
                plan = search(
                    profiles[key],
                    cluster,
                    memory_budget=item.memory_budget,
                    global_batch_size=samples,
                    constants=constants,
                    progress=lambda done, total, bar=bar: bar(done, total, ""),  # type: ignore[misc]
                    **request.pins,
                )
            tables = partial(breakdown, plan, profiles[key], cluster, constants=constants)
        except NoFeasiblePlanError as problem:
            error = str(problem)
        arithmetic: Arithmetic = "float32" if precision == "32-true" else "half"
        operations = _flops_per_sample(counted)
        found.append(OfflinePlan(item, plan, error, tokens, operations, device.peak_flops(arithmetic), tables))
    return found


def first_batch(module: LightningModule, datamodule: LightningDataModule | None) -> object:
    with torch.device("cpu"):  # samplers draw their order there
        if datamodule is not None:
            datamodule.prepare_data()
            datamodule.setup("fit")
        loader = (module if datamodule is None else datamodule).train_dataloader()
        batch = next(iter(loader), None)
    if batch is None:
        raise ValueError("the training dataloader yields no batch: there is nothing to plan for.")
    return batch


def _tokens(inputs: Any) -> int | None:
    """Length of a sample, where the first input is a batch of sequences of whole numbers."""
    first = next((item for item in tree_leaves(inputs) if isinstance(item, Tensor)), None)
    return first.shape[1] if first is not None and first.ndim == 2 and not first.is_floating_point() else None


def _flops_per_sample(counted: ModelProfile) -> float:
    """Operations of one sample, from a profile whose seconds are operations."""
    layers = [counted.embedding, *(counted.block(i) for i in range(counted.num_layers)), counted.head]
    return sum(layer.forward_seconds(1) * (1 + layer.backward_ratio) for layer in layers)


def comparison(plans: Sequence[OfflinePlan]) -> str:
    """A table with one line per target, the fastest first."""
    heads = ("cluster", "memory", "step", "samples/s", "per device", "utilization", "peak memory", "plan")
    rows = []
    for item in sorted(plans, key=lambda item: -item.samples_per_second):
        memory = format_bytes(item.target.memory_budget)
        if item.plan is None or item.plan.prediction is None:
            rows.append((item.target.name, memory, "-", "-", "-", "-", "-", f"none fits: {_needed(item)}"))
            continue
        rows.append(
            (
                item.target.name,
                memory,
                format_seconds(item.seconds),
                f"{item.samples_per_second:.4g}",
                f"{item.samples_per_second / item.plan.world_size:.3g}",
                f"{item.utilization:.1%}",
                format_bytes(max(item.plan.prediction.stage_memory)),
                _in_short(item.plan),
            )
        )
    return text_table([heads, *rows])


def _needed(item: OfflinePlan) -> str:
    text = item.error or ""
    return text[text.rfind("smallest") :].rstrip(".") if "smallest" in text else text


def _in_short(plan: HybridPlan) -> str:
    runs = list(dict.fromkeys(str(layer) for layer in plan.layers))
    count = plan.num_microbatches
    shown = ", ".join(runs[:3]) + (", ..." if len(runs) > 3 else "")
    return f"pp{plan.pipeline_parallel_size}, {count} microbatch{'es' * (count > 1)}, {shown}"
