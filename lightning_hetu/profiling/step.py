"""Profiles a model that only knows how to run its whole step: blocks one by one, everything else by subtraction.

One real step shows with which arguments the blocks are called and how long each takes in place. One block of every kind
is then run by itself with those arguments. What the step costs beyond its blocks is the rest, as in Galvatron's
``other`` part (arXiv 2211.13878, section 3.3); it counts as the head, since it cannot be cut from the last stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from lightning_hetu.parallel.experts import layers_to_share
from lightning_hetu.parallel.structure import ModelStructure
from lightning_hetu.parallel.tensor_plan import tensor_parallel_degrees, tensor_parallel_plan
from lightning_hetu.planning.profile import LayerProfile, ModelProfile, Precision
from lightning_hetu.profiling._agreement import is_busy, lone_mesh
from lightning_hetu.profiling._case import LayerCase, tensor_bytes
from lightning_hetu.profiling._experts import experts_of
from lightning_hetu.profiling._isolation import AutocastFactory, autocast_factory, untouched
from lightning_hetu.profiling._layers import group_layers
from lightning_hetu.profiling._measure import Stopwatch, measure_layer, measure_memory
from lightning_hetu.profiling._operators import with_operators
from lightning_hetu.profiling._sequence import with_sequence_degrees
from lightning_hetu.profiling.model import Ticker, checked_sizes, optimizer_state_bytes, profile_together
from lightning_hetu.profiling.progress import ProgressCallback


def profile_step(
    module: nn.Module,
    structure: ModelStructure,
    run: Callable[[Any], Tensor],
    batch: Any,
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
    """Measures a model by its own step. The profile is of one stage without microbatches.

    As with :func:`~lightning_hetu.profiling.profile_model` the module is left exactly as it was, and every process
    calls this and gets the same profile.

    Args:
        module: The whole module.
        structure: Where its blocks are.
        run: Forward pass and loss of a batch: ``run(batch)`` gives a scalar. It must not communicate with other
            processes, because not all of them may be running it.
        batch: A local batch, any nesting of tensors. Dimension 0 of the first tensor is the number of samples.
        precision: Lightning's name of the precision; ``bf16-mixed`` implies autocast.
        device: Where module and batch are; by default where the first tensor is.
        autocast: Makes the context that forward runs under, if not the one of ``precision``.
        max_tp: Largest tensor-parallel degree of interest.
        batch_sizes: Samples per timed run of a block, as in ``profile_model``.
        repeats: Timed runs per size, and of the whole step.
        optimizer: The optimizer, its class or the class name, for the size of its states; Adam by default.
        slots: Processes that compute at full speed together, as in ``profile_model``.
        progress: Called with steps done, steps in total, and the step.
        group: The processes; the default group for ``None``.

    Raises:
        ValueError: If the batch has no tensor, the loss is no scalar with a gradient, or a block does not run.
        RuntimeError: If profiling failed in another process.
    """
    tensors = [item for item in tree_flatten(batch)[0] if isinstance(item, Tensor) and item.ndim]
    if not tensors:
        raise ValueError(f"batch is a {type(batch).__name__} without a tensor that has a batch dimension.")
    device = torch.device(device) if device is not None else tensors[0].device
    samples = int(tensors[0].shape[0])
    sizes = checked_sizes(batch_sizes, samples, repeats)
    state_bytes = optimizer_state_bytes(optimizer)

    def work() -> ModelProfile | None:
        if not is_busy(slots, device, group):
            return None
        make_autocast = autocast_factory(precision, device, autocast)
        layers, first = group_layers(module, structure.blocks)
        tick = Ticker(progress, len(first) * (len(sizes) + 1) + 2)
        with untouched(module, device):
            step = _Step(module, structure, run, batch, make_autocast, device)
            tick("whole step")
            calls = step.capture([structure.blocks[index] for index in first])
            times = step.time(repeats)
            tick("whole step, memory")
            whole = measure_memory(step.case(samples), samples, device)[1]
            types = []
            for kind, (index, call) in enumerate(zip(first, calls, strict=True)):
                case = _block_case(module, structure.blocks[index], call, samples, make_autocast, max_tp)
                if len(first) > 1:
                    case = replace(case, name=f"{case.name}-{kind}")
                profile = measure_layer(case, sizes, repeats=repeats, device=device, tick=tick, mesh=mesh)
                in_place = median(times.blocks[block] for block, of in enumerate(layers) if of == kind)
                types.append(_scaled(profile, in_place, samples))
            types = _within(types, layers, times.backward, samples)
            blocks = [types[kind] for kind in layers]
        rest = _rest(module, structure, blocks, times, samples)
        rest = replace(
            rest,
            activation_bytes={1: _left(whole.kept / samples, [block.activation_bytes[1] for block in blocks])},
            forward_transient={1: whole.forward_extra / samples},
            backward_transient={1: whole.backward_extra / samples},
        )
        return ModelProfile(
            layer_types=tuple(types),
            layers=tuple(layers),
            embedding=LayerProfile("none", parameter_bytes=0),
            head=rest,
            precision=precision,
            pipeline=False,
            microbatches=False,
            split_vocab=False,
            optimizer_state_bytes=state_bytes,
            name=type(module).__name__,
        )

    with lone_mesh(device, group) as mesh:
        return profile_together(work, group)


@dataclass(frozen=True)
class _Call:
    """How a block was called."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class _StepTimes:
    """Seconds of a whole step: forward, backward, and forward of every block in place."""

    forward: float
    backward: float
    blocks: list[float]


class _Step:
    """The whole step, to be run under observation."""

    def __init__(
        self,
        module: nn.Module,
        structure: ModelStructure,
        run: Callable[[Any], Tensor],
        batch: Any,
        autocast: AutocastFactory,
        device: torch.device,
    ) -> None:
        self.module = module
        self.structure = structure
        self.run = run
        self.batch = batch
        self.autocast = autocast
        self.device = device

    def loss(self) -> Tensor:
        with self.autocast():
            loss = self.run(self.batch)
        if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
            shown = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"run(batch) returned {shown}: expected a scalar tensor that has a gradient.")
        return loss

    def case(self, samples: int) -> LayerCase:
        """The step as one layer. The batch is there before and after, so it counts for nothing."""
        return LayerCase(
            name=type(self.module).__name__,
            module=self.module,
            call=lambda _: self.loss(),
            arguments=(),
            batch=samples,
        )

    def capture(self, names: Sequence[str]) -> list[_Call]:
        """The arguments of the blocks ``names`` in a real step."""
        calls: dict[str, _Call] = {}

        def copied(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.detach().clone().requires_grad_(value.requires_grad)

        def keep(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if name not in calls:
                    calls[name] = _Call(tree_map(copied, args), tree_map(copied, kwargs))

            return hook

        handles = [
            self.module.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True) for name in names
        ]
        try:
            self.loss()
        finally:
            for handle in handles:
                handle.remove()
        missing = [name for name in names if name not in calls]
        if missing:
            raise ValueError(f"block {missing[0]!r} did not run in the step: name the container of the blocks that do.")
        return [calls[name] for name in names]

    def time(self, repeats: int) -> _StepTimes:
        """Median times of ``repeats`` steps, after one that is not counted."""
        watch = Stopwatch(self.device)
        forwards, backwards, blocks = [], [], []
        for _ in range(repeats + 1):
            with self._block_timers() as timers:
                watch.start()
                loss = self.loss()
                forwards.append(watch.stop())
            blocks.append([timer.seconds() for timer in timers])
            watch.start()
            loss.backward()
            backwards.append(watch.stop())
            del loss
            for parameter in self.module.parameters():
                parameter.grad = None
        return _StepTimes(
            forward=median(forwards[1:]),
            backward=median(backwards[1:]),
            blocks=[median(times) for times in zip(*blocks[1:], strict=True)],
        )

    @contextmanager
    def _block_timers(self) -> Iterator[list[_BlockTimer]]:
        timers = [_BlockTimer(self.device) for _ in self.structure.blocks]
        handles = []
        for name, timer in zip(self.structure.blocks, timers, strict=True):
            block = self.module.get_submodule(name)
            handles.append(block.register_forward_pre_hook(timer.enter))
            handles.append(block.register_forward_hook(timer.leave))
        try:
            yield timers
        finally:
            for handle in handles:
                handle.remove()


class _BlockTimer:
    """Adds up the forward seconds of one block within a step, without waiting for the device in between."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._watches: list[Stopwatch] = []

    def enter(self, *_: Any) -> None:
        self._watches.append(Stopwatch(self._device))
        self._watches[-1].start(wait=False)

    def leave(self, *_: Any) -> None:
        self._watches[-1].mark()

    def seconds(self) -> float:
        return sum(watch.read() for watch in self._watches)


def _block_case(
    module: nn.Module, name: str, call: _Call, samples: int, autocast: AutocastFactory, max_tp: int
) -> LayerCase:
    block = module.get_submodule(name)
    tensors = [item for item in tree_flatten((call.args, call.kwargs))[0] if isinstance(item, Tensor) and item.ndim]
    # The first tensor is what the block transforms; masks and position tables come behind it.
    rows = int(tensors[0].shape[0]) if tensors else samples
    case = LayerCase(
        name=type(block).__name__,
        module=block,
        call=lambda arguments: block(*arguments[0], **arguments[1]),
        arguments=(call.args, call.kwargs),
        batch=samples,
        rows=rows,
        input_requires_grad=None,
        plan=tensor_parallel_plan(module, name),
        tp_degrees=(1,) if any(layers_to_share(block)) else tensor_parallel_degrees(module, name, max_tp),
        boundary_bytes=tensor_bytes(tensors[:1], rows) * rows / samples,
        experts=experts_of(list(layers_to_share(block)), samples),
        autocast=autocast,
    )
    return with_operators(with_sequence_degrees(case, module, name, (call.args, call.kwargs), max_tp))


def _scaled(profile: LayerProfile, in_place: float, samples: int) -> LayerProfile:
    """The profile with the forward times of a block alone brought to what it takes within the step."""
    alone = profile.forward_seconds(samples)
    factor = in_place / alone if alone > 0 else 1.0
    return replace(profile, forward_time=tuple((size, seconds * factor) for size, seconds in profile.forward_time))


def _within(types: Sequence[LayerProfile], layers: Sequence[int], backward: float, samples: int) -> list[LayerProfile]:
    """The profiles with backward times that add up to no more than the backward of the whole step."""
    total = sum(types[kind].forward_seconds(samples) * types[kind].backward_ratio for kind in layers)
    factor = min(1.0, backward / total) if total > 0 else 1.0
    return [replace(profile, backward_ratio=profile.backward_ratio * factor) for profile in types]


def _rest(
    module: nn.Module, structure: ModelStructure, blocks: Sequence[LayerProfile], times: _StepTimes, samples: int
) -> LayerProfile:
    """Times and parameters of everything outside the blocks."""
    blocks_of_model = [module.get_submodule(name) for name in structure.blocks]
    inside = {id(p) for block in blocks_of_model for p in block.parameters()}
    within = {id(layer) for block in blocks_of_model for layer in layers_to_share(block)}
    experts = [layer for layer in layers_to_share(module) if id(layer) not in within]
    stacked = {id(p) for layer in experts for p in layer.stacked_parameters()}
    outside = [p for p in module.parameters() if id(p) not in inside | stacked]
    total = sum(p.numel() * p.element_size() for p in outside)
    trained = sum(p.numel() * p.element_size() for p in outside if p.requires_grad)
    seconds = [block.forward_seconds(samples) for block in blocks]
    forward = _left(times.forward, seconds)
    backward = _left(times.backward, [s * block.backward_ratio for s, block in zip(seconds, blocks, strict=True)])
    return LayerProfile(
        name=f"rest of {type(module).__name__}",
        parameter_bytes=total,
        forward_time=((samples, forward),),
        backward_ratio=backward / forward if forward > 0 else 0.0,
        boundary_bytes=blocks[-1].boundary_bytes,
        trainable_fraction=trained / total if total else 1.0,
        experts=experts_of(experts, samples),
    )


def _left(whole: float, parts: Sequence[float]) -> float:
    # Measured one by one, the parts can come out as more than the whole.
    return max(whole - sum(parts), 0.0)
