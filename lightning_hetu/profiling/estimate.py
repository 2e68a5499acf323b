"""Profiles a model without running it: memory from fake tensors, times from counted operations.

For models that are too large for the machine at hand, or that exist on the meta device only. For a device known by name
the times are those of the roofline model; else matrix products alone count, at a given speed.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from lightning_hetu.parallel.forward_trace import fake_copy
from lightning_hetu.parallel.structure import ModelStructure
from lightning_hetu.planning.presets import DEVICE_PRESETS, DevicePreset, device_preset
from lightning_hetu.planning.profile import LayerProfile, ModelProfile, Precision
from lightning_hetu.profiling._case import LayerCase
from lightning_hetu.profiling._isolation import autocast_factory
from lightning_hetu.profiling._measure import layer_profile
from lightning_hetu.profiling._parts import model_parts
from lightning_hetu.profiling._roofline import FusedKernels, layer_operations, layer_seconds
from lightning_hetu.profiling._tensor_parallel import one_of
from lightning_hetu.profiling._tracker import trace_memory
from lightning_hetu.profiling.model import checked_sizes, optimizer_state_bytes

_log = logging.getLogger(__name__)


def estimate_model(
    module: nn.Module,
    structure: ModelStructure,
    inputs: Any,
    target: Any = None,
    *,
    flops_per_second: float | None = None,
    precision: Precision = "32-true",
    device: DevicePreset | torch.device | str = "cpu",
    max_tp: int = 1,
    optimizer: torch.optim.Optimizer | type[torch.optim.Optimizer] | str | None = None,
) -> ModelProfile:
    """Estimates a model with pipeline support; nothing is computed and no memory is used.

    For a device that is described::

        profile = estimate_model(module, structure, inputs, target, device="H100-80GB", precision="bf16-mixed")
        plan = search(profile, cluster_preset("2x8xH100-80GB"), memory_budget="72GiB")

    Args:
        module: The whole module, on any device; it is not changed.
        structure: Where its parts are; must name an embedding and a head.
        inputs: A local batch as the embedding takes it; only shape and dtype count, so it may be on the meta device.
        target: What ``pipeline_loss`` compares with, likewise. ``None`` leaves out the loss.
        flops_per_second: Floating-point operations per second that the device reaches in matrix products. The times
            count those only. Not with a described device, which has its own rates.
        precision: Lightning's name of the precision.
        device: The device to estimate for: a described one or its name (see
            :data:`~lightning_hetu.planning.presets.DEVICE_PRESETS`), or one of torch, which decides which kernels run,
            and so what they keep. On a described one attention, RMSNorm and dropout are single kernels, as on GPUs.
        max_tp: Largest tensor-parallel degree of interest.
        optimizer: See :func:`~lightning_hetu.profiling.profile_model`.

    Raises:
        ValueError: If the structure has no embedding or head, the device is not known, or ``flops_per_second`` is not
            positive, missing, or given for a described device.
    """
    if not structure.pipeline:
        raise ValueError(f"structure={structure}: names no embedding and head; only such models can be estimated.")
    preset, place = _target_device(device, flops_per_second)

    def fake(value: Any) -> Any:
        return torch.empty(value.shape, dtype=value.dtype, device=place) if isinstance(value, Tensor) else value

    def measure(case: LayerCase) -> LayerProfile:
        if preset is not None:
            return _roofline_layer(case, preset)
        assert flops_per_second is not None
        return _counted_layer(case, flops_per_second)

    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
        parts = model_parts(module, structure, autocast_factory(precision, place, None), max_tp)
        embedding, types, head = parts.profiles(
            tree_map(fake, inputs), tree_map(fake, target), lambda part: fake_copy(part, place), measure
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
        optimizer_state_bytes=optimizer_state_bytes(optimizer),
        tied_bytes=parts.tied_bytes,
        name=type(module).__name__,
    )


def _target_device(
    device: DevicePreset | torch.device | str, flops_per_second: float | None
) -> tuple[DevicePreset | None, torch.device]:
    """The described device, if it is one, and where the fake tensors are."""
    place: torch.device | None = None
    if not isinstance(device, DevicePreset):
        try:
            place = torch.device(device)
        except RuntimeError:  # no name that torch knows
            device = device_preset(str(device))
    if isinstance(device, DevicePreset):
        if flops_per_second is not None:
            raise ValueError(
                f"flops_per_second={flops_per_second}: leave it out, device={device.name!r} has rates of its own."
            )
        return device, torch.device("cpu")
    assert place is not None
    if flops_per_second is None:
        raise ValueError(
            f"device={str(device)!r} without flops_per_second: give that, or one of {', '.join(DEVICE_PRESETS)}."
        )
    if not flops_per_second > 0:
        raise ValueError(f"flops_per_second={flops_per_second}: expected a positive number.")
    return None, place


def _roofline_layer(case: LayerCase, device: DevicePreset) -> LayerProfile:
    """The layer on a described device, for the same numbers of samples that a measured one has."""
    times: dict[int, tuple[float, float]] = {}
    for samples in sorted({*checked_sizes(None, case.batch, 1), case.batch}):
        try:
            times[samples] = layer_seconds(case, samples, device)
        except ValueError as error:
            # Batch normalization refuses a single sample, for one; the given batch must run.
            if samples == case.batch:
                raise
            _log.info("%s: does not run with %d samples: %s", case.name, samples, error)
    with FusedKernels():
        memory = trace_memory(case, case.batch)
    forward, backward = times[case.batch]
    profile = layer_profile(
        case,
        points=[(samples, seconds) for samples, (seconds, _) in times.items()],
        backward_ratio=backward / forward if forward else 0.0,
        memory=memory,
        samples=case.batch,
    )
    parallel: dict[int, tuple[tuple[float, float], ...]] = {}
    for tp in case.tp_degrees[1:]:
        try:
            with one_of(case, tp):
                parallel[tp] = tuple((samples, layer_seconds(case, samples, device)[0]) for samples in times)
        except (ValueError, RuntimeError) as error:
            _log.info("%s: one of %d tensor-parallel ranks cannot be run alone: %s", case.name, tp, error)
    return replace(profile, tp_forward_time=parallel)


def _counted_layer(case: LayerCase, flops_per_second: float) -> LayerProfile:
    forward, backward = layer_operations(case, case.batch)
    return layer_profile(
        case,
        points=((case.batch, forward / flops_per_second),),
        backward_ratio=backward / forward if forward else 0.0,
        memory=trace_memory(case, case.batch),
        samples=case.batch,
    )
