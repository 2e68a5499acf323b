"""Profiles the units of a model for OSDP: their sizes and seconds, and the activations alive at every moment of a step.

One forward and backward of the model on fake tensors is enough, for a described device and any batch: sizes of storages
and counted operations do not need values. Hooks stand where FSDP2 has its own, so that
:mod:`lightning_hetu.planning.osdp.timeline` can play any plan on what they saw. Operations are priced by the roofline
model and counted for the innermost unit that is running: in forward the module that was called, in backward the one
whose forward made the node that autograd runs, told by the node's sequence number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_hetu.parallel.batch import batch_samples
from lightning_hetu.parallel.forward_trace import fake_batch
from lightning_hetu.parallel.osdp.discover import ROOT, Unit
from lightning_hetu.parallel.transformers_compat import forget_fake_tensors, use_batched_experts
from lightning_hetu.planning.osdp.operator import Cut, Operator
from lightning_hetu.planning.osdp.timeline import Bytes, Moment, StepProfile
from lightning_hetu.planning.presets import KERNEL_SECONDS, DevicePreset, device_preset
from lightning_hetu.profiling._isolation import untouched
from lightning_hetu.profiling._step_observer import Observer, Trace, shardable

_SLICE_KERNELS = 6
"""Kernels that a slice adds: a product and a sum in forward, two products and two sums in backward."""


def profile_operators(
    module: nn.Module,
    units: Sequence[Unit],
    run: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    samples: int,
    *,
    device: DevicePreset | str | None = None,
    cuts: Callable[[nn.Module], tuple[Cut, ...]] | None = None,
    max_slices: int = 8,
    fake: bool = True,
    shared: Iterable[Any] = (),
) -> StepProfile:
    """Runs one forward and backward of a model under observation.

    Args:
        module: The model; it is not changed.
        units: Its units; see :func:`lightning_hetu.parallel.osdp.discover.find_units`.
        run: Forward pass and loss: ``run(module, batch)`` gives a scalar. It enters autocast itself, if it is used.
        batch: A local batch, any nesting of tensors.
        samples: Samples to profile; on fake tensors it may differ from those in ``batch``.
        device: The device to plan for, or its name (see ``DEVICE_PRESETS``): it gives the seconds, and runs attention,
            RMSNorm and dropout as single kernels. ``None``: no seconds are known, and the kernels are those of the CPU.
        cuts: How a module can be cut into slices; by default none can.
        max_slices: Most slices.
        fake: Whether to run a copy of fake tensors instead of the module itself.
        shared: Objects that the module refers to and a copy of it must share, such as a Trainer.

    Raises:
        ValueError: If the loss is no scalar with a gradient, a number is out of range, or the model decides by values
            what to compute, so that fake tensors cannot run it.
    """
    for name, value in (("samples", samples), ("max_slices", max_slices)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: expected an integer of at least 1.")
    preset = None if device is None else device_preset(device)
    observe = _observe_fake if fake else _observe_real
    traces = observe(module, units, run, batch, samples, preset, tuple(shared))
    first = traces[0]
    return StepProfile(
        operators=tuple(_operator(module, unit, first, cuts, max_slices, preset is not None) for unit in units),
        moments=_moments(traces),
        tree=tuple(_tree(module, units)),
        base=_base_bytes(module),
        batch=_line([(trace.samples, trace.batch) for trace in traces]),
        samples=samples,
        dtypes={unit.name: (unit.half.itemsize, 4) for unit in units if unit.half is not None},
        boundaries={
            name: (
                _line([(trace.samples, trace.inputs.get(name, 0)) for trace in traces]),
                _line([(trace.samples, trace.outputs.get(name, 0)) for trace in traces]),
            )
            for name in first.inputs
        },
    )


def _observe_fake(
    module: nn.Module,
    units: Sequence[Unit],
    run: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    samples: int,
    preset: DevicePreset | None,
    shared: tuple[Any, ...],
) -> list[Trace]:
    """Runs of ``samples`` and of twice as many."""
    with forget_fake_tensors(), FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
        copied = _fake_copy(module, units, shared)
        try:
            return [
                Observer(copied, units, preset).observe(run, fake_batch(batch, count), count)
                for count in (samples, 2 * samples)
            ]
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(
                f"{type(module).__name__} decides by the values in a tensor what to compute ({error}): give fake=False,"
                " which runs it."
            ) from error


def _observe_real(
    module: nn.Module,
    units: Sequence[Unit],
    run: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    samples: int,
    preset: DevicePreset | None,
    shared: tuple[Any, ...],
) -> list[Trace]:
    """A run of ``samples``, and one of half as many if that can be."""
    del shared
    rows = batch_samples(batch)
    if samples > rows:
        raise ValueError(f"samples={samples}: expected at most {rows}, those in the batch, or fake=True.")
    if half := [unit.name for unit in units if unit.half is not None]:
        raise ValueError(f"fake=False: unit {half[0]!r} is gathered in another dtype, which needs a copy: fake=True.")
    device = next((item.device for item in tree_leaves(batch) if isinstance(item, Tensor)), torch.device("cpu"))

    def cut(count: int) -> Any:
        def rows_of(value: Any) -> Any:
            batched = isinstance(value, Tensor) and value.ndim and value.shape[0] == rows
            return value[:count].clone() if batched else value

        return tree_map(rows_of, batch)

    with untouched(module, device):
        traces = []
        for count in sorted({samples, max(samples // 2, 1)}, reverse=True):
            traces.append(Observer(module, units, preset).observe(run, cut(count), count))
        return traces


def _fake_copy(module: nn.Module, units: Sequence[Unit], shared: tuple[Any, ...]) -> nn.Module:
    """The module with fake tensors, those of units in the dtype they are gathered in; to be called in fake mode."""
    memo: dict[int, Any] = {id(item): item for item in shared}
    half = {id(module.get_parameter(name)): unit.half for unit in units for name in unit.parameters}
    for tensor in chain(module.parameters(), module.buffers()):
        empty = torch.empty(tensor.shape, dtype=half.get(id(tensor)) or tensor.dtype)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    copied = copy.deepcopy(module, memo).train()
    use_batched_experts(copied)
    return copied


def _operator(
    module: nn.Module,
    unit: Unit,
    trace: Trace,
    cuts: Callable[[nn.Module], tuple[Cut, ...]] | None,
    max_slices: int,
    priced: bool,
) -> Operator:
    parameters = shardable(module, unit)
    layer = module if unit.name == ROOT else module.get_submodule(unit.name)
    shapes = tuple(tuple(parameter.shape) for parameter in parameters)
    possible = cuts(layer) if cuts is not None and unit.leaf and unit.name != ROOT and shapes else ()
    slices = 1
    if possible:
        dim = int(possible[0] == "input")
        slices = min((shape[dim] for shape in shapes if len(shape) > dim), default=1)
    forward, backward = trace.seconds.get(unit.name, (0.0, 0.0))
    return Operator(
        unit.name,
        parameters=-1 if shapes else 0,
        shapes=shapes,
        dtype_bytes=max((parameter.element_size() for parameter in parameters), default=4),
        trained=any(parameter.requires_grad for parameter in parameters),
        forward_seconds=forward / trace.samples,
        backward_seconds=backward / trace.samples,
        activation_bytes=max(trace.kept.get(unit.name, 0.0), 0.0) / trace.samples,
        cuts=possible,
        max_slices=max(min(slices, max_slices), 1) if possible else 1,
        split_seconds=_SLICE_KERNELS * KERNEL_SECONDS if possible and priced else 0.0,
        kind=unit.kind,
        excluded=("dp",) if unit.name == ROOT else (),  # inside of replicated modules nothing can be sharded
    )


def _tree(module: nn.Module, units: Sequence[Unit]) -> list[str]:
    names = {unit.name for unit in units}
    return [name or ROOT for name, _ in module.named_modules() if (name or ROOT) in names]


def _base_bytes(module: nn.Module) -> int:
    """Buffers, and parameters that every rank keeps whole."""
    plain = [p for p in module.parameters() if not p.ndim or not p.numel()]
    return sum(tensor.numel() * tensor.element_size() for tensor in chain(module.buffers(), plain))


def _moments(traces: Sequence[Trace]) -> tuple[Moment, ...]:
    """The moments with bytes as lines through those of the runs, if the same things happened in them."""
    first = traces[0]
    alike = [trace for trace in traces if [m[:3] for m in trace.moments] == [m[:3] for m in first.moments]]
    found = []
    for rows in zip(*(trace.moments for trace in alike), strict=True):
        alive, most = (
            _line([(trace.samples, row[column]) for trace, row in zip(alike, rows, strict=True)]) for column in (3, 4)
        )
        kind, unit, parameter, _, _ = rows[0]
        found.append(Moment(kind, unit, parameter, alive, most))
    return tuple(found)


def _line(points: Sequence[tuple[int, float]]) -> Bytes:
    """The line through the first and the last point; through zero if there is one point only."""
    (first, low), (last, high) = points[0], points[-1]
    if first == last:
        return Bytes(0.0, low / first)
    slope = (high - low) / (last - first)
    return Bytes(low - slope * first, slope)
