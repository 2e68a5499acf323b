"""OSDP plans for clusters that nobody has: the model is not run, and the devices are known by name only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lightning_hetu.parallel.batch import batch_samples, first_rows
from lightning_hetu.planning import cluster_preset, device_preset, format_bytes
from lightning_hetu.planning.osdp import HostLink, OSDPInfeasibleError, OSDPPlan
from lightning_hetu.planning.osdp.fsdp2 import NCCL
from lightning_hetu.planning.tables import text_table
from lightning_hetu.planning.units import format_seconds
from lightning_hetu.profiling import ProgressBar
from lightning_hetu.strategies import _lightning_compat as compat
from lightning_hetu.strategies._offline import Target, first_batch
from lightning_hetu.strategies._osdp_planner import (
    OSDPRequest,
    model_units,
    profile_units,
    search_plan,
    step_loss,
)

HOST_BANDWIDTH = 25e9
"""Bytes per second between a device and its host: PCIe 4.0 x16 carries 31.5 GB/s, of which copies from pinned memory
reach about 25 (bandwidthTest of NVIDIA's CUDA samples on A100). Newer hosts are faster."""


@dataclass(frozen=True)
class OfflineOSDPPlan:
    """The best plan for a target, or why there is none."""

    target: Target
    plan: OSDPPlan | None
    error: str | None = None


def plan_osdp_offline(
    trainer: Trainer,
    module: LightningModule,
    datamodule: LightningDataModule | None,
    request: OSDPRequest,
    targets: Sequence[Target],
    *,
    search_batch: bool = False,
) -> list[OfflineOSDPPlan]:
    """The best plan for each target, from shapes alone: no process group, no device.

    Args:
        trainer: Tells precision and accumulation; nothing is run.
        module: The model, on any device, the meta device included. Its optimizer counts as Adam.
        datamodule: Its data; only the shape of the first training batch counts, which is the global batch.
        request: What to choose from.
        targets: What to plan for.
        search_batch: Whether the batch size is searched too, for the most samples per second.

    Raises:
        ValueError: If the batch does not divide over the devices of a target.
    """
    with torch.device("meta"):
        module.configure_model()
    batch = first_batch(module, datamodule)
    samples = batch_samples(batch)
    module = cast(LightningModule, trainer.strategy.precision_plugin.convert_module(module))
    found = []
    for target in targets:
        cluster = cluster_preset(target.name)
        ranks = cluster.num_devices
        if samples % ranks:
            raise ValueError(
                f"cluster={target.name}: a training batch of {samples} samples does not divide over {ranks} devices:"
                f" give the data a batch_size that is a multiple of {ranks}."
            )
        rows = first_rows(batch, samples, samples // ranks)
        comm = HostLink(cluster, 1 / HOST_BANDWIDTH) if "off" in request.modes else cluster
        with compat.silent_logging(module), ProgressBar(f"searching a plan for {target.name}") as bar:
            bar(0, 2, "activations")
            units = model_units(request, trainer, module, torch.device("cpu"), rows)
            run = partial(step_loss, trainer)
            profile = profile_units(request, module, units, run, rows, trainer, device=device_preset(cluster.device))
            bar(1, 2, "modes")
            try:
                plan = search_plan(
                    request,
                    profile,
                    target.memory_budget,
                    comm=comm,
                    ranks=ranks,
                    micro_steps=trainer.accumulate_grad_batches,
                    search_batch=search_batch,
                    runtime=NCCL,
                )
                found.append(OfflineOSDPPlan(target, plan))
            except OSDPInfeasibleError as problem:
                found.append(OfflineOSDPPlan(target, None, str(problem)))
            bar(2, 2, "done")
    return found


def comparison(plans: Sequence[OfflineOSDPPlan]) -> str:
    """A table with one line per target, the fastest first."""
    heads = ("cluster", "limit", "step", "samples/s", "per device", "peak memory", "modes")
    rows = []
    for item in sorted(plans, key=lambda item: -_samples_per_second(item)):
        limit = format_bytes(item.target.memory_budget)
        if item.plan is None:
            rows.append((item.target.name, limit, "-", "-", "-", "-", f"none fits: {_needed(item.error or '')}"))
            continue
        rate = _samples_per_second(item)
        rows.append(
            (
                item.target.name,
                limit,
                format_seconds(item.plan.overlapped_seconds),
                f"{rate:.4g}",
                f"{rate / item.plan.world_size:.3g}",
                format_bytes(item.plan.peak_memory),
                item.plan.in_short,
            )
        )
    return text_table([heads, *rows])


def _samples_per_second(item: OfflineOSDPPlan) -> float:
    plan = item.plan
    if plan is None or not plan.overlapped_seconds:
        return 0.0
    return plan.batch_size * plan.micro_steps * plan.world_size / plan.overlapped_seconds


def _needed(text: str) -> str:
    start = text.find("the smallest feasible")
    return f"{text[start:].split(':')[0]})" if start >= 0 else text
