"""Measures which constants of FSDP2's memory hold for this torch, device and process group, and what its calls take.

What :mod:`lightning_hetu.planning.osdp.fsdp2` assumes was read in one version of torch. A probe of two sizes tells what
a step really allocates per byte of a layer, without what does not depend on the size; where that is not what the played
step says, torch has changed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_hetu.parallel.osdp.apply import apply_osdp
from lightning_hetu.parallel.osdp.discover import Unit
from lightning_hetu.planning.osdp import OperatorPlan, OSDPPlan
from lightning_hetu.planning.osdp.fsdp2 import Runtime
from lightning_hetu.planning.osdp.links import CollectiveSeconds
from lightning_hetu.planning.osdp.timeline import StepSettings, play_step
from lightning_hetu.profiling._measure import Stopwatch
from lightning_hetu.profiling.memory import MemoryMeter
from lightning_hetu.profiling.operators import profile_operators
from lightning_hetu.profiling.step_time import time_step

_log = logging.getLogger(__name__)

_ELEMENTS = (1 << 18, 1 << 19)
_WIDTHS = (256, 512)
_LAYERS = 4
_REPEATS = 3
_TOLERANCE = 0.02


@dataclass(frozen=True)
class Calibration:
    """What a probe found.

    Args:
        runtime: The constants that were measured one by one.
        measured: For each mode, bytes at the peak of a step per byte of a layer, of four equal ones.
        predicted: The same as the played step says with these constants.
    """

    runtime: Runtime
    measured: Mapping[str, float]
    predicted: Mapping[str, float]

    @property
    def holds(self) -> bool:
        """Whether predictions are within 2 % of what was measured."""
        return all(abs(self.predicted[mode] / self.measured[mode] - 1) <= _TOLERANCE for mode in self.measured)


def calibrate(
    mesh: DeviceMesh,
    *,
    modes: Iterable[str] = ("dp", "z2", "zdp"),
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] = torch.optim.AdamW,
) -> Calibration:
    """Measures the constants, and whether the steps of a small model are predicted with them.

    To be called by all ranks; a warning says where predictions fail.

    Args:
        mesh: One-dimensional mesh of the data-parallel ranks.
        modes: The modes to probe.
        optimizer: Makes the optimizer from parameters.
    """
    runtime = _measure_runtime(mesh, optimizer)
    measured, predicted = {}, {}
    for mode in modes:
        peaks = [_step_peak(mesh, mode, width, optimizer) for width in _WIDTHS]
        guesses = [_played_peak(mesh.size(), mode, width, runtime) for width in _WIDTHS]
        sizes = [4 * width * width for width in _WIDTHS]
        measured[mode] = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
        predicted[mode] = (guesses[1] - guesses[0]) / (sizes[1] - sizes[0])
    found = Calibration(runtime, measured, predicted)
    if not found.holds:
        shown = ", ".join(f"{mode} {predicted[mode]:.2f} for {measured[mode]:.2f}" for mode in measured)
        _log.warning(
            "torch %s on %s: the memory of FSDP2 is not what plans assume (predicted for measured, in layers: %s).",
            torch.__version__,
            mesh.device_type,
            shown,
        )
    return found


def call_overhead(mesh: DeviceMesh, comm: CollectiveSeconds, *, repeats: int = 7) -> float:
    """Seconds that a collective of FSDP2 takes beyond what ``comm`` says: hooks, copies, and starting it.

    To be called by all ranks. Found by steps of a small model, with everything sharded and with nothing. Where the
    device works on its own this is hidden behind its work, unless that is as small as the probe's.

    Args:
        mesh: One-dimensional mesh of the data-parallel ranks.
        comm: What knows how long collectives take.
        repeats: Timed steps.
    """
    device, ranks = _device(mesh), mesh.size()
    if ranks == 1:
        return 0.0
    model, units, run = _model(_WIDTHS[0])
    plan = OSDPPlan(ranks, tuple(OperatorPlan(unit.name, (("zdp", 1),)) for unit in units))
    batch = torch.ones(1, _WIDTHS[0], device=device)
    plain = time_step(model.to(device), run, batch, device, repeats=repeats)
    root = apply_osdp(model, units, plan, mesh)
    watch, found = Stopwatch(device), []
    for _ in range(repeats + 2):  # in the first ones FSDP2 prepares itself
        dist.barrier(mesh.get_group())
        watch.start()
        run(root, batch).backward()  # type: ignore[no-untyped-call]
        found.append(watch.stop())
    size = 4 * _WIDTHS[0] ** 2
    known = 2 * comm.seconds("all_gather", ranks, size) + comm.seconds("reduce_scatter", ranks, size)
    return max((median(found[2:]) - sum(plain)) / _LAYERS - known, 0.0) / 3


def _measure_runtime(mesh: DeviceMesh, optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Runtime:
    device, ranks, group = _device(mesh), mesh.size(), mesh.get_group()
    gather = scatter = 0.0
    if ranks > 1:
        whole = [torch.zeros(ranks * size, device=device) for size in _ELEMENTS]
        parts = [torch.zeros(size, device=device) for size in _ELEMENTS]
        # Torch 2.13 has renamed both.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        # Into its own part of the output, as FSDP2 does.
        gather = _copies(
            lambda i: all_gather(whole[i], whole[i].chunk(ranks)[mesh.get_local_rank()], group=group),
            [4 * tensor.numel() for tensor in whole],
            device,
        )
        scatter = _copies(
            lambda i: reduce_scatter(parts[i], whole[i], group=group),
            [4 * tensor.numel() for tensor in whole],
            device,
        )
    odd = [torch.zeros(size // 16 - 1, 16, device=device) for size in _ELEMENTS]
    flat = [torch.zeros(2, size // 2, device=device) for size in _ELEMENTS]
    bytes_of = [4 * size for size in _ELEMENTS]
    pads = _copies(lambda i: torch._chunk_cat([odd[i]], dim=0, num_chunks=2, out=flat[i]), bytes_of, device)
    half = [tensor.to(torch.bfloat16) for tensor in flat]
    casts = _copies(lambda i: flat[i].add_(half[i]), bytes_of, device)
    one, two, four = (_optimizer_copies(count, optimizer, device) for count in (1, 2, 4))
    every = (four - two) / 2
    return Runtime(
        gather_copies=gather,
        reduce_scatter_copies=scatter,
        pads_gradients=pads > 0.5,
        casts_copy=casts > 0.5,
        host_counts=device.type == "cpu",
        optimizer_each=max(round(one - every, 2), 0.0),
        optimizer_before=max(round(two - one - every, 2), 0.0),
        optimizer_all=max(round(every, 2), 0.0),
    )


def _device(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.accelerator.current_device_index())


def _copies(work: Callable[[int], object], sizes: list[int], device: torch.device) -> float:
    """Bytes that ``work`` allocates on the way, per byte of the larger size beyond the smaller one."""
    peaks = []
    for number in range(len(sizes)):
        work(number)
        peaks.append(min(_peak(lambda number=number: work(number), [], device) for _ in range(_REPEATS)))  # type: ignore[misc]
    return max(round((peaks[1] - peaks[0]) / (sizes[1] - sizes[0]), 2), 0.0)


def _optimizer_copies(
    count: int, optimizer: Callable[[list[Tensor]], torch.optim.Optimizer], device: torch.device
) -> float:
    """Bytes that a step of the optimizer allocates on the way, per byte of one of ``count`` equal parameters."""
    steps = []
    for size in _ELEMENTS:
        parameters: list[Tensor] = [nn.Parameter(torch.zeros(size, device=device)) for _ in range(count)]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        steps.append(optimizer(parameters).step)
    return _copies(lambda number: steps[number](), [4 * size for size in _ELEMENTS], device)


def _peak(work: Callable[[], object], alive: Iterable[Tensor], device: torch.device) -> int:
    # A thread of a collective may hold its buffer a moment longer.
    time.sleep(0.01)
    with MemoryMeter(device, tensors=alive) as meter:
        work()
    return meter.total


def _model(width: int) -> tuple[nn.Module, list[Unit], Callable[[nn.Module, Tensor], Tensor]]:
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(_LAYERS)))
    units = [Unit(str(index), (f"{index}.weight",), "Linear", leaf=True) for index in range(_LAYERS)]
    return model, units, lambda module, batch: module(batch).square().mean()


def _step_peak(
    mesh: DeviceMesh, mode: str, width: int, make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]
) -> int:
    device = _device(mesh)
    model, units, run = _model(width)
    plan = OSDPPlan(mesh.size(), tuple(OperatorPlan(unit.name, ((mode, 1),)) for unit in units))
    root = apply_osdp(model.to(device), units, plan, mesh)
    batch = torch.ones(1, width, device=device)
    optimizer = make_optimizer(list(root.parameters()))

    def step() -> None:
        loss = run(root, batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    for _ in range(2):  # what is made once is there then
        step()
    return min(_peak(step, _alive(root, optimizer), device) for _ in range(_REPEATS))


def _alive(root: nn.Module, optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    """Parameters, gradients and states, one at a time: nobody holds them while a step runs."""
    for parameter in root.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _played_peak(ranks: int, mode: str, width: int, runtime: Runtime) -> int:
    model, units, run = _model(width)
    profile = profile_operators(model, units, run, torch.ones(1, width), 1)
    settings = StepSettings(ranks, batch_size=1, runtime=runtime)
    return play_step(profile, {unit.name: ((mode, 1),) for unit in units}, settings).peak
