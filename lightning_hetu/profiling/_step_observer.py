"""Watches one forward and backward of a model where FSDP2 would act: what happens, and the bytes alive meanwhile."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_hetu.parallel.osdp.discover import ROOT, Unit
from lightning_hetu.planning.osdp.timeline import MomentKind
from lightning_hetu.planning.presets import DevicePreset
from lightning_hetu.profiling._roofline import FusedKernels, Roofline
from lightning_hetu.profiling._tracker import StorageTracker


@dataclass
class Trace:
    """What one run showed."""

    samples: int
    batch: int
    moments: list[tuple[MomentKind, str, int, float, float]]
    seconds: Mapping[str, tuple[float, float]]
    kept: Mapping[str, float]
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]


class _Entered(torch.autograd.Function):
    """Tells when the gradients of all inputs of a unit are there, as FSDP2's own function at the same place."""

    @staticmethod
    def forward(ctx: Any, note: Callable[[], None], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.note = note
        return inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.note()
        return (None, *gradients)


class _OwnedStorages(StorageTracker):
    """A tracker that also notes at which unit a storage was made."""

    def __init__(self, ignored: Iterable[Tensor], owner: Callable[[], str]) -> None:
        super().__init__(ignored)
        self.owners: list[str] = []
        self._owner = owner

    def _add(self, nbytes: int, split: bool, *, only_parallel: bool = False) -> int:
        self.owners.append(self._owner())
        return super()._add(nbytes, split, only_parallel=only_parallel)


class _OwnedSeconds(Roofline):
    """A roofline that counts for each unit, forward and backward apart."""

    def __init__(self, device: DevicePreset, owner: Callable[[], str]) -> None:
        super().__init__(device)
        self.forward: Counter[str] = Counter()
        self.backward: Counter[str] = Counter()
        self._owner = owner

    def add(self, num_bytes: float, operations: float = 0.0, rate: float = 1.0) -> None:
        """See :class:`Roofline`."""
        before = self.seconds
        super().add(num_bytes, operations, rate)
        counter = self.backward if _in_backward() else self.forward
        counter[self._owner()] += self.seconds - before  # type: ignore[assignment]


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


class Observer:
    """One forward and backward of a module.

    Args:
        module: The module that runs.
        units: Its units.
        preset: The device that prices operations.
    """

    def __init__(self, module: nn.Module, units: Sequence[Unit], preset: DevicePreset | None) -> None:
        self.module = module
        self.units = units
        self.tracker = _OwnedStorages(chain(module.parameters(), module.buffers()), self.owner)
        self.roofline = None if preset is None else _OwnedSeconds(preset, self.owner)
        self.marks: list[tuple[int, MomentKind, str, int]] = []
        self.gradients: dict[int, tuple[str, int]] = {}
        self.before: set[str] = set()  # units in whose backward we are
        self.inputs: dict[str, int] = {}
        self.outputs: dict[str, int] = {}
        self._stack: list[str] = []
        # Nodes with a sequence number from the first one on, up to that of the next entry, were made at the unit.
        # What no unit runs counts for the one before it, unless the whole model is a unit.
        self._whole = any(unit.name == ROOT for unit in units)
        self._numbers = [0]
        self._names = [ROOT if self._whole or not units else units[0].name]

    def owner(self) -> str:
        """The unit that is running."""
        node = torch._C._current_autograd_node()  # type: ignore[attr-defined]
        if self._stack:
            return self._stack[-1]
        if node is None:
            return self._names[-1]
        return self._names[max(bisect_right(self._numbers, node._sequence_nr()) - 1, 0)]

    def observe(self, run: Callable[[nn.Module, Any], Tensor], batch: Any, samples: int) -> Trace:
        """Runs the step.

        Raises:
            ValueError: If the loss is no scalar with a gradient.
        """
        size = sum(item.numel() * item.element_size() for item in tree_leaves(batch) if isinstance(item, Tensor))
        with ExitStack() as stack:
            for unit in self.units:
                self._watch_parameters(unit, stack)
                if unit.name != ROOT:
                    self._watch(unit.name, self.module.get_submodule(unit.name), stack)
            with self._modes():
                self._mark("enter", ROOT)
                loss = run(self.module, batch)
                _check_loss(loss)
                self._mark("leave", ROOT)
                loss.register_hook(lambda _: self._first_gradient(ROOT))
            batch = None
            with self._modes():
                loss.backward()  # type: ignore[no-untyped-call]
            self._mark("end", ROOT)
        found = self._trace(samples, size)
        for parameter in self.module.parameters():
            parameter.grad = None
        return found

    @contextmanager
    def _modes(self) -> Iterator[None]:
        fused: AbstractContextManager[object] = nullcontext()
        priced: AbstractContextManager[object] = nullcontext()
        if self.roofline is not None:
            fused, priced = FusedKernels(self.roofline), self.roofline
        with fused, priced, self.tracker:
            yield

    def _mark(self, kind: MomentKind, unit: str, parameter: int = -1) -> None:
        self.marks.append((self.tracker.now, kind, unit, parameter))

    def _watch(self, name: str, module: nn.Module, stack: ExitStack) -> None:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> Any:
            self._change(name, entering=True)
            self._mark("enter", name)
            if name in self.before:  # recomputed in its own backward
                return args, kwargs
            self.inputs[name] = _gradient_bytes((args, kwargs))
            return self._watch_inputs(name, args, kwargs)

        def leave(_: nn.Module, args: Any, output: Any) -> None:
            self._mark("leave", name)
            if name in self.before or not torch.is_grad_enabled():
                return
            self.outputs[name] = _gradient_bytes(output)
            for tensor in _gradient_tensors(output):
                tensor.register_hook(lambda _: self._first_gradient(name))

        def left(*_: Any) -> None:
            self._change(name, entering=False)

        stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True).remove)
        stack.callback(module.register_forward_hook(leave).remove)
        stack.callback(module.register_forward_hook(left, always_call=True).remove)

    def _change(self, name: str, *, entering: bool) -> None:
        if entering:
            self._stack.append(name)
        else:
            while self._stack and self._stack.pop() != name:  # an exception may have passed inner ones
                pass
        self._numbers.append(torch._C._autograd._get_sequence_nr())  # type: ignore[attr-defined]
        self._names.append(self._stack[-1] if self._stack else ROOT if self._whole else name)

    def _watch_inputs(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        tensors = _gradient_tensors((args, kwargs))
        if not tensors or not torch.is_grad_enabled():
            return args, kwargs

        def note() -> None:
            self.before.discard(name)
            self._mark("input_gradient", name)

        replaced = iter(_Entered.apply(note, *tensors))

        def swap(value: Any) -> Any:
            return next(replaced) if isinstance(value, Tensor) and value.requires_grad else value

        changed: tuple[Any, Any] = tree_map(swap, (args, kwargs))
        return changed

    def _first_gradient(self, name: str) -> None:
        if name not in self.before:
            self.before.add(name)
            self._mark("output_gradient", name)

    def _watch_parameters(self, unit: Unit, stack: ExitStack) -> None:
        for index, parameter in enumerate(shardable(self.module, unit)):
            if parameter.requires_grad:
                hook = self._accumulated(unit.name, index)
                stack.callback(parameter.register_post_accumulate_grad_hook(hook).remove)

    def _accumulated(self, name: str, index: int) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            storage = None if parameter.grad is None else self.tracker.identity(parameter.grad)
            if storage is None or storage in self.gradients:
                self._mark("gradient", name, index)
            else:
                self.gradients[storage] = (name, index)
            self._mark("accumulated", name, index)

        return hook

    def _trace(self, samples: int, batch: int) -> Trace:
        tracker = self.tracker
        births = {index: at for at, (index, sign) in enumerate(tracker.events) if sign > 0}
        # A mark stands before the event at its place in the record; a birth is that event.
        born: list[tuple[int, MomentKind, str, int]] = [
            (births[storage] + 1, "gradient", name, index) for storage, (name, index) in self.gradients.items()
        ]
        marks = sorted([*born, *self.marks], key=lambda mark: mark[0])
        curve = tracker.curve(1, set(self.gradients), tracker.now)
        moments, last = [], 0
        for position, kind, name, index in marks:
            moments.append((kind, name, index, curve[position], max(curve[last : position + 1])))
            last = position
        seconds: dict[str, tuple[float, float]] = {}
        if self.roofline is not None:
            seconds = {u.name: (self.roofline.forward[u.name], self.roofline.backward[u.name]) for u in self.units}
        return Trace(samples, batch, moments, seconds, self._kept(curve), self.inputs, self.outputs)

    def _kept(self, curve: Sequence[float]) -> dict[str, float]:
        """Bytes that each unit has made and that are alive when forward ends.

        What more there is at the peak counts for the unit that runs then.
        """
        end = next(position for position, kind, name, _ in self.marks if kind == "leave" and name == ROOT)
        alive: dict[str, float] = defaultdict(float)
        for index, sign in self.tracker.events[:end]:
            if index not in self.gradients:
                alive[self.tracker.owners[index]] += sign * self.tracker.nbytes[index]
        peak = max(range(len(curve)), key=curve.__getitem__)
        events = self.tracker.events
        if events:
            alive[self.tracker.owners[events[max(peak - 1, 0)][0]]] += max(curve[peak] - curve[end], 0.0)
        return alive


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
        shown = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"run(module, batch) returned {shown}: expected a scalar tensor that has a gradient.")


def _gradient_tensors(value: Any) -> list[Tensor]:
    """Tensors with a gradient in a nesting, also in one that is an object of its own class."""
    leaves = tree_leaves(value)
    inside = [
        item
        for leaf in leaves
        if hasattr(leaf, "__dataclass_fields__") and not isinstance(leaf, type)
        for item in tree_leaves(vars(leaf))
    ]
    return [item for item in (*leaves, *inside) if isinstance(item, Tensor) and item.requires_grad]


def _gradient_bytes(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _gradient_tensors(value))


def shardable(module: nn.Module, unit: Unit) -> list[nn.Parameter]:
    """The parameters of a unit that FSDP2 takes."""
    parameters = [module.get_parameter(name) for name in unit.parameters]
    return [parameter for parameter in parameters if parameter.ndim and parameter.numel()]
