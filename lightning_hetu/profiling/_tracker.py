"""Follows every tensor storage of a layer's forward and backward: when it lives, and whether TP would split it.

One run in one process tells the memory of the layer at every tensor-parallel degree. What depends on a split weight is
itself split, until a row-wise layer's sum or a gather makes it whole again (Megatron-LM, arXiv 1909.08053, section 3).
It runs real tensors and fake ones alike, since only sizes matter.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lightning_hetu.profiling._case import LayerCase


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one layer for one microbatch, at one tensor-parallel degree.

    Args:
        kept: What stays alive from this layer's forward to its backward: everything but parameters, buffers and their
            gradients. The layer's own input counts if the layer holds on to it, its output only if this layer (not the
            next) does, so that a sum over layers counts every tensor between two of them once.
        forward_extra: Most bytes alive during forward, input and output included, beyond ``kept``.
        backward_extra: Most bytes alive during backward, gradients of input and output included, beyond ``kept``.
        backward_gradients: Gradients of parameters alive at that moment.
    """

    kept: float
    forward_extra: float
    backward_extra: float
    backward_gradients: float = 0.0


class StorageTracker(TorchDispatchMode):
    """Records birth and death of every storage made inside the mode.

    Args:
        ignored: Tensors that are not counted: parameters and buffers.
        split: Those of them that tensor parallelism splits.
    """

    def __init__(self, ignored: Iterable[Tensor] = (), split: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.nbytes: list[int] = []
        self.split: list[bool] = []
        self.only_parallel: list[bool] = []
        self.events: list[tuple[int, int]] = []
        self._ignored = {key for key in map(_storage_key, ignored) if key is not None}
        self._split_keys = {key for key in map(_storage_key, split) if key is not None}
        self._living: dict[int, int] = {}
        self._watches: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        inputs = {_storage_key(value) for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)}
        split = not self._split_keys.isdisjoint(inputs)
        for value in tree_flatten(outputs)[0]:
            if isinstance(value, Tensor):
                self._register(value, split, inputs)
        return outputs

    @property
    def now(self) -> int:
        """Position in the record."""
        return len(self.events)

    def make_whole(self, tensor: Tensor, *, gathered: bool = False) -> None:
        """Notes that ``tensor`` is the same on every tensor-parallel rank from here on.

        The collective that makes it so holds further tensors for a moment: a sum copies its operand, a gather along
        another dimension than the first has the rank's own part and a buffer next to its result.

        Args:
            tensor: Result of the collective, which the single process here does not need.
            gathered: Whether it is gathered; otherwise it is summed.
        """
        self._mark(tensor, False)
        size = tensor.numel() * tensor.element_size()
        held = [self._add(size, split, only_parallel=True) for split in ((False, True) if gathered else (False,))]
        self.events += [(index, -1) for index in held]

    def identity(self, tensor: Tensor) -> int | None:
        """Number under which the storage of ``tensor`` is recorded, if it is."""
        key = _storage_key(tensor)
        return None if key is None else self._living.get(key)

    def curve(self, tp: int, exclude: set[int], end: int) -> list[float]:
        """Live bytes at the start and after each of the first ``end`` events, without the storages in ``exclude``."""

        def size(index: int) -> float:
            if index in exclude or (self.only_parallel[index] and tp == 1):
                return 0.0
            return self.nbytes[index] / tp if self.split[index] else float(self.nbytes[index])

        steps = (sign * size(index) for index, sign in self.events[:end])
        return list(accumulate(steps, initial=0.0))

    def _register(self, tensor: Tensor, split: bool, inputs: set[int | None]) -> None:
        key = _storage_key(tensor)
        if key is None or key in self._ignored:
            return
        if key in self._living:
            if split:
                self._mark(tensor, True)
            return
        if key in inputs:  # a view of something that was there before the record began
            return
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            return
        index = self._add(storage.nbytes(), split)
        self._living[key] = index
        if split:
            self._split_keys.add(key)
        self._watches[index] = weakref.ref(storage, self._forget(key, index))

    def _add(self, nbytes: int, split: bool, *, only_parallel: bool = False) -> int:
        index = len(self.nbytes)
        self.nbytes.append(nbytes)
        self.split.append(split)
        self.only_parallel.append(only_parallel)
        self.events.append((index, 1))
        return index

    def _mark(self, tensor: Tensor, split: bool) -> None:
        key = _storage_key(tensor)
        if key is None or key not in self._living:
            return
        self.split[self._living[key]] = split
        (self._split_keys.add if split else self._split_keys.discard)(key)

    def _forget(self, key: int, index: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            self.events.append((index, -1))
            self._living.pop(key, None)
            self._split_keys.discard(key)
            self._watches.pop(index, None)

        return forget


def trace_memory(case: LayerCase, samples: int) -> dict[int, LayerMemory]:
    """Memory of one microbatch of ``samples``, for every tensor-parallel degree of the layer."""
    tracker = StorageTracker([*case.module.parameters(), *case.module.buffers()], split_parameters(case).values())
    case.clear_gradients()
    with _parallel_regions(case.module, case.plan, tracker), tracker:
        loss = case.forward(samples)
        middle = tracker.now
        if loss is not None:
            loss.backward()
        # The loss and what it holds are part of backward.
        gradients = {tracker.identity(p.grad) for p in case.module.parameters() if p.grad is not None}
        end = tracker.now
    exclude = {index for index in gradients if index is not None}
    others = set(range(len(tracker.nbytes))) - exclude
    del loss
    case.clear_gradients()
    memory = {}
    for tp in case.tp_degrees:
        live = tracker.curve(tp, exclude, end)
        kept = live[middle]
        fullest = max(range(middle, len(live)), key=live.__getitem__)
        there = tracker.curve(tp, others, end)[fullest]
        memory[tp] = LayerMemory(kept, max(live[: middle + 1]) - kept, live[fullest] - kept, there)
    return memory


def split_parameters(case: LayerCase) -> dict[str, nn.Parameter]:
    """The parameters that the layer's tensor-parallel plan splits; a row-wise bias is whole on every rank."""
    found = {}
    for name, style in case.plan.items():
        for key, parameter in case.module.get_submodule(name).named_parameters(recurse=False):
            if style != "rowwise" or key != "bias":
                found[f"{name}.{key}"] = parameter
    return found


@contextmanager
def _parallel_regions(module: nn.Module, plan: Mapping[str, str], tracker: StorageTracker) -> Iterator[None]:
    """Tells the tracker where the layers of the plan would sum or gather over the tensor-parallel ranks."""
    handles: list[Any] = []

    def sum_gradient(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], Tensor) or not args[0].requires_grad:
            return None
        entry = args[0].view_as(args[0])
        entry.register_hook(lambda gradient: tracker.make_whole(gradient))
        return (entry, *args[1:])

    def finish(gathered: bool) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            for value in tree_flatten(output)[0]:
                if isinstance(value, Tensor):
                    tracker.make_whole(value, gathered=gathered)

        return hook

    for name, style in plan.items():
        part = module.get_submodule(name)
        if style in ("colwise", "colwise_gather"):
            handles.append(part.register_forward_pre_hook(sum_gradient))
        if style != "colwise":
            handles.append(part.register_forward_hook(finish(style == "colwise_gather")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _storage_key(tensor: Tensor) -> int | None:
    """Address of the tensor's storage, equal for all its views; ``None`` for layouts without one."""
    if tensor.layout != torch.strided:
        return None
    return int(tensor.untyped_storage()._cdata)
