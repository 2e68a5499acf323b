"""Profiles a model that can be cut into parts: embedding, one block of every kind, head with the loss.

Each part runs alone on real inputs, as in Galvatron's profiler (arXiv 2211.13878, section 3.3; arXiv 2307.02031). Where
Galvatron subtracts runs of models with different numbers of layers, a layer here is run by itself: one layer is enough,
so the cost does not grow with depth, and a model that does not fit on one device can still be profiled there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_hetu.parallel.batch import batch_samples
from lightning_hetu.parallel.structure import ModelStructure
from lightning_hetu.planning.profile import LayerProfile, ModelProfile, Precision
from lightning_hetu.profiling._agreement import gather, is_busy, lone_mesh, run_together
from lightning_hetu.profiling._isolation import AutocastFactory, autocast_factory, untouched
from lightning_hetu.profiling._measure import measure_layer
from lightning_hetu.profiling._parts import device_of, model_parts, place, to_device
from lightning_hetu.profiling.progress import ProgressCallback

# State tensors per parameter tensor, all in the parameter's dtype.
_OPTIMIZER_STATES = {
    "Adam": 2, "AdamW": 2, "NAdam": 2, "RAdam": 2, "Adamax": 2, "Adadelta": 2, "Adagrad": 1, "RMSprop": 1, "SGD": 0,
}  # fmt: skip


def profile_model(
    module: nn.Module,
    structure: ModelStructure,
    inputs: Any,
    target: Any = None,
    *,
    precision: Precision = "32-true",
    device: torch.device | str | None = None,
    autocast: AutocastFactory | None = None,
    max_tp: int = 1,
    batch_sizes: Sequence[int] | None = None,
    repeats: int = 5,
    optimizer: torch.optim.Optimizer | type[torch.optim.Optimizer] | str | None = None,
    slots: float | None = None,
    progress: ProgressCallback | None = None,
    group: dist.ProcessGroup | None = None,
) -> ModelProfile:
    """Measures a model with pipeline support.

    The module is left exactly as it was: parameters, gradients, buffers, training flags and random number generators.

    With torch.distributed every process calls this and gets the same profile. Processes that share the cores of a host
    measure at most ``slots`` at a time, so that the times are those of a process that has a core; the median over them
    counts.

    Args:
        module: The whole module; ``pipeline_loss(output, target)`` gives its loss. Parts that are on another device are
            copied to ``device`` one at a time, parts on the meta device are given memory and ``reset_parameters``.
        structure: Where its parts are; must name an embedding and a head.
        inputs: A local batch as the embedding takes it, batch in dimension 0; for a model that runs its own forward
            what that takes, any nesting of tensors.
        target: What ``pipeline_loss`` compares with; tensors with the batch in dimension 0. ``None`` leaves out the
            loss, except in a model that runs its own forward, whose inputs may hold labels.
        precision: Lightning's name of the precision; ``bf16-mixed`` implies autocast.
        device: Where to measure; by default where ``inputs`` are.
        autocast: Makes the context that forward runs under, if not the one of ``precision``.
        max_tp: Largest tensor-parallel degree of interest.
        batch_sizes: Samples per timed run; rows of the batch are repeated beyond its size. By default powers of two up
            to the batch, at least up to 4.
        repeats: Timed runs per size.
        optimizer: The optimizer, its class or the class name, for the size of its states; Adam by default.
        slots: Processes that compute at full speed together (:attr:`ClusterSpec.slots`). By default all on
            accelerators, one on CPU.
        progress: Called with steps done, steps in total, and the step.
        group: The processes; the default group for ``None``.

    Raises:
        ValueError: If the structure has no embedding or head, or an argument is out of range.
        RuntimeError: If profiling failed in another process.
    """
    if not structure.pipeline:
        raise ValueError(f"structure={structure}: names no embedding and head; profile it with profile_step.")
    device = torch.device(device) if device is not None else device_of(inputs)
    sizes = checked_sizes(batch_sizes, batch_samples(inputs), repeats)
    state_bytes = optimizer_state_bytes(optimizer)

    def work() -> ModelProfile | None:
        if not is_busy(slots, device, group):
            return None
        parts = model_parts(module, structure, autocast_factory(precision, device, autocast), max_tp)
        tick = Ticker(progress, parts.count * (len(sizes) + 1))
        with untouched(module, device):
            embedding, types, head = parts.profiles(
                to_device(inputs, device),
                to_device(target, device),
                lambda part: place(part, device),
                lambda case: measure_layer(case, sizes, repeats=repeats, device=device, tick=tick, mesh=mesh),
            )
        return ModelProfile(
            layer_types=types,
            layers=tuple(parts.layers),
            embedding=embedding,
            head=head,
            precision=precision,
            pipeline=parts.pipeline,
            split_vocab=parts.split_vocab,
            schedules=parts.schedules,
            optimizer_state_bytes=state_bytes,
            tied_bytes=parts.tied_bytes,
            name=type(module).__name__,
        )

    with lone_mesh(device, group) as mesh:
        return profile_together(work, group)


class Ticker:
    """Counts the steps of a profile for a :data:`ProgressCallback`."""

    def __init__(self, progress: ProgressCallback | None, total: int) -> None:
        self.progress = progress
        self.total = total
        self.done = 0

    def __call__(self, description: str) -> None:
        """Another step begins."""
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total, description)
        self.done += 1


def checked_sizes(batch_sizes: Sequence[int] | None, batch: int, repeats: int) -> tuple[int, ...]:
    """Ascending batch sizes to time; see :func:`profile_model`.

    Raises:
        ValueError: If a size, the batch or ``repeats`` is below 1.
    """
    if batch < 1 or repeats < 1:
        raise ValueError(f"inputs of {batch} samples, repeats={repeats}: expected at least 1 of each.")
    if batch_sizes is None:
        top = max(batch, 4)
        batch_sizes = [*(1 << power for power in range(top.bit_length()) if 1 << power <= top), top]
    if not batch_sizes or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in batch_sizes):
        raise ValueError(f"batch_sizes={list(batch_sizes)}: expected whole numbers of at least 1.")
    return tuple(sorted(set(batch_sizes)))


def optimizer_state_bytes(optimizer: Any = None) -> float:
    """Bytes of optimizer states per byte of parameters.

    Args:
        optimizer: An optimizer, its class, or the class's name. ``None`` and unknown ones count as Adam: 2.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        name, options = type(optimizer).__name__, [optimizer.defaults, *optimizer.param_groups]
    else:
        name = optimizer.__name__ if isinstance(optimizer, type) else str(optimizer or "Adam")
        options = []
    states = float(_OPTIMIZER_STATES.get(name, 2))
    for option in ("amsgrad", "momentum", "centered"):
        # SGD and RMSprop have momentum and centered, Adam has amsgrad: each adds one more state.
        states += any(bool(values.get(option)) for values in options)
    return states


def profile_together(work: Callable[[], ModelProfile | None], group: dist.ProcessGroup | None) -> ModelProfile:
    """Runs ``work`` in all processes at once and makes one profile of what those measured that did not give ``None``.

    It is the first process's, with the median of the times; the same in every process.

    Raises:
        RuntimeError: If ``work`` failed in another process.
    """
    gather(None, group)  # so that those that measure do so at the same time
    found = [profile for profile in run_together(work, group) if profile is not None]

    def middle(layers: Sequence[LayerProfile]) -> LayerProfile:
        # A device that ran out of memory earlier than another timed fewer sizes.
        shortest = min(len(layer.forward_time) for layer in layers)
        times = zip(*(layer.forward_time[:shortest] for layer in layers), strict=True)
        return replace(
            layers[0],
            forward_time=tuple((points[0][0], median(seconds for _, seconds in points)) for points in times),
            backward_ratio=median(layer.backward_ratio for layer in layers),
        )

    return replace(
        found[0],
        layer_types=tuple(middle(layers) for layers in zip(*(p.layer_types for p in found), strict=True)),
        embedding=middle([p.embedding for p in found]),
        head=middle([p.head for p in found]),
    )
