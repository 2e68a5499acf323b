"""Times one layer on a device and puts its costs together."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from statistics import median

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lightning_hetu.planning.profile import LayerProfile
from lightning_hetu.profiling._case import LayerCase, gradient_sink
from lightning_hetu.profiling._tensor_parallel import one_of
from lightning_hetu.profiling._tracker import LayerMemory, split_parameters, trace_memory

_log = logging.getLogger(__name__)

_LEAST_SECONDS = 0.03  # per number of samples


class Stopwatch:
    """Seconds between :meth:`start` and :meth:`mark`; by CUDA events where the work is queued on a stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._times = [0.0, 0.0]
        self._events: list[torch.cuda.Event] = []
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def start(self, *, wait: bool = True) -> None:
        """Begins; with ``wait`` after all that is queued on the device."""
        if self._events and wait:
            torch.cuda.synchronize(self._device)
        self._note(0)

    def mark(self) -> None:
        """Ends, without waiting for the device."""
        self._note(1)

    def read(self) -> float:
        """The seconds, once the device has come so far."""
        if not self._events:
            return self._times[1] - self._times[0]
        self._events[1].synchronize()
        return float(self._events[0].elapsed_time(self._events[1])) / 1e3

    def stop(self) -> float:
        """:meth:`mark` and :meth:`read`."""
        self.mark()
        return self.read()

    def _note(self, index: int) -> None:
        if self._events:
            self._events[index].record(torch.cuda.current_stream(self._device))
        else:
            self._times[index] = time.perf_counter()


def measure_layer(
    case: LayerCase,
    sizes: Sequence[int],
    *,
    repeats: int,
    device: torch.device,
    tick: Callable[[str], None] = lambda text: None,
    mesh: DeviceMesh | None = None,
) -> LayerProfile:
    """Profiles one layer.

    Forward is timed at every size, backward at the largest that fits; each time is the median of ``repeats`` runs after
    one that is not counted. Memory is taken at the largest size, so a part that does not grow with the batch (weights
    that autocast converted, say) is spread over that many samples.

    Args:
        case: The layer.
        sizes: Numbers of samples.
        repeats: Timed runs per number.
        device: Where the layer and its samples are.
        tick: Called before every measurement with what it is.
        mesh: A mesh of this process alone: tensor-parallel ranks are then timed with what DTensor adds.

    Raises:
        torch.OutOfMemoryError: If not even the smallest size fits.
        ValueError, RuntimeError: What the layer raises if it does not run with the real batch, or with no size.
    """
    points: list[tuple[int, float]] = []
    refused: Exception | None = None
    for samples in sorted(sizes):
        tick(f"{case.name}, {samples} samples")
        try:
            forward, _ = time_layer(case, samples, repeats, device)
        except torch.OutOfMemoryError as error:
            case.clear_gradients()
            refused = error.with_traceback(None)  # whose frames hold tensors
            _log.info("%s: %d samples do not fit on %s.", case.name, samples, device)
            break
        except (ValueError, RuntimeError) as error:
            # Batch normalization refuses a single sample, for one; the real batch must run.
            if samples == case.batch:
                raise
            case.clear_gradients()
            refused = error.with_traceback(None)  # whose frames hold tensors
            _log.info("%s: does not run with %d samples: %s", case.name, samples, error)
            continue
        points.append((samples, forward))
    if not points:
        assert refused is not None
        raise refused
    largest, ratio = _backward_ratio(case, [samples for samples, _ in points], repeats, device)
    tick(f"{case.name}, memory")
    profile = layer_profile(case, ascending(points), ratio, measure_memory(case, largest, device), largest)
    return replace(profile, tp_forward_time=_tensor_parallel_times(case, [n for n, _ in points], repeats, device, mesh))


def _tensor_parallel_times(
    case: LayerCase, sizes: Sequence[int], repeats: int, device: torch.device, mesh: DeviceMesh | None
) -> dict[int, tuple[tuple[float, float], ...]]:
    """Forward points of one rank at every tensor-parallel degree, at every other size."""
    times: dict[int, tuple[tuple[float, float], ...]] = {}
    for tp in case.tp_degrees:
        if tp == 1:
            continue
        try:
            with one_of(case, tp, mesh):
                points = [(n, time_layer(case, n, repeats, device)[0]) for n in sizes[::-2][::-1]]
        except (ValueError, RuntimeError) as error:
            case.clear_gradients()
            _log.info("%s: one of %d tensor-parallel ranks cannot be timed alone: %s", case.name, tp, error)
            continue
        times[tp] = ascending(points)
    return times


def ascending(points: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """The ``(size, seconds)`` such that nothing larger is faster: what disturbs a measurement only slows it down."""
    times = list(accumulate((seconds for _, seconds in reversed(points)), min))[::-1]
    return tuple((size, seconds) for (size, _), seconds in zip(points, times, strict=True))


def _backward_ratio(case: LayerCase, sizes: Sequence[int], repeats: int, device: torch.device) -> tuple[int, float]:
    """The largest of ``sizes`` whose backward fits, and backward over forward time there."""
    for samples in reversed(sizes):
        try:
            forward, backward = time_layer(case, samples, repeats, device, with_backward=True)
        except torch.OutOfMemoryError:
            case.clear_gradients()
            if samples == sizes[0]:
                raise
            continue
        return samples, backward / max(forward, 1e-9)
    raise ValueError("sizes=[]: expected at least one.")


def measure_memory(case: LayerCase, samples: int, device: torch.device) -> dict[int, LayerMemory]:
    """Bytes of one microbatch of ``samples`` at every tensor-parallel degree of the layer.

    From the sizes and lifetimes of all tensors; on CUDA also from the allocator, which knows what kernels use inside.
    """
    memory = trace_memory(case, samples)
    return _add_workspace(case, samples, memory, device) if device.type == "cuda" else memory


def time_layer(
    case: LayerCase, samples: int, repeats: int, device: torch.device, *, with_backward: bool = False
) -> tuple[float, float]:
    """Median seconds of forward and of backward (0 unless asked for, or where nothing is trained)."""
    watch = Stopwatch(device)
    forwards: list[float] = []
    backwards: list[float] = []
    begin = time.perf_counter()
    # Short layers are repeated for longer: their times vary more.
    while len(forwards) <= repeats or (time.perf_counter() - begin < _LEAST_SECONDS and len(forwards) <= 8 * repeats):
        with case.autocast():
            arguments = case.prepare(samples)
            watch.start()
            output = case.call(arguments)
            forwards.append(watch.stop())
            loss = gradient_sink(output)
        del output, arguments
        if with_backward and loss is not None:
            watch.start()
            loss.backward()
            backwards.append(watch.stop())
            case.clear_gradients()
        del loss
    return median(forwards[1:]), median(backwards[1:]) if backwards else 0.0


def layer_profile(
    case: LayerCase,
    points: Sequence[tuple[float, float]],
    backward_ratio: float,
    memory: dict[int, LayerMemory],
    samples: int,
) -> LayerProfile:
    """Puts the costs of a layer together.

    Args:
        case: The layer.
        points: ``(samples, seconds)`` of forward.
        backward_ratio: Backward time over forward time.
        memory: Bytes for a microbatch of ``samples``, per tensor-parallel degree.
        samples: See ``memory``.
    """
    owned = case.owned()
    split = [p for name, p in split_parameters(case).items() if name in owned]
    total = _num_bytes(list(owned.values()))
    trained = _num_bytes([p for p in owned.values() if p.requires_grad])
    gradients = {tp: item.backward_gradients for tp, item in memory.items()}
    if case.experts is not None:  # whose gradients were there as well
        gradients = {tp: min(size, trained) for tp, size in gradients.items()}
    return LayerProfile(
        name=case.name,
        parameter_bytes=total,
        tp_parameter_bytes=_num_bytes(split),
        forward_time=tuple(points),
        backward_ratio=backward_ratio,
        activation_bytes={tp: item.kept / samples for tp, item in memory.items()},
        boundary_bytes=case.boundary_bytes,
        forward_transient={tp: item.forward_extra / samples for tp, item in memory.items()},
        backward_transient={tp: item.backward_extra / samples for tp, item in memory.items()},
        backward_gradients=gradients,
        tp_degrees=case.tp_degrees,
        sequence_degrees=case.sequence_degrees,
        ulysses_degrees=case.ulysses_degrees,
        context_degrees=case.context_degrees,
        trainable_fraction=trained / total if total else 1.0,
        operators=case.operators,
        experts=case.experts,
    )


def _add_workspace(
    case: LayerCase, samples: int, memory: dict[int, LayerMemory], device: torch.device
) -> dict[int, LayerMemory]:
    """Adds what kernels allocate inside themselves, which only the allocator's counters show."""

    def run(work: Callable[[], Tensor | None]) -> tuple[Tensor | None, float, float]:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        torch.cuda.synchronize(device)
        return (
            result,
            torch.cuda.max_memory_allocated(device) - before,
            torch.cuda.memory_allocated(device) - before,
        )

    case.clear_gradients()
    loss, forward_peak, kept = run(lambda: case.forward(samples))
    one = memory[1]
    hidden = max(kept - one.kept, 0.0)
    forward_hidden = max(forward_peak - kept - one.forward_extra, 0.0)
    backward_hidden = 0.0
    if loss is not None:
        loss.backward()  # so that gradients exist and the next pass only adds to them
        del loss
        loss, _, _ = run(lambda: case.forward(samples))
        assert loss is not None
        _, backward_peak, _ = run(lambda: loss.backward())
        # Gradients are added to existing ones here: the new one of a parameter lives on top, at most the largest.
        largest = max((_num_bytes([p]) for p in case.module.parameters() if p.requires_grad), default=0)
        backward_hidden = max(backward_peak - one.backward_extra - largest, 0.0)
    case.clear_gradients()

    def grown(value: float, extra: float, at_one: float) -> float:
        return value + extra * (value / at_one if at_one else 1.0)

    return {
        tp: replace(
            item,
            kept=grown(item.kept, hidden, one.kept),
            forward_extra=grown(item.forward_extra, forward_hidden, one.forward_extra),
            backward_extra=grown(item.backward_extra, backward_hidden, one.backward_extra),
        )
        for tp, item in memory.items()
    }


def _num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
